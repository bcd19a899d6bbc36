"""Postpaid: a month is closed, asked for by an invoice whose total is ours to the cent, and paid, or it stops spending.

What an invoice cannot ask for, fractions of a cent, stays in the balance and so comes into the next one.
"""

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime
from decimal import Decimal
from heapq import nlargest
from itertools import groupby
from operator import attrgetter
from typing import TYPE_CHECKING

import structlog

from billing.commands import CloseStatement, Credit, CustomerId, Reverse, SetCreditLine, StatementClosed
from billing.money import MILS_PER_CENT, MILS_PER_USD, Mils, dollars
from billing.payments.commands import (
    ApplyInvoice,
    EventHint,
    Invoice,
    InvoiceOpened,
    InvoiceState,
    OpenInvoice,
    PaymentStale,
    RenumberInvoice,
)
from billing.payments.reader import UnitsFee, UsedAt
from deployments.payments.config import MAX_STALE
from deployments.payments.errors import PaymentError, StripeFailed, StripeUnavailable
from deployments.payments.gateway import InvoiceLine, InvoiceSeen

if TYPE_CHECKING:
    from deployments.payments.service import Payments

CLOSE_AFTER_S = 3_600.0
"""Into the next month, so that what ran over its end has settled."""
MAX_RATES = 10
"""Of one model, each with a line of its own."""
MAX_CANDIDATES = 5
"""Unpaid invoices that an event of an unknown payment is compared with."""
STATES: dict[str, InvoiceState] = {
    "open": "open",
    "paid": "paid",
    "void": "void",
    "uncollectible": "uncollectible",
}

log = structlog.get_logger(__name__)


async def bill_last_month(payments: "Payments") -> int:
    """Close the last month of every postpaid customer and ask for what it left owed; how many were looked at."""
    period = _month_before(payments.now() - CLOSE_AFTER_S)
    done = 0
    for customer_id, _, _ in await asyncio.to_thread(payments.reader.postpaid):
        if await asyncio.to_thread(payments.reader.invoice, customer_id, period) is None:
            try:
                await payments.tell(CloseStatement(customer_id, period), StatementClosed)
                await payments.tell(OpenInvoice(customer_id, period), InvoiceOpened)
            except PaymentError as error:  # a later month is closed: what this one left owed is in that
                log.error("month_not_billed", customer=customer_id, period=period, error=str(error))
    for invoice in await asyncio.to_thread(payments.reader.unpaid_invoices, payments.now()):
        try:
            await look_at_invoice(payments, invoice)
            done += 1
        except PaymentError as error:  # it is looked at again at the next turn
            log.warning("invoice_unfinished", customer=invoice.customer_id, period=invoice.period, error=str(error))
    return done


async def look_at_invoice(payments: "Payments", invoice: Invoice, hints: Sequence[EventHint] = ()) -> Invoice:
    """Make it if need be, then bring the balance and the credit line to what is seen of it.

    Raises:
        StripeUnavailable, StripeRefused: nothing was applied.
    """
    for _ in range(MAX_STALE):
        known = await asyncio.to_thread(payments.reader.invoice, invoice.customer_id, invoice.period)
        assert known is not None
        invoice_id = known.invoice_id or await _make(payments, known)
        seen = await payments.gateway.see_invoice(invoice_id)
        applied = await payments.tell(await _effect(payments, known, seen, hints), InvoiceOpened, PaymentStale)
        if isinstance(applied, InvoiceOpened):
            assert applied.invoice is not None
            return applied.invoice
    raise StripeUnavailable("the invoice changes faster than it can be read")


async def _make(payments: "Payments", invoice: Invoice) -> str:
    """A finalised invoice at Stripe whose total is ours. A draft that an earlier attempt left is thrown away."""
    provider_customer = await payments.provider_customer(invoice.customer_id)
    found = await payments.gateway.find_invoice(invoice.period, provider_customer, invoice.created_at)
    if found is not None and found.status != "draft":
        return found.invoice_id
    if found is not None:
        await payments.gateway.delete_invoice(found.invoice_id)
        invoice = await _renumber(payments, invoice, "an earlier draft was thrown away")
    used = await asyncio.to_thread(payments.reader.usage_by_rate, invoice.customer_id, invoice.period)
    fees = await asyncio.to_thread(payments.reader.unit_fees, invoice.customer_id, invoice.period)
    in_one = [InvoiceLine(f"Usage until the end of {invoice.period}", invoice.amount_cents)]
    for lines in (_lines(invoice, used, fees), in_one):
        try:
            draft = await payments.gateway.draft_invoice(
                customer_id=invoice.customer_id,
                provider_customer=provider_customer,
                period=invoice.period,
                lines=lines,
                idempotency_key=f"inv:{invoice.customer_id}:{invoice.period}:{invoice.attempt}",
            )
            if draft.total == invoice.amount_cents:
                return await payments.gateway.finalize_invoice(draft.invoice_id)
        except StripeFailed:  # its keys would answer so again; the next turn finds what there is
            await _renumber(payments, invoice, "Stripe failed while it was made")
            raise
        log.error("invoice_total_differs", invoice=draft.invoice_id, total=draft.total, ours=invoice.amount_cents)
        await payments.gateway.delete_invoice(draft.invoice_id)
        invoice = await _renumber(payments, invoice, f"Stripe made it {draft.total} cents")
    raise StripeUnavailable(f"its invoice of {invoice.period} does not come to {invoice.amount_cents} cents")


