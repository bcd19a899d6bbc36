"""Read-only questions about the ledger, for processes that never write it. Every answer is committed state."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Engine, Row, bindparam, case, func, literal_column, or_, select

from billing.commands import NO_TERMS, CustomerId, KeyId, KeyTerms, RequestId
from billing.core.teams import days_of_period
from billing.errors import UnknownWallet
from billing.money import Mils, part_of_rate
from billing.price_terms import version_of
from billing.prices import PriceVersion
from billing.store import terms_of
from billing.tables import (
    api_key,
    draw,
    entry,
    key_terms,
    membership,
    payment,
    payment_event,
    price,
    reservation,
    wallet,
)

MAX_TRANSACTIONS = 200
MAX_SEQ = 2**63 - 1

AnyRow = Row[*tuple[Any, ...]]
EntryKind = Literal["debit", "credit", "refund"]
SHOWN_AS: dict[str, EntryKind] = {
    "debit": "debit",
    "refund": "refund",
    "credit": "credit",
    "reversal": "debit",
    "reinstatement": "credit",
    "repayment": "debit",
    "transfer_out": "debit",
    "transfer_in": "credit",
    "fee": "debit",
}
"""Customers see three kinds of entries."""


@dataclass(frozen=True, slots=True)
class KeyRecord:
    """What a request needs to know about its key."""

    key_id: KeyId
    customer_id: CustomerId
    refill_per_s: float
    burst: int
    revoked: bool
    terms: KeyTerms = NO_TERMS
    """Whether it has expired is for whoever knows the time."""


@dataclass(frozen=True, slots=True)
class KeySummary:
    """What an operator sees of a key."""

    key_id: KeyId
    last4: str
    customer_id: CustomerId
    customer_name: str
    balance_mils: Mils
    """The customer's, whichever of its keys is listed."""
    refill_per_s: float
    burst: int
    created_at: float
    revoked_at: float | None
    terms: KeyTerms = NO_TERMS


@dataclass(frozen=True, slots=True)
class EntryRecord:
    """One row of a customer's transaction list."""

    seq: int
    public_id: str
    ts: float
    kind: EntryKind
    amount_mils: Mils
    """Signed: a debit is negative."""
    balance_after_mils: Mils
    detail: str


@dataclass(frozen=True, slots=True)
class ReservationRecord:
    request_id: RequestId
    customer_id: CustomerId
    key_id: KeyId
    frames: int
    mils_per_frame: Mils
    amount_mils: Mils
    captured_mils: Mils
    refunded_mils: Mils
    state: Literal["open", "settled"]
    reason: str
    lease_until: float
    created_at: float
    settled_at: float | None
    per_frames: int
    """The rate is `mils_per_frame` for so many frames."""
    frames_delivered: int | None
    frames_covered: int
    """That provisioned units pay for: the first ones to be delivered."""

    def cost(self, frames: int) -> Mils:
        """What is captured if so many are delivered."""
        return part_of_rate(max(0, frames - self.frames_covered), self.mils_per_frame, self.per_frames)


@dataclass(frozen=True, slots=True)
class CustomerRecord:
    customer_id: CustomerId
    name: str
    balance_mils: Mils
    seq: int
    """How many entries made this balance."""
    created_at: float
    credit_limit_mils: Mils
    floor_mils: Mils
    """How far down the balance may be spent."""
    debt_mils: Mils
    """What reversed payments took and the balance did not cover; it blocks spending until it is repaid."""


@dataclass(frozen=True, slots=True)
class PaymentRecord:
    source: str
    public_id: str
    customer_id: CustomerId
    granted_mils: Mils
    reversed_mils: Mils
    created_at: float


