"""A Ray cluster of several nodes on this machine: each node a `ray start --block` of its own, ended by process ids.

Ray's own test clusters stop what they started with `ray stop`, which ends every Ray on the machine.
"""

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
RAY = str(Path(sys.executable).with_name("ray"))
STORE_BYTES = 128 * 2**20
START_TIMEOUT_S = 60.0
EVERY_NODE = (
    *("--node-ip-address=127.0.0.1", f"--object-store-memory={STORE_BYTES}"),
    *("--node-manager-port=0", "--object-manager-port=0", "--min-worker-port=0", "--max-worker-port=0"),
    *("--dashboard-agent-grpc-port=0", "--runtime-env-agent-port=0", "--metrics-export-port=0"),
)

COMMANDS = ("setup", "head_setup", "worker_setup", "initialization", "head_start_ray", "worker_start_ray")


@dataclass
class Node:
    """One `ray start` and what it started."""

    process: subprocess.Popen[bytes]
    seen: dict[int, psutil.Process] = field(default_factory=dict)

    def processes(self) -> list[psutil.Process]:
        """Those alive now and those that were when last asked: an orphan is not forgotten."""
        with contextlib.suppress(psutil.NoSuchProcess):
            root = psutil.Process(self.process.pid)
            for each in (root, *root.children(recursive=True)):
                self.seen.setdefault(each.pid, each)
        return [each for each in self.seen.values() if each.is_running()]

    def kill(self) -> None:
        """As a power cut: SIGKILL for all of it at once."""
        for each in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        self.process.wait()


class RayNodes:
    """Close it to end every process of every node."""

    def __init__(self, gcs_port: int) -> None:
        self.address = f"127.0.0.1:{gcs_port}"
        self._gcs_port = gcs_port
        self.directory = Path(
            tempfile.mkdtemp(prefix="nodes-")
        )  # short: it holds Unix sockets, whose paths are bounded
        self._nodes: list[Node] = []

    def head(self, *options: str, env: Mapping[str, str] | None = None) -> Node:
        common = (
            f"--port={self._gcs_port}",
            f"--temp-dir={self.directory / 'ray'}",
            f"--ray-client-server-port={free_port()}",
        )
        return self._start([RAY, "start", "--block", *EVERY_NODE, "--head", *common, *options], env or {})

    def worker(self, env: Mapping[str, str] | None = None, **resources: Any) -> Node:
        """Not by `ray start`, which refuses a second node on a loopback address."""
        return self._start(
            [sys.executable, "-m", "benchmarks.ray_nodes", self.address, json.dumps(resources)], env or {}
        )

    def _start(self, command: list[str], env: Mapping[str, str]) -> Node:
        log = self.directory / f"node-{len(self._nodes)}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                env=os.environ | {"PYTHONPATH": str(ROOT)} | dict(env),
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        node = Node(process)
        self._nodes.append(node)
        deadline = time.monotonic() + START_TIMEOUT_S
        while b"Ray runtime started" not in log.read_bytes():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"a Ray node did not start:\n{log.read_text()[-2000:]}")
            time.sleep(0.1)
        return node

    def processes(self) -> list[psutil.Process]:
        return [process for node in self._nodes for process in node.processes()]

    def close(self) -> None:
        for node in self._nodes:
            node.processes()
        for node in reversed(self._nodes):
            node.kill()
        shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def ray_nodes(gcs_port: int) -> Iterator[RayNodes]:
    nodes = RayNodes(gcs_port)
    try:
        yield nodes
    finally:
        nodes.close()


def fake_autoscaling(nodes: RayNodes, config: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, str]]:
    """Options and environment of a head whose autoscaler (v2) makes nodes with Ray's fake multi-node provider."""
    from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID, FakeMultiNodeProvider

    provider = {
        "type": "external",  # by its own name Ray looks for a file of defaults that its wheel does not hold
        "module": f"{FakeMultiNodeProvider.__module__}.{FakeMultiNodeProvider.__name__}",
        "gcs_address": nodes.address,
        "head_node_id": FAKE_HEAD_NODE_ID,
        "launch_multiple": True,
        "disable_node_updaters": True,
        "disable_launch_config_check": True,
    }
    path = nodes.directory / "autoscaling.json"
    unused: dict[str, Any] = {f"{each}_commands": [] for each in COMMANDS}
    unused |= {"auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": []}
    path.write_text(json.dumps({**unused, **config, "cluster_name": "fake", "provider": provider}))
    env = {
        "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": "1",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
    }
    return (f"--autoscaling-config={path}",), env


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def join(address: str, resources: Mapping[str, Any]) -> None:
    """Be a worker node of the cluster at `address`, until this process ends."""
    from ray._private.node import Node as RayNode
    from ray._private.parameter import RayParams

    RayNode(
        RayParams(
            gcs_address=address,
            redis_address=address,
            min_worker_port=0,
            max_worker_port=0,
            dashboard_agent_listen_port=0,
            object_store_memory=STORE_BYTES,
            **resources,
        ),
        head=False,
        shutdown_at_exit=True,
        spawn_reaper=False,
    )
    print("Ray runtime started", flush=True)
    signal.pause()


if __name__ == "__main__":
    join(sys.argv[1], json.loads(sys.argv[2]))
