"""Jobs on a real cluster. `make chaos-jobs` ends all of its processes, and starts it again."""

import json
from typing import Any

import httpx
import numpy as np

from tests.support.cluster import PATIENCE_S, Cluster, eventually
from tests.support.models import SLEEP_S
from tests.support.payloads import actions, npy, png
from tests.support.video import decode


def slow(seconds_per_step: float) -> np.ndarray:
    values = actions()
    values[:, SLEEP_S] = seconds_per_step
    return values


def http_of(cluster: Cluster, key: str) -> httpx.Client:
    return httpx.Client(base_url=cluster.base_url, headers={"Authorization": f"Bearer {key}"}, timeout=PATIENCE_S)


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
        eventually(lambda: get(http, rollout_id)["status"] == "succeeded", timeout_s=PATIENCE_S)
        assert len(decode(httpx.get(get(http, rollout_id)["video_url"]).content)) == 49
        assert amounts(http) == [10_000, -245]
