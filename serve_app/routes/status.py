"""Liveness, and what the cluster is doing and how fast; no key needed."""

import asyncio
import time
from importlib.metadata import version
from typing import Literal

import structlog
from fastapi import APIRouter

from deployments.ledger_audits import AuditsClient
from deployments.model_client import ModelClient
from deployments.scheduler import SchedulerStatus
from deployments.status import NOTHING_YET, WINDOW_S, ModelReport, Percentiles
from serve_app.context import ActiveSlug, Parts
from serve_app.schemas import Health, LatencyPercentiles, LedgerStatus, ModelStatus, Status

log = structlog.get_logger(__name__)

router = APIRouter(tags=["status"])


@router.get("/healthz")
async def healthz() -> Health:
    return Health()


@router.get("/v1/status")
async def get_status(parts: Parts, active: ActiveSlug) -> Status:
    """Counts and percentiles over the last 24 hours, since this cluster started; queues as of now."""
    try:
        counting_since, reports = await parts.status.report()
    except Exception as error:  # the queues are still worth showing
        log.warning("status_unreachable", error=type(error).__name__)
        counting_since, reports = time.time(), {}
    ledger = asyncio.ensure_future(ledger_status(parts.audits))
    queues = await asyncio.gather(*(queue_status(model) for model in parts.models.values()))
    return Status(
        model=active,
        models={
            slug: _model_status(reports.get(slug, NOTHING_YET), queue)
            for slug, queue in zip(parts.models, queues, strict=True)
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


def _model_status(report: ModelReport, queue: SchedulerStatus | None) -> ModelStatus:
    state: Literal["ready", "starting", "unreachable"] = "ready"
    if queue is None:
        queue, state = SchedulerStatus(0, 0, 0, 0), "unreachable"
    elif not queue.replicas:
        state = "starting"
    return ModelStatus(
        state=state,
        replicas=queue.replicas,
        running_rows=queue.running_rows,
        queued_rows=queue.queued_rows,
        capacity_rows=queue.capacity_rows,
        requests=report.requests,
        frames=report.frames,
        failed=report.failed,
        canceled=report.canceled,
        refused=report.refused,
        error_rate=report.error_rate,
        queue_ms=_percentiles(report.queue_ms),
        infer_ms=_percentiles(report.infer_ms),
        total_ms=_percentiles(report.total_ms),
    )


def _percentiles(values: Percentiles | None) -> LatencyPercentiles | None:
    return None if values is None else LatencyPercentiles(p50=values.p50, p90=values.p90, p99=values.p99)
