"""The engine with a real model, and how soon a client who has gone leaves it: `python -m benchmarks.engine`.

    efficiency  tiny-pusher's chunks per second through scheduler and engine, 16 callers that each wait for a row, over
                `generate` of 8 rows at a time in the same process without either; rounds alternate. The served rows
                join and leave between steps; the direct ones run in lockstep, which is the best that a batch can be.
    cancel      from a caller's cancellation to the end of the last forward that holds its row, with steps of 50 ms;
                how long that forward took, and whether it began later, tell a stall of the machine from one of ours

One JSON line each.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.batching_systems import ROW, Served, StandIn, StandInRow
from deployments.batching import BatchProfile
from deployments.messages import ChunkRow
from deployments.profiling import measure
from deployments.world_model import WorldModel
from serve_app.catalog import PACKAGED_CHECKPOINTS

BATCH = 8
CALLERS = 2 * BATCH
STEP_S = 0.05


def pusher_row(candidate: int, num_steps: int) -> ChunkRow:
    generator = np.random.default_rng(candidate)
    actions = generator.uniform(-1, 1, (12, 8)).astype(np.float32)
    frame = generator.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    return ChunkRow(frame, actions, 0, candidate, 0, num_steps, 0.0, form="none")


async def efficiency(rounds: int, seconds: float) -> dict[str, Any]:
    model = WorldModel.load(PACKAGED_CHECKPOINTS["tiny-pusher"])
    num_steps = model.config.default_num_steps
    profile = measure(model, pusher_row(0, 1), BATCH)
    rows = [pusher_row(candidate, num_steps) for candidate in range(BATCH)]

    def direct() -> float:
        done, began = 0, time.perf_counter()
        while (took_s := time.perf_counter() - began) < seconds:
            model.generate(rows)  # type: ignore[arg-type]
            done += BATCH
        return done / took_s

    async def served() -> float:
        system = Served(model, profile, BATCH)
        await system.start()
        until, done = time.perf_counter() + seconds, 0

        async def caller(index: int) -> None:
            nonlocal done
            while time.perf_counter() < until:
                await system.run([rows[index % BATCH]])
                done += 1

        began = time.perf_counter()
        await asyncio.gather(*map(caller, range(CALLERS)))
        took_s = time.perf_counter() - began
        await system.stop()
        return done / took_s

    await asyncio.to_thread(direct)
    pairs = [(await asyncio.to_thread(direct), await served()) for _ in range(rounds)]
    ratios = [there / here for here, there in pairs]
    return {
        "direct_rows_per_s": round(statistics.median(here for here, _ in pairs), 2),
        "served_rows_per_s": round(statistics.median(there for _, there in pairs), 2),
        "served_over_direct": round(statistics.median(ratios), 3),
        "range": [round(min(ratios), 3), round(max(ratios), 3)],
        "step_ms": {"base": round(1e3 * profile.base_s, 2), "row": round(1e3 * profile.row_s, 2)},
        "worthwhile_batch": profile.cap(64),
    }


class Recorded(StandIn):
    """Remembers from when until when the last forward of each candidate was."""

    def __init__(self, profile: BatchProfile) -> None:
        super().__init__(profile)
        self.last: dict[int, tuple[float, float]] = {}

    def step(self, rows: Sequence[StandInRow]) -> None:
        began = time.perf_counter()
        super().step(rows)
        ended = time.perf_counter()
        self.last |= {row.chunk_input.candidate: (began, ended) for row in rows}


async def cancel(times: int) -> dict[str, Any]:
    profile = BatchProfile(STEP_S, 1e-9)
    model = Recorded(profile)
    system = Served(model, profile, BATCH)
    await system.start()
    stays = asyncio.create_task(system.run([replace(ROW, candidate=10**6, num_steps=10**6)]))
    while not model.last:  # noqa: ASYNC110 - the queue's bound is far below its cost, so nothing else may wait beside it
        await asyncio.sleep(STEP_S)
    generator, stayed_s, began_late_s, longest_step_s = random.Random(0), [], [], 0.0
    for candidate in range(times):
        leaves = asyncio.create_task(system.run([replace(ROW, candidate=candidate, num_steps=10**6)]))
        await asyncio.sleep(generator.uniform(0.1, 0.2))
        cancelled = time.perf_counter()
        leaves.cancel()
        await asyncio.sleep(4 * STEP_S)
        began, ended = model.last[candidate]
        stayed_s.append(ended - cancelled)
        began_late_s.append(began - cancelled)
        longest_step_s = max(longest_step_s, ended - began)
    stays.cancel()
    await asyncio.sleep(2 * STEP_S)
    status = await system.scheduler.status()
    await system.stop()
    return {
        "step_ms": 1e3 * STEP_S,
        "stayed_ms": {"p50": round(1e3 * statistics.median(stayed_s), 1), "max": round(1e3 * max(stayed_s), 1)},
        "longest_last_step_ms": round(1e3 * longest_step_s, 1),
        "in_a_step_begun_after": sum(late_s > 0 for late_s in began_late_s),
        "begun_after_ms_max": round(1e3 * max(0.0, *began_late_s), 1),
        "rows_left": status.running_rows + status.queued_rows,
        "times": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=6.0)
    parser.add_argument("--cancels", type=int, default=50)
    arguments = parser.parse_args()
    for name, scenario in (
        ("efficiency", efficiency(arguments.rounds, arguments.seconds)),
        ("cancel", cancel(arguments.cancels)),
    ):
        load = os.getloadavg()[0]
        result = asyncio.run(scenario)
        machine = {"python": platform.python_version(), "cores": os.cpu_count(), "load": round(load, 1)}
        print(json.dumps({"benchmark": f"engine.{name}", **result, **machine}), flush=True)


if __name__ == "__main__":
    main()
