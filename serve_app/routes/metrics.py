"""The whole cluster's metrics on one page for Prometheus, from whichever ingress replica is asked.

They say what the cluster earns, so they are for whoever holds the secret in `$DATA_DIR/metrics-secret`.
"""

import asyncio
import hmac
from collections.abc import Awaitable
from importlib.metadata import version

import structlog
from fastapi import APIRouter, Depends, Request, Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from deployments.meter import Meter, Series, exposition
from deployments.metrics import (
    BUILD_INFO,
    CAPACITY_ROLLOUTS_PER_SECOND,
    HEADROOM_ROLLOUTS_PER_SECOND,
    PART_UP,
    REPLICAS,
    SCHEDULER_CAPACITY_ROWS,
    SCHEDULER_QUEUED_ROW_STEPS,
    SCHEDULER_QUEUED_ROWS,
    SCHEDULER_RUNNING_ROWS,
)
from deployments.scheduler import SchedulerStatus
from serve_app.capacity import rollouts_per_s
from serve_app.context import Parts, Services, services
from serve_app.errors import NotAuthenticated

log = structlog.get_logger(__name__)


def authenticate_scraper(request: Request) -> None:
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    secret = services(request).metrics_secret
    if scheme.lower() != "bearer" or not hmac.compare_digest(token.strip().encode(), secret.encode()):
        raise NotAuthenticated("send the secret in $DATA_DIR/metrics-secret as `Authorization: Bearer ...`")


router = APIRouter(tags=["status"], dependencies=[Depends(authenticate_scraper)])


@router.get("/metrics", response_class=Response)
async def get_metrics(parts: Parts) -> Response:
    """In Prometheus's text format. A part that does not answer within 2 s is left out: see `dream_part_up`."""
    meter = Meter()
    meter.set(BUILD_INFO, version("dream-engine-cluster"), to=1)
    answered = await asyncio.gather(
        _part(meter, "ledger", "", parts.audits.metrics()),
        _part(meter, "status", "", parts.status.metrics()),
        _part(meter, "payments", "", parts.payments.metrics()),
        _booting(meter, parts),
        *(_part(meter, "scheduler", slug, _model(meter, parts, slug)) for slug in parts.models),
    )
    return Response(exposition([meter.series(), *answered]), media_type=CONTENT_TYPE_PLAIN_0_0_4)


async def _part(meter: Meter, part: str, model: str, asked: Awaitable[Series]) -> Series:
    try:
        series = await asked
    except Exception as error:  # whatever ails it, the others are still worth knowing
        log.warning("metrics_unreachable", part=part, model=model, error=type(error).__name__)
        meter.set(PART_UP, part, model, to=0)
        return {}
    meter.set(PART_UP, part, model, to=1)
    return series


async def _model(meter: Meter, parts: Services, slug: str) -> Series:
    status, series = await parts.models[slug].metrics()
    measure_model(meter, parts, slug, status)
    return series


def measure_model(meter: Meter, parts: Services, slug: str, status: SchedulerStatus) -> None:
    spec = parts.models[slug].spec
    meter.set(REPLICAS, slug, "ready", to=status.replicas)
    meter.set(SCHEDULER_CAPACITY_ROWS, slug, to=status.capacity_rows)
    meter.set(SCHEDULER_RUNNING_ROWS, slug, to=status.running_rows)
    meter.set(CAPACITY_ROLLOUTS_PER_SECOND, slug, to=rollouts_per_s(spec, status.cost_per_s))
    meter.set(HEADROOM_ROLLOUTS_PER_SECOND, slug, to=rollouts_per_s(spec, status.headroom_cost_per_s))
    for service_class, (rows, row_steps) in status.queued.items():
        meter.set(SCHEDULER_QUEUED_ROWS, slug, service_class, to=rows)
        meter.set(SCHEDULER_QUEUED_ROW_STEPS, slug, service_class, to=row_steps)


async def _booting(meter: Meter, parts: Services) -> Series:
    async def asked() -> Series:
        counts = await parts.booting.counts()
        for slug in parts.models:
            meter.set(REPLICAS, slug, "booting", to=counts.get(slug, 0))
        return {}

    return await _part(meter, "controller", "", asked())
