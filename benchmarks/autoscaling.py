"""The scaling policy in a real Serve controller: a load step up and down, and no request lost on the way.

    python -m benchmarks.autoscaling [--seconds 40]

A real cluster with a stand-in model (a step of b rows sleeps 30 + 10 b ms) begins with one replica of at most three.
Then single rollouts arrive at Poisson times, at more than two replicas' worth of work, for `--seconds`, and then none.
Prints one JSON line: replicas over time, when the last one was added and the last one gone, and how many requests
failed. Exit code 1 unless all three served, two went again, and every request was answered.
"""

import argparse
import asyncio
import io
import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.sleep_model import STEP_MS_VARIABLE
from serve_app.launch import check_port, development_token, local_ray, register_development_key
from serve_app.settings import ModelArgs, ScalingArgs, Settings

STEP_MS = (30.0, 10.0)
NUM_STEPS, ACTIONS, MAX_ROWS = 20, 12, 4
MAX_REPLICAS = 3
LOAD = 2.4
"""In replicas' worth of full batches."""
SCALING = ScalingArgs(boot_s=5, drain_s=10, window_s=5, calm_s=10)
PATIENCE_S = 120.0


def request_parts(seed: int, num_actions: int = ACTIONS, num_steps: int = NUM_STEPS) -> dict[str, Any]:
    frame, actions = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), 128, np.uint8)).save(frame, "PNG")
    np.save(actions, np.zeros((num_actions, 8), np.float32))
    files = {"frame": frame.getvalue(), "actions": actions.getvalue()}
    return {"files": files, "data": {"seed": str(seed), "num_steps": str(num_steps)}}


async def watch(
    http: httpx.AsyncClient, series: list[tuple[float, int]], started: float, loaded: asyncio.Event
) -> None:
    """Twice a second, until the load is over and one replica is left."""
    while loaded.is_set() or series[-1][1] > 1:
        model = (await http.get("/v1/status")).json()["models"]["tiny-pusher"]
        series.append((round(time.monotonic() - started, 1), model["replicas"]))
        await asyncio.sleep(0.5)


async def step(url: str, key: str, seconds: float) -> dict[str, Any]:
    chance, series, started = random.Random(0), [], time.monotonic()  # type: ignore[var-annotated]
    full_batch_s = NUM_STEPS * (STEP_MS[0] + STEP_MS[1] * MAX_ROWS) / 1e3
    per_s = LOAD * MAX_ROWS / full_batch_s
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(
        base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=PATIENCE_S, limits=limits
    ) as http:
        loaded = asyncio.Event()
        loaded.set()
        watching = asyncio.create_task(watch(http, series, started, loaded))
        sent: list[asyncio.Task[httpx.Response]] = []
        at = started
        while (at := at + chance.expovariate(per_s)) < started + seconds:
            await asyncio.sleep(max(0.0, at - time.monotonic()))
            sent.append(asyncio.create_task(http.post("/v1/predict", **request_parts(len(sent)))))
        answers = await asyncio.gather(*sent)
        quiet_at = time.monotonic() - started
        loaded.clear()
        await asyncio.wait([watching], timeout=PATIENCE_S)
        watching.cancel()
    return {
        "requests": len(answers),
        "answered": sum(answer.is_success for answer in answers),
        "statuses": sorted({answer.status_code for answer in answers}),
        "most_replicas": max(replicas for _, replicas in series),
        "all_serve_after_s": next((at for at, replicas in series if replicas == MAX_REPLICAS), None),
        "quiet_after_s": round(quiet_at, 1),
        "one_is_left_after_s": next((at for at, replicas in series if at > quiet_at and replicas == 1), None),
        "replicas": [
            series[index] for index in range(len(series)) if not index or series[index][1] != series[index - 1][1]
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0, help="of load")
    parser.add_argument("--port", type=int, default=8125)
    args = parser.parse_args()
    os.environ[STEP_MS_VARIABLE] = ",".join(map(str, STEP_MS))
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        settings = Settings(data_dir=Path(directory), port=args.port)
        model = ModelArgs(
            slug="tiny-pusher",
            runner="benchmarks.sleep_model:SleepModel",
            num_cpus=0.5,
            max_rows=MAX_ROWS,
            max_replicas=MAX_REPLICAS,
            scaling=SCALING,
        )
        cluster = settings.cluster_args().model_copy(update={"models": (model,)})
        check_port(settings.host, settings.port)
        with local_ray(settings.data_dir, num_cpus=4):  # sets what Ray reads when it is imported
            from ray import serve

            from serve_app.build import build

            serve.start(http_options={"host": settings.host, "port": settings.port})
            serve.run(build(cluster), name="scaling", route_prefix="/")
            key = development_token(settings)
            register_development_key(settings, key)
            url = f"http://{settings.host}:{settings.port}"
            result = asyncio.run(step(url, key, args.seconds))
    held = result["answered"] == result["requests"] and result["all_serve_after_s"] and result["one_is_left_after_s"]
    print(json.dumps({"benchmark": "autoscaling", **result, "held": bool(held), "cores": os.cpu_count()}))
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
