"""A payment from the request to the balance: ask Stripe for it, listen, look, and bring the balance to what was seen.

One function applies what was seen, whoever asked for it to be looked at: a webhook, a sweep, an operator, the page that
the customer came back to. It may run any number of times and in several processes; the ledger refuses what is stale.
"""

import asyncio
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar, overload

import structlog

from billing.commands import Command, Credit, CustomerId, Outcome, Reverse
from billing.money import MILS_PER_CENT, Mils, dollars
from billing.payments.commands import (
    ApplyPayment,
    AutoTopup,
    AutoTopupHeld,
    AutoTopupSet,
    CustomerLinked,
    DisarmAutoTopup,
    EventHint,
    EventsMarked,
    LinkCustomer,
    MarkEvents,
    NoteSession,
    OpenTopup,
    PaymentApplied,
    PaymentStale,
    RenumberAttempt,
    SetAutoTopup,
    StartAutoTopup,
    TooManyTopups,
    Topup,
    TopupConflict,
    TopupNoted,
    TopupOpened,
    TopupState,
)
from billing.payments.reader import PaymentsReader, PendingEvent
from billing.payments.verdict import PaymentSeen, judge
from deployments.ledger_client import LedgerClient
from deployments.payments import events, invoices
from deployments.payments.config import MAX_STALE, PaymentsConfig
from deployments.payments.errors import (
    CardDeclined,
    LedgerRefused,
    PageOver,
    PaymentError,
    StripeFailed,
    StripeRefused,
    StripeUnavailable,
    TooManyPages,
    TopupKeyReused,
)
from deployments.payments.gateway import Page, StripeGateway

MAX_EVENTS = 200
"""Taken from the inbox at a time."""
MAX_CONCURRENT = 8
"""Payments that are looked at side by side."""
RETRY_EVENT_S = (5.0, 30.0, 120.0, 600.0)
"""When an event whose payment cannot be looked at now is tried again; the last of these for ever."""
MAX_AUTO_PER_LOOK = 100
ENDED: tuple[TopupState, ...] = ("failed", "expired", "refused")
"""Nothing can be paid on their pages any more."""
SUSPICIOUS_TYPES = {
    "charge.dispute.created": "a payment was disputed",
    "radar.early_fraud_warning.created": "a card's bank suspects fraud",
}

First = TypeVar("First")
Second = TypeVar("Second")
Third = TypeVar("Third")
Asked = TypeVar("Asked")

log = structlog.get_logger(__name__)


