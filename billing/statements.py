"""A customer's months: what each began with, what came in, was spent and came back, and what it ended with.

A month is a range of the wallet's entries, so that every entry is in exactly one. Reads, never writes.
"""

import re
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, bindparam, func, select

from billing.commands import CustomerId
from billing.errors import UnknownWallet
from billing.money import Mils
from billing.reader import SHOWN_AS, EntryRecord, shown
from billing.tables import entry, wallet

_ENTRY = select(entry.c.ts, entry.c.balance_after).where(
    entry.c.customer_id == bindparam("customer"), entry.c.seq == bindparam("number")
)
_MONTH = re.compile(r"([1-8][0-9]{3})-(0[1-9]|1[0-2])")


class Month(NamedTuple):
    """Of UTC."""

    year: int
    month: int

    @classmethod
    def of(cls, ts: float) -> "Month":
        moment = datetime.fromtimestamp(ts, UTC)
        return cls(moment.year, moment.month)

    @classmethod
    def parse(cls, text: str) -> "Month":
        """Raises ValueError unless `text` is such as `2027-01`."""
        match = _MONTH.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not a month such as 2027-01")
        return cls(int(match[1]), int(match[2]))

    @property
    def starts_at(self) -> float:
        return datetime(self.year, self.month, 1, tzinfo=UTC).timestamp()

    @property
    def following(self) -> "Month":
        return Month(self.year + self.month // 12, self.month % 12 + 1)

    @property
    def previous(self) -> "Month":
        return Month(self.year - (self.month == 1), 12 if self.month == 1 else self.month - 1)

    def __str__(self) -> str:
        return f"{self.year:04d}-{self.month:02d}"


@dataclass(frozen=True, slots=True)
class Statement:
    """The entries of one month: those after `from_seq` up to `to_seq`. One month's `to_seq` is the next's `from_seq`.

    `opening + credits + debits + refunds + reversals + transfers == closing`, all in mils.
    """

    month: Month
    from_seq: int
    to_seq: int
    opening_mils: Mils
    credits_mils: Mils
    debits_mils: Mils
    """For work and provisioned units; negative."""
    refunds_mils: Mils
    reversals_mils: Mils
    """Payments that were taken back, and debts that were repaid; negative."""
    transfers_mils: Mils
    """Within the customer's team."""
    closing_mils: Mils

    @property
    def num_entries(self) -> int:
        return self.to_seq - self.from_seq


class StatementReader:
    """Safe to share between threads and to use beside the writer, in its process or another.

    Every method raises one of `DATABASE_FAILURES` when the database fails.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def statements(self, customer_id: CustomerId, newest: Month, limit: int) -> list[Statement]:
        """Months, newest first, from `newest` back to the one in which the wallet was opened.

        Raises:
            UnknownWallet: there is no such customer.
        """
        with self._engine.connect() as connection:
            own = connection.execute(
                select(wallet.c.seq, wallet.c.created_at).where(wallet.c.customer_id == customer_id)
            ).first()
            if own is None:
                raise UnknownWallet(customer_id)
            first, month = Month.of(own.created_at), newest
            statements: list[Statement] = []
            to_seq = _last_before(connection, customer_id, own.seq, month.following.starts_at)
            while month >= first and len(statements) < limit:
                from_seq = _last_before(connection, customer_id, to_seq, month.starts_at)
                statements.append(_statement(connection, customer_id, month, from_seq, to_seq))
                month, to_seq = month.previous, from_seq
        return statements

    def entries(self, customer_id: CustomerId, from_seq: int, to_seq: int, limit: int) -> list[EntryRecord]:
        """The first `limit` entries after `from_seq` up to `to_seq`, oldest first."""
        columns = ("seq", "public_id", "ts", "kind", "amount", "balance_after", "detail")
        statement = (
            select(*(entry.c[name] for name in columns))
            .where(entry.c.customer_id == customer_id, entry.c.seq > from_seq, entry.c.seq <= to_seq)
            .order_by(entry.c.seq)
            .limit(limit)
        )
        with self._engine.connect() as connection:
            return [shown(row) for row in connection.execute(statement)]


def _last_before(connection: Connection, customer_id: CustomerId, last: int, ts: float) -> int:
    """The wallet's last entry, up to number `last`, from before `ts`: found by halves, since time never runs back.

    0 is the opening entry, which moves nothing, so it stands for "none" too.
    """
    low, high = 0, last
    while low < high:
        middle = (low + high + 1) // 2
        if _entry(connection, customer_id, middle).ts < ts:
            low = middle
        else:
            high = middle - 1
    return low


def _entry(connection: Connection, customer_id: CustomerId, seq: int) -> Any:
    return connection.execute(_ENTRY, {"customer": customer_id, "number": seq}).one()


def _statement(connection: Connection, customer_id: CustomerId, month: Month, from_seq: int, to_seq: int) -> Statement:
    totals = dict.fromkeys(SHOWN_AS, 0)
    sums = (
        select(entry.c.kind, func.sum(entry.c.amount))
        .where(entry.c.customer_id == customer_id, entry.c.seq > from_seq, entry.c.seq <= to_seq)
        .group_by(entry.c.kind)
    )
    totals |= {kind: int(total) for kind, total in connection.execute(sums)}
    return Statement(
        month=month,
        from_seq=from_seq,
        to_seq=to_seq,
        opening_mils=_entry(connection, customer_id, from_seq).balance_after,
        credits_mils=Mils(totals["credit"] + totals["reinstatement"]),
        debits_mils=Mils(totals["debit"] + totals["fee"]),
        refunds_mils=Mils(totals["refund"]),
        reversals_mils=Mils(totals["reversal"] + totals["repayment"]),
        transfers_mils=Mils(totals["transfer_in"] + totals["transfer_out"]),
        closing_mils=_entry(connection, customer_id, to_seq).balance_after,
    )
