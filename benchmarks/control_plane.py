"""What it costs to sell a rollout: a full paid request with a no-op model beside a bare two-deployment Serve app.

    python -m benchmarks.control_plane [--rounds 5] [--requests 100] [--proxy haproxy]

The physics. A bare app with one handle call crosses two processes behind the proxy (client -> proxy -> ingress ->
deployment). A paid request adds, in the order of DESIGN: a key looked up in the database, a form, a PNG and an array
parsed and checked, one durable commit to reserve, one scheduler call per chunk, H.264 of the chunk's frames, one mp4,
and one durable commit to settle. Both applications run in the same Ray cluster behind the same proxy, receive the same
body, and answer with a body of the same size; their rounds alternate, so that a noisy neighbour hits both.

The clients are on the same cores, at the same cost for both, which brings the ratios of latency and throughput nearer
to one. So the CPU that the cluster's processes used for a request is counted too: that ratio is of the server alone,
and what else the machine does hardly changes it.

Then what a decision costs: the CPU that the control plane's processes (proxies, ingress, ledger, scheduler, status; not
the model's) use for batches of 8 candidates, and for as many single requests, in turns, per candidate.

Prints one JSON line: medians over rounds of requests/s, p50 and p99 in milliseconds and the cluster's CPU milliseconds
per request, at 1 and at 16 connections, the same for both, and the ratios paid/bare.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image

from serve_app.launch import check_port, development_token, local_ray, register_development_key
from serve_app.settings import ModelArgs, Settings

CONNECTIONS = (1, 16)
NUM_ACTIONS = 12
CANDIDATES = 8
CONTROL_PLANE = ("ProxyActor", "ingress", "LedgerActor", "SchedulerActor", "StatusActor", "SessionDirectory")


def haproxy_environment(directory: Path) -> dict[str, str]:
    """What the production manifests set, and files and ports that no other cluster on this machine has."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(2)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        metrics_port, stats_port = (str(each.getsockname()[1]) for each in sockets)
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH": str(2**28),
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(sys.executable).with_name("dream-haproxy")),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": metrics_port,
        "RAY_SERVE_HAPROXY_STATS_PORT": stats_port,
    }


def request_parts(seed: int) -> dict[str, Any]:
    """A distinct request each time: an identical one would be answered from the first run's result."""
    frame, actions = io.BytesIO(), io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), 128, np.uint8)).save(frame, "PNG")
    np.save(actions, np.zeros((NUM_ACTIONS, 8), np.float32))
    return {
        "files": {"frame": frame.getvalue(), "actions": actions.getvalue()},
        "data": {"seed": str(seed), "num_steps": "1"},
    }


async def measure(url: str, key: str, connections: int, requests: int, first_seed: int) -> dict[str, float]:
    """`requests` over `connections` kept-alive connections, each sending its next request when it has its answer."""
    times: list[float] = []
    waiting = iter([request_parts(seed) for seed in range(first_seed, first_seed + requests)])

    async def one_connection(http: httpx.AsyncClient) -> None:
        for parts in waiting:
            started = time.perf_counter()
            response = await http.post(url, **parts)
            times.append(time.perf_counter() - started)
            response.raise_for_status()

    async with contextlib.AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(httpx.AsyncClient(headers={"Authorization": f"Bearer {key}"}, timeout=60))
            for _ in range(connections)
        ]
        cpu_s, started = used_cpu_s(lambda _: True), time.perf_counter()
        await asyncio.gather(*(one_connection(http) for http in clients))
        took_s = time.perf_counter() - started
        cpu_s = used_cpu_s(lambda _: True) - cpu_s
    p50, p99 = np.percentile(times, (50, 99)) * 1e3
    return {
        "rps": requests / took_s,
        "p50_ms": float(p50),
        "p99_ms": float(p99),
        "cpu_ms": cpu_s / requests * 1e3,
    }


def medians(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: round(statistics.median(each[name] for each in rounds), 3) for name in rounds[0]}


async def alternate(base: str, key: str, rounds: int, requests: int) -> dict[str, Any]:
    urls = {"bare": f"{base}/bare/", "paid": f"{base}/v1/predict"}
    seed = 0
    measured: dict[str, dict[int, list[dict[str, float]]]] = {
        name: {connections: [] for connections in CONNECTIONS} for name in urls
    }
    for round_index in range(-1, rounds):  # the first round warms both up
        for connections in CONNECTIONS:
            for name, url in urls.items():
                result = await measure(url, key, connections, requests, seed)
                seed += requests
                if round_index >= 0:
                    measured[name][connections].append(result)
    return {
        name: {f"c{connections}": medians(results) for connections, results in by_connections.items()}
        for name, by_connections in measured.items()
    }


