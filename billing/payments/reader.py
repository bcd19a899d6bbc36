"""Read-only questions about payments, for processes that never write them."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from sqlalchemy import Engine, Row, and_, case, func, select

from billing.commands import CustomerId
from billing.money import MILS_PER_CENT, Mils
from billing.payments.commands import AutoTopup, EventHint, Invoice, Topup
from billing.payments.records import auto_topup_of, topup_of
from billing.payments.tables import (
    auto_topup,
    stripe_cursor,
    stripe_customer,
    stripe_event,
    stripe_invoice,
    stripe_movement,
    stripe_report,
    topup,
)
from billing.tables import entry, payment, reservation, statement, unit_charge, wallet

MAX_MISMATCHES = 100
UNFINISHED = ("new", "open", "charging", "processing")

AnyRow = Row[*tuple[Any, ...]]


@dataclass(frozen=True, slots=True)
class ProviderCustomer:
    provider_customer: str
    payment_method: str


@dataclass(frozen=True, slots=True)
class PendingEvent:
    hint: EventHint
    attempts: int
    received_at: float


@dataclass(frozen=True, slots=True)
class ReportRecord:
    day: int
    body: str
    signature: str
    difference_cents: int
    filed_at: float


@dataclass(frozen=True, slots=True)
class MovementRecord:
    movement_id: str
    customer_id: CustomerId
    source: str
    kind: str
    amount_cents: int
    created: float


@dataclass(frozen=True, slots=True)
class UsedAt:
    """What a month's entries for one model come to at one rate: each volume discount is a rate of its own."""

    model: str
    mils_per_frame: Mils
    per_frames: int
    """The rate is `mils_per_frame` for so many frames."""
    mils: Mils


@dataclass(frozen=True, slots=True)
class UnitsFee:
    model: str
    period: str
    units: int
    mils: Mils


@dataclass(frozen=True, slots=True)
class InboxHealth:
    pending: int
    oldest_received_at: float | None
    newest_received_at: float | None
    unmatched: int


