"""Train the causal student: `python -m deployments.world_model.train_student --teacher DIR --out DIR --minutes 15`.

The student starts as the teacher's weights and learns to work one latent frame at a time (`causal.py`). Training goes
in rounds of freshly drawn episodes. In the first, every latent frame follows the simulator's; after that most episodes
go on from the student's own latents, and what should follow is simulated from the positions its decoded frame shows, as
in `refine.py`. All frames of an episode are learnt in one forward.

Only the denoiser is trained; the tokenizer is the teacher's. Written to DIR: the checkpoint, its card, and
`metrics.json` with the teacher's figures on the same held-out episodes beside the student's.

Shapes: E episodes, T latent frames of an episode, C latent channels, H and W the latent grid, A action features.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from deployments.world_model import pusher
from deployments.world_model.actions import encode_actions
from deployments.world_model.causal import SIGMAS, CausalWorldModel, predict_all
from deployments.world_model.checkpoint import write_checkpoint, write_whole
from deployments.world_model.dit import DiT
from deployments.world_model.evaluate import HELD_OUT_SEED, NUM_ACTIONS, accuracy, held_out_episodes, predict
from deployments.world_model.refine import shown_positions
from deployments.world_model.rollout import WorldModel, from_uint8
from deployments.world_model.train import Budget, Phase, run_phase

PEAK_LR = 6e-4
BATCH = 8  # episodes
ROUND_STEPS, ROUND_EPISODES, ROLLOUT_BATCH = 120, 256, 64
OWN_SHARE = 0.6  # of episodes, after the first round, that go on from the student's own latents
SECOND_SHARE = 0.5  # of episodes that get a second pass, from a noised guess or the noised truth
EVALUATION_EPISODES = 64


@dataclass(frozen=True)
class Pool:
    """What stands before each latent frame, and what should follow: the same where the simulator led."""

    before_ECTHW: Tensor
    target_ECTHW: Tensor
    actions_ETA: Tensor


@torch.no_grad()
def roll_out(student: CausalWorldModel, random: np.random.Generator, episodes: int, own_share: float) -> Pool:
    config, group = student.config, student.config.temporal_compression
    state = pusher.reset(episodes, random)
    own_E1 = random.random((episodes, 1)) < own_share
    own_E111 = torch.from_numpy(own_E1)[..., None, None]
    moves = pusher.random_actions(state, NUM_ACTIONS, random)
    actions = np.zeros((episodes, NUM_ACTIONS, config.action_dim), np.float32)
    actions[..., config.embodiment.columns] = moves
    frame = pusher.render(state)
    session = student.begin(list(frame), random.integers(0, 2**62, episodes).tolist(), num_steps=2)
    before, targets = [session.latents_BCHW], [session.latents_BCHW]
    for first in range(0, NUM_ACTIONS, group):
        now = list(actions[:, first : first + group])
        states = pusher.simulate(state, moves[:, first : first + group])[1:]
        video = np.stack([frame, *(pusher.render(each) for each in states)], axis=1)
        target = student.tokenizer.encode(from_uint8(video, student.device, torch.float32))[:, :, 1]
        state = states[-1]
        latents = target
        if own_share > 0:
            latents = torch.where(own_E111, session.imagine(now), target)
            video = student.decoded(latents)
            shown = shown_positions(video[:, -1], state)
            agent, puck = np.where(own_E1, shown.agent, state.agent), np.where(own_E1, shown.puck, state.puck)
            state = pusher.PusherState(agent.astype(np.float32), puck.astype(np.float32), state.goal)
            session.write(latents, now)
        before.append(latents)
        targets.append(target)
    encoded = np.stack([encode_actions(config, each) for each in actions])
    first_too = np.concatenate((np.zeros_like(encoded[:, :1]), encoded), axis=1)
    return Pool(
        torch.stack([x.float() for x in before], dim=2),
        torch.stack([x.float() for x in targets], dim=2),
        torch.from_numpy(first_too),
    )


def student_loss(student: CausalWorldModel, dit: DiT, pool: Pool, random: torch.Generator, batch: int) -> Tensor:
    """Squared error of the guess from pure noise, and of a second pass at one of the lower noise levels."""
    config = student.config
    rows = torch.randint(len(pool.before_ECTHW), (batch,), generator=random)
    before, target, actions = pool.before_ECTHW[rows], pool.target_ECTHW[rows], pool.actions_ETA[rows]
    noise = torch.randn(target.shape, generator=random)
    level = torch.randint(1, len(SIGMAS), (batch, target.shape[2]), generator=random)
    guessed = torch.rand(batch, generator=random) < 0.5
    context = dit.context(torch.zeros(config.dit.text_tokens, config.dit.text_dim))
    first = predict_all(config, dit, context, before, noise, torch.full(level.shape, SIGMAS[0]), actions).float()
    first_error = ((first - target)[:, :, 1:] ** 2).mean()
    count = max(1, round(batch * SECOND_SHARE))
    sigma = torch.tensor(SIGMAS)[level][:count]
    column = sigma[:, None, :, None, None]
    origin = torch.where(guessed[:count, None, None, None, None], first[:count].detach(), target[:count])
    x = (1 - column) * origin + column * noise[:count]
    second = predict_all(config, dit, context, before[:count], x, sigma, actions[:count]).float()
    return first_error + SECOND_SHARE * ((second - target[:count])[:, :, 1:] ** 2).mean()


def train_student(teacher: WorldModel, out: Path, budget: Budget, seed: int, bf16: bool) -> None:
    student = CausalWorldModel(teacher)
    dit = DiT(teacher.config.dit, teacher.config.grouped_action_dim)
    dit.load_state_dict(teacher.dit.state_dict())
    phase = Phase.of("student", dit, PEAK_LR)
    assert isinstance(phase.averaged, DiT)
    student.dit = phase.averaged
    pools: dict[int, Pool] = {}

    def loss_at(step: int) -> Tensor:
        index = step // ROUND_STEPS
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            if index not in pools:
                pools.clear()
                draw = np.random.default_rng([seed, 5, index])
                share = OWN_SHARE if index else 0.0
                parts = [roll_out(student, draw, ROLLOUT_BATCH, share) for _ in range(ROUND_EPISODES // ROLLOUT_BATCH)]
                pools[index] = Pool(
                    torch.cat([part.before_ECTHW for part in parts]),
                    torch.cat([part.target_ECTHW for part in parts]),
                    torch.cat([part.actions_ETA for part in parts]),
                )
            random = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, 6, step]).generate_state(1)[0]))
            return student_loss(student, dit, pools[index], random, BATCH)

    run_phase(phase, budget, loss_at, lambda: None)
    modules = {"net": phase.averaged, "tokenizer": teacher.tokenizer}
    tensors = {
        f"{part}.{name}": t.half()
        for part, module in modules.items()
        for name, t in module.state_dict().items()  # type: ignore[attr-defined]
    }
    write_checkpoint(out, teacher.config, tensors)
    asked = f"--steps {budget.steps}" if budget.steps is not None else f"--minutes {(budget.seconds or 0) / 60:g}"
    describe(teacher, out, Training(f"{asked} --seed {seed}{' --bf16' * bf16}", phase.step, phase.seconds / 60))


@dataclass(frozen=True)
class Training:
    options: str
    steps: int
    minutes: float


def describe(teacher: WorldModel, out: Path, training: Training) -> None:
    """Measure the student that was written, beside its teacher, and write what was found."""
    found = figures(teacher, CausalWorldModel.load(out))
    metrics = {"seed": HELD_OUT_SEED, "episodes": EVALUATION_EPISODES, "training": asdict(training), **found}
    write_whole(out / "metrics.json", (json.dumps(metrics, indent=2) + "\n").encode())
    write_whole(out / "MODEL_CARD.md", model_card(teacher.config.name, training, found).encode())
    print(json.dumps(metrics))


def model_card(name: str, training: Training, found: dict[str, dict[str, float]]) -> str:
    """Markdown."""
    header = " | ".join(each.replace("_", " ") for each in found)
    rows = "\n".join(
        f"| `{figure}` | {' | '.join(f'{each[figure]:g}' for each in found.values())} |" for figure in found["teacher"]
    )
    return f"""# {name}, causal student