def used_cpu_s(counts: Callable[[str], bool]) -> float:
    """User and system seconds so far of the cluster's processes, those whose titles count."""
    used = 0.0
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if counts(" ".join(process.cmdline())):
                times = process.cpu_times()
                used += times.user + times.system
    return used


def is_control_plane(title: str) -> bool:
    """Whatever serves, but the model's replicas."""
    if "model-" in title:
        return False
    return "haproxy" in title or (title.startswith("ray::") and any(part in title for part in CONTROL_PLANE))


async def batch_cost(base: str, key: str, rounds: int, decisions: int) -> dict[str, float]:
    """Control-plane CPU per candidate in milliseconds: of batches of 8, and of eight single calls at a time."""
    used: dict[str, list[float]] = {"batch": [], "single": []}
    seed = 10_000_000
    async with httpx.AsyncClient(base_url=base, headers={"Authorization": f"Bearer {key}"}, timeout=60) as http:
        for round_index in range(-1, rounds):
            for name in used:
                before = used_cpu_s(is_control_plane)
                for _ in range(decisions):
                    parts = [request_parts(seed + index) for index in range(CANDIDATES)]
                    seed += CANDIDATES
                    if name == "batch":
                        actions = [("actions", part["files"]["actions"]) for part in parts]
                        files = [("frame", parts[0]["files"]["frame"]), *actions]
                        calls = [http.post("/v1/predict/batch", files=files, data=parts[0]["data"])]
                    else:
                        calls = [http.post("/v1/predict", **part) for part in parts]
                    for answer in await asyncio.gather(*calls):
                        answer.raise_for_status()
                if round_index >= 0:
                    used[name].append((used_cpu_s(is_control_plane) - before) / (decisions * CANDIDATES) * 1e3)
    return {f"{name}_cpu_ms_per_candidate": round(statistics.median(each), 3) for name, each in used.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=100, help="per round, application and number of connections")
    parser.add_argument("--port", type=int, default=8123)
    parser.add_argument("--proxy", choices=("default", "haproxy"), default="default", help="haproxy as in production")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        settings = Settings(data_dir=Path(directory), port=arguments.port)
        args = settings.cluster_args().model_copy(
            update={"models": (ModelArgs(slug="tiny-pusher", checkpoint="", runner="benchmarks.noop_model:NoOpModel"),)}
        )
        check_port(settings.host, settings.port)
        if arguments.proxy == "haproxy":
            os.environ.update(haproxy_environment(Path(directory)))
        with local_ray(settings.data_dir, num_cpus=4):  # sets what Ray reads when imported, so its users come after
            import ray
            from ray import serve

            from benchmarks.bare_app import bare_application
            from serve_app.build import build

            serve.start(http_options={"host": settings.host, "port": settings.port})
            serve.run(build(args), name="paid", route_prefix="/")
            serve.run(bare_application(), name="bare", route_prefix="/bare")
            key = development_token(settings)
            register_development_key(settings, key)
            result = asyncio.run(
                alternate(f"http://{settings.host}:{settings.port}", key, arguments.rounds, arguments.requests)
            )
            batch = asyncio.run(
                batch_cost(
                    f"http://{settings.host}:{settings.port}", key, arguments.rounds, max(1, arguments.requests // 8)
                )
            )
            ray_version = ray.__version__
    paid, bare = result["paid"], result["bare"]
    print(
        json.dumps(
            {
                "benchmark": "control_plane",
                **result,
                "p50_ratio": {c: round(paid[c]["p50_ms"] / bare[c]["p50_ms"], 2) for c in paid},
                "rps_ratio": {c: round(paid[c]["rps"] / bare[c]["rps"], 2) for c in paid},
                "cpu_ratio": {c: round(paid[c]["cpu_ms"] / bare[c]["cpu_ms"], 2) for c in paid},
                **batch,
                "batch_cpu_ratio": round(batch["batch_cpu_ms_per_candidate"] / batch["single_cpu_ms_per_candidate"], 3),
                "proxy": arguments.proxy,
                "actions": NUM_ACTIONS,
                "rounds": arguments.rounds,
                "requests": arguments.requests,
                "ray": ray_version,
                "python": platform.python_version(),
                "cores": os.cpu_count(),
                "load_1m": round(os.getloadavg()[0], 1),
            }
        )
    )


if __name__ == "__main__":
    main()
