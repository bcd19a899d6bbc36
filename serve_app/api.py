"""The FastAPI application of one ingress replica."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from importlib.metadata import version

import structlog
from fastapi import APIRouter, FastAPI

from serve_app import errors
from serve_app.context import Services
from serve_app.middleware import RequestEnvelope
from serve_app.routes import billing, catalog, rollouts, status

SWEEP_RESULTS_EVERY_S = 600.0

log = structlog.get_logger(__name__)


def create_api(parts: Services) -> FastAPI:
    """All routes, twice: at the root with the default model active, and under `/models/{slug}` with that one."""

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        parts.ingress.start()
        sweeper = asyncio.get_running_loop().create_task(_sweep_results(parts))
        yield
        sweeper.cancel()
        await parts.ingress.stop()

    api = FastAPI(
        title="Dream Engine Cluster",
        version=version("dream-engine-cluster"),
        description="Action-conditioned robot world models, metered per generated frame.",
        lifespan=lifespan,
    )
    api.state.services = parts
    surface = APIRouter()
    for router in (catalog.router, rollouts.paid, rollouts.router, billing.router, status.router):
        surface.include_router(router)
    api.include_router(surface)
    api.include_router(surface, prefix="/models/{base_model}", include_in_schema=False)
    errors.install(api)
    api.add_middleware(RequestEnvelope, max_body_bytes=parts.args.limits.max_body_bytes)
    return api


async def _sweep_results(parts: Services) -> None:
    while True:
        swept = await asyncio.to_thread(parts.results.sweep)
        if swept:
            log.info("results_expired", files=swept)
        await asyncio.sleep(SWEEP_RESULTS_EVERY_S)
