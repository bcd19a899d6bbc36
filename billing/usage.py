"""How much a customer uses: by day, model and key, at the moment, and beside its budgets. Reads, never writes."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import ColumnElement, Engine, func, literal_column, select, tuple_

from billing.commands import CustomerId, KeyId
from billing.errors import TooManyRows, UnknownCursor
from billing.money import Mils
from billing.tables import budget_event, has_frames, reservation

MAX_USAGE_ROWS = 10_000

Dimension = Literal["day", "model", "key"]


@dataclass(frozen=True, slots=True)
class UsageRow:
    """Requests that were made on one day, of one model, by one key; None where all of them are counted together."""

    day: int | None
    """Of UTC, since 1970. A refund counts for the day of its request."""
    model: str | None
    key_id: str | None
    requests: int
    frames: int
    """That were asked for."""
    frames_delivered: int
    reserved_mils: Mils
    refunded_mils: Mils

    @property
    def cost_mils(self) -> Mils:
        return Mils(self.reserved_mils - self.refunded_mils)


@dataclass(frozen=True, slots=True)
class BudgetWarning:
    """A key's budget came to `level` per cent: there is one for each budget, period, limit and level."""

    event_id: str
    key_id: KeyId
    period: Literal["day", "month"]
    starts_day: int
    """Of the period, in days of UTC since 1970."""
    level: int
    limit_mils: Mils
    spent_mils: Mils
    created_at: float


_COST = reservation.c.amount - reservation.c.refunded
_DAY = {  # a cast rounds on PostgreSQL and cuts off on SQLite, which need not know `floor`
    "sqlite": "CAST(reservation.created_at / 86400 AS INTEGER)",
    "postgresql": "CAST(floor(reservation.created_at / 86400) AS bigint)",
}


class UsageReader:
    """Safe to share between threads and to use beside the writer, in its process or another.

    Every method raises one of `DATABASE_FAILURES` when the database fails.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def usage(
        self, customer_id: CustomerId, since: float, until: float, by: Sequence[Dimension] = ("day", "model", "key")
    ) -> list[UsageRow]:
        """Requests made from `since` to before `until`, counted together by the given dimensions.

        Raises:
            TooManyRows: more than `MAX_USAGE_ROWS`; a shorter time or fewer dimensions have fewer.
        """
        columns: dict[Dimension, ColumnElement[Any]] = {
            "day": literal_column(_DAY[self._engine.dialect.name]),
            "model": reservation.c.model,
            "key": reservation.c.key_id,
        }
        chosen = [columns[each] for each in columns if each in by]
        statement = (
            select(
                *(columns[each] if each in by else literal_column("NULL") for each in columns),
                func.count(),
                func.sum(reservation.c.frames),
                func.sum(reservation.c.frames_delivered),
                func.sum(reservation.c.amount),
                func.sum(reservation.c.refunded),
            )
            .where(*_of(customer_id, since, until))
            .group_by(*chosen)
            .order_by(*chosen)
            .limit(MAX_USAGE_ROWS + 1)
        )
        with self._engine.connect() as connection:
            rows = connection.execute(statement).all()
        if len(rows) > MAX_USAGE_ROWS:
            raise TooManyRows(MAX_USAGE_ROWS)
        return [UsageRow(*row[:3], *(int(total or 0) for total in row[3:])) for row in rows]  # type: ignore[arg-type]

    def warnings(self, customer_id: CustomerId, limit: int, after: str | None = None) -> list[BudgetWarning]:
        """Newest first; those older than the event `after`.

        Raises:
            UnknownCursor: `after` is not an event of this customer.
        """
        of_customer = budget_event.c.customer_id == customer_id
        place = (budget_event.c.created_at, budget_event.c.event_id)
        statement = (
            select(*(column for column in budget_event.c if column.name != "customer_id"))
            .where(of_customer)
            .order_by(*(column.desc() for column in place))
            .limit(limit)
        )
        with self._engine.connect() as connection:
            if after is not None:
                begin = connection.execute(select(*place).where(of_customer, budget_event.c.event_id == after)).first()
                if begin is None:
                    raise UnknownCursor(after)
                statement = statement.where(tuple_(*place) < tuple_(*begin))
            return [BudgetWarning(*row) for row in connection.execute(statement)]

    def frames_since(self, customer_id: CustomerId, since: float) -> int:
        """Frames of requests made since then: what was delivered, and of what still runs all that was reserved."""
        used = func.sum(func.coalesce(reservation.c.frames_delivered, reservation.c.frames))
        with self._engine.connect() as connection:
            return int(connection.execute(select(used).where(*_of(customer_id, since, None))).scalar_one() or 0)

    def spent_since(self, customer_id: CustomerId, since: float) -> Mils:
        """What requests made since then cost."""
        with self._engine.connect() as connection:
            spent = connection.execute(select(func.sum(_COST)).where(*_of(customer_id, since, None))).scalar_one()
        return Mils(int(spent or 0))


def _of(customer_id: CustomerId, since: float | None, until: float | None) -> list[ColumnElement[bool]]:
    conditions = [reservation.c.customer_id == customer_id, has_frames]
    if since is not None:
        conditions.append(reservation.c.created_at >= since)
    if until is not None:
        conditions.append(reservation.c.created_at < until)
    return conditions
