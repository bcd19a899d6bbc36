"""Jobs on a real cluster: what was answered 202 is delivered and charged once, whatever process ends meanwhile."""

import json
from pathlib import Path
from typing import Any

import httpx
import numpy as np

from billing import invariants
from billing.database import open_database
from tests.support.cluster import SERVE_STAND_IN, Cluster, eventually, running_cluster
from tests.support.models import SLEEP_S
from tests.support.payloads import actions, npy, png
from tests.support.video import decode


def slow(seconds_per_step: float) -> np.ndarray:
    values = actions()
    values[:, SLEEP_S] = seconds_per_step
    return values


def http_of(cluster: Cluster, key: str) -> httpx.Client:
    return httpx.Client(base_url=cluster.base_url, headers={"Authorization": f"Bearer {key}"}, timeout=60)


def queue(http: httpx.Client, values: np.ndarray, seed: int) -> str:
    params = {"model": "tiny-pusher", "mode": "async", "seed": seed, "num_steps": 4}
    files = {"start_frame": png(), "actions": npy(values)}
    answer = http.post("/v1/rollouts", files=files, data={"params": json.dumps(params)})
    assert answer.status_code == 202, answer.text
    rollout_id: str = answer.json()["id"]
    return rollout_id


def get(http: httpx.Client, rollout_id: str) -> dict[str, Any]:
    """Its envelope, or nothing while no ingress answers."""
    answer = http.get(f"/v1/rollouts/{rollout_id}")
    envelope: dict[str, Any] = answer.json() if answer.status_code == 200 else {"status": "unknown"}
    return envelope


def amounts(http: httpx.Client) -> list[int]:
    rows = http.get("/v1/billing/transactions").json()["transactions"]
    return [row["amount_mils"] for row in reversed(rows)]


def test_a_job_outlives_the_ingress_that_accepted_and_ran_it(stand_in_cluster: Cluster) -> None:
    with http_of(stand_in_cluster, stand_in_cluster.new_customer()) as http:
        rollout_id = queue(http, slow(0.1), seed=41)
        eventually(lambda: get(http, rollout_id)["status"] == "running")
        for ingress in stand_in_cluster.processes("ServeReplica:dream-engine:ingress"):
            ingress.kill()
        eventually(lambda: get(http, rollout_id)["status"] == "succeeded", timeout_s=60)
        assert len(decode(httpx.get(get(http, rollout_id)["video_url"]).content)) == 49
        assert amounts(http) == [10_000, -245]


def test_jobs_outlive_the_cluster(tmp_path: Path) -> None:
    """Stopped in the middle of one job, with two more waiting; started again on the same data directory."""
    data_dir = tmp_path / "data"
    with running_cluster(data_dir, SERVE_STAND_IN) as cluster:
        key = cluster.new_customer()
        with http_of(cluster, key) as http:
            ids = [queue(http, slow(0.5), seed) for seed in range(3)]
            eventually(lambda: get(http, ids[0])["status"] == "running")
        cluster.interrupt()
        cluster.stop()
    with running_cluster(data_dir, SERVE_STAND_IN) as cluster, http_of(cluster, key) as http:
        assert cluster.admin("ledger", "audit").returncode == 0
        for each in ids:
            eventually(lambda each=each: get(http, each)["status"] == "succeeded", timeout_s=90)  # type: ignore[misc]
        assert amounts(http) == [10_000, -245, -245, -245]
    database = open_database(f"sqlite:///{data_dir / 'ledger.db'}")
    assert invariants.audit(database) == []
    database.dispose()
