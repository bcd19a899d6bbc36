"""Liveness, and what the cluster is doing and how fast; no key needed."""

import asyncio
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any, Literal

import structlog
from fastapi import APIRouter
from fastapi.responses import HTMLResponse

from deployments.ledger_audits import AuditsClient
from deployments.messages import ModelSpec
from deployments.model_client import ModelClient
from deployments.scheduler import SchedulerStatus
from deployments.status import NOTHING_YET, WINDOW_S, ModelReport, Percentiles
from serve_app.capacity import rollouts_per_s
from serve_app.context import ActiveSlug, Parts, Services
from serve_app.schemas import (
    Health,
    LatencyPercentiles,
    LatencyQuarter,
    LedgerStatus,
    ModelStatus,
    OutcomeRates,
    Status,
)
from serve_app.settings import ModelArgs
from serve_app.status_page import status_page

ERRORS_DEGRADE = 0.01
"""Share of a quarter's requests that failed, above which a model counts as degraded."""
ERRORS_BREAK = 0.25

log = structlog.get_logger(__name__)

router = APIRouter(tags=["status"])
pages = APIRouter(tags=["status"])
"""Of the cluster, not of a model: at the root only."""


@router.get("/healthz")
async def healthz() -> Health:
    return Health()


@router.get("/v1/status")
async def get_status(parts: Parts, active: ActiveSlug) -> Status:
    """Counts and percentiles over the last 24 hours, kept across restarts; queues and replicas as of now."""
    return await _status(parts, active)


@pages.get("/status", response_class=HTMLResponse)
async def get_status_page(parts: Parts) -> HTMLResponse:
    """The same for people: a page without scripts."""
    status = await _status(parts, parts.args.default_model)
    health = {slug: _health(model) for slug, model in status.models.items()}
    return HTMLResponse(status_page(status, health), headers={"Cache-Control": "public, max-age=5"})


@pages.get("/api/v2/summary.json")
async def get_summary(parts: Parts) -> dict[str, Any]:
    """The same for tools that read Statuspage summaries: a component per model, and one for the ledger."""
    status = await _status(parts, parts.args.default_model)
    updated_at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    states = {slug: _health(model) for slug, model in status.models.items()}
    states["ledger"] = "operational" if status.ledger.audits in ("ok", "pending", "not_finished") else "major_outage"
    components = [
        {
            "id": name,
            "name": name,
            "status": state,
            "description": None,
            "position": position,
            "group": False,
            "group_id": None,
            "showcase": True,
            "only_show_if_degraded": False,
            "updated_at": updated_at,
        }
        for position, (name, state) in enumerate(states.items(), 1)
    ]
    return {
        "page": {
            "id": "dream-engine-cluster",
            "name": "Dream Engine Cluster",
            "url": parts.args.public_url,
            "time_zone": "Etc/UTC",
            "updated_at": updated_at,
        },
        "status": _indicator(states),
        "components": components,
        "incidents": [],
        "scheduled_maintenances": [],
    }


async def _status(parts: Services, active: str) -> Status:
    try:
        counting_since, reports = await parts.status.report()
    except Exception as error:  # the queues are still worth showing
        log.warning("status_unreachable", error=type(error).__name__)
        counting_since, reports = time.time(), {}
    ledger, booting = asyncio.ensure_future(ledger_status(parts.audits)), asyncio.ensure_future(_booting(parts))
    queues = await asyncio.gather(*(queue_status(model) for model in parts.models.values()))
    started = await booting
    models = {model.slug: model for model in parts.args.models}
    return Status(
        model=active,
        models={
            slug: _model_status(models[slug], model.spec, reports.get(slug, NOTHING_YET), queue, started)
            for (slug, model), queue in zip(parts.models.items(), queues, strict=True)
        },
        ledger=await ledger,
        uptime_s=round(time.time() - counting_since, 3),
        window_s=WINDOW_S,
        version=version("dream-engine-cluster"),
    )


