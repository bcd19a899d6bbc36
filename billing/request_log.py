"""A customer's requests, newest first: what each was, what became of its money, and pages in both directions.

A page is found by an index that begins with the customer, and it looks at no more than `MAX_EXAMINED` requests, however
few of them its filter lets through. Reads, never writes.
"""

from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Connection, Engine, Select, and_, case, func, select, tuple_

from billing.commands import CustomerId, KeyId, RequestId
from billing.errors import UnknownCursor
from billing.money import Mils
from billing.tables import api_key, entry, has_frames, key_terms, reservation

MAX_EXAMINED = 20_000

RequestState = Literal["open", "succeeded", "partial", "refunded"]
"""What became of its money: held, kept, kept in part, or given back."""


@dataclass(frozen=True, slots=True)
class RequestRecord:
    request_id: RequestId
    model: str
    """Empty for what an older version reserved."""
    key_id: KeyId
    key_last4: str
    key_label: str
    state: RequestState
    frames: int
    frames_delivered: int | None
    """None while it is open."""
    amount_mils: Mils
    """Debited when it was reserved."""
    refunded_mils: Mils
    reason: str
    """Why something was refunded."""
    created_at: float
    settled_at: float | None
    detail: str
    frames_covered: int
    """That provisioned units paid for, of those asked for."""

    @property
    def cost_mils(self) -> Mils:
        """What it costs as things stand."""
        return Mils(self.amount_mils - self.refunded_mils)


@dataclass(frozen=True, slots=True)
class RequestFilter:
    """Every field that is set must hold. Times are POSIX seconds, the first inclusive and the second not."""

    since: float | None = None
    until: float | None = None
    model: str | None = None
    key_id: str | None = None
    state: RequestState | None = None
    min_cost_mils: int | None = None
    max_cost_mils: int | None = None

    @property
    def selects(self) -> bool:
        """Whether it lets through only some of the requests of its time."""
        chosen = (self.model, self.key_id, self.state, self.min_cost_mils, self.max_cost_mils)
        return any(each is not None for each in chosen)


@dataclass(frozen=True, slots=True)
class RequestPage:
    """Newest first. A page may be short, even empty, although there are more: then `older` or `newer` goes on."""

    requests: tuple[RequestRecord, ...]
    older: RequestId | None
    """Where the next page of older ones begins; None if there are none."""
    newer: RequestId | None


_COST = reservation.c.amount - reservation.c.refunded
_STATE = case(
    (reservation.c.state == "open", "open"),
    (reservation.c.frames_delivered == reservation.c.frames, "succeeded"),
    (reservation.c.frames_delivered > 0, "partial"),
    else_="refunded",
)
DETAILS: Select[Any] = (
    select(
        reservation.c.request_id,
        reservation.c.model,
        reservation.c.key_id,
        api_key.c.last4,
        func.coalesce(key_terms.c.label, "").label("label"),
        _STATE.label("state"),
        reservation.c.frames,
        reservation.c.frames_delivered,
        reservation.c.amount,
        reservation.c.refunded,
        reservation.c.reason,
        reservation.c.created_at,
        reservation.c.settled_at,
        entry.c.detail,
        func.coalesce(reservation.c.covered, 0),
    )
    .join_from(
        reservation,
        entry,
        and_(entry.c.customer_id == reservation.c.customer_id, entry.c.seq == reservation.c.debit_seq),
    )
    .join(api_key, api_key.c.key_id == reservation.c.key_id)
    .outerjoin(key_terms, key_terms.c.key_id == reservation.c.key_id)
)
_PLACE = (reservation.c.created_at, reservation.c.debit_seq)
"""Orders a customer's requests; `ix_reservation_customer` holds it."""


