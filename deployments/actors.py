"""The named actors that every process of the cluster finds by name, and how they are made.

They are detached, restart for ever, and retry no call by themselves: callers own retries, because Ray may report a
failure for a call that ran. Only the ledger's calls are repeated by Ray: each of its commands may come twice, and Ray
knows at once that the actor is back, where a caller is told seconds later that it was away.
"""

import hashlib
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import ray

from deployments.ledger_actor import LedgerActor
from deployments.payments.actor import PaymentsActor
from deployments.payments.config import PaymentsConfig
from deployments.scheduler import SchedulerLimits
from deployments.scheduler_actor import SchedulerActor
from deployments.session_directory import SessionDirectory
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


LEDGER_CALLS = 64
"""Calls that the ledger takes at a time, a thread each; an ingress replica makes one after the other."""

Labels = Mapping[str, str]
"""Of the nodes that an actor may live on; empty for any. They hold for who makes it, and everybody passes the same."""


def start_ledger(database_url: str, labels: Labels) -> Any:
    actor = _remote(LedgerActor, _ledger_name(database_url), labels, max_concurrency=LEDGER_CALLS, max_task_retries=-1)
    return actor.remote(database_url)


def ledger_handle(database_url: str) -> Any:
    """The running ledger of that database. Raises ValueError if there is none."""
    return ray.get_actor(_ledger_name(database_url), namespace=NAMESPACE)


def start_status(directory: str, labels: Labels) -> Any:
    return _remote(StatusActor, _name("status", directory), labels).remote(directory)


def start_session_directory(max_per_customer: int, max_sessions: int, labels: Labels) -> Any:
    name = _name("sessions", str(max_per_customer), str(max_sessions))
    return _remote(SessionDirectory, name, labels).remote(max_per_customer, max_sessions)


def start_scheduler(model: str, limits: SchedulerLimits, labels: Labels) -> Any:
    """One for each model, whatever the limits: while a configuration replaces another, the ingress replicas of both
    work with the replicas of both. `limits` hold until a replica says its own."""
    return _remote(SchedulerActor, _scheduler_name(model), labels).remote(limits, model)


def scheduler_handle(model: str) -> Any:
    """The running scheduler of that model. Raises ValueError if there is none."""
    return ray.get_actor(_scheduler_name(model), namespace=NAMESPACE)


def start_payments(config: PaymentsConfig, database_url: str, ledger: Any, report_secret: bytes, labels: Labels) -> Any:
    """Another secret is another actor, as any other configuration is; names only ever hold a digest of it."""
    secrets = hashlib.sha256("\n".join((config.secret_key, *config.webhook_secrets)).encode()).hexdigest()
    name = _name("payments", database_url, repr(config), secrets)
    return _remote(PaymentsActor, name, labels).remote(config, database_url, ledger, report_secret)


def _remote(actor: type, name: str, labels: Labels, **options: int) -> Any:
    return ray.remote(actor).options(name=name, label_selector=dict(labels), **(_OPTIONS | options))


def _scheduler_name(model: str) -> str:
    return _name(f"scheduler:{model}")


def _ledger_name(database_url: str) -> str:
    return _name("ledger", database_url)


def _name(actor: str, *configuration: str) -> str:
    """Another version is another actor, and another configuration too: a redeploy never goes on with the old one's."""
    digest = hashlib.sha256("\n".join((version("dream-engine-cluster"), *configuration)).encode()).hexdigest()
    return f"{actor}:{digest[:12]}"
