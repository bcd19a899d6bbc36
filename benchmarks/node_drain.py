"""A node is drained while its replica serves, and then ends, as a spot machine does: `make drain-node`.

A head with the control plane and two workers of one logical GPU each, all on this machine, each with processes of
its own; one replica of the stand-in model. Clients send rollouts, batches, streams and sessions one after the other.
After a while the replica's node is drained: Ray takes no new work to it, Serve starts another replica on the other node
and ends the old one when it has done what it runs. Then the node is killed.

Prints one JSON line. Exit code 1 unless every client got the whole of what it asked for, all of it was charged once,
the audit is clean and the replica did move.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil

from benchmarks.ray_nodes import RAY, Node, RayNodes, free_port, ray_nodes
from benchmarks.sleep_model import STEP_MS_VARIABLE
from benchmarks.soak import MODEL, load
from billing import invariants
from billing.database import open_database
from billing.keys import token_sha256
from billing.reader import LedgerReader
from serve_app.admin import open_migrated
from serve_app.launch import DEV_CREDITS_MILS, development_token, register_development_key
from serve_app.local_ray import prepare_ray_environment
from serve_app.settings import ModelArgs, Settings

STEP_MS = "20,5"
BEFORE_S = 6.0
MOVE_TIMEOUT_S = 45.0
CONTROL = {"role": "ingress"}
MILS = {"200 rollout": 125, "200 batch": 500, "200 stream": 125, "200 session": 245}


def has_replica(node: Node) -> bool:
    found = False
    for process in node.processes():
        with contextlib.suppress(psutil.Error):
            found = found or f"model-{MODEL}" in " ".join(process.cmdline())
    return found


def drain(nodes: RayNodes, name: str) -> None:
    import ray

    (node_id,) = (node["NodeID"] for node in ray.nodes() if node["Labels"].get("name") == name)
    reason = ("--reason=DRAIN_NODE_REASON_PREEMPTION", "--reason-message=spot notice")
    command = [RAY, "drain-node", f"--address={nodes.address}", f"--node-id={node_id}", *reason]
    subprocess.run([*command, "--deadline-remaining-seconds=60"], check=True, capture_output=True)


async def drained_under_load(
    nodes: RayNodes, workers: dict[str, Node], url: str, key: str, seconds: float, clients: int
) -> dict[str, Any]:
    loading = asyncio.create_task(load(url, key, time.monotonic() + seconds, clients, abort=0.0, seed=0))
    await asyncio.sleep(BEFORE_S)
    (old,) = (name for name, node in workers.items() if has_replica(node))
    (new,) = workers.keys() - {old}
    await asyncio.to_thread(drain, nodes, old)
    started, moved_s = time.monotonic(), None
    while time.monotonic() - started < MOVE_TIMEOUT_S:
        if has_replica(workers[new]) and not has_replica(workers[old]):
            moved_s = round(time.monotonic() - started, 1)
            break
        await asyncio.sleep(0.2)
    workers[old].kill()
    ends: Counter[str] = await loading
    return {"ends": dict(ends), "moved_after_s": moved_s}


def run(directory: Path, seconds: float, clients: int) -> dict[str, Any]:
    settings = Settings(data_dir=directory, port=free_port())
    prepare_ray_environment(settings.data_dir)
    model = ModelArgs(slug=MODEL, runner="benchmarks.sleep_model:SleepModel", num_cpus=0.5, num_gpus=1)
    cluster = settings.cluster_args().model_copy(update={"models": (model,), "control_labels": CONTROL})
    with ray_nodes(free_port()) as nodes:
        nodes.head("--num-cpus=1", "--include-dashboard=false", "--labels=role=ingress")
        workers = {name: nodes.worker(num_cpus=1, num_gpus=1, labels={"name": name}) for name in ("one", "other")}
        import ray
        from ray import serve

        from deployments.actors import NAMESPACE
        from serve_app.build import build

        ray.init(address=nodes.address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        try:
            open_migrated(settings).dispose()
            serve.start(proxy_location="HeadOnly", http_options={"host": settings.host, "port": settings.port})
            serve.run(build(cluster), name="drain", route_prefix="/")
            key = development_token(settings)
            register_development_key(settings, key)
            url = f"http://{settings.host}:{settings.port}"
            result = asyncio.run(drained_under_load(nodes, workers, url, key, seconds, clients))
        finally:
            ray.shutdown()
    database = open_database(settings.ledger_url)
    violations = [violation.name for violation in invariants.audit(database)]
    reader = LedgerReader(database)
    owner = reader.key_by_token_hash(token_sha256(key))
    assert owner is not None
    charged_mils = DEV_CREDITS_MILS - reader.balance(owner.customer_id)
    database.dispose()
    owed_mils = sum(count * MILS.get(end, 0) for end, count in result["ends"].items())
    whole = result["ends"].keys() <= MILS.keys() and result["moved_after_s"] is not None
    held = whole and charged_mils == owed_mils and not violations
    return {**result, "owed_mils": owed_mils, "charged_mils": charged_mils, "violations": violations, "held": held}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=40.0, help="of load, of which the drain must leave some")
    parser.add_argument("--clients", type=int, default=4)
    args = parser.parse_args()
    os.environ[STEP_MS_VARIABLE] = STEP_MS
    with tempfile.TemporaryDirectory(prefix="drain-") as directory:
        result = run(Path(directory), args.seconds, args.clients)
    print(json.dumps({"benchmark": "node_drain", **result}))
    sys.exit(0 if result["held"] else 1)


if __name__ == "__main__":
    main()