_TERMS = tuple(column for column in key_terms.c if column.name not in ("key_id", "budget_id"))
_KEY_BY_HASH = (
    select(
        api_key.c.key_id,
        api_key.c.customer_id,
        api_key.c.refill_per_s,
        api_key.c.burst,
        api_key.c.revoked_at,
        *_TERMS,
    )
    .join_from(api_key, key_terms, key_terms.c.key_id == api_key.c.key_id, isouter=True)
    .where(api_key.c.sha256 == bindparam("sha256"))
)
_parent = wallet.alias("parent")
_SPENDABLE = (
    select(
        wallet.c.balance_mils,
        wallet.c.floor_mils,
        wallet.c.debt_mils,
        membership.c.cap_mils,
        membership.c.cap_period,
        (_parent.c.balance_mils - _parent.c.floor_mils).label("parents_mils"),
    )
    .select_from(wallet)
    .outerjoin(membership, membership.c.customer_id == wallet.c.customer_id)
    .outerjoin(_parent, _parent.c.customer_id == membership.c.parent_id)
    .where(wallet.c.customer_id == bindparam("customer_id"))
)
_DRAWN = (
    select(
        func.sum(
            draw.c.drawn - case((reservation.c.refunded < draw.c.drawn, reservation.c.refunded), else_=draw.c.drawn)
        ).label("drawn")
    )
    .join_from(draw, reservation, reservation.c.request_id == draw.c.request_id)
    .where(draw.c.customer_id == bindparam("customer_id"))
    .where(draw.c.day >= bindparam("first"), draw.c.day < bindparam("after"))
)
_BALANCE = select(wallet.c.balance_mils).where(wallet.c.customer_id == bindparam("customer_id"))
_TRANSACTIONS = (
    select(
        entry.c.seq,
        entry.c.public_id,
        entry.c.ts,
        entry.c.kind,
        entry.c.amount,
        entry.c.balance_after,
        entry.c.detail,
    )
    .where(entry.c.customer_id == bindparam("customer_id"), entry.c.seq > 0, entry.c.seq < bindparam("before_seq"))
    .order_by(entry.c.seq.desc())
    .limit(bindparam("at_most"))
)
_KEYS = (
    select(
        api_key.c.key_id,
        api_key.c.last4,
        api_key.c.customer_id,
        wallet.c.name,
        wallet.c.balance_mils,
        api_key.c.refill_per_s,
        api_key.c.burst,
        api_key.c.created_at,
        api_key.c.revoked_at,
        *_TERMS,
    )
    .join_from(api_key, wallet, wallet.c.customer_id == api_key.c.customer_id)
    .outerjoin(key_terms, key_terms.c.key_id == api_key.c.key_id)
    .order_by(api_key.c.created_at, api_key.c.key_id)
)
_RESERVATION = select(
    reservation.c.request_id,
    reservation.c.customer_id,
    reservation.c.key_id,
    reservation.c.frames,
    reservation.c.mils_per_frame,
    reservation.c.amount,
    reservation.c.captured,
    reservation.c.refunded,
    reservation.c.state,
    reservation.c.reason,
    reservation.c.lease_until,
    reservation.c.created_at,
    reservation.c.settled_at,
    reservation.c.per_frames,
    reservation.c.frames_delivered,
    func.coalesce(reservation.c.covered, 0),
).where(reservation.c.request_id == bindparam("request_id"))
_DEBIT_DETAIL = select(entry.c.detail).where(
    entry.c.public_id == bindparam("request_id"), entry.c.kind == literal_column("'debit'")
)
_PAYMENT = select(
    payment.c.source,
    payment.c.public_id,
    payment.c.customer_id,
    payment.c.granted,
    payment.c.reversed,
    payment.c.created_at,
).where(payment.c.source == bindparam("source"))
_APPLIED_EVENTS = select(payment_event.c.event_id).where(
    payment_event.c.event_id.in_(bindparam("event_ids", expanding=True))
)
_PRICES = select(price).order_by(price.c.model, price.c.customer_id, price.c.version)
_CUSTOMER = (
    select(
        wallet.c.customer_id,
        wallet.c.name,
        wallet.c.balance_mils,
        wallet.c.seq,
        wallet.c.created_at,
        wallet.c.credit_limit_mils,
        wallet.c.floor_mils,
        wallet.c.debt_mils,
    )
    .where(or_(wallet.c.customer_id == bindparam("name_or_id"), wallet.c.name == bindparam("name_or_id")))
    # A customer may bear another one's id as its name; the id wins.
    .order_by((wallet.c.customer_id == bindparam("name_or_id")).desc())
    .limit(1)
)


