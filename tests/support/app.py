"""The whole request path in one process: the real API, ingress, scheduler, engine and ledger, without Ray.

Only the hops are replaced: where the cluster calls an actor or a replica, these call the same object directly.
"""

import asyncio
import contextlib
import functools
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI
from sqlalchemy import Engine as Database
from sqlalchemy import make_url

from billing import invariants
from billing.auditor import AuditReport
from billing.commands import Command, CreateKey, CustomerId, KeyCreated, Outcome
from billing.database import migrate, open_database
from billing.keys import mint_customer_id, mint_key_id, mint_token, token_sha256
from billing.ledger import Ledger
from billing.money import Mils
from billing.payments.reader import PaymentsReader
from billing.reader import LedgerReader
from billing.request_log import RequestLog
from billing.statements import StatementReader
from billing.units import UnitsReader
from billing.usage import UsageReader
from billing.writer import LedgerWriter
from deployments.engine import Engine
from deployments.errors import DeadlinePassed
from deployments.file_groups import open_file_groups
from deployments.frame_store import FrameStore
from deployments.ingress import Ingress
from deployments.ledger_actor import measure_commit
from deployments.ledger_audits import AuditsClient
from deployments.ledger_client import LedgerClient
from deployments.messages import NO_TERMS, ChunkReport, ChunkRow, ModelSpec, TicketTerms
from deployments.meter import Meter, Series
from deployments.model_client import ChunkTiming, OnPiece
from deployments.payments.config import PaymentsConfig
from deployments.payments.desk import PaymentsDesk
from deployments.pricing import Prices
from deployments.replica_counts import BootingReplicas
from deployments.reservations import Reservations
from deployments.results import ResultStore
from deployments.scheduler import SchedulerStatus
from deployments.session_directory import SessionDirectory
from deployments.sessions import SessionLimits, Sessions
from deployments.status import StatusActor
from deployments.status_client import StatusClient
from serve_app.api import create_api
from serve_app.catalog import CATALOG, model_spec
from serve_app.context import Services
from serve_app.envelopes import Envelopes
from serve_app.job_services import job_services
from serve_app.known_keys import KnownKeys
from serve_app.rate_limit import TokenBuckets
from serve_app.settings import ClusterArgs, Limits, ModelArgs
from serve_app.signing import LinkSigner
from tests.support.models import StandInModel

SLUG = "tiny-pusher"
METRICS_SECRET = "5ec" * 8


class LocalModel:
    """A `ModelClient` whose replica is an engine in this process."""

    def __init__(self, spec: ModelSpec, model: Any) -> None:
        self.spec = spec
        self.model = model
        self.terms: list[TicketTerms] = []
        self.meter = Meter()
        self.engine = Engine(
            model,
            spec.resolution,
            spec.fps,
            max_rows=16,
            slug=spec.slug,
            meter=self.meter,
            forwards=lambda row: spec.forwards(len(row.actions), row.num_steps, row.guidance),
        )

    def start(self) -> None:
        pass

    async def stop(self) -> None:
        pass

    async def run_chunk(
        self,
        ticket_prefix: str,
        rows: Sequence[ChunkRow],
        begun: bool,
        terms: TicketTerms = NO_TERMS,
        permit: asyncio.Event | None = None,
        on_piece: OnPiece | None = None,
    ) -> tuple[ChunkReport, ChunkTiming]:
        self.terms.append(terms)
        try:
            async with asyncio.timeout(terms.deadline_s):
                if permit is not None:
                    await permit.wait()
                report = await asyncio.wrap_future(self.engine.submit(rows, on_piece=self._told(on_piece)))
        except TimeoutError:
            raise DeadlinePassed(self.spec.slug) from None
        return report, ChunkTiming(0.0, report.infer_ms)

    def _told(self, on_piece: OnPiece | None) -> OnPiece | None:
        loop = asyncio.get_running_loop()
        return None if on_piece is None else lambda piece: loop.call_soon_threadsafe(on_piece, piece)

    async def status(self) -> SchedulerStatus:
        return SchedulerStatus(replicas=1, capacity_rows=16, running_rows=0, queued_rows=0, cost_per_s=160.0)

    async def metrics(self) -> tuple[SchedulerStatus, Series]:
        return await self.status(), self.meter.series()


class _Method:
    """`actor.method.remote(...)` on a plain object: it is carried out whether or not its caller waits."""

    def __init__(self, method: Any) -> None:
        self._method = method

    def remote(self, *arguments: Any) -> "asyncio.Future[Any]":
        return asyncio.shield(asyncio.get_running_loop().create_task(self._method(*arguments)))


class LocalActor:
    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> _Method:
        return _Method(getattr(self._target, name))


@dataclass
class Ledgered:
    """A real ledger on a real database, with its writer's thread."""

    database: Database
    writer: LedgerWriter
    deaths: list[BaseException]
    meter: Meter

    @property
    def reader(self) -> LedgerReader:
        return LedgerReader(self.database)

    def apply(self, command: Command) -> Outcome:
        return self.writer.submit([command]).result(timeout=30)[0]

    def create_key(self, credits_mils: int, refill_per_s: float = 1000.0, burst: int = 1000) -> tuple[str, CustomerId]:
        """A new customer's token and id."""
        token = mint_token()
        outcome = self.apply(
            CreateKey(
                key_id=mint_key_id(),
                sha256=token_sha256(token),
                last4=token[-4:],
                customer_name=f"customer of {token[-8:]}",
                customer_id=mint_customer_id(),
                initial_credits_mils=Mils(credits_mils),
                refill_per_s=refill_per_s,
                burst=burst,
            )
        )
        assert isinstance(outcome, KeyCreated)
        return token, outcome.customer_id

    def rows(self, customer_id: CustomerId) -> list[tuple[str, int]]:
        """(kind, amount) of every entry, oldest first."""
        return [(row.kind, row.amount_mils) for row in reversed(self.reader.transactions(customer_id, 200))]


