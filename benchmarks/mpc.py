"""Model-predictive control through the HTTP API: `python -m benchmarks.mpc`.

The world is the toy's simulator, played closed-loop: an agent should push a puck to a goal within EPISODE_ACTIONS
actions. Success is the puck's centre within the goal's radius when the episode ends; no episode starts so.

A cross-entropy planner (CEM) asks for candidates that differ in their actions, by the public client's `predict_batch`,
reads agent and puck off each candidate's last decoded frame, and executes the best plan's chunk before it looks at the
world again. Beside it: `oracle`, the same planner with the same number of candidates in the true simulator, which is
the ceiling; `random` plans from the planner's prior, unplanned; `noop` rests. The planner knows the goal, as a customer
knows the task; everything else it reads off frames.

Starts a cluster of its own in a temporary directory, or plays against one that runs (`--base-url`, `--key`; a decision
costs `iterations * candidates * 13` frames). Prints one JSON line: per policy the successes, the rate, and the mean of
the final distance, and the two ratios that matter, to random and to the oracle.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import av
import dream
import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from deployments.world_model import pusher
from deployments.world_model.pusher import FloatArray, PusherState

EPISODE_SEED = 9_000_001
EPISODE_ACTIONS = 60
CHUNK = 12  # actions per decision, the model's chunk
HOLD = 3  # actions in a row that are the same: a plan has CHUNK / HOLD knots
ELITES = 6
PRIOR_STD, STD_FLOOR = 0.8, 0.1  # of a velocity, whose range is [-1, 1]
MODEL_ACTION_DIM = 8
CREDITS_USD = "100000"
BEHIND_WEIGHT = 0.3  # of the agent's distance from where it can push: what leads it around the puck
Predict = Callable[[npt.NDArray[np.uint8], FloatArray, int], npt.NDArray[np.uint8]]
"""(start frame, moves (K, T, 2), seed) to the K last frames."""
Cost = Callable[[FloatArray], npt.NDArray[np.float64]]  # moves (K, T, 2) to K costs, lower is better


@dataclass(frozen=True)
class Outcome:
    success: bool
    distance_px: float


def plan(cost: Cost, random: np.random.Generator, candidates: int, iterations: int) -> FloatArray:
    """The cheapest of all candidates tried, (CHUNK, 2): each iteration draws around the best few of the one before."""
    mean = np.zeros((CHUNK // HOLD, 2))
    std = np.full_like(mean, PRIOR_STD)
    best_cost, best = np.inf, np.zeros((CHUNK, 2), np.float32)
    for _ in range(iterations):
        knots = np.clip(mean + std * random.standard_normal((candidates, *mean.shape)), -1, 1)
        moves = np.repeat(knots, HOLD, axis=1).astype(np.float32)
        costs = cost(moves)
        order = np.argsort(costs)
        if costs[order[0]] < best_cost:
            best_cost, best = float(costs[order[0]]), moves[order[0]]
        elites = knots[order[:ELITES]]
        mean, std = elites.mean(0), np.maximum(elites.std(0), STD_FLOOR)
    return best


def task_cost(agent: FloatArray, puck: FloatArray, goal: FloatArray) -> npt.NDArray[np.float64]:
    """Pixels between puck and goal, and some of the way that the agent lacks to where it would push from."""
    to_goal = goal - puck
    distance = np.linalg.norm(to_goal, axis=-1)
    behind = puck - to_goal / np.maximum(distance, 1e-6)[..., None] * pusher.CONTACT
    cost: npt.NDArray[np.float64] = distance + BEHIND_WEIGHT * np.linalg.norm(agent - behind, axis=-1)
    return np.nan_to_num(cost, nan=4.0 * pusher.SIZE)  # a frame that shows no puck or agent is the worst there is


def imagined(predict: Predict, state: PusherState, goal: FloatArray, seed: int) -> Cost:
    """Costs by the world model: it sees the rendered frame, and is read by its frames."""
    frame = pusher.render(state)[0]

    def cost(moves: FloatArray) -> npt.NDArray[np.float64]:
        last = predict(frame, moves, seed)
        return task_cost(pusher.read_agent(last), pusher.read_puck(last), goal)

    return cost


def simulated(state: PusherState, goal: FloatArray) -> Cost:
    """Costs by the true simulator."""

    def cost(moves: FloatArray) -> npt.NDArray[np.float64]:
        repeated = PusherState(*(np.repeat(each, len(moves), axis=0) for each in (state.agent, state.puck, state.goal)))
        last = pusher.simulate(repeated, moves)[-1]
        return task_cost(last.agent, last.puck, goal)

    return cost


def start_of(episode: int) -> PusherState:
    """A start whose puck is not at the goal yet; a function of the episode."""
    random = np.random.default_rng([EPISODE_SEED, episode])
    while True:
        state = pusher.reset(1, random)
        if np.linalg.norm(state.puck - state.goal) > 2 * pusher.GOAL_RADIUS:
            return state


def play(episode: int, choose: Callable[[PusherState, np.random.Generator, int], FloatArray]) -> Outcome:
    """`choose(state, generator, seed)` gives the next CHUNK moves; the seed is the decision's own."""
    random = np.random.default_rng([EPISODE_SEED, episode, 1])
    state = start_of(episode)
    for decision in range(EPISODE_ACTIONS // CHUNK):
        moves = choose(state, random, episode * 1_000 + decision)
        state = pusher.simulate(state, moves[None])[-1]
    distance = float(np.linalg.norm(state.puck - state.goal))
    return Outcome(distance <= pusher.GOAL_RADIUS, distance)


def policies(
    predict: Predict, candidates: int, iterations: int
) -> dict[str, Callable[[PusherState, np.random.Generator, int], FloatArray]]:
    def by_model(state: PusherState, random: np.random.Generator, seed: int) -> FloatArray:
        return plan(imagined(predict, state, state.goal[0], seed), random, candidates, iterations)

    def by_simulator(state: PusherState, random: np.random.Generator, _: int) -> FloatArray:
        return plan(simulated(state, state.goal[0]), random, candidates, iterations)

    def at_random(_: PusherState, random: np.random.Generator, __: int) -> FloatArray:
        return plan(lambda moves: np.zeros(len(moves)), random, 1, 1)

    def rest(*_: object) -> FloatArray:
        return np.zeros((CHUNK, 2), np.float32)

    return {"model": by_model, "oracle": by_simulator, "random": at_random, "noop": rest}


def over_http(client: dream.Client, num_steps: int | None) -> Predict:
    model = client.models.get("tiny-pusher")

    def predict(frame: npt.NDArray[np.uint8], moves: FloatArray, seed: int) -> npt.NDArray[np.uint8]:
        actions = np.zeros((*moves.shape[:2], MODEL_ACTION_DIM), np.float32)
        actions[..., :2] = moves
        batch = model.predict_batch(start_frame=Image.fromarray(frame), actions=actions, num_steps=num_steps, seed=seed)
        return np.stack([last_frame(rollout.mp4_bytes()) for rollout in batch])

    return predict


def last_frame(mp4: bytes) -> npt.NDArray[np.uint8]:
    with av.open(io.BytesIO(mp4), "r") as container:
        *_, last = container.decode(video=0)
        return last.to_ndarray(format="rgb24").astype(np.uint8)


@contextlib.contextmanager
def cluster() -> Iterator[tuple[str, str]]:
    """A cluster in a process group of its own, and a key with enough credits: (base URL, key)."""
    admin = str(Path(sys.executable).with_name("dream-admin"))
    with tempfile.TemporaryDirectory(prefix="bench-") as directory, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        environment = os.environ | {"DATA_DIR": f"{directory}/data", "PORT": str(port), "HOST": "127.0.0.1"}
        with (Path(directory) / "log").open("w") as log:
            process = subprocess.Popen(
                [admin, "serve"], env=environment, stdout=subprocess.PIPE, stderr=log, text=True, start_new_session=True
            )
        assert process.stdout is not None
        try:
            ready = process.stdout.readline().split()
            if ready[:1] != ["ready"]:
                raise SystemExit((Path(directory) / "log").read_text())
            options = ["--customer", "planner", "--initial-credits", CREDITS_USD, "--qps", "1000", "--burst", "1000"]
            minted = subprocess.run(
                [admin, "keys", "create", *options, "--json"],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            yield ready[1], json.loads(minted.stdout)["key"]
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=60)
            process.stdout.close()


def summary(outcomes: list[Outcome]) -> dict[str, float]:
    successes = sum(outcome.success for outcome in outcomes)
    return {
        "successes": successes,
        "success_rate": round(successes / len(outcomes), 4),
        "final_distance_px": round(float(np.mean([outcome.distance_px for outcome in outcomes])), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=50)
    parser.add_argument("--candidates", type=int, default=32)
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--num-steps", type=int, help="denoising steps; the model's default if not given")
    parser.add_argument("--connections", type=int, default=2, help="episodes played at a time")
    parser.add_argument("--base-url", help="of a running cluster; without it one is started")
    parser.add_argument("--key", help="for that cluster, with enough credits")
    arguments = parser.parse_args()
    if bool(arguments.base_url) != bool(arguments.key):
        parser.error("--base-url and --key belong together")
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        base_url, key = (arguments.base_url, arguments.key) if arguments.base_url else stack.enter_context(cluster())
        client = stack.enter_context(dream.Client(api_key=key, base_url=base_url))
        predict = over_http(client, arguments.num_steps)
        pool = stack.enter_context(ThreadPoolExecutor(arguments.connections))
        results = {}
        for name, choose in policies(predict, arguments.candidates, arguments.iterations).items():
            played = pool.map(play, range(arguments.episodes), [choose] * arguments.episodes)
            results[name] = summary(list(tqdm(played, desc=name, total=arguments.episodes, mininterval=2.0)))
    rates = {name: result["success_rate"] for name, result in results.items()}
    print(
        json.dumps(
            {
                "benchmark": "mpc",
                **results,
                "model_to_random": round(rates["model"] / rates["random"], 2) if rates["random"] else None,
                "model_to_oracle": round(rates["model"] / rates["oracle"], 2) if rates["oracle"] else None,
                "episodes": arguments.episodes,
                "actions_per_episode": EPISODE_ACTIONS,
                "candidates": arguments.candidates,
                "iterations": arguments.iterations,
                "horizon": CHUNK,
                "num_steps": arguments.num_steps,
                "wall_s": round(time.monotonic() - started, 1),
                "python": platform.python_version(),
                "cores": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main()
