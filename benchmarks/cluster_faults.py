"""A cluster of several nodes whose head and GPU node are lost and whose version changes, under load all the while.

    python -m benchmarks.cluster_faults        # make chaos-cluster; needs `apt-get install redis-server`

A head that runs no work and keeps Ray's state in Redis, an ingress node with the control actors, and two nodes of one
logical GPU each with a replica; all on this machine, each with processes of its own. Clients send rollouts of two
chunks to the ingress node, one after the other. Meanwhile:

- `node`: a GPU node is killed at once with everything on it; another joins.
- `head`: the head is killed at once (GCS, Serve's controller, dashboard, its proxy), stays away for `--away` seconds,
  and another starts in its place from Redis.
- `model`: `serve deploy` puts another runner into the model: its replicas and the ingress are replaced.
- `limits`: `serve deploy` changes a limit: the scheduler, the replicas and the ingress are replaced.

Prints one JSON line: per phase requests, failures and the slowest answer. Exit code 1 unless every request of every
phase was answered, each was charged once, the audits are clean, and replicas and ingress really were replaced.
"""

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import yaml

from benchmarks.autoscaling import request_parts
from benchmarks.ray_nodes import Node, RayNodes, free_port, ray_nodes
from benchmarks.sleep_model import STEP_MS_VARIABLE
from billing import invariants
from billing.commands import CreateKey
from billing.database import open_database
from billing.keys import mint_customer_id, mint_key_id, mint_token, token_sha256
from billing.ledger import Ledger
from billing.money import Mils
from billing.reader import LedgerReader
from serve_app.launch import open_migrated
from serve_app.local_ray import prepare_ray_environment
from serve_app.settings import Settings

PHASES = ("node", "head", "model", "limits")
STEP_MS = "10,5"
ACTIONS = 24
MILS_PER_REQUEST = 5 * (ACTIONS + 1)
CREDITS = Mils(10_000_000)
QUIET_S = 5.0
"""Of load before and after each fault."""
TIMEOUT_S = 120.0
REPLICA, INGRESS = "ServeReplica:dream-engine:model-tiny-pusher", "ServeReplica:dream-engine:ingress"


@dataclass
class Answers:
    """What the clients got, and when they had asked."""

    statuses: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)


class Load:
    """Clients that each send one request after another, until they are stopped."""

    def __init__(self, http: httpx.AsyncClient, clients: int) -> None:
        self._http = http
        self._seed = 0
        self._running = True
        self.phase = Answers()
        self._tasks = [asyncio.create_task(self._client()) for _ in range(clients)]

    async def _client(self) -> None:
        while self._running:
            self._seed += 1
            answers, started = self.phase, time.monotonic()
            try:
                response = await self._http.post("/v1/predict", **request_parts(self._seed, ACTIONS, 10))
                status = str(response.status_code)
                if not response.is_success:
                    status = f"{status} {response.text[:200]}"
            except httpx.TransportError as error:
                status = type(error).__name__
            answers.statuses[status] += 1
            answers.seconds.append(time.monotonic() - started)

    async def stop(self) -> None:
        self._running = False
        await asyncio.gather(*self._tasks)


