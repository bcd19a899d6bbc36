"""What the routes talk to: top-ups and cards through the actor, events and terms straight to the ledger."""

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

import structlog

from billing.commands import CustomerId, Rejected
from billing.money import Mils
from billing.payments.commands import AutoTopup, AutoTopupSet, EventHint, ReceiveEvents, SetAutoTopup, Topup
from billing.payments.reader import PaymentsReader
from deployments.errors import LedgerUnavailable
from deployments.ledger_client import LedgerClient
from deployments.meter import Series
from deployments.payments import events
from deployments.payments.config import PaymentsConfig
from deployments.payments.errors import LedgerRefused, PaymentError, PaymentsDisabled, StripeUnavailable

WAKE_EVERY_S = 5.0
"""Also what starts the actor's loops again after it was restarted."""
METRICS_WITHIN_S = 2.0
ANSWER_WITHIN_S = 30.0
"""How long a request waits for Stripe, however often that is asked again."""
MAX_SHORTAGES = 1_000
"""Customers for whom a charge is being asked for at once."""

log = structlog.get_logger(__name__)


class PaymentsDesk:
    """One ingress replica's. `actor` is the cluster's `PaymentsActor`; None when payments are off."""

    def __init__(self, config: PaymentsConfig, ledger: LedgerClient, reader: PaymentsReader, actor: Any) -> None:
        self.config = config
        self.reader = reader
        self._ledger = ledger
        self._actor = actor
        self._short: set[CustomerId] = set()
        self._background: set[asyncio.Task[None]] = set()
        self._waking: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Called outside any request: Ray would cancel calls made in a cancelled request's context."""
        if self._actor is not None:
            self._waking = asyncio.get_running_loop().create_task(self._wake_for_ever())

    async def metrics(self) -> Series:
        """Of the payments actor; none while payments are off. Raises TimeoutError or a Ray error."""
        if self._actor is None:
            return {}
        async with asyncio.timeout(METRICS_WITHIN_S):
            series: Series = await self._actor.metrics.remote()
        return series

    def stop(self) -> None:
        for task in (self._waking, *self._background):
            if task is not None:
                task.cancel()

    async def topup(self, customer_id: CustomerId, amount_cents: int, base_url: str, idempotency_key: str) -> Topup:
        """A page to pay on.

        Raises:
            PaymentError: there is none, and the card was asked for nothing.
        """
        answer = await self._call("topup", customer_id, amount_cents, base_url, idempotency_key)
        assert isinstance(answer, Topup)
        return answer

    async def look(self, topup_id: str) -> Topup:
        """How a top-up stands, as Stripe says now."""
        answer = await self._call("look", topup_id)
        assert isinstance(answer, Topup)
        return answer

    def verified(self, body: bytes, signature: str) -> EventHint:
        """Raises NotAnEvent unless Stripe signed it."""
        if self._actor is None:
            raise PaymentsDisabled()
        return events.verified(body, signature, self.config.webhook_secrets, time.time())

    async def receive(self, hints: Sequence[EventHint]) -> None:
        """Keep events for good, then have them looked at; returns when they are kept."""
        outcome = await self._ledger.apply(ReceiveEvents(tuple(hints), "webhook"))
        if isinstance(outcome, Rejected):
            raise LedgerRefused(outcome.reason)
        self._later(self._wake())

    async def set_auto_topup(self, customer_id: CustomerId, terms: AutoTopup) -> AutoTopup:
        if self._actor is None:
            raise PaymentsDisabled()
        outcome = await self._ledger.apply(SetAutoTopup(customer_id, terms))
        if not isinstance(outcome, AutoTopupSet) or outcome.terms is None:
            raise LedgerRefused(str(outcome))
        return outcome.terms

    def note_shortage(self, customer_id: CustomerId, requested_mils: Mils) -> None:
        """A request was refused for want of credits: charge for it, if the customer agreed to that. Nobody waits."""
        if self._actor is None or customer_id in self._short or len(self._short) >= MAX_SHORTAGES:
            return
        self._short.add(customer_id)
        self._later(self._shortage(customer_id, requested_mils))

    async def _shortage(self, customer_id: CustomerId, requested_mils: Mils) -> None:
        try:
            await self._call("shortage", customer_id, requested_mils)
        except (PaymentError, LedgerUnavailable) as error:
            log.warning("auto_topup_failed", customer=customer_id, error=str(error))
        finally:
            self._short.discard(customer_id)

    async def _call(self, method: str, *arguments: Any) -> Any:
        if self._actor is None:
            raise PaymentsDisabled()
        try:
            async with asyncio.timeout(ANSWER_WITHIN_S):
                answer = await getattr(self._actor, method).remote(*arguments)
        except TimeoutError:
            raise StripeUnavailable("no answer in time") from None
        except Exception as error:  # Ray's: the actor is starting, or died over this
            log.error("payments_unreachable", method=method, error=type(error).__name__)
            raise StripeUnavailable("payments are starting") from error
        if isinstance(answer, PaymentError | LedgerUnavailable):
            raise answer
        return answer

    def _later(self, what: Any) -> None:
        task = asyncio.get_running_loop().create_task(what)
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _wake(self) -> None:
        with contextlib.suppress(PaymentError, LedgerUnavailable):  # it is asked again within seconds
            await self._call("wake")

    async def _wake_for_ever(self) -> None:
        while True:
            await self._wake()
            await asyncio.sleep(WAKE_EVERY_S)
