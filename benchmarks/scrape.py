"""A real Prometheus scrapes a real cluster: what it finds, and whether every alert and every panel can be asked of it.

    python -m benchmarks.scrape        # Debian: apt-get install prometheus

Starts the cluster of `make serve` and a Prometheus configured as docs/08-metrics.md says, runs one paid rollout, and
asks Prometheus. One JSON line; exit code 1 unless every metric that one machine without payments has was found, with
the values that the rollout must have left, and no expression was refused.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml

from deployments.metrics import METRICS
from serve_app.dashboard import dashboard
from tests.support.cluster import ROOT, Cluster, free_port, running_cluster
from tests.support.payloads import actions, npy, png

ONLY_WITH_PAYMENTS = {"dream_stripe_difference_cents", "dream_stripe_inbox_age_seconds"}
ONLY_WITH_CONTEXTS = {
    "dream_context_cache_hits_total",
    "dream_context_cache_misses_total",
    "dream_context_cache_bytes",
}
ONLY_IN_TROUBLE = {"dream_scheduler_refusals_total"}
NOT_HERE = ONLY_WITH_PAYMENTS | ONLY_WITH_CONTEXTS | ONLY_IN_TROUBLE
FIRST_AUDITS_S = 60.0


def main() -> int:
    if shutil.which("prometheus") is None:
        print("prometheus is not installed: apt-get install prometheus", file=sys.stderr)
        return 1
    with tempfile.TemporaryDirectory(prefix="scrape-") as directory:
        report = run(Path(directory))
    print(json.dumps(report))
    return 0 if report["held"] else 1


def run(directory: Path) -> dict[str, Any]:
    with running_cluster(directory / "data") as cluster, prometheus(directory, cluster) as ask:
        form = {"params": json.dumps({"model": "tiny-pusher"})}
        files = {"start_frame": png(), "actions": npy(actions())}
        with cluster.http() as http:
            http.post("/v1/rollouts", files=files, data=form).raise_for_status()
        expected = [each for each in METRICS if each.name not in NOT_HERE]
        deadline = time.monotonic() + FIRST_AUDITS_S
        while True:
            names = {series["metric"]["__name__"] for series in ask('{job="dream-engine"}')}
            missing = [
                each.name
                for each in expected
                if (f"{each.name}_bucket" if each.kind == "histogram" else each.name) not in names
            ]
            captured = ask("sum(dream_ledger_captured_mils_total)")
            if (not missing and captured) or time.monotonic() > deadline:
                break
            time.sleep(0.5)
        refused = [expression for expression in expressions() if not asked(ask, expression)]
        captured_mils = float(captured[0]["value"][1]) if captured else 0.0
        (scrape,) = ask('scrape_duration_seconds{job="dream-engine"}')
        return {
            "prometheus": ask.version,
            "series": len(ask('{job="dream-engine",__name__=~"dream_.*"}')),
            "scrape_s": float(scrape["value"][1]),
            "missing": missing,
            "refused": refused,
            "expressions": len(expressions()),
            "captured_mils": captured_mils,
            "held": not missing and not refused and captured_mils == 245,
        }


def expressions() -> list[str]:
    rules = yaml.safe_load((ROOT / "serve_app" / "config" / "alerts.yaml").read_text())["groups"]
    shown = [target["expr"] for panel in dashboard()["panels"] for target in panel.get("targets", ())]
    asked = [rule["expr"] for group in rules for rule in group["rules"]] + shown
    return [each.replace("$__rate_interval", "1m").replace("$model", ".*") for each in asked]


class Prometheus:
    def __init__(self, http: httpx.Client) -> None:
        self._http = http
        self.version = http.get("/api/v1/status/buildinfo").json()["data"]["version"]

    def __call__(self, expression: str) -> list[dict[str, Any]]:
        answer = self._http.get("/api/v1/query", params={"query": expression})
        answer.raise_for_status()
        result: list[dict[str, Any]] = answer.json()["data"]["result"]
        return result


def asked(ask: Prometheus, expression: str) -> bool:
    try:
        ask(expression)
    except httpx.HTTPStatusError:
        return False
    return True


@contextlib.contextmanager
def prometheus(directory: Path, cluster: Cluster) -> Iterator[Prometheus]:
    port = free_port()
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ROOT / "serve_app" / "config" / "alerts.yaml")],
        "scrape_configs": [
            {
                "job_name": "dream-engine",
                "authorization": {"credentials_file": str(cluster.data_dir / "metrics-secret")},
                "static_configs": [{"targets": [cluster.base_url.removeprefix("http://")]}],
            }
        ],
    }
    file = directory / "prometheus.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [
        "prometheus",
        f"--config.file={file}",
        f"--storage.tsdb.path={directory / 'tsdb'}",
        f"--web.listen-address=127.0.0.1:{port}",
    ]
    with (directory / "prometheus.log").open("w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10.0) as http:
            deadline = time.monotonic() + 20.0
            while not _is_ready(http):
                if time.monotonic() > deadline:
                    raise TimeoutError((directory / "prometheus.log").read_text())
                time.sleep(0.1)
            yield Prometheus(http)
    finally:
        process.terminate()
        process.wait(timeout=20)


def _is_ready(http: httpx.Client) -> bool:
    try:
        return http.get("/-/ready").status_code == 200
    except httpx.TransportError:
        return False


if __name__ == "__main__":
    sys.exit(main())