The same tensors as `{name}`, trained to generate one latent frame (4 frames of video) at a time from a cache of the
keys and values of the three before it, in 1 to {len(SIGMAS)} denoising passes. For streaming: each call of
`causal.Session.advance` takes 4 actions and gives 4 frames, at a cost that does not grow with the stream. Input,
output and limits are the teacher's.

## Training
Started from the teacher's weights; all data is drawn by the simulator in `pusher.py` from the seed.

| what | value |
|---|---|
| command | `python -m deployments.world_model.train_student --teacher {name} {training.options}` |
| steps | {training.steps:,} of {BATCH} episodes of {NUM_ACTIONS} actions in {training.minutes:.1f} min |

## Held-out figures
Over {EVALUATION_EPISODES} episodes of {NUM_ACTIONS + 1} frames that were never trained on (simulator seed
{HELD_OUT_SEED}); the figures are those of the teacher's card.

| figure | {header} |
|---|{"---|" * len(found)}
{rows}
"""


def figures(teacher: WorldModel, student: CausalWorldModel) -> dict[str, dict[str, float]]:
    """Both on the same held-out episodes; the student with each number of denoising steps that it may take."""
    episodes = held_out_episodes(teacher, EVALUATION_EPISODES)
    frames, actions = list(episodes.frames[:, 0]), list(episodes.actions)
    found = {"teacher": accuracy(predict(teacher, episodes, episodes.actions), episodes).to_json()}
    for num_steps in (1, 2, len(SIGMAS)):
        rolled = student.rollouts(frames, actions, range(len(frames)), num_steps)
        found[f"student_{num_steps}_steps"] = accuracy(np.stack(rolled), episodes).to_json()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the causal student of a toy world model.")
    parser.add_argument("--teacher", type=Path, required=True, help="directory of the teacher's checkpoint")
    parser.add_argument("--out", type=Path, required=True, help="directory for the student's checkpoint")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, default=15.0)
    length.add_argument("--steps", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16: faster on a CPU with AMX")
    parser.add_argument("--describe", action="store_true", help="train nothing: measure what --out holds once more")
    arguments = parser.parse_args()
    teacher = WorldModel.load(arguments.teacher)
    if arguments.describe:
        training = Training(**json.loads((arguments.out / "metrics.json").read_text())["training"])
        return describe(teacher, arguments.out, training)
    budget = Budget(arguments.steps, None if arguments.steps is not None else arguments.minutes * 60)
    arguments.out.mkdir(parents=True, exist_ok=True)
    tqdm.monitor_interval = 0
    return train_student(teacher, arguments.out, budget, arguments.seed, arguments.bf16)


if __name__ == "__main__":
    main()
