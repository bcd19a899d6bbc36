"""The simulator against a real cluster: the same arrivals, the same service times, four replicas.

    python -m benchmarks.fleet_validation [--decisions 200] [--load 0.75]

A real cluster (HTTP, ledger, scheduler, four replicas of a stand-in model that sleeps a + c b per step) gets decisions
of 8 candidates and 2 chunks at Poisson times, open loop: each is sent when it is due, whether or not earlier ones have
been answered, and its latency counts from then. What a request costs outside the model is taken from decisions that
were alone in the cluster. The simulator then gets the same times and these costs.

Prints one JSON line with p50 and p99 of both and their ratios, simulated/real; wanted: p50 within 10%, p99 within 20%.
"""

import argparse
import asyncio
import io
import json
import math
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.fleet_simulator import Arrival, Fleet, Service, Simulator
from benchmarks.sleep_model import STEP_MS_VARIABLE
from deployments.scheduler import SchedulerLimits
from serve_app.launch import check_port, development_token, local_ray, register_development_key
from serve_app.settings import ModelArgs, Settings

ROWS, CHUNKS, CHUNK_SIZE = 8, 2, 12
STEP_MS = (30.0, 10.0)
NUM_STEPS = 10
MAX_ROWS = 16
REPLICAS = 4
ALONE = 8


def request_parts(seed: int) -> dict[str, Any]:
    frame, actions = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), 128, np.uint8)).save(frame, "PNG")
    np.save(actions, np.zeros((CHUNKS * CHUNK_SIZE, 8), np.float32))
    files = [("frame", frame.getvalue()), *[("actions", actions.getvalue())] * ROWS]
    return {"files": files, "data": {"seed": str(seed), "num_steps": str(NUM_STEPS)}}


async def decide(http: httpx.AsyncClient, url: str, seed: int, due: float) -> float:
    parts = request_parts(seed)
    await asyncio.sleep(max(0.0, due - time.monotonic()))
    response = await http.post(url, **parts)
    response.raise_for_status()
    return time.monotonic() - due


async def real(url: str, key: str, times: list[float]) -> tuple[list[float], list[float]]:
    """Latencies of decisions alone in the cluster, then of those that are due at `times`."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(headers={"Authorization": f"Bearer {key}"}, timeout=300, limits=limits) as http:
        alone = [await decide(http, url, seed, time.monotonic()) for seed in range(ALONE)]
        begin = time.monotonic() + 1.0
        together = await asyncio.gather(
            *(decide(http, url, 1000 + index, begin + at) for index, at in enumerate(times))
        )
    return alone[1:], list(together)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decisions", type=int, default=200)
    parser.add_argument("--load", type=float, default=0.75, help="share of what full batches of all replicas do")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--port", type=int, default=8124)
    args = parser.parse_args()
    bare = Service(STEP_MS[0] / 1e3, STEP_MS[1] / 1e3, NUM_STEPS, MAX_ROWS)
    chance = random.Random(args.seed)
    per_s = args.load * REPLICAS / (ROWS * CHUNKS * bare.row_chunk_s)
    times, at = [], 0.0
    for _ in range(args.decisions):
        at += chance.expovariate(per_s)
        times.append(at)

    os.environ[STEP_MS_VARIABLE] = ",".join(map(str, STEP_MS))
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        settings = Settings(data_dir=Path(directory), port=args.port)
        model = ModelArgs(
            slug="tiny-pusher",
            runner="benchmarks.sleep_model:SleepModel",
            min_replicas=REPLICAS,
            max_replicas=REPLICAS,
            max_rows=MAX_ROWS,
        )
        cluster = settings.cluster_args().model_copy(update={"models": (model,)})
        check_port(settings.host, settings.port)
        with local_ray(settings.data_dir, num_cpus=REPLICAS + 2):  # sets what Ray reads when it is imported
            from ray import serve

            from serve_app.build import build

            serve.start(http_options={"host": settings.host, "port": settings.port})
            serve.run(build(cluster), name="validation", route_prefix="/")
            key = development_token(settings)
            register_development_key(settings, key)
            url = f"http://{settings.host}:{settings.port}/v1/predict/batch"
            alone, measured = asyncio.run(real(url, key, times))

    outside_s = statistics.median(alone) - bare.decision_s(ROWS, CHUNKS)
    # Half of it before and after, the rest between chunks: decode, encode, a call of the scheduler and of the replica.
    service = Service(
        bare.step_fixed_s, bare.step_row_s, NUM_STEPS, MAX_ROWS, outside_s / (2 * CHUNKS), 0.0, outside_s / 2
    )
    simulator = Simulator(
        service,
        Fleet((0.0, 0.0), REPLICAS, REPLICAS),
        SchedulerLimits(max_queued_rows=10**6, replica_timeout_s=math.inf),
        policy=None,
    )
    simulated = simulator.run([Arrival(at, ROWS, CHUNKS) for at in times], times[-1]).latencies
    figures = {
        name: {f"p{p}_s": round(float(np.percentile(values, p)), 3) for p in (50, 90, 99)}
        for name, values in (("real", measured), ("simulated", simulated))
    }
    print(
        json.dumps(
            {
                "benchmark": "fleet_validation",
                **figures,
                "ratio": {p: round(figures["simulated"][p] / figures["real"][p], 3) for p in figures["real"]},
                "outside_ms": round(outside_s * 1e3, 1),
                "decisions": args.decisions,
                "load": args.load,
                "replicas": REPLICAS,
                "step_ms": STEP_MS,
                "cores": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main()
