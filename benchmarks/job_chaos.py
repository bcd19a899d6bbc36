"""Jobs on a real cluster whose processes are killed: all of what was answered 202 is delivered, and charged once.

    python -m benchmarks.job_chaos

Queues jobs, kills every ingress replica with SIGKILL in the middle of them, lets the cluster recover, kills all of its
processes at once, starts it again on the same data directory, and waits. One JSON line; exit code 1 unless it held.
"""

import argparse
import contextlib
import json
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import httpx
import psutil

from billing import invariants
from billing.database import open_database
from tests.support.cluster import SERVE_STAND_IN, Cluster, eventually, running_cluster
from tests.support.models import SLEEP_S
from tests.support.payloads import actions, npy, png

RECOVERY_S = 120.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=20)
    parser.add_argument("--step-s", type=float, default=0.5, help="of 16 steps a job")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="job-chaos-") as directory:
        report = run(Path(directory) / "data", arguments.jobs, arguments.step_s)
    print(json.dumps(report))
    return 0 if report["held"] else 1


def run(data_dir: Path, num_jobs: int, step_s: float) -> dict[str, object]:
    started = time.monotonic()
    with running_cluster(data_dir, SERVE_STAND_IN) as cluster:
        key = cluster.new_customer()
        with http_of(cluster, key) as http:
            ids = [queue(http, step_s, seed) for seed in range(num_jobs)]
            eventually(lambda: "running" in states(http, ids))
            for ingress in cluster.processes("ServeReplica:dream-engine:ingress"):
                ingress.kill()
            eventually(lambda: "running" in states(http, ids) and "unknown" not in states(http, ids), RECOVERY_S)
            before = states(http, ids)
        kill_all(cluster)
    with running_cluster(data_dir, SERVE_STAND_IN) as cluster, http_of(cluster, key) as http:
        with contextlib.suppress(AssertionError):  # the report says what was not delivered
            eventually(lambda: set(states(http, ids)) <= {"succeeded", "failed", "canceled"}, RECOVERY_S)
        after = states(http, ids)
        rows = http.get("/v1/billing/transactions", params={"limit": 200}).json()["transactions"]
    debits = Counter(row["id"] for row in rows if row["kind"] == "debit")
    refunds = sum(row["kind"] == "refund" for row in rows)
    database = open_database(f"sqlite:///{data_dir / 'ledger.db'}")
    violations = len(invariants.audit(database))
    database.dispose()
    return {
        "benchmark": "job_chaos",
        "jobs": num_jobs,
        "states_when_all_was_killed": before,
        "states": after,
        "debits": sum(debits.values()),
        "refunds": refunds,
        "audit_violations": violations,
        "wall_s": round(time.monotonic() - started, 1),
        "held": after == {"succeeded": num_jobs} and set(debits.values()) == {1} and not refunds and not violations,
    }


def queue(http: httpx.Client, step_s: float, seed: int) -> str:
    values = actions()
    values[:, SLEEP_S] = step_s
    params = {"model": "tiny-pusher", "mode": "async", "seed": seed, "num_steps": 4}
    files = {"start_frame": png(), "actions": npy(values)}
    answer = http.post("/v1/rollouts", files=files, data={"params": json.dumps(params)})
    answer.raise_for_status()
    return str(answer.json()["id"])


def states(http: httpx.Client, ids: list[str]) -> dict[str, int]:
    """How many are in which state; "unknown" while no ingress answers."""
    try:
        answer = http.get("/v1/rollouts", params={"limit": 100})
    except httpx.TransportError:
        return {"unknown": len(ids)}
    if answer.status_code != 200:
        return {"unknown": len(ids)}
    return dict(Counter(each["status"] for each in answer.json()["data"] if each["id"] in ids))


def kill_all(cluster: Cluster) -> None:
    """As a power cut would, but for the disk."""
    process = psutil.Process(cluster.process.pid)
    for each in [process, *process.children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    cluster.process.wait(timeout=30)


def http_of(cluster: Cluster, key: str) -> httpx.Client:
    return httpx.Client(base_url=cluster.base_url, headers={"Authorization": f"Bearer {key}"}, timeout=60)


if __name__ == "__main__":
    sys.exit(main())
