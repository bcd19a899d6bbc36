"""What heals a missed webhook, and what proves that nothing was missed: three loops over the same one function.

Events are listed again from where the last sweep began; payments that nothing was heard of are looked at; and every day
Stripe's books are compared with ours, movement by movement.
"""

import asyncio
import hashlib
import hmac
import json
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import structlog

from billing.payments.commands import (
    ApplyPayment,
    CursorSet,
    EventHint,
    EventsReceived,
    FileReport,
    NoteSession,
    PaymentApplied,
    PaymentStale,
    ReceiveEvents,
    ReportFiled,
    SetCursor,
    Topup,
    TopupNoted,
)
from billing.payments.reader import MovementRecord
from deployments.payments import events
from deployments.payments.errors import PaymentError
from deployments.payments.gateway import BookedMovement
from deployments.payments.service import MAX_CONCURRENT, Payments

DAY_S = 86_400
MAX_TYPES = 20
"""Stripe lists events of at most so many types at once."""
OVERLAP_S = 3_600.0
"""Events may be listed later than they were created."""
FIRST_LOOK_BACK_S = 3 * DAY_S
"""Of the first sweep. Stripe keeps events for 30 days."""
MAX_OBJECTS = 500
"""Payments that one sweep looks at."""
EVENTS_PER_COMMAND = 100
LOOK_BACK_DAYS = 3
"""Days that the daily comparison looks for payments in that we do not know."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Report:
    """One day, compared. Amounts are cents; all differences are Stripe's less ours."""

    day: int
    body: str
    signature: str
    difference_cents: int
    """Of all customers, each without its sign."""


async def sweep_events(payments: Payments) -> int:
    """Put whatever Stripe lists and the inbox lacks into the inbox, and do what it asks for."""
    began = payments.now()
    cursor = await asyncio.to_thread(payments.reader.cursor, "events")
    since = (began - FIRST_LOOK_BACK_S if cursor is None else cursor) - OVERLAP_S
    types = (*events.TOPUP_TYPES, *events.CUSTOMER_TYPES, *events.INVOICE_TYPES)
    new = 0
    for first in range(0, len(types), MAX_TYPES):
        waiting: list[EventHint] = []
        async for event in payments.gateway.events(types[first : first + MAX_TYPES], since):
            try:
                waiting.append(events.hint_of(event))
            except events.NotAnEvent as error:  # whatever it was about is found by the other two loops
                log.error("listed_event_not_understood", event_id=str(event.get("id"))[:64], error=str(error))
                continue
            if len(waiting) == EVENTS_PER_COMMAND:
                new += await _receive(payments, waiting)
        new += await _receive(payments, waiting)
    await payments.tell(SetCursor("events", began), CursorSet)
    await payments.drain()
    if new:
        log.warning("webhooks_were_missed", events=new)
    return new


async def _receive(payments: Payments, waiting: list[EventHint]) -> int:
    if not waiting:
        return 0
    received = await payments.tell(ReceiveEvents(tuple(waiting), "sweep"), EventsReceived)
    waiting.clear()
    return received.new


async def sweep_objects(payments: Payments, older_than_s: float | None = None) -> int:
    """Look at every payment that is not finished and that nothing was heard of lately; returns at how many."""
    age_s = payments.config.object_age_s if older_than_s is None else older_than_s
    unfinished = await asyncio.to_thread(payments.reader.unfinished, payments.now() - age_s, MAX_OBJECTS)
    room = asyncio.Semaphore(MAX_CONCURRENT)

    async def one(topup: Topup) -> None:
        async with room:
            try:
                await _resume(payments, topup)
            except PaymentError as error:  # it is looked at again by the next sweep
                log.warning("payment_not_seen", topup=topup.topup_id, error=str(error))

    await asyncio.gather(*(one(topup) for topup in unfinished))
    return len(unfinished)


async def _resume(payments: Payments, topup: Topup) -> None:
    if topup.kind == "auto" and topup.state == "charging":
        await payments.charge(topup)
    elif topup.state == "new":
        await _find_page(payments, topup)
    else:
        await payments.look(topup.topup_id)


