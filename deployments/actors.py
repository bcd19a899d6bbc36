"""The named actors that every process of the cluster finds by name, and how they are made.

They are detached, restart for ever, and retry no call by themselves: callers own retries, because Ray may report a
failure for a call that ran.
"""

import hashlib
from importlib.metadata import version
from typing import Any

import ray

from deployments.ledger_actor import LedgerActor
from deployments.scheduler import SchedulerLimits
from deployments.scheduler_actor import SchedulerActor
from deployments.status import StatusActor

NAMESPACE = "dream-engine"

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
    return ray.remote(LedgerActor).options(name=_ledger_name(database_url), **_OPTIONS).remote(database_url)


def ledger_handle(database_url: str) -> Any:
    """The running ledger of that database. Raises ValueError if there is none."""
    return ray.get_actor(_ledger_name(database_url), namespace=NAMESPACE)


def start_status() -> Any:
    return ray.remote(StatusActor).options(name=_name("status"), **_OPTIONS).remote()


def start_scheduler(model: str, limits: SchedulerLimits) -> Any:
    name = _name(f"scheduler:{model}", repr(limits))
    return ray.remote(SchedulerActor).options(name=name, **_OPTIONS).remote(limits)


def _ledger_name(database_url: str) -> str:
    return _name("ledger", database_url)


def _name(actor: str, *configuration: str) -> str:
    """Another version or configuration is another actor: a redeploy never goes on with the old one's."""
    digest = hashlib.sha256("\n".join((version("dream-engine-cluster"), *configuration)).encode()).hexdigest()
    return f"{actor}:{digest[:12]}"
