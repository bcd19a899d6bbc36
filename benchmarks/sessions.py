"""How long a person who steers waits: from the last byte of a chunk's actions to its first and its last frame.

    python -m benchmarks.sessions [--rounds 4] [--submissions 20] [--model noop]

The physics. A chunk's frames exist all at once, so the first frame waits for the whole chunk: actions through the proxy
to the ingress, one grant of the scheduler, one chunk on the replica, PNGs of its 12 frames, and the way back, a message
per frame. The baseline in the same run is the same chunk as a plain `/v1/predict` on a kept-alive connection, which
besides carries a form and a PNG up, is reserved and settled by itself, and comes as one mp4. Rounds of both alternate.

Prints one JSON line: p50 and p99 in milliseconds of the first and of the last frame of each submission, for one session
and for four at a time, those of predict, and the ratio of the medians.
"""

import argparse
import asyncio
import json
import os
import platform
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from websockets.asyncio.client import connect

from benchmarks.control_plane import NUM_ACTIONS, request_parts
from serve_app.launch import check_port, development_token, local_ray, register_development_key
from serve_app.settings import ModelArgs, Settings

SESSIONS = (1, 4)
ACTIONS = np.zeros((NUM_ACTIONS, 8), np.float32).tolist()


async def steer(base: str, headers: dict[str, str], submissions: int) -> list[tuple[float, float]]:
    """One session: seconds to the first and to the last frame of each submission but the first, which warms it up."""
    parts = request_parts(0)
    async with httpx.AsyncClient(base_url=base, headers=headers, timeout=60) as http:
        envelope = await http.post(
            "/v1/sessions",
            files={"initial_frame": parts["files"]["frame"]},
            data={"model": "tiny-pusher", "num_steps": "1", "max_frames": str(1 + NUM_ACTIONS * (submissions + 1))},
        )
        envelope.raise_for_status()
    times = []
    async with connect(envelope.json()["ws_url"], additional_headers=headers, max_size=2**20) as socket:
        started_message = json.loads(await socket.recv())
        assert started_message["type"] == "session_started", started_message
        for _ in range(submissions + 1):
            await socket.send(json.dumps({"type": "submit_actions", "actions": ACTIONS}))
            sent, arrived = time.perf_counter(), []
            while (message := json.loads(await socket.recv()))["type"] != "rollout_complete":
                assert message["type"] in ("frame", "billing"), message
                if message["type"] == "frame":
                    arrived.append(time.perf_counter() - sent)
            times.append((arrived[0], arrived[-1]))
        await socket.send(json.dumps({"type": "control", "command": "stop"}))
    return times[1:]


async def predict(base: str, headers: dict[str, str], requests: int, first_seed: int) -> list[float]:
    times = []
    async with httpx.AsyncClient(base_url=base, headers=headers, timeout=60) as http:
        for seed in range(first_seed, first_seed + requests):
            parts = request_parts(seed)
            started = time.perf_counter()
            answer = await http.post("/v1/predict", **parts)
            times.append(time.perf_counter() - started)
            answer.raise_for_status()
    return times


async def alternate(base: str, key: str, rounds: int, submissions: int) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}"}
    streamed: dict[int, list[tuple[float, float]]] = {count: [] for count in SESSIONS}
    predicted: list[float] = []
    for round_index in range(-1, rounds):  # the first round warms both up
        for count in SESSIONS:
            results = await asyncio.gather(*(steer(base, headers, submissions) for _ in range(count)))
            if round_index >= 0:
                streamed[count] += [each for result in results for each in result]
        times = await predict(base, headers, submissions, (round_index + 1) * submissions)
        if round_index >= 0:
            predicted += times
    return {
        "predict": percentiles(predicted),
        **{
            f"sessions_{count}": {
                "first_frame": percentiles([first for first, _ in times]),
                "last_frame": percentiles([last for _, last in times]),
            }
            for count, times in streamed.items()
        },
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(seconds, (50, 99)) * 1e3
    return {"p50_ms": round(float(p50), 3), "p99_ms": round(float(p99), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--submissions", type=int, default=20, help="per session and round")
    parser.add_argument("--model", choices=("noop", "tiny-pusher"), default="noop")
    parser.add_argument("--port", type=int, default=8124)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        settings = Settings(data_dir=Path(directory), port=arguments.port)
        args = settings.cluster_args()
        runner = {"runner": "benchmarks.noop_model:NoOpModel"} if arguments.model == "noop" else {}
        args = args.model_copy(update={"models": (ModelArgs(slug="tiny-pusher", checkpoint="", **runner),)})
        check_port(settings.host, settings.port)
        with local_ray(settings.data_dir, num_cpus=4):  # sets what Ray reads when imported, so its users come after
            import ray
            from ray import serve

            from serve_app.build import build

            serve.start(http_options={"host": settings.host, "port": settings.port})
            serve.run(build(args), name="paid", route_prefix="/")
            key = development_token(settings)
            register_development_key(settings, key)
            base = f"http://{settings.host}:{settings.port}"
            result = asyncio.run(alternate(base, key, arguments.rounds, arguments.submissions))
            ray_version = ray.__version__
    predicted = result["predict"]["p50_ms"]
    print(
        json.dumps(
            {
                "benchmark": "sessions",
                "model": arguments.model,
                **result,
                "p50_ratio_to_predict": {
                    f"sessions_{count}": round(result[f"sessions_{count}"]["first_frame"]["p50_ms"] / predicted, 2)
                    for count in SESSIONS
                },
                "proxy": "default",
                "actions": NUM_ACTIONS,
                "rounds": arguments.rounds,
                "submissions": arguments.submissions,
                "ray": ray_version,
                "python": platform.python_version(),
                "cores": os.cpu_count(),
            }
        )
    )


if __name__ == "__main__":
    main()