async def _find_page(payments: Payments, topup: Topup) -> None:
    """A top-up whose page was asked for, and no answer came."""
    customer = await asyncio.to_thread(payments.reader.customer, topup.customer_id)
    page = None
    if customer is not None:
        page = await payments.gateway.find_page(topup.topup_id, customer.provider_customer, topup.created_at)
    if page is not None:
        await payments.tell(NoteSession(topup.topup_id, page.session_id, page.url, page.expires_at), TopupNoted)
        await payments.look(topup.topup_id)
    elif payments.now() > topup.created_at + payments.config.page_ttl_s:
        given_up = ApplyPayment(topup.topup_id, topup.revision, "expired", "its page was never made")
        await payments.tell(given_up, PaymentApplied, PaymentStale)


async def find_unknown(payments: Payments, since: float) -> tuple[list[str], list[str]]:
    """Look at payments that name a top-up of ours and are not known to have been paid. The ids of those that name one
    that we do not have, and of those that could not be looked at."""
    unknown, unseen = [], []
    async for payment_intent, topup_id, _ in payments.gateway.payments_since(since):
        if not topup_id:
            continue
        topup = await asyncio.to_thread(payments.reader.topup, topup_id)
        if topup is None:
            unknown.append(payment_intent)
        elif topup.state != "paid":
            try:
                await payments.look(topup_id, payment_intent=payment_intent)
            except PaymentError as error:
                log.warning("payment_not_seen", topup=topup_id, error=str(error))
                unseen.append(payment_intent)
    return unknown, unseen


async def reconcile(payments: Payments, day: int, secret: bytes) -> Report:
    """Compare one day of UTC, per customer and to the cent, and file the report, signed."""
    since, until = float(day * DAY_S), float((day + 1) * DAY_S)
    unknown, unseen = await find_unknown(payments, since - LOOK_BACK_DAYS * DAY_S)
    booked = [each async for each in payments.gateway.movements(since, until)]
    ours = await asyncio.to_thread(payments.reader.movements, since, until)
    customers = await asyncio.to_thread(payments.reader.customers)
    owners = await asyncio.to_thread(
        payments.reader.owners_of_payments, [each.payment_intent for each in booked if each.payment_intent]
    )
    mismatches = await asyncio.to_thread(payments.reader.ledger_mismatches)
    body = _compare(day, booked, ours, customers, owners, unknown, unseen, mismatches)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    signature = hmac.new(secret, text.encode(), hashlib.sha256).hexdigest()
    difference = int(body["difference_cents"])
    await payments.tell(FileReport(day, text, signature, difference), ReportFiled)
    level = log.error if difference or unknown or unseen or mismatches else log.info
    level(
        "reconciled",
        day=day,
        difference_cents=difference,
        unknown=len(unknown),
        unseen=len(unseen),
        mismatches=len(mismatches),
    )
    return Report(day, text, signature, difference)


def _compare(
    day: int,
    booked: list[BookedMovement],
    ours: list[MovementRecord],
    customers: dict[str, Any],
    owners: dict[str, Any],
    unknown: list[str],
    unseen: list[str],
    mismatches: list[dict[str, Any]],
) -> dict[str, Any]:
    totals: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for each in booked:
        if each.movement.kind not in ("charge", "refund", "refund_failure", "dispute", "dispute_reversal"):
            continue  # payouts and fees are between Stripe and the operator
        owner = customers.get(each.provider_customer) or owners.get(each.payment_intent) or "unknown"
        totals[owner][0] += each.movement.amount_cents
    for record in ours:
        totals[record.customer_id][1] += record.amount_cents
    rows = {
        owner: {"stripe_cents": theirs, "ours_cents": mine, "difference_cents": theirs - mine}
        for owner, (theirs, mine) in sorted(totals.items())
    }
    return {
        "day": day,
        "customers": rows,
        "unknown_payments": unknown,
        "unseen_payments": unseen,
        "ledger_mismatches": mismatches,
        "difference_cents": sum(abs(row["difference_cents"]) for row in rows.values())
        + sum(abs(each["difference_cents"]) for each in mismatches),
    }