async def _renumber(payments: "Payments", invoice: Invoice, problem: str) -> Invoice:
    again = RenumberInvoice(invoice.customer_id, invoice.period, invoice.attempt, problem)
    renumbered = (await payments.tell(again, InvoiceOpened)).invoice
    assert renumbered is not None
    return renumbered


def _lines(invoice: Invoice, used: Sequence[UsedAt], fees: Sequence[UnitsFee]) -> list[InvoiceLine]:
    """Whole cents of each model at each rate and of each model's units, and what is left to the total: fractions, and
    what was owed or paid before."""
    mils = {f"{fee.units} provisioned units · {fee.model} · {fee.period}": fee.mils for fee in fees}
    for model, rates in groupby(used, key=attrgetter("model")):
        known = nlargest(MAX_RATES, at := list(rates), key=lambda each: abs(each.mils))
        for each in at:
            rate = f"{_per_frame(each)} a frame" if each in known else "other rates"
            name = f"{model} · {invoice.period} · {rate}"
            mils[name] = Mils(mils.get(name, 0) + each.mils)
    lines = [InvoiceLine(name, amount // MILS_PER_CENT) for name, amount in mils.items()]
    lines = [line for line in lines if line.amount_cents]
    rest = invoice.amount_cents - sum(line.amount_cents for line in lines)
    return [*lines, InvoiceLine("Brought forward, payments and fractions of a cent", rest)] if rest else lines


def _per_frame(used: UsedAt) -> str:
    """Nine digits: requests that cross a tier's boundary have a rate in between."""
    exact = Decimal(used.mils_per_frame) / used.per_frames / MILS_PER_USD
    return f"${round(exact, 9).normalize():f}"


async def _effect(
    payments: "Payments", invoice: Invoice, seen: InvoiceSeen, hints: Sequence[EventHint]
) -> ApplyInvoice:
    state = STATES.get(seen.status, invoice.state)
    if state == "open" and seen.due_at is not None and seen.due_at <= payments.now():
        state = "overdue"
    public_id = hints[0].event_id if hints else f"rec_{seen.invoice_id}"
    effects: list[Credit | Reverse | SetCreditLine] = []
    if state == "paid":
        # Paid in full, whoever took the money: in Stripe's books, or outside them.
        source = f"stripe:{seen.payment.payment_intent or seen.invoice_id}"
        amount = Mils(invoice.amount_cents * MILS_PER_CENT)
        back = Mils(min(invoice.amount_cents, seen.payment.refunded + max(0, seen.payment.withdrawn)) * MILS_PER_CENT)
        detail = f"Invoice {invoice.period} · {dollars(amount)}"
        effects.append(Credit(invoice.customer_id, amount, source, public_id, detail))
        effects.append(Reverse(source, back, public_id, f"reversal · {detail}"))
    line = await _credit_line(payments, invoice, state)
    if line is not None:
        effects.append(line)
    return ApplyInvoice(
        customer_id=invoice.customer_id,
        period=invoice.period,
        revision=invoice.revision,
        state=state,
        invoice_id=seen.invoice_id,
        payment_intent=seen.payment.payment_intent,
        url=seen.url,
        event_ids=tuple(hint.event_id for hint in hints),
        movements=seen.payment.movements,
        effects=tuple(effects),
    )


async def _credit_line(payments: "Payments", invoice: Invoice, state: InvoiceState) -> SetCreditLine | None:
    """While any invoice is overdue its customer spends nothing on credit; None when that is so already."""
    limits = {each[0]: each[1:] for each in await asyncio.to_thread(payments.reader.postpaid)}
    if invoice.customer_id not in limits:
        return None
    limit, floor = limits[invoice.customer_id]
    others = await asyncio.to_thread(payments.reader.invoices, invoice.customer_id)
    states = {each.period: each.state for each in others} | {invoice.period: state}
    overdue = any(each in ("overdue", "uncollectible") for each in states.values())
    return None if overdue == (floor == 0) else SetCreditLine(invoice.customer_id, limit, overdue)


async def invoice_of(payments: "Payments", hint: EventHint, customer_id: CustomerId | None) -> Invoice | None:
    """The invoice that an event is about, though perhaps it is not yet known by that name."""
    found = await asyncio.to_thread(payments.reader.invoice_by, hint.invoice_id, hint.payment_intent)
    if found is not None or customer_id is None:
        return found
    unpaid = [each for each in await asyncio.to_thread(payments.reader.invoices, customer_id) if each.state != "paid"]
    for each in unpaid[-MAX_CANDIDATES:]:
        if await _is_about(payments, hint, each):
            return each
    return None


async def _is_about(payments: "Payments", hint: EventHint, invoice: Invoice) -> bool:
    """Whether Stripe says so: an event about something unknown is nobody's."""
    invoice_id = invoice.invoice_id
    if not invoice_id:  # it was made, and the answer was lost
        provider_customer = await payments.provider_customer(invoice.customer_id)
        made = await payments.gateway.find_invoice(invoice.period, provider_customer, invoice.created_at)
        invoice_id = "" if made is None else made.invoice_id
    if not invoice_id or hint.invoice_id:
        return bool(invoice_id) and hint.invoice_id == invoice_id
    seen = await payments.gateway.see_invoice(invoice_id)
    return hint.payment_intent != "" and hint.payment_intent == seen.payment.payment_intent


def _month_before(now: float) -> str:
    date = datetime.fromtimestamp(now, UTC)
    year, month = (date.year, date.month - 1) if date.month > 1 else (date.year - 1, 12)
    return f"{year:04d}-{month:02d}"
