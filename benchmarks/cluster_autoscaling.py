"""Nodes and replicas under a load step: Ray's autoscaler really adds GPU nodes and takes them away; no request is lost.

    python -m benchmarks.cluster_autoscaling [--seconds 60]

The node types are those of `cluster.yaml` in small: a head that runs no work, one node for ingress and control actors,
and GPU nodes, from none to three. Ray's autoscaler (v2) makes them with Ray's fake multi-node provider, which starts a
raylet of its own for each, with one logical GPU. The application runs one replica on one GPU; then single rollouts
arrive at Poisson times, at more than two replicas' worth of work, for `--seconds`, and then none.

Prints one JSON line; exit code 1 unless replicas and GPU nodes went from one to three and back to one, every request
was answered, each was charged once, and the ledger audits clean.
"""

import argparse
import asyncio
import json
import logging
import os
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.autoscaling import ACTIONS, MAX_REPLICAS, MAX_ROWS, STEP_MS, step
from benchmarks.ray_nodes import STORE_BYTES, fake_autoscaling, free_port, ray_nodes
from benchmarks.sleep_model import STEP_MS_VARIABLE
from billing import invariants
from billing.database import open_database
from billing.keys import token_sha256
from billing.reader import LedgerReader
from serve_app.launch import DEV_CREDITS_MILS, development_token, open_migrated, register_development_key
from serve_app.local_ray import prepare_ray_environment
from serve_app.settings import Limits, ModelArgs, ScalingArgs, Settings

HEAD = "ray.head.default"
IDLE_S = 10
NODE_TYPES: dict[str, Any] = {
    HEAD: {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
    "ingress": {
        "resources": {"CPU": 4, "object_store_memory": STORE_BYTES},
        "labels": {"role": "ingress"},
        "node_config": {},
        "min_workers": 1,
        "max_workers": 1,
    },
    "gpu": {
        "resources": {"CPU": 1, "GPU": 1, "object_store_memory": STORE_BYTES},
        "labels": {"role": "model"},
        "node_config": {},
        "min_workers": 0,
        "max_workers": MAX_REPLICAS,
        "idle_timeout_s": IDLE_S,
    },
}
SCALING = ScalingArgs(boot_s=15, drain_s=10, window_s=5, calm_s=10)
MILS_PER_REQUEST = 5 * (ACTIONS + 1)
RELEASE_TIMEOUT_S = 90.0


class NodeWatch:
    """How many GPU nodes are alive, over time."""

    def __init__(self) -> None:
        self.series: list[tuple[float, int]] = []
        self._started = time.monotonic()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._stopping.set()
        self._thread.join()

    def _run(self) -> None:
        import ray

        while not self._stopping.wait(0.5):
            count = sum(node["Alive"] and node["Resources"].get("GPU", 0) > 0 for node in ray.nodes())
            if not self.series or self.series[-1][1] != count:
                self.series.append((round(time.monotonic() - self._started, 1), count))


def run(directory: Path, seconds: float) -> dict[str, Any]:
    settings = Settings(data_dir=directory, port=free_port())
    model = ModelArgs(
        slug="tiny-pusher",
        runner="benchmarks.sleep_model:SleepModel",
        num_cpus=0.5,
        num_gpus=1,
        max_rows=MAX_ROWS,
        max_replicas=MAX_REPLICAS,
        scaling=SCALING,
    )
    cluster = settings.cluster_args().model_copy(
        update={
            "models": (model,),
            "control_labels": {"role": "ingress"},
            "limits": Limits(queue_timeout_s=120, max_queued_rows=2048),
        }
    )
    prepare_ray_environment(settings.data_dir)
    os.environ[STEP_MS_VARIABLE] = ",".join(map(str, STEP_MS))
    os.environ["RAY_SERVE_USE_PACK_SCHEDULING_STRATEGY"] = "1"  # as in `cluster.yaml`
    os.environ["RAY_SERVE_WORKER_PROXY_HTTP_PORT"] = str(free_port())  # the head's has the public one to itself
    with ray_nodes(free_port()) as nodes:
        config = {
            "head_node_type": HEAD,
            "available_node_types": NODE_TYPES,
            "max_workers": MAX_REPLICAS + 1,
            "idle_timeout_minutes": 60,
            "upscaling_speed": 10.0,
        }
        options, env = fake_autoscaling(nodes, config)
        nodes.head("--num-cpus=0", "--include-dashboard=false", *options, env=env)
        import ray
        from ray import serve

        from deployments.actors import NAMESPACE
        from serve_app.build import build

        ray.init(address=nodes.address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        try:
            open_migrated(settings).dispose()
            serve.start(proxy_location="EveryNode", http_options={"host": settings.host, "port": settings.port})
            serve.run(build(cluster), name="dream-engine", route_prefix="/")
            key = development_token(settings)
            register_development_key(settings, key)
            watch = NodeWatch()
            result = asyncio.run(step(f"http://{settings.host}:{settings.port}", key, seconds))
            deadline = time.monotonic() + RELEASE_TIMEOUT_S
            while watch.series[-1][1] > 1 and time.monotonic() < deadline:
                time.sleep(0.5)
            watch.stop()
        finally:
            ray.shutdown()
    database = open_database(settings.ledger_url)
    violations = len(invariants.audit(database))
    reader = LedgerReader(database)
    owner = reader.key_by_token_hash(token_sha256(key))
    assert owner is not None
    spent_mils = DEV_CREDITS_MILS - reader.balance(owner.customer_id)
    database.dispose()
    return {
        **result,
        "gpu_nodes": watch.series,
        "charged_requests": spent_mils / MILS_PER_REQUEST,
        "audit_violations": violations,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0, help="of load")
    args = parser.parse_args()
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="bench-") as directory:
        result = run(Path(directory), args.seconds)
    counts = [count for _, count in result["gpu_nodes"]]
    held = (
        result["answered"] == result["requests"] == result["charged_requests"]
        and not result["audit_violations"]
        and result["one_is_left_after_s"] is not None
        and (counts[0], max(counts), counts[-1]) == (1, MAX_REPLICAS, 1)
        and result["most_replicas"] == MAX_REPLICAS
    )
    report = {"benchmark": "cluster_autoscaling", **result, "wall_s": round(time.monotonic() - started), "held": held}
    print(json.dumps(report | {"cores": os.cpu_count()}))
    sys.exit(0 if held else 1)


if __name__ == "__main__":
    main()