class Cluster:
    def __init__(self, nodes: RayNodes, settings: Settings, redis: str) -> None:
        self._nodes = nodes
        self._settings = settings
        self._redis = redis
        self._dashboard = free_port()
        self._http = free_port()
        self._changes: dict[str, Any] = {}
        self._model: dict[str, Any] = {"runner": "benchmarks.sleep_model:SleepModel"}
        self.ingress_port = free_port()

    def start(self) -> None:
        self.start_head()
        proxy = {"RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(self.ingress_port)}
        self._nodes.worker(proxy, num_cpus=4, labels={"role": "ingress"})
        self.gpu_nodes = [self.start_gpu_node() for _ in range(2)]

    def start_head(self) -> None:
        self.head: Node = self._nodes.head(
            *("--num-cpus=0", "--dashboard-host=127.0.0.1", f"--dashboard-port={self._dashboard}"),
            env={"RAY_REDIS_ADDRESS": self._redis},
        )

    def kill_head(self) -> None:
        self.head.kill()
        # Or the next one takes the workers on this machine for a cluster that runs already.
        (self._nodes.directory / "ray" / "ray_current_cluster").unlink()

    def start_gpu_node(self) -> Node:
        proxy = {"RAY_SERVE_WORKER_PROXY_HTTP_PORT": str(free_port())}
        return self._nodes.worker(proxy, num_cpus=1, num_gpus=1)

    async def deploy(self, model: dict[str, Any] | None = None, **changes: Any) -> None:
        """`serve deploy`, and wait until nothing of the version before is left."""
        self._changes |= changes
        self._model |= model or {}
        before = self.replicas(INGRESS) | (self.replicas(REPLICA) if model or changes else set())
        args = {
            "data_dir": str(self._settings.data_dir),
            "database_url": self._settings.ledger_url,
            "ingress_replicas": 2,
            "control_labels": {"role": "ingress"},
            "models": [
                {"slug": "tiny-pusher", "num_cpus": 0.5, "num_gpus": 1, "min_replicas": 2, "max_replicas": 2}
                | self._model
            ],
        }
        config = {
            "proxy_location": "EveryNode",
            "http_options": {"host": "127.0.0.1", "port": self._http},
            "applications": [
                {
                    "name": "dream-engine",
                    "route_prefix": "/",
                    "import_path": "serve_app.build:build",
                    "args": args | self._changes,
                }
            ],
        }
        path = self._settings.data_dir / "serve.yaml"
        path.write_text(yaml.safe_dump(config))
        serve = str(Path(sys.executable).with_name("serve"))
        deployed = await asyncio.to_thread(
            subprocess.run,
            [serve, "deploy", "--address", f"http://127.0.0.1:{self._dashboard}", str(path)],
            capture_output=True,
            text=True,
            check=False,
        )
        if deployed.returncode:
            raise RuntimeError(f"serve deploy failed:\n{deployed.stderr[-2000:]}")
        await until(lambda: self._is_deployed(before), "the deployment")

    async def is_running(self) -> bool:
        from ray.dashboard.modules.serve.sdk import ServeSubmissionClient

        def status() -> str:
            client = ServeSubmissionClient(f"http://127.0.0.1:{self._dashboard}")
            details = client.get_serve_details()
            return str(details.get("applications", {}).get("dream-engine", {}).get("status"))

        with contextlib.suppress(Exception):
            return await asyncio.to_thread(status) == "RUNNING"
        return False

    async def _is_deployed(self, before: set[int]) -> bool:
        now = self.replicas(INGRESS) | self.replicas(REPLICA)
        whole = len(self.replicas(INGRESS)) == 2 and len(self.replicas(REPLICA)) == 2
        return whole and not before & now and await self.is_running()

    def replicas(self, title: str) -> set[int]:
        found = set()
        for process in self._nodes.processes():
            with contextlib.suppress(Exception):
                if title in " ".join(process.cmdline()):
                    found.add(process.pid)
        return found


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not await condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{what} took more than {TIMEOUT_S:.0f} s")
        await asyncio.sleep(0.3)


async def kill_node(cluster: Cluster) -> None:
    cluster.gpu_nodes.pop(0).kill()
    await asyncio.sleep(QUIET_S)
    cluster.gpu_nodes.append(await asyncio.to_thread(cluster.start_gpu_node))
    await until(lambda: whole(cluster), "the replica on another node")


async def whole(cluster: Cluster) -> bool:
    return len(cluster.replicas(REPLICA)) == 2 and await cluster.is_running()


async def kill_head(cluster: Cluster, away_s: float) -> None:
    cluster.kill_head()
    await asyncio.sleep(away_s)
    await asyncio.to_thread(cluster.start_head)
    await until(cluster.is_running, "Serve on the new head")


async def run(cluster: Cluster, key: str, phases: list[str], clients: int, away_s: float) -> dict[str, Any]:
    faults: dict[str, Callable[[], Awaitable[None]]] = {
        "node": lambda: kill_node(cluster),
        "head": lambda: kill_head(cluster, away_s),
        "model": lambda: cluster.deploy(model={"runner": "tests.support.models:StandInModel"}),
        "limits": lambda: cluster.deploy(limits={"max_queued_rows": 300}),
    }
    await cluster.deploy()
    url = f"http://127.0.0.1:{cluster.ingress_port}"
    headers = {"Authorization": f"Bearer {key}"}
    report: dict[str, Any] = {}
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=TIMEOUT_S) as http:
        await until(lambda: answers(http), "the ingress")
        load = Load(http, clients)
        for name in phases:
            load.phase = phase = Answers()
            await asyncio.sleep(QUIET_S)
            started = time.monotonic()
            await faults[name]()
            took_s = time.monotonic() - started
            await asyncio.sleep(QUIET_S)
            report[name] = (phase, took_s)
            print(f"{name}: {dict(phase.statuses)}", file=sys.stderr, flush=True)
        await load.stop()
        await asyncio.sleep(1.0)
    return {
        name: {
            "requests": phase.statuses.total(),
            "answered": phase.statuses["200"],
            "others": {status: count for status, count in phase.statuses.items() if status != "200"},
            "median_s": round(sorted(phase.seconds)[len(phase.seconds) // 2], 2),
            "slowest_s": round(max(phase.seconds), 2),
            "over_after_s": round(took_s, 1),
        }
        for name, (phase, took_s) in report.items()
    }


async def answers(http: httpx.AsyncClient) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return (await http.get("/healthz")).status_code == 200
    return False


def fund(settings: Settings) -> str:
    """A customer's key, made as `dream-admin keys create` does without a cluster."""
    database, token = open_migrated(settings), mint_token()
    ledger = Ledger(database, time.time)
    ledger.take_over()
    command = CreateKey(
        key_id=mint_key_id(),
        sha256=token_sha256(token),
        last4=token[-4:],
        customer_name="chaos",
        customer_id=mint_customer_id(),
        initial_credits_mils=CREDITS,
        refill_per_s=1000.0,
        burst=1000,
    )
    ledger.apply([command])
    database.dispose()
    return token


@contextlib.contextmanager
def redis_server(directory: Path) -> Iterator[str]:
    server = shutil.which("redis-server")
    if server is None:
        raise SystemExit("redis-server is not installed; on Debian: apt-get install redis-server")
    port = free_port()
    options = ["--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory), "--save", "", "--appendonly", "no"]
    process = subprocess.Popen([server, *options], stdout=subprocess.DEVNULL)
    try:
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--phases", default=",".join(PHASES))
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--away", type=float, default=20.0, help="seconds without a head")
    args = parser.parse_args()
    started = time.monotonic()
    os.environ[STEP_MS_VARIABLE] = STEP_MS
    os.environ.update(RAY_gcs_rpc_server_reconnect_timeout_s="600")  # as in `cluster.yaml`
    with tempfile.TemporaryDirectory(prefix="chaos-") as directory:
        settings = Settings(data_dir=Path(directory))
        prepare_ray_environment(settings.data_dir)
        key = fund(settings)
        with redis_server(settings.data_dir) as redis, ray_nodes(free_port()) as nodes:
            cluster = Cluster(nodes, settings, redis)
            cluster.start()
            phases = asyncio.run(run(cluster, key, args.phases.split(","), args.clients, args.away))
        database = open_database(settings.ledger_url)
        reader = LedgerReader(database)
        owner = reader.key_by_token_hash(token_sha256(key))
        assert owner is not None
        charged = (CREDITS - reader.balance(owner.customer_id)) / MILS_PER_REQUEST
        violations = len(invariants.audit(database))
        database.dispose()
    answered = sum(phase["answered"] for phase in phases.values())
    held = all(phase["answered"] == phase["requests"] for phase in phases.values()) and charged == answered
    report = {
        "benchmark": "cluster_faults",
        "phases": phases,
        "answered": answered,
        "charged": charged,
        "audit_violations": violations,
        "wall_s": round(time.monotonic() - started),
        "held": held and not violations,
        "cores": os.cpu_count(),
    }
    print(json.dumps(report))
    sys.exit(0 if report["held"] else 1)


if __name__ == "__main__":
    main()
