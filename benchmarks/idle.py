"""What an idle cluster costs: CPU and memory of each of its processes while nobody asks for anything.

    python -m benchmarks.idle [--seconds 60]

Starts the cluster of `make serve`, lets it settle, and counts the CPU time of every process. One JSON line; exit code 1
unless Serve's controller, the ingress, the scheduler and the ledger together take less than 5% of one core.
Proportional memory counts a page that n processes share as 1/n.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.support.cluster import Cluster, running_cluster

SETTLE_S = 20.0
GOAL_CORES = 0.05
COUNTED = ("ServeController", "ServeReplica:dream-engine:ingress", "SchedulerActor", "LedgerActor")
KNOWN = (
    *COUNTED,
    "ServeReplica:dream-engine:model",
    "ProxyActor",
    "StatusActor",
    "SessionDirectory",
    "gcs_server",
    "raylet",
    "dashboard/agent.py",
    "runtime_env/agent",
    "dashboard.py",
    "log_monitor.py",
    "monitor.py",
    "ray::IDLE",
    "dream-admin",
)
"""By what their command lines contain; the first that fits."""


@dataclass(frozen=True, slots=True)
class Usage:
    cpu_s: float
    resident_bytes: int
    proportional_bytes: int


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    seconds = parser.parse_args().seconds
    with tempfile.TemporaryDirectory(prefix="idle-") as directory, running_cluster(Path(directory) / "data") as cluster:
        time.sleep(SETTLE_S)
        report = measure(cluster, seconds)
    print(json.dumps(report))
    return 0 if report["held"] else 1


def measure(cluster: Cluster, seconds: float) -> dict[str, Any]:
    root = psutil.Process(cluster.process.pid)
    processes = {process.pid: process for process in [root, *root.children(recursive=True)]}
    before, started = {pid: usage(process) for pid, process in processes.items()}, time.monotonic()
    time.sleep(seconds)
    elapsed_s = time.monotonic() - started
    rows: dict[str, dict[str, float]] = {}
    for pid, process in processes.items():
        if not process.is_running():
            continue
        now = usage(process)
        row = rows.setdefault(
            name_of(process), {"processes": 0, "cores": 0.0, "resident_mb": 0.0, "proportional_mb": 0.0}
        )
        row["processes"] += 1
        row["cores"] += (now.cpu_s - before[pid].cpu_s) / elapsed_s
        row["resident_mb"] += now.resident_bytes / 2**20
        row["proportional_mb"] += now.proportional_bytes / 2**20
    counted = sum(rows[name]["cores"] for name in COUNTED)
    return {
        "seconds": round(elapsed_s, 1),
        "controller_ingress_scheduler_ledger_cores": round(counted, 4),
        "all_cores": round(sum(row["cores"] for row in rows.values()), 4),
        "all_proportional_mb": round(sum(row["proportional_mb"] for row in rows.values())),
        "by_process": {
            name: {key: round(value, 4 if key == "cores" else 1) for key, value in row.items()}
            for name, row in sorted(rows.items(), key=lambda item: -item[1]["cores"])
        },
        "held": counted < GOAL_CORES,
    }


def usage(process: psutil.Process) -> Usage:
    cpu, memory = process.cpu_times(), process.memory_full_info()
    return Usage(cpu.user + cpu.system, memory.rss, memory.pss)


def name_of(process: psutil.Process) -> str:
    command = " ".join(process.cmdline())
    return next((name for name in KNOWN if re.search(re.escape(name), command)), process.name())


if __name__ == "__main__":
    sys.exit(main())
