"""Payments as a Ray actor: one per cluster, which alone speaks to Stripe, and runs the loops that miss nothing.

It runs its loops while ingress replicas call on it, so an older one that a redeploy left behind falls silent.
Two at once would do no harm: the ledger refuses what is stale, and keeps one charge in flight.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import structlog

from billing.commands import CustomerId
from billing.database import open_database
from billing.money import Mils
from billing.payments.commands import Topup
from billing.payments.reader import PaymentsReader
from deployments import ledger_client
from deployments.errors import LedgerUnavailable
from deployments.logs import configure_logs
from deployments.meter import Meter, Series
from deployments.metrics import STRIPE_DIFFERENCE_CENTS, STRIPE_INBOX_AGE_SECONDS
from deployments.payments import invoices, sweeps
from deployments.payments.config import PaymentsConfig
from deployments.payments.errors import PaymentError
from deployments.payments.gateway import StripeGateway
from deployments.payments.service import Payments

FORGOTTEN_AFTER_S = 60.0
"""Without a call the loops rest."""
INBOX_EVERY_S = 1.0
INVOICES_EVERY_S = 900.0
RECONCILE_EVERY_S = 900.0
RECONCILE_AFTER_S = 3_600.0
"""Into the next day: Stripe's books are complete by then, and retries of webhooks have come."""
DAY_S = 86_400

Answer = TypeVar("Answer")

log = structlog.get_logger(__name__)


class PaymentsActor:
    """Answers refusals as values; only what broke is raised."""

    def __init__(self, config: PaymentsConfig, database_url: str, ledger: Any, report_secret: bytes) -> None:
        configure_logs()
        self._config = config
        self._database_url = database_url
        self._ledger_handle = ledger
        self._report_secret = report_secret
        self._payments: Payments | None = None
        self._starting = asyncio.Lock()
        self._loops: list[asyncio.Task[None]] = []
        self._events = asyncio.Event()
        self._called_at = time.monotonic()
        self._meter = Meter()

    async def metrics(self) -> Series:
        return self._meter.series()

    async def wake(self) -> None:
        """There may be something in the inbox; and somebody still wants this to run."""
        await self._ready()
        self._events.set()

    async def topup(
        self, customer_id: CustomerId, amount_cents: int, base_url: str, idempotency_key: str
    ) -> Topup | PaymentError | LedgerUnavailable:
        payments = await self._ready()
        return await _value(payments.topup(customer_id, amount_cents, base_url, idempotency_key))

    async def look(self, topup_id: str) -> Topup | PaymentError | LedgerUnavailable:
        return await _value((await self._ready()).look(topup_id))

    async def shortage(
        self, customer_id: CustomerId, requested_mils: Mils
    ) -> Topup | PaymentError | LedgerUnavailable | None:
        return await _value((await self._ready()).shortage(customer_id, requested_mils))

    async def _ready(self) -> Payments:
        self._called_at = time.monotonic()
        async with self._starting:
            if self._payments is None:
                reader = PaymentsReader(await asyncio.to_thread(open_database, self._database_url))
                ledger = ledger_client.connect(self._ledger_handle)
                ledger.start()
                self._payments = Payments(self._config, ledger, reader, StripeGateway(self._config))
                self._loops = [
                    asyncio.create_task(self._repeat(name, every_s, what))
                    for name, every_s, what in self._duties(self._payments)
                ]
                log.info("payments_ready", livemode=self._config.livemode)
        return self._payments

    def _duties(self, payments: Payments) -> tuple[tuple[str, float, Callable[[], Awaitable[object]]], ...]:
        config = self._config
        return (
            ("inbox", INBOX_EVERY_S, payments.drain),
            ("auto_topup", config.auto_every_s, payments.top_up_low_balances),
            ("events", config.events_every_s, lambda: sweeps.sweep_events(payments)),
            ("objects", config.objects_every_s, lambda: sweeps.sweep_objects(payments)),
            ("invoices", INVOICES_EVERY_S, lambda: invoices.bill_last_month(payments)),
            ("money", RECONCILE_EVERY_S, self._reconcile_yesterday),
        )

    async def _repeat(self, name: str, every_s: float, what: Callable[[], Awaitable[object]]) -> None:
        """For ever: a failure is logged, and the next turn tries again."""
        while True:
            if time.monotonic() - self._called_at < FORGOTTEN_AFTER_S:
                try:
                    await what()
                except (PaymentError, LedgerUnavailable) as error:
                    log.warning("payments_loop_failed", loop=name, error=str(error))
                except Exception as error:
                    log.error("payments_loop_broke", loop=name, error=repr(error), exc_info=error)
            if name == "inbox":  # a webhook does not wait for the next turn
                try:
                    async with asyncio.timeout(every_s):
                        await self._events.wait()
                except TimeoutError:
                    pass
                self._events.clear()
            else:
                await asyncio.sleep(every_s)

    async def _reconcile_yesterday(self) -> None:
        payments = self._payments
        assert payments is not None
        yesterday = int((payments.now() - RECONCILE_AFTER_S) // DAY_S) - 1
        filed = await asyncio.to_thread(payments.reader.report, yesterday)
        if filed is None:
            report = await sweeps.reconcile(payments, yesterday, self._report_secret)
            self._meter.set(STRIPE_DIFFERENCE_CENTS, to=report.difference_cents)
        inbox = await asyncio.to_thread(payments.reader.inbox)
        age_s = 0.0 if inbox.oldest_received_at is None else payments.now() - inbox.oldest_received_at
        self._meter.set(STRIPE_INBOX_AGE_SECONDS, to=age_s)


async def _value(work: Awaitable[Answer]) -> Answer | PaymentError | LedgerUnavailable:
    try:
        return await work
    except (PaymentError, LedgerUnavailable) as error:
        return error
