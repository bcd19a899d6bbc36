"""The writer's own connection: held between its transactions, its statements handed to the driver as they are.

SQLAlchemy opens it, begins and ends its transactions, and makes statements into text, once. For each statement in
between it takes 16 to 30 us of what is 1 us for SQLite's driver, and has PostgreSQL's wait for an answer.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine

from billing.database import WRITER_CACHE_KIB

RUNS_AHEAD_SINCE = 17_00_00
"""PostgreSQL's version."""
TRANSACTION_TIMEOUT_S = 8
"""PostgreSQL ends a transaction that runs ahead after so long, which is less than its successor waits for the lock."""
FRESH_FOR_S = 1.0
"""A connection that rested for longer goes through the pool again, which asks PostgreSQL whether it is still there."""


class WriterConnection:
    """One transaction at a time. Opened when it is first needed, and anew after a transaction that failed unexpectedly.

    What the driver raises comes out as it is.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._held: Connection | None = None
        self._driver: Any = None
        self._may_run_ahead = False
        self._used_at = 0.0
        self.dialect = engine.dialect
        self.is_sqlite = engine.dialect.name == "sqlite"

    @property
    def sqlalchemy(self) -> Connection:
        """For what is asked too rarely to be worth a text; inside a transaction that does not run ahead."""
        assert self._held is not None
        return self._held

    @contextmanager
    def transaction(self, *expected: type[Exception], runs_ahead: bool = True) -> Iterator[None]:
        """Committed at the end. After a failure the connection goes back to the pool, or, unless it was an `expected`
        one, is given up: nobody knows its state.

        One that runs ahead sends PostgreSQL its statements without waiting until an answer is looked at, or until the
        end of the block: so an error may come out of a later statement than the one at fault, but before COMMIT. While
        it does, the server does not count it as idle: only since version 17 can it end one whose writer froze, and
        with an older one each statement waits for the one before.
        """
        held = self._fresh()
        try:
            with held.begin(), self._begun(runs_ahead):
                yield
        except BaseException as error:
            if not isinstance(error, expected):
                held.invalidate()
            self.close()
            raise
        finally:
            self._used_at = time.monotonic()

    def execute(self, statement: str, parameters: Any = ()) -> Any:
        """A cursor of the driver's. What it returns has to be read before the transaction ends."""
        if self.is_sqlite:  # it prepares everything
            return self._driver.execute(statement, parameters)
        return self._driver.execute(statement, parameters, prepare=True)  # psycopg would wait for the sixth time

    def executemany(self, statement: str, rows: Sequence[Any]) -> None:
        self._driver.executemany(statement, rows)

    def close(self) -> None:
        """Give the connection back to its pool; the next transaction takes one again."""
        if self._held is not None:
            self._held.close()
            self._held = self._driver = None

    def _fresh(self) -> Connection:
        if self._held is not None and time.monotonic() - self._used_at > FRESH_FOR_S:
            self.close()
        if self._held is None:
            self._held = self._engine.connect()
            if not self.is_sqlite:  # psycopg would send a BEGIN of its own, and wait for it
                self._held = self._held.execution_options(isolation_level="AUTOCOMMIT")
            self._driver = self._held.connection.driver_connection
            if self.is_sqlite:
                self._driver.execute(f"PRAGMA cache_size = -{WRITER_CACHE_KIB}")
            self._may_run_ahead = not self.is_sqlite and self._driver.info.server_version >= RUNS_AHEAD_SINCE
        return self._held

    @contextmanager
    def _begun(self, runs_ahead: bool) -> Iterator[None]:
        if self.is_sqlite:  # `billing.database` says BEGIN
            yield
        elif runs_ahead and self._may_run_ahead:
            with self._driver.pipeline():
                self._driver.execute("BEGIN")
                self._driver.execute(f"SET LOCAL transaction_timeout = '{TRANSACTION_TIMEOUT_S}s'")
                yield
        else:
            self._driver.execute("BEGIN")
            yield
