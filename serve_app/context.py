"""What the routes share, and the three questions each may ask: who calls, which model, and is there room."""

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Annotated, ParamSpec, TypeVar

import structlog
from fastapi import Depends, Request
from starlette.requests import HTTPConnection

from billing.database import DATABASE_FAILURES
from billing.keys import is_token_shaped, token_sha256
from billing.reader import KeyRecord, LedgerReader
from billing.request_log import RequestLog
from billing.statements import StatementReader
from billing.units import UnitsReader
from billing.usage import UsageReader
from deployments.errors import CreditsInsufficient, LedgerUnavailable
from deployments.frame_store import FrameStore
from deployments.ingress import Ingress
from deployments.ledger_audits import AuditsClient
from deployments.messages import ModelSpec
from deployments.model_client import ModelClient
from deployments.payments.desk import PaymentsDesk
from deployments.pricing import Prices
from deployments.replica_counts import BootingReplicas
from deployments.results import ResultStore
from deployments.robot_commands import RobotCommands
from deployments.sessions import Sessions
from deployments.status_client import StatusClient
from serve_app.catalog import CATALOG
from serve_app.envelopes import Envelopes
from serve_app.errors import ModelNotFound, NotAuthenticated, RateLimited
from serve_app.job_services import JobServices
from serve_app.known_keys import KnownKeys
from serve_app.no_auth import refuse_strangers
from serve_app.rate_limit import TokenBuckets
from serve_app.settings import ClusterArgs
from serve_app.signing import LinkSigner

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Services:
    """One ingress replica's parts; made once, passed to every request."""

    args: ClusterArgs
    ingress: Ingress
    models: Mapping[str, ModelClient]
    commands: Mapping[str, RobotCommands]
    """Per model that has them: how its robot's commands become actions."""
    max_row_steps: Mapping[str, int]
    """Per model, how many candidates x denoising steps one request may ask for."""
    reader: LedgerReader
    request_log: RequestLog
    usage: UsageReader
    statements: StatementReader
    units: UnitsReader
    prices: Prices
    buckets: TokenBuckets
    known_keys: KnownKeys
    results: ResultStore
    frames: FrameStore
    sessions: Sessions
    jobs: JobServices
    envelopes: Envelopes
    signer: LinkSigner
    status: StatusClient
    booting: BootingReplicas
    audits: AuditsClient
    metrics_secret: str
    """Whoever scrapes the metrics sends it as a bearer token."""
    open_to: str
    """SHA-256 of the key that every request is taken to carry; empty but in development: each needs its own."""
    payments: PaymentsDesk
    decoders: Executor
    """Threads for pictures alone: a large one takes seconds and hundreds of MB, so few run at once and no key waits."""

    async def ask(
        self, question: Callable[Arguments, Answer], *args: Arguments.args, **kwargs: Arguments.kwargs
    ) -> Answer:
        """Put a question of one of the readers to the database, off the event loop.

        Raises:
            LedgerUnavailable: the database does not answer.
        """
        try:
            return await asyncio.to_thread(question, *args, **kwargs)
        except DATABASE_FAILURES as error:
            log.error("database_unavailable", error=type(error).__name__)
            raise LedgerUnavailable() from error


def services(request: HTTPConnection) -> Services:
    found = request.app.state.services
    assert isinstance(found, Services)
    return found


def base_url(request: Request, parts: Services) -> str:
    """Of the links in answers."""
    return parts.args.public_url.rstrip("/") or str(request.base_url).rstrip("/")


async def authenticate(request: HTTPConnection) -> KeyRecord:
    """The caller's key as it is now, after its bucket gave a token. Runs before the body is read."""
    parts = services(request)
    sha256 = _presented(request, parts)
    return _admit(request, parts, await parts.ask(parts.reader.key_by_token_hash, sha256))


async def authenticate_for_work(request: HTTPConnection) -> KeyRecord:
    """The same where nothing is done for a key but what the ledger permits it again: read lately is enough there."""
    if "dryRun" in request.query_params:  # the ledger promises a price to any key
        return await authenticate(request)
    parts = services(request)
    sha256 = _presented(request, parts)
    key = parts.known_keys.get(sha256)
    if key is None:
        key = await parts.ask(parts.reader.key_by_token_hash, sha256)
        if key is not None:
            parts.known_keys.add(sha256, key)
    return _admit(request, parts, key)


def _admit(request: HTTPConnection, parts: Services, key: KeyRecord | None) -> KeyRecord:
    if key is None:
        raise NotAuthenticated("the API key is not known here")
    if key.revoked:
        raise NotAuthenticated("the API key was revoked")
    if key.terms.expires_at is not None and key.terms.expires_at <= time.time():
        raise NotAuthenticated("the API key has expired")
    request.state.customer_id = key.customer_id
    retry_after_s = parts.buckets.take(key.key_id, key.refill_per_s, key.burst)
    if retry_after_s is not None:
        raise RateLimited(retry_after_s)
    return key


def _presented(request: HTTPConnection, parts: Services) -> str:
    """SHA-256 of the key that the request carries, or is taken to carry."""
    if parts.open_to:
        refuse_strangers(request)
        return parts.open_to
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise NotAuthenticated("send your API key as `Authorization: Bearer dre_...`")
    if not is_token_shaped(token):
        raise NotAuthenticated("the API key is malformed; keys are dre_ and 43 characters a-z, 2-7")
    return token_sha256(token)


def charge_for(request: Request, refused: CreditsInsufficient) -> None:
    """A request was refused for want of credits: its customer may have agreed to be charged for that."""
    services(request).payments.note_shortage(request.state.customer_id, refused.requested_mils)


async def check_base(request: Request) -> None:
    """Refuse what is under `/models/{base_model}` for a model that there is not. The paid routes see to it themselves:
    `POST /v1/rollouts` never answers 404, see `errors`."""
    slug = request.path_params["base_model"]
    if slug not in CATALOG:
        raise ModelNotFound(f"{slug!r} is not in the catalog; see /v1/models")


async def active_slug(request: Request) -> str:
    """The one model that is active under this base URL: the one in the path, else the deployment's default."""
    slug: str = request.path_params.get("base_model") or services(request).args.default_model
    return slug


async def active_model(request: Request) -> ModelSpec:
    slug = await active_slug(request)
    model = services(request).models.get(slug)
    if model is None:
        raise ModelNotFound(f"{slug} is not served here; see /v1/models")
    return model.spec


async def _services(request: HTTPConnection) -> Services:
    return services(request)


# Coroutines all of them: FastAPI calls anything else in a thread, at half a millisecond each.
Parts = Annotated[Services, Depends(_services)]
Caller = Annotated[KeyRecord, Depends(authenticate)]
PayingCaller = Annotated[KeyRecord, Depends(authenticate_for_work)]
ActiveSlug = Annotated[str, Depends(active_slug)]
ActiveModel = Annotated[ModelSpec, Depends(active_model)]