async def ledger_status(audits: AuditsClient) -> LedgerStatus:
    try:
        report = await audits.report()
    except Exception:  # whatever ails it, the ledger does not answer, and that is the status to show
        return LedgerStatus(audits="unreachable")
    if report is None:
        return LedgerStatus(audits="pending")
    state: Literal["ok", "violated", "not_finished"] = "ok" if report.ok else "not_finished"
    return LedgerStatus(
        audits="violated" if report.violations else state,
        audited_at=report.finished_at,
        took_s=round(report.took_s, 3),
        violations=len(report.violations),
    )


async def queue_status(model: ModelClient) -> SchedulerStatus | None:
    """What the model's scheduler says, or None if it does not answer."""
    try:
        return await model.status()
    except Exception:  # whatever ails it, its scheduler does not answer, and that is the status to show
        return None


async def _booting(parts: Services) -> Mapping[str, int] | None:
    try:
        return await parts.booting.counts()
    except Exception as error:  # the controller is away; requests go on without it, and so does the status
        log.warning("controller_unreachable", error=type(error).__name__)
        return None


def _model_status(
    model: ModelArgs,
    spec: ModelSpec,
    report: ModelReport,
    queue: SchedulerStatus | None,
    booting: Mapping[str, int] | None,
) -> ModelStatus:
    state: Literal["ready", "starting", "idle", "unreachable"] = "ready"
    if queue is None:
        queue, state = SchedulerStatus(0, 0, 0, 0), "unreachable"
    elif not queue.replicas:
        state = "idle" if model.min_replicas == 0 and not queue.queued_rows else "starting"
    rated = queue.cost_per_s > 0 or not queue.replicas
    return ModelStatus(
        state=state,
        replicas=queue.replicas,
        booting_replicas=None if booting is None else booting.get(model.slug, 0),
        max_replicas=model.max_replicas,
        running_rows=queue.running_rows,
        queued_rows=queue.queued_rows,
        capacity_rows=queue.capacity_rows,
        utilisation=round(min(1.0, queue.running_rows / queue.capacity_rows), 4) if queue.capacity_rows else 0.0,
        capacity_rollouts_per_s=round(rollouts_per_s(spec, queue.cost_per_s), 3) if rated else None,
        headroom_rollouts_per_s=round(rollouts_per_s(spec, queue.headroom_cost_per_s), 3) if rated else None,
        cold_start_s=model.scaling.boot_s,
        requests=report.day.requests,
        frames=report.day.frames,
        failed=report.day.failed,
        canceled=report.day.canceled,
        refused=report.day.refused,
        error_rate=report.day.error_rate,
        rates={name: OutcomeRates(**asdict(rates)) for name, rates in report.rates.items()},
        quarters=[
            LatencyQuarter(started_at=each.started_at, requests=each.requests, total_ms=_percentiles(each.total_ms))
            for each in report.quarters
        ],
        queue_ms=_percentiles(report.queue_ms),
        infer_ms=_percentiles(report.infer_ms),
        total_ms=_percentiles(report.total_ms),
    )


def _percentiles(values: Percentiles | None) -> LatencyPercentiles | None:
    return None if values is None else LatencyPercentiles(p50=values.p50, p90=values.p90, p99=values.p99)


def _health(model: ModelStatus) -> str:
    """In Statuspage's words, from now and the last quarter of an hour."""
    errors = model.rates["15m"].error_rate
    if model.state in ("unreachable", "starting") or errors > ERRORS_BREAK:
        return "major_outage"
    return "degraded_performance" if errors > ERRORS_DEGRADE else "operational"


def _indicator(states: Mapping[str, str]) -> dict[str, str]:
    worst = set(states.values())
    if "major_outage" in worst:
        return {"indicator": "major", "description": "Partial System Outage"}
    if "degraded_performance" in worst:
        return {"indicator": "minor", "description": "Minor Service Outage"}
    return {"indicator": "none", "description": "All Systems Operational"}
