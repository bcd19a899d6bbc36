"""The named actors that every process of the cluster finds by name, and how they are made.

They are detached, restart for ever, and retry no call by themselves: callers own retries, because Ray may report a
failure for a call that ran.
"""

from typing import Any

import ray

from deployments.ledger_actor import LedgerActor
from deployments.scheduler import SchedulerLimits
from deployments.scheduler_actor import SchedulerActor
from deployments.status import StatusActor

NAMESPACE = "dream-engine"
LEDGER = "ledger"
STATUS = "status"

_OPTIONS = {
    "namespace": NAMESPACE,
    "lifetime": "detached",
    "get_if_exists": True,
    "max_restarts": -1,
    "max_task_retries": 0,
    "max_concurrency": 10_000,
    "num_cpus": 0,
}


def start_ledger(database_url: str) -> Any:
    return ray.remote(LedgerActor).options(name=LEDGER, **_OPTIONS).remote(database_url)


def start_status(models: list[str]) -> Any:
    return ray.remote(StatusActor).options(name=STATUS, **_OPTIONS).remote(models)


def start_scheduler(model: str, limits: SchedulerLimits) -> Any:
    return ray.remote(SchedulerActor).options(name=_scheduler_name(model), **_OPTIONS).remote(limits)


def ledger_handle() -> Any:
    return ray.get_actor(LEDGER, namespace=NAMESPACE)


def _scheduler_name(model: str) -> str:
    return f"scheduler:{model}"
