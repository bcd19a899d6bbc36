"""The single writer: a list of commands in, one durable commit, a list of answers out.

Callers gather what arrived while the last commit ran and hand it over at once; that is group commit, and it is what
makes a synchronous disk affordable. Which writer is the single one is decided by an epoch in the database.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

from sqlalchemy import Engine
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError

from billing import store
from billing.checks import malformed
from billing.commands import Command, Credited, CreditLineSet, Outcome, PaymentCommand, Rejected, Reversed
from billing.core import Book, decide
from billing.database import writer
from billing.errors import Fenced, LedgerUnavailable
from billing.money import Mils
from billing.payments import records


class _MoneyRefused(Exception):
    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome)
        self.outcome = outcome


@dataclass(frozen=True, slots=True)
class Commit:
    """What one transaction wrote, for whoever counts it."""

    num_commands: int
    took_s: float
    entries: tuple[str, ...]
    """Their kinds."""
    settled: tuple[tuple[str, int, Mils, Mils], ...]
    """Of each reservation that it closed: model, frames delivered, captured, refunded."""


class Ledger:
    """Owns every write. Safe to call from several threads, which take turns; meant to be fed whole batches by one.

    `clock` gives POSIX seconds. It stamps entries and judges leases; tests inject it. `on_commit` is told of each
    transaction once it is durable, in the thread that made it.
    """

    def __init__(
        self,
        engine: Engine,
        clock: Callable[[], float],
        takeover_grace_s: float = 30.0,
        on_commit: Callable[[Commit], None] = lambda _: None,
    ) -> None:
        self._connection = store.WriterConnection(writer(engine))
        driver = engine.dialect.loaded_dbapi
        self._refusals = (IntegrityError, DataError, driver.IntegrityError, driver.DataError)
        """SQLAlchemy's and the driver's."""
        self._failures = (DBAPIError, driver.Error)
        self._clock = clock
        self._takeover_grace_s = takeover_grace_s
        self._on_commit = on_commit
        self._epoch = 0
        self._newest_ts = 0.0
        self._book = Book()
        self._turn = Lock()

    def take_over(self) -> int:
        """Become the writer: every earlier one is fenced from here on. Returns the new epoch.

        Open leases last at least `takeover_grace_s` from now, so that work which outlived the last writer has time to
        send a heartbeat before the sweeper refunds it.

        Raises:
            LedgerUnavailable: the database failed; whether the epoch was taken is not known, take over again.
        """
        with self._turn:
            now = self._clock()
            try:
                with self._connection.transaction(runs_ahead=False):
                    epoch = store.take_fence(self._connection, now)
                    store.extend_open_leases(self._connection, until=now + self._takeover_grace_s)
                    newest_ts = store.newest_ts(self._connection)
            except self._failures as error:
                raise LedgerUnavailable(f"the database failed during take-over: {_said(error)}") from error
            self._epoch, self._newest_ts, self._book = epoch, newest_ts, Book()
            return epoch

    def close(self) -> None:
        """Give its connection back. It may still be used, and takes one again."""
        with self._turn:
            self._connection.close()

    def apply(self, commands: Sequence[Command]) -> list[Outcome]:
        """Carry out the commands in order, all in one transaction; answers come back in the same order.

        When this returns, what the answers say is on disk. A malformed command is answered `Rejected`. If the database
        refuses the batch, each command is carried out in a transaction of its own, and only the one at fault is
        answered `Rejected`.

        Raises:
            Fenced: another writer has taken over, or `take_over` was never called. Nothing was written.
            LedgerUnavailable: the database failed. Whatever was not answered may or may not have been written; the
                same commands may be sent again, to this ledger or its successor.
        """
        reasons = [malformed(command) for command in commands]
        well_formed = [command for command, reason in zip(commands, reasons, strict=True) if reason is None]
        outcomes = iter(self._carry_out(well_formed))
        return [next(outcomes) if reason is None else Rejected(reason) for reason in reasons]

    def _carry_out(self, commands: Sequence[Command]) -> list[Outcome]:
        if not commands:
            return []
        with self._turn:
            try:
                return self._commit(commands)
            except (*self._refusals, _MoneyRefused):
                return [self._commit_alone(command) for command in commands]

    def _commit_alone(self, command: Command) -> Outcome:
        try:
            return self._commit([command])[0]
        except self._refusals as error:
            return Rejected(f"the database refused it: {_said(error).splitlines()[0]}")
        except _MoneyRefused as error:
            return Rejected(f"the money of a payment was refused: {error.outcome}")

    def _pay(self, book: Book, command: PaymentCommand) -> Outcome:
        refused = records.refuse(self._connection.sqlalchemy, command)
        if refused is not None:
            return refused
        for money in command.money:
            outcome = decide(book, money)
            if not isinstance(outcome, Credited | Reversed | CreditLineSet):
                # What was decided before it must not stay: this batch is given up, and each command gets its own.
                raise _MoneyRefused(outcome)
        return records.carry_out(self._connection.sqlalchemy, command, book.ts, book.wallets)

    def _commit(self, commands: Sequence[Command]) -> list[Outcome]:
        started = time.perf_counter()
        now = self._clock()
        ts = max(now, self._newest_ts)  # a clock that steps back must not put a refund before its debit
        book, self._book = self._book, Book()  # whatever fails below, its picture of the database is not used again
        connection = self._connection
        payments = [command for command in commands if isinstance(command, PaymentCommand)]
        money = [each for command in payments for each in command.money]
        expected = (*self._refusals, _MoneyRefused, Fenced)
        try:
            with connection.transaction(*expected, runs_ahead=not payments):
                read_fence = store.ask_fence(connection)
                book.begin(now, ts, self._epoch)
                store.load(connection, [*commands, *money], book)
                current_epoch = read_fence()
                if self._epoch == 0 or current_epoch != self._epoch:
                    raise Fenced(self._epoch, current_epoch)
                outcomes = [
                    self._pay(book, command) if isinstance(command, PaymentCommand) else decide(book, command)
                    for command in commands
                ]
                store.write(connection, book)
        except expected:
            raise
        except self._failures as error:
            raise LedgerUnavailable(f"the database failed during a commit: {_said(error)}") from error
        self._newest_ts = ts
        commit = _commit_of(book, len(commands), time.perf_counter() - started)
        book.committed()
        self._book = book
        assert len(outcomes) == len(commands)
        self._on_commit(commit)
        return outcomes


def _said(error: Exception) -> str:
    """The driver's own words."""
    return str(error.orig if isinstance(error, DBAPIError) else error)


def _commit_of(book: Book, num_commands: int, took_s: float) -> Commit:
    return Commit(
        num_commands,
        took_s,
        tuple(entry.kind for entry in book.entries),
        tuple((each.model, each.frames_delivered or 0, each.captured, each.refunded) for each in book.settled),
    )