@functools.cache
def _migrated() -> bytes:
    """A new ledger's file: migrating takes longer than most tests."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "ledger.db"
        database = open_database(f"sqlite:///{file}")
        migrate(database)
        database.dispose()
        return file.read_bytes()


@contextlib.contextmanager
def ledgered(url: str, clock: Callable[[], float] = time.time) -> Iterator[Ledgered]:
    if url.startswith("sqlite") and not (file := Path(str(make_url(url).database))).exists():
        file.write_bytes(_migrated())
    database = open_database(url)
    migrate(database)
    meter = Meter()
    ledger = Ledger(database, clock, on_commit=lambda commit: measure_commit(meter, commit))
    ledger.take_over()
    deaths: list[BaseException] = []
    writer = LedgerWriter(ledger, deaths.append)
    try:
        yield Ledgered(database, writer, deaths, meter)
    finally:
        writer.stop()
        database.dispose()


@dataclass
class App:
    """The API in this process, and what a test may look behind it at."""

    api: FastAPI
    http: httpx.AsyncClient
    ledger: Ledgered
    ledger_call: "LedgerCall"
    model: LocalModel
    services: Services

    def key(self, credits_mils: int = 1_000_000, **bucket: Any) -> tuple[dict[str, str], CustomerId]:
        """Headers of a new customer with that balance, and the customer's id."""
        token, customer_id = self.ledger.create_key(credits_mils, **bucket)
        return {"Authorization": f"Bearer {token}"}, customer_id


@dataclass
class LedgerCall:
    """The hop to the ledger; a test may replace `call` with one that fails or waits."""

    ledger: Ledgered
    audit_report: AuditReport | None = None

    async def call(self, commands: list[Command]) -> list[Outcome]:
        return await asyncio.wrap_future(self.ledger.writer.submit(commands))

    async def audits(self) -> AuditReport | None:
        return self.audit_report

    async def metrics(self) -> Series:
        return self.ledger.meter.series()


def no_payments(ledger: Ledgered, client: LedgerClient) -> PaymentsDesk:
    return PaymentsDesk(PaymentsConfig(""), client, PaymentsReader(ledger.database), None)


@contextlib.asynccontextmanager
async def running_app(
    data_dir: Path,
    model: Any = None,
    limits: Limits | None = None,
    database_url: str = "",
    open_to: str = "",
    payments: Callable[[Ledgered, LedgerClient], PaymentsDesk] | None = None,
    slug: str = SLUG,
) -> AsyncIterator[App]:
    """An application with its lifespan running over a ledger, which must audit clean at the end; a new SQLite file's
    unless told otherwise."""
    with ledgered(database_url or f"sqlite:///{data_dir / 'ledger.db'}") as ledger:
        ledger_call = LedgerCall(ledger)
        local = LocalModel(model_spec(CATALOG[slug]), model or StandInModel(Path(), "cpu"))
        status = StatusClient(LocalActor(StatusActor(str(data_dir / "status"))))
        ledger_client = LedgerClient(lambda commands: ledger_call.call(commands))
        reservations = Reservations(ledger_client, ledger.reader)
        bounds = limits or Limits()
        sessions = Sessions(
            reservations,
            {slug: local},  # type: ignore[dict-item]
            LocalActor(SessionDirectory(bounds.max_sessions_per_customer, bounds.max_sessions)),
            status,
            SessionLimits(bounds.session_frames, bounds.session_idle_s),
        )
        results = ResultStore(data_dir / "results", ttl_s=3600)
        args = ClusterArgs(
            data_dir=data_dir,
            database_url="",
            default_model=slug,
            models=(ModelArgs(slug=slug, checkpoint=""),),
            webhook_loopback=True,
            limits=bounds,
        )
        models: dict[str, Any] = {slug: local}
        ingress = Ingress(ledger_client, reservations, models, results, status)
        signer = LinkSigner(b"0" * 32)
        envelopes = Envelopes(signer, results.ttl_s)
        services = Services(
            args=args,
            ingress=ingress,
            models=models,
            commands={},
            max_row_steps={slug: 1024},
            reader=ledger.reader,
            request_log=RequestLog(ledger.database),
            usage=UsageReader(ledger.database),
            statements=StatementReader(ledger.database),
            units=UnitsReader(ledger.database),
            prices=Prices(ledger.reader.prices, UsageReader(ledger.database).frames_since),
            buckets=TokenBuckets(lambda: 0.0),  # nothing is refilled: how slow a machine is must not matter
            known_keys=KnownKeys(time.monotonic),
            results=results,
            sessions=sessions,
            frames=FrameStore(open_file_groups(str(data_dir / "results"))),
            jobs=job_services(
                args, ledger.database, ingress, ledger_client, reservations, models, results, status, envelopes
            ),
            envelopes=envelopes,
            signer=signer,
            status=status,
            booting=BootingReplicas(lambda: {slug: 0}),
            audits=AuditsClient(LocalActor(ledger_call)),
            metrics_secret=METRICS_SECRET,
            open_to=open_to,
            payments=(payments or no_payments)(ledger, ledger_client),
            decoders=ThreadPoolExecutor(2),
        )
        api = create_api(services)
        transport = httpx.ASGITransport(api, raise_app_exceptions=False)
        async with (
            api.router.lifespan_context(api),
            httpx.AsyncClient(transport=transport, base_url="http://cluster.test") as http,
        ):
            yield App(api, http, ledger, ledger_call, local, services)
        local.engine.stop()
        assert invariants.audit(ledger.database) == []