class RequestLog:
    """Safe to share between threads and to use beside the writer, in its process or another.

    Every method raises one of `DATABASE_FAILURES` when the database fails.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def page(
        self,
        customer_id: CustomerId,
        where: RequestFilter,
        limit: int,
        after: str | None = None,
        before: str | None = None,
    ) -> RequestPage:
        """The newest `limit` requests; those older than the request `after`, or those next newer than `before`.

        Raises:
            UnknownCursor: `after` or `before` is not a request of this customer.
        """
        assert after is None or before is None
        cursor = after or before
        towards_newer = before is not None
        with self._engine.connect() as connection:
            ids, end = _ids(connection, customer_id, where, limit, cursor, towards_newer)
            rows = connection.execute(DETAILS.where(reservation.c.request_id.in_(ids)))
            found = {row.request_id: RequestRecord(*row) for row in rows}
        if towards_newer:
            ids.reverse()
            older = ids[-1] if ids else cursor
            return RequestPage(tuple(found[each] for each in ids), _id(older), end)
        newer = None if cursor is None else (ids[0] if ids else cursor)
        return RequestPage(tuple(found[each] for each in ids), end, _id(newer))

    def request(self, customer_id: CustomerId, request_id: str) -> RequestRecord | None:
        """One request, or None if this customer has none of that id."""
        statement = DETAILS.where(reservation.c.request_id == request_id, reservation.c.customer_id == customer_id)
        with self._engine.connect() as connection:
            row = connection.execute(statement).first()
        return None if row is None else RequestRecord(*row)


def _ids(
    connection: Connection,
    customer_id: CustomerId,
    where: RequestFilter,
    limit: int,
    cursor: str | None,
    towards_newer: bool,
) -> tuple[list[RequestId], RequestId | None]:
    """Up to `limit` ids away from the cursor, and from where to go on if there may be more."""
    order = [column.asc() if towards_newer else column.desc() for column in _PLACE]
    reach: Select[Any] = select(
        reservation.c.request_id,
        *_PLACE,
        reservation.c.model,
        reservation.c.key_id,
        _STATE.label("state"),
        _COST.label("cost"),
    ).where(*_of(customer_id, where))
    if cursor is not None:
        begin = connection.execute(
            select(*_PLACE).where(reservation.c.request_id == cursor, reservation.c.customer_id == customer_id)
        ).first()
        if begin is None:
            raise UnknownCursor(cursor)
        here, there = tuple_(*_PLACE), tuple_(*begin)
        reach = reach.where(here > there if towards_newer else here < there)
    reach = reach.order_by(*order)
    if not where.selects:
        ids = list(connection.execute(reach.limit(limit + 1)).scalars())
        return ids[:limit], ids[limit - 1] if len(ids) > limit else None
    examined = reach.limit(MAX_EXAMINED).subquery()
    place = (examined.c.created_at, examined.c.debit_seq)
    passing = (
        select(examined.c.request_id)
        .where(*_passes(examined.c, where))
        .order_by(*(column.asc() if towards_newer else column.desc() for column in place))
        .limit(limit + 1)
    )
    ids = list(connection.execute(passing).scalars())
    if len(ids) > limit:
        return ids[:limit], ids[limit - 1]
    return ids, connection.execute(reach.offset(MAX_EXAMINED - 1).limit(1)).scalars().first()


def _passes(columns: Any, where: RequestFilter) -> list[ColumnElement[bool]]:
    wanted = ((columns.model, where.model), (columns.key_id, where.key_id), (columns.state, where.state))
    conditions = [column == value for column, value in wanted if value is not None]
    if where.min_cost_mils is not None:
        conditions.append(columns.cost >= where.min_cost_mils)
    if where.max_cost_mils is not None:
        conditions.append(columns.cost <= where.max_cost_mils)
    return conditions


def _of(customer_id: CustomerId, where: RequestFilter) -> list[ColumnElement[bool]]:
    conditions = [reservation.c.customer_id == customer_id, has_frames]
    if where.since is not None:
        conditions.append(reservation.c.created_at >= where.since)
    if where.until is not None:
        conditions.append(reservation.c.created_at < where.until)
    return conditions


def _id(text: str | None) -> RequestId | None:
    return None if text is None else RequestId(text)