class LedgerReader:
    """Safe to share between threads and to use beside the writer, in its process or another.

    Every method raises one of `DATABASE_FAILURES` when the database fails.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def key_by_token_hash(self, sha256: str) -> KeyRecord | None:
        row = self._first(_KEY_BY_HASH, sha256=sha256)
        if row is None:
            return None
        return KeyRecord(
            row.key_id, row.customer_id, row.refill_per_s, row.burst, row.revoked_at is not None, terms_of(row)
        )

    def balance(self, customer_id: CustomerId) -> Mils:
        """What can be spent now: what open reservations hold has already been debited.

        Raises:
            UnknownWallet: there is no such customer.
        """
        row = self._first(_BALANCE, customer_id=customer_id)
        if row is None:
            raise UnknownWallet(customer_id)
        return Mils(row.balance_mils)

    def spendable(self, customer_id: CustomerId, ts: float) -> Mils:
        """What can be spent now: of its own, credit line included, and of its team's up to a capped member's cap.

        Raises:
            UnknownWallet: there is no such customer.
        """
        row = self._first(_SPENDABLE, customer_id=customer_id)
        if row is None:
            raise UnknownWallet(customer_id)
        own = max(0, row.balance_mils - row.floor_mils)
        if row.cap_mils is None or row.debt_mils > 0:
            return Mils(own)
        first, after = days_of_period(ts, row.cap_period)
        drawn = self._first(_DRAWN, customer_id=customer_id, first=first, after=after)
        assert drawn is not None
        return Mils(own + max(0, min(row.cap_mils - int(drawn.drawn or 0), row.parents_mils)))

    def transactions(self, customer_id: CustomerId, limit: int, before_seq: int = MAX_SEQ) -> list[EntryRecord]:
        """The newest entries first, at least 1 and at most `MAX_TRANSACTIONS`; the opening entry is not one of them."""
        at_most = max(1, min(limit, MAX_TRANSACTIONS))
        rows = self._all(_TRANSACTIONS, customer_id=customer_id, at_most=at_most, before_seq=before_seq)
        return [shown(row) for row in rows]

    def keys(self) -> list[KeySummary]:
        """Every key, revoked ones too, in the order in which they were made."""
        return [_summary(row) for row in self._all(_KEYS)]

    def reservation(self, request_id: RequestId) -> ReservationRecord | None:
        row = self._first(_RESERVATION, request_id=request_id)
        return None if row is None else ReservationRecord(*row)

    def debit_detail(self, request_id: RequestId) -> str:
        """What a reservation said it is for; empty if there is none of that id."""
        row = self._first(_DEBIT_DETAIL, request_id=request_id)
        return "" if row is None else str(row.detail)

    def payment(self, source: str) -> PaymentRecord | None:
        row = self._first(_PAYMENT, source=source)
        return None if row is None else PaymentRecord(*row)

    def applied_events(self, event_ids: Sequence[str]) -> set[str]:
        """Those of a provider's messages that a committed credit or reversal took into account."""
        return {row.event_id for row in self._all(_APPLIED_EVENTS, event_ids=list(event_ids))}

    def prices(self) -> list[PriceVersion]:
        """Every version of every price, as `PriceBook` takes them."""
        rows = self._all(_PRICES)
        return [version_of(row.model, row.customer_id, row.version, row.effective_from, row.terms) for row in rows]

    def customer(self, name_or_id: str) -> CustomerRecord | None:
        row = self._first(_CUSTOMER, name_or_id=name_or_id)
        return None if row is None else CustomerRecord(*row)

    def _first(self, statement: Any, **parameters: object) -> AnyRow | None:
        with self._engine.connect() as connection:
            return connection.execute(statement, parameters).first()

    def _all(self, statement: Any, **parameters: object) -> list[AnyRow]:
        with self._engine.connect() as connection:
            return list(connection.execute(statement, parameters))


def shown(row: AnyRow) -> EntryRecord:
    """From a row in the order of `EntryRecord`'s fields."""
    return EntryRecord(row.seq, row.public_id, row.ts, SHOWN_AS[row.kind], *row[4:])


def _summary(row: AnyRow) -> KeySummary:
    return KeySummary(
        key_id=row.key_id,
        last4=row.last4,
        customer_id=row.customer_id,
        customer_name=row.name,
        balance_mils=row.balance_mils,
        refill_per_s=row.refill_per_s,
        burst=row.burst,
        created_at=row.created_at,
        revoked_at=row.revoked_at,
        terms=terms_of(row),
    )
