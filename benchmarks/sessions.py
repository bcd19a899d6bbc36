"""How long a person who steers waits: from the last byte of a chunk's actions to its first and its last frame.

    python -m benchmarks.sessions [--rounds 4] [--submissions 20] [--model noop]
    python -m benchmarks.sessions --student

The physics. A chunk's frames exist all at once, so the first frame waits for the whole chunk: actions through the proxy
to the ingress, one grant of the scheduler, one chunk on the replica, PNGs of its 12 frames, and the way back, a message
per frame. The baseline in the same run is the same chunk as a plain `/v1/predict` on a kept-alive connection, which
besides carries a form and a PNG up, is reserved and settled by itself, and comes as one mp4. Rounds of both alternate.

With `--student` the causal student runs beside its teacher, each as it is served by default, and the baseline is the
teacher's session. The student's first frame waits for the passes of 4 frames; the rest of the chunk follows while those
are on their way. Submissions have a chunk's 12 actions, and the 4 of one latent frame, in turns.

Prints one JSON line: p50 and p99 in milliseconds of the first and of the last frame of each submission, for one session
and for four at a time, those of the baseline, and the ratio of the medians.
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
TEACHER, STUDENT = "tiny-pusher", "tiny-pusher-student"
LENGTHS = (NUM_ACTIONS, 4)
"""Actions of a submission, where the student is compared with its teacher."""

Times = list[tuple[float, float]]


async def steer(
    base: str,
    headers: dict[str, str],
    submissions: int,
    model: str = TEACHER,
    num_steps: int | None = 1,
    length: int = NUM_ACTIONS,
) -> Times:
    """One session: seconds to the first and to the last frame of each submission but the first, which warms it up."""
    parts = request_parts(0)
    async with httpx.AsyncClient(base_url=base, headers=headers, timeout=60) as http:
        envelope = await http.post(
            "/v1/sessions",
            files={"initial_frame": parts["files"]["frame"]},
            data={"model": model, "max_frames": str(1 + length * (submissions + 1))}
            | ({} if num_steps is None else {"num_steps": str(num_steps)}),
        )
        envelope.raise_for_status()
    times, actions = [], np.zeros((length, 8), np.float32).tolist()
    async with connect(envelope.json()["ws_url"], additional_headers=headers, max_size=2**20) as socket:
        started_message = json.loads(await socket.recv())
        assert started_message["type"] == "session_started", started_message
        for _ in range(submissions + 1):
            await socket.send(json.dumps({"type": "submit_actions", "actions": actions}))
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
    streamed: dict[int, Times] = {count: [] for count in SESSIONS}
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
        **{f"sessions_{count}": first_and_last(times) for count, times in streamed.items()},
    }


async def compare(base: str, key: str, rounds: int, submissions: int) -> dict[str, Any]:
    """The student's sessions beside its teacher's."""
    headers = {"Authorization": f"Bearer {key}"}
    cases = [(model, count, length) for count in SESSIONS for length in LENGTHS for model in (TEACHER, STUDENT)]
    streamed: dict[tuple[str, int, int], Times] = {case: [] for case in cases}
    for round_index in range(-1, rounds):  # the first round warms up
        for model, count, length in cases:
            sessions = (steer(base, headers, submissions, model, None, length) for _ in range(count))
            results = await asyncio.gather(*sessions)
            if round_index >= 0:
                streamed[model, count, length] += [each for result in results for each in result]
    answer: dict[str, Any] = {}
    for count in SESSIONS:
        for length in LENGTHS:
            found = {model: first_and_last(streamed[model, count, length]) for model in (TEACHER, STUDENT)}
            ratio = {
                frame: round(found[STUDENT][frame]["p50_ms"] / found[TEACHER][frame]["p50_ms"], 2)
                for frame in ("first_frame", "last_frame")
            }
            answer[f"sessions_{count}_of_{length}_actions"] = {**found, "p50_student_to_teacher": ratio}
    return answer


def first_and_last(times: Times) -> dict[str, dict[str, float]]:
    return {
        "first_frame": percentiles([first for first, _ in times]),
        "last_frame": percentiles([last for _, last in times]),
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    p50, p99 = np.percentile(seconds, (50, 99)) * 1e3
    return {"p50_ms": round(float(p50), 3), "p99_ms": round(float(p99), 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--submissions", type=int, default=20, help="per session and round")
    parser.add_argument("--model", choices=("noop", TEACHER), default="noop")
    parser.add_argument("--student", action="store_true", help="the causal student beside its teacher")
    parser.add_argument("--port", type=int, default=8124)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        settings = Settings(data_dir=Path(directory), port=arguments.port)
        args = settings.cluster_args()
        runner = {"runner": "benchmarks.noop_model:NoOpModel"} if arguments.model == "noop" else {}
        models: tuple[ModelArgs, ...] = (ModelArgs(slug=TEACHER, **runner),)
        if arguments.student:
            models = (ModelArgs(slug=TEACHER, torch_threads=1), ModelArgs(slug=STUDENT, torch_threads=1))
        args = args.model_copy(update={"models": models})
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
            run = compare if arguments.student else alternate
            result = asyncio.run(run(base, key, arguments.rounds, arguments.submissions))
            ray_version = ray.__version__
    ratios = {}
    if not arguments.student:
        predicted = result["predict"]["p50_ms"]
        ratios["p50_ratio_to_predict"] = {
            f"sessions_{count}": round(result[f"sessions_{count}"]["first_frame"]["p50_ms"] / predicted, 2)
            for count in SESSIONS
        }
    print(
        json.dumps(
            {
                "benchmark": "sessions",
                "model": STUDENT if arguments.student else arguments.model,
                **result,
                **ratios,
                "proxy": "default",
                "actions": NUM_ACTIONS,
                "rounds": arguments.rounds,
                "submissions": arguments.submissions,
                "ray": ray_version,
                "python": platform.python_version(),
                "cores": os.cpu_count(),
                "load": os.getloadavg()[0],
            }
        )
    )


if __name__ == "__main__":
    main()
