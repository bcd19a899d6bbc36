"""The FastAPI application of one ingress replica."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib.metadata import version
from typing import Any

import structlog
from fastapi import Depends, FastAPI

from serve_app import errors
from serve_app.context import Services, authenticate, charge_for, check_base
from serve_app.middleware import HeldBodies, RequestEnvelope
from serve_app.routes import (
    billing,
    catalog,
    frames,
    jobs,
    metrics,
    payments,
    predict,
    requests,
    rollouts,
    sessions,
    status,
    usage,
    webhooks,
)
from serve_app.schemas import ErrorBody
from serve_app.send_window import SendWindow

ERRORS: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorBody}, "5XX": {"model": ErrorBody}}

log = structlog.get_logger(__name__)


def create_api(parts: Services) -> FastAPI:
    """All routes, twice: at the root with the default model active, and under `/models/{slug}` with that one."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        parts.ingress.start()
        parts.payments.start()
        parts.sessions.start()
        parts.jobs.start()
        sweeper = asyncio.get_running_loop().create_task(_sweep_results(parts))
        yield
        sweeper.cancel()
        parts.payments.stop()
        await parts.sessions.drain()
        await parts.sessions.stop()
        await parts.jobs.stop()
        await parts.ingress.stop()

    api = FastAPI(
        title="Dream Engine Cluster",
        version=version("dream-engine-cluster"),
        description="Action-conditioned robot world models, metered per generated frame.",
        lifespan=lifespan,
    )
    api.state.services = parts
    for base, in_schema in (("", True), ("/models/{base_model}", False)):
        known = [Depends(check_base)] if base else []
        for router, first in (  # in this order a request's path is compared with them
            (predict.paid, []),
            (rollouts.paid, []),
            (catalog.router, known),
            (status.router, known),
            (billing.router, [Depends(authenticate), *known]),
            (usage.router, [Depends(authenticate), *known]),
            (requests.router, [Depends(authenticate), *known]),
            (payments.router, [Depends(authenticate), *known]),
            (payments.public, known),
            (frames.router, known),
            (sessions.router, []),
            (rollouts.router, known),
            (jobs.router, known),
            (webhooks.router, known),
        ):
            api.include_router(router, prefix=base, include_in_schema=in_schema, dependencies=first, responses=ERRORS)
    api.include_router(status.pages, responses=ERRORS)
    api.include_router(metrics.router, responses=ERRORS)
    api.include_router(sessions.sockets)
    errors.install(api, charge_for)
    limits = parts.args.limits
    api.state.held_bodies = HeldBodies(limits.max_held_bytes)
    api.add_middleware(
        RequestEnvelope,
        max_body_bytes=limits.max_body_bytes,
        held=api.state.held_bodies,
        meter=parts.status.meter,
    )
    api.add_middleware(SendWindow)
    return api


async def _sweep_results(parts: Services) -> None:
    while True:
        try:
            swept = await asyncio.to_thread(parts.results.sweep) + await asyncio.to_thread(parts.frames.sweep)
        except Exception as error:  # each object store has its own; the next sweep may do better
            log.warning("results_not_swept", error=type(error).__name__)
        else:
            if swept:
                log.info("results_expired", files=swept)
        await asyncio.sleep(parts.results.sweep_every_s)