class PaymentsReader:
    """Safe to share between threads. Every method raises one of `DATABASE_FAILURES` when the database fails."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def topup(self, topup_id: str) -> Topup | None:
        return self._topup(topup.c.topup_id == topup_id)

    def topup_by_payment(self, payment_intent: str, session_id: str) -> Topup | None:
        """The one that this payment or this page belongs to; empty ids belong to none."""
        if payment_intent:
            found = self._topup(topup.c.payment_intent == payment_intent)
            if found is not None:
                return found
        return self._topup(topup.c.session_id == session_id) if session_id else None

    def unfinished(self, before: float, at_most: int) -> list[Topup]:
        """Those that nothing was heard of since `before`, longest silent first."""
        stale = select(topup).where(topup.c.state.in_(UNFINISHED), topup.c.updated_at <= before)
        return [topup_of(row) for row in self._all(stale.order_by(topup.c.updated_at).limit(at_most))]

    def topups_since(self, created_at: float, at_most: int) -> list[Topup]:
        recent = select(topup).where(topup.c.created_at >= created_at).order_by(topup.c.created_at, topup.c.topup_id)
        return [topup_of(row) for row in self._all(recent.limit(at_most))]

    def customer(self, customer_id: CustomerId) -> ProviderCustomer | None:
        row = self._first(select(stripe_customer).where(stripe_customer.c.customer_id == customer_id))
        return None if row is None else ProviderCustomer(row.provider_customer, row.payment_method)

    def customer_of(self, provider_customer: str) -> CustomerId | None:
        mine = select(stripe_customer.c.customer_id).where(stripe_customer.c.provider_customer == provider_customer)
        row = self._first(mine)
        return None if row is None else row.customer_id

    def customers(self) -> dict[str, CustomerId]:
        """From the provider's name to ours."""
        rows = self._all(select(stripe_customer.c.provider_customer, stripe_customer.c.customer_id))
        return {row.provider_customer: row.customer_id for row in rows}

    def pending_events(self, now: float, at_most: int) -> list[PendingEvent]:
        due = select(stripe_event).where(stripe_event.c.state == "pending", stripe_event.c.due_at <= now)
        rows = self._all(due.order_by(stripe_event.c.due_at, stripe_event.c.event_id).limit(at_most))
        return [
            PendingEvent(
                EventHint(
                    row.event_id,
                    row.type,
                    row.created,
                    row.object_id,
                    row.topup_id,
                    row.session_id,
                    row.payment_intent,
                    row.invoice_id,
                    row.provider_customer,
                ),
                row.attempts,
                row.received_at,
            )
            for row in rows
        ]

    def event_states(self, event_ids: list[str]) -> dict[str, str]:
        rows = self._all(
            select(stripe_event.c.event_id, stripe_event.c.state).where(stripe_event.c.event_id.in_(event_ids))
        )
        return {row.event_id: row.state for row in rows}

    def auto_topup(self, customer_id: CustomerId) -> AutoTopup | None:
        row = self._first(select(auto_topup).where(auto_topup.c.customer_id == customer_id))
        return None if row is None else auto_topup_of(row)

    def below_threshold(self, now: float, at_most: int) -> list[CustomerId]:
        """Customers whose automatic top-up may be due."""
        low = (
            select(auto_topup.c.customer_id)
            .join_from(auto_topup, wallet, wallet.c.customer_id == auto_topup.c.customer_id)
            .join(
                stripe_customer,
                and_(stripe_customer.c.customer_id == auto_topup.c.customer_id, stripe_customer.c.payment_method != ""),
            )
            .where(
                auto_topup.c.enabled == 1,
                auto_topup.c.retry_at <= now,
                wallet.c.balance_mils < auto_topup.c.threshold_mils,
                ~select(topup.c.topup_id)
                .where(topup.c.customer_id == auto_topup.c.customer_id, topup.c.kind == "auto")
                .where(topup.c.state.in_(("charging", "processing")))
                .exists(),
            )
            .limit(at_most)
        )
        return [row.customer_id for row in self._all(low)]

    def last_auto_topup(self, customer_id: CustomerId) -> Topup | None:
        newest = select(topup).where(topup.c.customer_id == customer_id, topup.c.kind == "auto")
        row = self._first(newest.order_by(topup.c.created_at.desc(), topup.c.topup_id.desc()).limit(1))
        return None if row is None else topup_of(row)

    def cursor(self, name: str) -> float | None:
        row = self._first(select(stripe_cursor.c.value).where(stripe_cursor.c.name == name))
        return None if row is None else row.value

    def report(self, day: int | None = None) -> ReportRecord | None:
        """Of one day, or the newest."""
        wanted = select(stripe_report).order_by(stripe_report.c.day.desc()).limit(1)
        row = self._first(wanted if day is None else wanted.where(stripe_report.c.day == day))
        return None if row is None else ReportRecord(**row._mapping)

    def postpaid(self) -> list[tuple[CustomerId, Mils, Mils]]:
        """(customer, credit limit, floor) of each that may owe."""
        rows = self._all(select(wallet).where(wallet.c.credit_limit_mils > 0).order_by(wallet.c.customer_id))
        return [(row.customer_id, row.credit_limit_mils, row.floor_mils) for row in rows]

    def invoice(self, customer_id: CustomerId, period: str) -> Invoice | None:
        mine = stripe_invoice.c.customer_id == customer_id
        return next(iter(self._invoices(mine, stripe_invoice.c.period == period)), None)

    def invoice_by(self, invoice_id: str, payment_intent: str) -> Invoice | None:
        """By either of its names at the provider; empty ids name none."""
        for column, value in (
            (stripe_invoice.c.invoice_id, invoice_id),
            (stripe_invoice.c.payment_intent, payment_intent),
        ):
            if value and (found := self._invoices(column == value)):
                return found[0]
        return None

    def invoices(self, customer_id: CustomerId) -> list[Invoice]:
        return self._invoices(stripe_invoice.c.customer_id == customer_id)

    def unpaid_invoices(self, before: float) -> list[Invoice]:
        """Those that nothing was heard of since `before`."""
        return self._invoices(
            stripe_invoice.c.state.in_(("new", "open", "overdue")), stripe_invoice.c.updated_at <= before
        )

    def usage_by_rate(self, customer_id: CustomerId, period: str) -> list[UsedAt]:
        """What the entries of a closed month cost, by model and rate, dearest rate first."""
        rate = (reservation.c.model, reservation.c.mils_per_frame, reservation.c.per_frames)
        used = (
            select(*rate, func.sum(-entry.c.amount).label("mils"))
            .join_from(statement, entry, entry.c.customer_id == statement.c.customer_id)
            .join(reservation, reservation.c.request_id == entry.c.public_id)
            .where(statement.c.customer_id == customer_id, statement.c.period == period)
            .where(entry.c.seq > statement.c.from_seq, entry.c.seq <= statement.c.to_seq)
            .where(entry.c.kind.in_(("debit", "refund")))
            .group_by(*rate)
        )
        rows = [
            UsedAt(row.model or "rollouts", row.mils_per_frame, row.per_frames, Mils(int(row.mils)))
            for row in self._all(used)
        ]
        return sorted(rows, key=lambda each: (each.model, -Fraction(each.mils_per_frame, each.per_frames)))

    def unit_fees(self, customer_id: CustomerId, period: str) -> list[UnitsFee]:
        """The provisioned units that a closed month was charged for."""
        mine = (unit_charge.c.customer_id == statement.c.customer_id, statement.c.customer_id == customer_id)
        fees = (
            select(unit_charge.c.model, unit_charge.c.period, unit_charge.c.units, unit_charge.c.amount)
            .where(*mine, statement.c.period == period)
            .where(unit_charge.c.entry_seq > statement.c.from_seq, unit_charge.c.entry_seq <= statement.c.to_seq)
            .order_by(unit_charge.c.model, unit_charge.c.period)
        )
        return [UnitsFee(*row) for row in self._all(fees)]

    def _invoices(self, *conditions: Any) -> list[Invoice]:
        rows = self._all(select(stripe_invoice).where(*conditions).order_by(stripe_invoice.c.period))
        return [Invoice(**row._mapping) for row in rows]

    def movements(self, since: float, until: float) -> list[MovementRecord]:
        """What the provider moved in [since, until), as far as we know."""
        moved = select(stripe_movement).where(stripe_movement.c.created >= since, stripe_movement.c.created < until)
        return [MovementRecord(*row) for row in self._all(moved)]

    def owners_of_payments(self, payment_intents: list[str]) -> dict[str, CustomerId]:
        owners: dict[str, CustomerId] = {}
        for first in range(0, len(payment_intents), 500):
            part = payment_intents[first : first + 500]
            for table in (topup, stripe_invoice):
                mine = select(table.c.payment_intent, table.c.customer_id).where(table.c.payment_intent.in_(part))
                owners.update({row.payment_intent: row.customer_id for row in self._all(mine)})
        return owners

    def held_of_payments(self) -> dict[CustomerId, int]:
        """What the ledger holds of each customer's payments now, in mils: granted less taken back."""
        held = select(payment.c.customer_id, func.sum(payment.c.granted - payment.c.reversed).label("held"))
        mine = held.where(payment.c.source.like("stripe:%")).group_by(payment.c.customer_id)
        return {row.customer_id: int(row.held) for row in self._all(mine)}

    def ledger_mismatches(self) -> list[dict[str, Any]]:
        """Payments of which the ledger holds another amount than the provider's movements add up to.

        An invoice that was paid outside the provider's books has none, and is not compared.
        """
        outside = select("stripe:" + stripe_invoice.c.invoice_id).where(
            stripe_invoice.c.state == "paid", stripe_invoice.c.payment_intent == ""
        )
        moved = (
            select(stripe_movement.c.source, func.sum(stripe_movement.c.amount_cents).label("moved"))
            .group_by(stripe_movement.c.source)
            .subquery()
        )
        held = payment.c.granted - payment.c.reversed
        least = case((moved.c.moved > 0, moved.c.moved), else_=0)
        wrong = (
            select(payment.c.source, payment.c.customer_id, held.label("held_mils"), least.label("moved_cents"))
            .join_from(payment, moved, moved.c.source == payment.c.source, isouter=True)
            .where(payment.c.source.like("stripe:%"), func.coalesce(least, 0) * MILS_PER_CENT != held)
            .where(payment.c.source.not_in(outside))
            .limit(MAX_MISMATCHES)
        )
        return [
            {
                "source": row.source,
                "customer_id": row.customer_id,
                "difference_cents": int(row.moved_cents or 0) - row.held_mils // MILS_PER_CENT,
            }
            for row in self._all(wrong)
        ]

    def inbox(self) -> InboxHealth:
        counts = select(
            func.count().filter(stripe_event.c.state == "pending").label("pending"),
            func.min(stripe_event.c.received_at).filter(stripe_event.c.state == "pending").label("oldest_received_at"),
            func.max(stripe_event.c.received_at).label("newest_received_at"),
            func.count().filter(stripe_event.c.state == "unmatched").label("unmatched"),
        )
        row = self._first(counts)
        assert row is not None
        return InboxHealth(**row._mapping)

    def _topup(self, condition: Any) -> Topup | None:
        row = self._first(select(topup).where(condition))
        return None if row is None else topup_of(row)

    def _first(self, statement: Any) -> AnyRow | None:
        with self._engine.connect() as connection:
            return connection.execute(statement).first()

    def _all(self, statement: Any) -> list[AnyRow]:
        with self._engine.connect() as connection:
            return list(connection.execute(statement))