class Payments:
    """Everything that payments do. `ledger` is where their effects go; `now` gives POSIX seconds."""

    def __init__(
        self,
        config: PaymentsConfig,
        ledger: LedgerClient,
        reader: PaymentsReader,
        gateway: StripeGateway,
        now: Callable[[], float] = time.time,
    ) -> None:
        self.config = config
        self.reader = reader
        self.gateway = gateway
        self.now = now
        self._ledger = ledger
        self._draining = asyncio.Lock()

    @overload
    async def tell(self, command: Command, first: type[First], /) -> First: ...

    @overload
    async def tell(self, command: Command, first: type[First], second: type[Second], /) -> First | Second: ...

    @overload
    async def tell(
        self, command: Command, first: type[First], second: type[Second], third: type[Third], /
    ) -> First | Second | Third: ...

    async def tell(self, command: Command, *expected: type[Any]) -> Any:
        """The ledger's outcome, which is one of `expected`.

        Raises:
            LedgerRefused: it is another one; nothing was written.
        """
        outcome: Outcome = await self._ledger.apply(command)
        if not isinstance(outcome, expected):
            raise LedgerRefused(f"{type(command).__name__} was answered {outcome}")
        return outcome

    # A top-up that its customer asked for.

    async def topup(
        self, customer_id: CustomerId, amount_cents: int, base_url: str, idempotency_key: str = ""
    ) -> Topup:
        """A top-up with a page to pay on: a new one, or one that is open already.

        Raises:
            TopupKeyReused, PageOver, TooManyPages, StripeRefused: nothing was asked of the card.
            StripeUnavailable: the page may exist; asking again finds it.
        """
        # A key's top-up is the same row whichever replica is asked; without a key the ledger looks for an open page.
        opened = await self.tell(
            OpenTopup(mint_topup_id(), customer_id, amount_cents, idempotency_key),
            TopupOpened,
            TopupConflict,
            TooManyTopups,
        )
        if isinstance(opened, TopupConflict):
            raise TopupKeyReused(opened.amount_cents)
        if isinstance(opened, TooManyTopups):
            raise TooManyPages(opened.open, max(1, int(opened.retry_at - self.now())))
        topup = opened.topup
        if topup.state in ENDED or (topup.state == "open" and topup.expires_at <= self.now()):
            raise PageOver("expired" if topup.state == "open" else topup.state)
        if topup.state != "new":
            return topup
        provider_customer = await self.provider_customer(customer_id)
        page = await self._open_page(topup, provider_customer, base_url)
        noted = await self.tell(NoteSession(topup.topup_id, page.session_id, page.url, page.expires_at), TopupNoted)
        return noted.topup

    async def _open_page(self, topup: Topup, provider_customer: str, base_url: str) -> Page:
        terms = await asyncio.to_thread(self.reader.auto_topup, topup.customer_id)
        # The same whenever it is asked again, or the idempotency key would name another request.
        expires_at = int(topup.created_at + self.config.page_ttl_s)

        async def ask(attempt: int) -> Page:
            return await self.gateway.open_page(
                topup_id=topup.topup_id,
                customer_id=topup.customer_id,
                provider_customer=provider_customer,
                amount_cents=topup.amount_cents,
                expires_at=expires_at,
                success_url=f"{base_url}/v1/billing/topup/{topup.topup_id}/done",
                cancel_url=f"{base_url}/v1/billing/topup/{topup.topup_id}/canceled",
                save_card=terms is not None and terms.enabled,
                idempotency_key=f"topup:{topup.topup_id}:{attempt}",
            )

        return await self._ask_once_more(
            topup, ask, lambda: self.gateway.find_page(topup.topup_id, provider_customer, topup.created_at)
        )

    async def _ask_once_more(
        self,
        topup: Topup,
        ask: Callable[[int], Awaitable[Asked]],
        find: Callable[[], Awaitable[Asked | None]],
    ) -> Asked:
        """Ask; after a 500, which its idempotency key would answer for ever, see whether it was done, else ask anew."""
        try:
            return await ask(topup.attempt)
        except StripeFailed:
            found = await find()
            if found is not None:
                return found
            noted = await self.tell(RenumberAttempt(topup.topup_id, topup.attempt), TopupNoted)
            return await ask(noted.topup.attempt)

    async def provider_customer(self, customer_id: CustomerId) -> str:
        known = await asyncio.to_thread(self.reader.customer, customer_id)
        if known is not None:
            return known.provider_customer
        # A stored 500 is over with the hour; a customer made twice moves no money, and the first to be linked stays.
        made = await self.gateway.create_customer(customer_id, f"cus:{customer_id}:{int(self.now() // 3_600)}")
        return (await self.tell(LinkCustomer(customer_id, made), CustomerLinked)).provider_customer

    # What Stripe says.

    async def drain(self) -> int:
        """Do what the inbox asks for; returns how many events were looked at. One drain runs at a time."""
        done = 0
        async with self._draining:
            while True:
                pending = await asyncio.to_thread(self.reader.pending_events, self.now(), MAX_EVENTS)
                if not pending:
                    return done
                await self._take(pending)
                done += len(pending)

    async def _take(self, pending: Sequence[PendingEvent]) -> None:
        """Events of one payment are one look at it."""
        looks: dict[str, list[PendingEvent]] = {}
        changes, ignored = [], []
        for event in pending:
            hint = event.hint
            if hint.type in events.INVOICE_TYPES:
                looks.setdefault(hint.invoice_id, []).append(event)
            elif hint.type in events.TOPUP_TYPES:
                subject = hint.topup_id or hint.session_id or hint.payment_intent or hint.event_id
                looks.setdefault(subject, []).append(event)
            elif hint.type in events.CUSTOMER_TYPES:
                changes.append(event)
            else:
                ignored.append(hint.event_id)
        if ignored:
            await self.tell(MarkEvents(tuple(ignored), "ignored"), EventsMarked)
        room = asyncio.Semaphore(MAX_CONCURRENT)

        async def one(group: Sequence[PendingEvent], do: Callable[[Sequence[EventHint]], Awaitable[None]]) -> None:
            async with room:
                try:
                    await do([event.hint for event in group])
                except PaymentError as error:
                    await self._postpone(group, error)

        await asyncio.gather(
            *(one(group, self._payment_changed) for group in looks.values()),
            *(one([event], self._customer_changed) for event in changes),
        )

    async def _postpone(self, group: Sequence[PendingEvent], error: PaymentError) -> None:
        attempts = max(event.attempts for event in group)
        due_at = self.now() + RETRY_EVENT_S[min(attempts, len(RETRY_EVENT_S) - 1)]
        ids = tuple(event.hint.event_id for event in group)
        log.warning("events_postponed", events=ids, error=str(error), attempts=attempts)
        await self.tell(MarkEvents(ids, "pending", str(error), due_at), EventsMarked)

    async def _payment_changed(self, hints: Sequence[EventHint]) -> None:
        topup = await self._topup_of(hints[0])
        if topup is not None:
            await self.look(topup.topup_id, hints)
            return
        customer_id = await asyncio.to_thread(self.reader.customer_of, hints[0].provider_customer)
        invoice = await invoices.invoice_of(self, hints[0], customer_id)
        if invoice is not None:
            await invoices.look_at_invoice(self, invoice, hints)
            return
        log.warning("payment_is_not_ours", event_id=hints[0].event_id, type=hints[0].type)
        ids = tuple(hint.event_id for hint in hints)
        await self.tell(MarkEvents(ids, "unmatched", "no top-up of ours"), EventsMarked)

    async def _topup_of(self, hint: EventHint) -> Topup | None:
        """By what the event names; a payment that is unknown is asked which top-up it is of."""
        if hint.topup_id:
            return await asyncio.to_thread(self.reader.topup, hint.topup_id)
        found = await asyncio.to_thread(self.reader.topup_by_payment, hint.payment_intent, hint.session_id)
        if found is not None or not hint.payment_intent:
            return found
        try:
            topup_id, _ = await self.gateway.topup_of(hint.payment_intent)
        except StripeRefused:
            return None
        return await asyncio.to_thread(self.reader.topup, topup_id) if topup_id else None

    async def _customer_changed(self, hints: Sequence[EventHint]) -> None:
        """A card or a customer is gone: automatic top-ups have nothing to charge."""
        [hint] = hints
        ids = (hint.event_id,)
        customer_id = await asyncio.to_thread(self.reader.customer_of, hint.provider_customer)
        if hint.type == "payment_method.automatically_updated":
            await self.tell(MarkEvents(ids, "ignored"), EventsMarked)
        elif customer_id is None:
            # A detached card no longer says whose it was; charging it will be refused.
            await self.tell(MarkEvents(ids, "unmatched", "no customer of ours"), EventsMarked)
        else:
            gone = DisarmAutoTopup(customer_id, f"{hint.type} at Stripe", ids, forget_method=True)
            await self.tell(gone, AutoTopupSet)

    async def look(self, topup_id: str, hints: Iterable[EventHint] = (), payment_intent: str = "") -> Topup:
        """Look at a payment and bring the balance to what is seen: the one way in which money comes and goes.

        The answer may be older than what another look has applied meanwhile; then the ledger says so, and this one
        looks again.

        Raises:
            StripeUnavailable, StripeRefused: nothing was applied.
        """
        hints = list(hints)
        for _ in range(MAX_STALE):
            topup = await asyncio.to_thread(self.reader.topup, topup_id)
            assert topup is not None, topup_id
            sessions = (topup.session_id, *(hint.session_id for hint in hints))
            intents = (topup.payment_intent, payment_intent, *(hint.payment_intent for hint in hints))
            seen = await self.gateway.see(next(filter(None, sessions), ""), next(filter(None, intents), ""))
            applied = await self.tell(self._effect(topup, seen, hints), PaymentApplied, PaymentStale)
            if isinstance(applied, PaymentApplied):
                if applied.topup.state != topup.state:
                    log.info("topup", topup=topup_id, state=applied.topup.state, problem=applied.topup.problem)
                return applied.topup
        raise StripeUnavailable("the payment changes faster than it can be read")

    def _effect(self, topup: Topup, seen: PaymentSeen, hints: Sequence[EventHint]) -> ApplyPayment:
        verdict = judge(topup, seen, self.config.livemode)
        source = f"stripe:{seen.payment_intent}"
        public_id = hints[0].event_id if hints else f"rec_{seen.payment_intent or topup.topup_id}"
        effects: list[Credit | Reverse] = []
        if verdict.granted_cents:
            granted = Mils(verdict.granted_cents * MILS_PER_CENT)
            name = "Stripe Checkout top-up" if topup.kind == "checkout" else "Automatic top-up"
            effects.append(Credit(topup.customer_id, granted, source, public_id, f"{name} · {dollars(granted)}"))
            target = Mils(verdict.reversed_cents * MILS_PER_CENT)
            effects.append(Reverse(source, target, public_id, f"reversal · {name} of {dollars(granted)}"))
        suspicions = (SUSPICIOUS_TYPES[hint.type] for hint in hints if hint.type in SUSPICIOUS_TYPES)
        return ApplyPayment(
            topup_id=topup.topup_id,
            revision=topup.revision,
            state=verdict.state,
            problem=verdict.problem,
            session_id=seen.session_id,
            payment_intent=seen.payment_intent,
            payment_method=seen.payment_method if verdict.state == "paid" and topup.kind == "checkout" else "",
            suspicion=next(suspicions, ""),
            event_ids=tuple(hint.event_id for hint in hints),
            movements=seen.movements,
            effects=tuple(effects),
        )

    # Top-ups that nobody has to ask for.

    async def set_auto_topup(self, customer_id: CustomerId, terms: AutoTopup) -> AutoTopup:
        done = await self.tell(SetAutoTopup(customer_id, terms), AutoTopupSet)
        assert done.terms is not None
        return done.terms

    async def top_up_low_balances(self) -> int:
        """Charge for every balance below its threshold; returns how many charges were begun."""
        low = await asyncio.to_thread(self.reader.below_threshold, self.now(), MAX_AUTO_PER_LOOK)
        begun = [await self.shortage(customer_id) for customer_id in low]
        return sum(topup is not None for topup in begun)

    async def shortage(self, customer_id: CustomerId, requested_mils: Mils = Mils(0)) -> Topup | None:
        """Charge if the customer agreed to that and it is due: after a refusal for want of `requested_mils`, or because
        the balance is low. Any number of calls at once is one charge."""
        started = await self.tell(
            StartAutoTopup(mint_topup_id(), customer_id, requested_mils), TopupOpened, AutoTopupHeld
        )
        if isinstance(started, AutoTopupHeld):
            log.info("auto_topup_held", customer=customer_id, reason=started.reason)
            return None
        log.info("auto_topup", topup=started.topup.topup_id, customer=customer_id, reason=started.topup.reason)
        try:
            return await self.charge(started.topup)
        except PaymentError as error:  # it stays in flight, and the sweep goes on with it
            log.warning("auto_topup_unfinished", topup=started.topup.topup_id, error=str(error))
            return started.topup

    async def charge(self, topup: Topup) -> Topup:
        """Carry an automatic top-up on: from the beginning, or from wherever it was left."""
        customer = await asyncio.to_thread(self.reader.customer, topup.customer_id)
        assert customer is not None, "it was begun with a saved card"

        async def find() -> str | None:
            return await self.gateway.find_charge(topup.topup_id, customer.provider_customer, topup.created_at)

        async def ask(attempt: int) -> str:
            return await self.gateway.charge(
                topup_id=topup.topup_id,
                customer_id=topup.customer_id,
                provider_customer=customer.provider_customer,
                payment_method=topup.payment_method,
                amount_cents=topup.amount_cents,
                description=f"Automatic top-up: {topup.reason}",
                idempotency_key=f"auto:{topup.topup_id}:{attempt}",
            )

        intent = topup.payment_intent or await find()
        if not intent:
            try:
                intent = await self._ask_once_more(topup, ask, find)
            except CardDeclined as declined:
                intent = declined.payment_intent or await find()
                if not intent:
                    return await self._give_up(topup, str(declined))
            except StripeRefused as refused:
                return await self._give_up(topup, str(refused))
        return await self.look(topup.topup_id, payment_intent=str(intent))

    async def _give_up(self, topup: Topup, problem: str) -> Topup:
        """Stripe will not charge at all: the card is gone, say. Counts as a decline."""
        applied = await self.tell(
            ApplyPayment(topup.topup_id, topup.revision, "failed", problem),
            PaymentApplied,
            PaymentStale,
        )
        return applied.topup if isinstance(applied, PaymentApplied) else await self.look(topup.topup_id)


def mint_topup_id() -> str:
    return f"top_{secrets.token_hex(16)}"
