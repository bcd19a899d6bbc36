"""How far the toy's future can be told at all: `python -m benchmarks.predictability [--checkpoint DIR]`.

Played open loop, the toy multiplies errors: an agent that pushes a puck off its centre a little more slips past it. So
a model that is right to a fraction of a pixel after each chunk is still wrong about the end of some episodes. Beside a
checkpoint's own rollouts stand two players that know the dynamics exactly and are only imprecise about positions, once
after each chunk: `noise` by so many pixels of standard deviation per axis, `tokenizer` by what the checkpoint's
tokenizer makes of the frame, in which a rollout hands its state from chunk to chunk too. No dynamics can help a model
beyond the latter.

Episodes are those of the evaluation under another seed. Prints one JSON line: per player the Pearson of predicted and
true final distance between puck and goal, and the puck's mean error at the end in pixels.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from deployments.world_model import WorldModel, pusher
from deployments.world_model.evaluate import NUM_ACTIONS, embed_actions
from deployments.world_model.pusher import FloatArray, PusherState
from deployments.world_model.rollout import rollouts
from serve_app.catalog import PACKAGED_CHECKPOINTS

SEED = 4242
NOISES_PX = (0.05, 0.1, 0.2, 0.5, 1.0)
BATCH = 32
Blur = Callable[[list[PusherState]], PusherState]
"""The states of a chunk's last latent frame, with the one before them, to what is known of the last one."""


def play(state: PusherState, moves: FloatArray, chunk: int, blur: Blur) -> PusherState:
    """The simulator's last state, when what it knows is blurred after each chunk but the last."""
    for first in range(0, moves.shape[1], chunk):
        states = pusher.simulate(state, moves[:, first : first + chunk])
        state = blur(states[-5:]) if first + chunk < moves.shape[1] else states[-1]
    return state


def by_noise(std_px: float) -> Blur:
    random = np.random.default_rng(0)

    def blur(states: list[PusherState]) -> PusherState:
        last = states[-1]
        agent, puck = (at + random.normal(0, std_px, at.shape).astype(np.float32) for at in (last.agent, last.puck))
        return PusherState(agent, puck, last.goal)

    return blur


def by_tokenizer(model: WorldModel) -> Blur:
    def blur(states: list[PusherState]) -> PusherState:
        shown = model.reconstruct(np.stack([pusher.render(state) for state in states], axis=1))[:, -1]
        return PusherState(pusher.read_agent(shown), pusher.read_puck(shown), states[-1].goal)

    return blur


def compared(puck: FloatArray, truth: PusherState) -> dict[str, float]:
    predicted, true = (np.linalg.norm(each - truth.goal, axis=1) for each in (puck, truth.puck))
    error = np.linalg.norm(puck - truth.puck, axis=1)
    return {
        "goal_distance_pearson": round(float(np.corrcoef(predicted, true)[0, 1]), 3),
        "final_puck_error_px": round(float(error.mean()), 2),
    }


def final_puck(model: WorldModel, start: PusherState, moves: FloatArray, num_steps: int) -> FloatArray:
    """Where the model's last frames show it; at the table's centre where they show none."""
    frames, actions = list(pusher.render(start)), list(embed_actions(model, moves))
    last = []
    for first in range(0, len(frames), BATCH):
        rows = range(first, min(first + BATCH, len(frames)))
        own = [frames[row] for row in rows], [actions[row] for row in rows], rows, [0] * len(rows)
        last += [video[-1] for video in rollouts(model, *own, num_steps=num_steps)]
    return np.nan_to_num(pusher.read_puck(np.stack(last)), nan=pusher.SIZE / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=PACKAGED_CHECKPOINTS["tiny-pusher"])
    parser.add_argument("--episodes", type=int, default=192)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--num-steps", type=int, help="denoising steps; the model's default if not given")
    arguments = parser.parse_args()
    model = WorldModel.load(arguments.checkpoint)
    num_steps = arguments.num_steps or model.config.default_num_steps
    random = np.random.default_rng(arguments.seed)
    start = pusher.reset(arguments.episodes, random)
    moves = pusher.random_actions(start, NUM_ACTIONS, random)
    truth, chunk = pusher.simulate(start, moves)[-1], model.config.chunk_size
    noisy = {str(std_px): play(start, moves, chunk, by_noise(std_px)) for std_px in NOISES_PX}
    result = {
        "benchmark": "predictability",
        "model": compared(final_puck(model, start, moves, num_steps), truth),
        "tokenizer": compared(play(start, moves, chunk, by_tokenizer(model)).puck, truth),
        "noise": {std_px: compared(last.puck, truth) for std_px, last in noisy.items()},
        "episodes": arguments.episodes,
        "seed": arguments.seed,
        "num_steps": num_steps,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
