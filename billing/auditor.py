"""The audits on a live ledger: one after the other in a thread of its own, off the writer's path, for ever.

Each audit is one statement on a read-only connection, with a snapshot of its own, so none holds back the database's
housekeeping for longer than itself. A round of a large ledger takes long and is therefore rare: the thread rests for
`REST` times as long as it worked. Knows no Ray and no gauge: what a round found is a value for whoever publishes it.
"""

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from sqlalchemy import Engine, event, text
from sqlalchemy.exc import DBAPIError

from billing.database import open_database
from billing.errors import DatabaseUnusable
from billing.invariants import AUDITS, MAX_ROWS_PER_AUDIT, Audit, Violation

FIRST_AFTER_S = 5.0
"""After a take-over, whose callers come first."""
EVERY_S = 60.0
REST = 50
"""Auditing takes at most this share of a core, one in so many."""
MAX_AUDIT_S = 600.0
"""One audit that takes longer is ended and reported as not finished."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class AuditReport:
    """What one round over all audits found."""

    finished_at: float
    """POSIX seconds."""
    took_s: float
    violations: tuple[Violation, ...]
    """At most `MAX_ROWS_PER_AUDIT` of each audit."""
    not_finished: tuple[str, ...]
    """Audits that the database did not answer, or not in time: of these nothing is known."""

    @property
    def ok(self) -> bool:
        return not self.violations and not self.not_finished


class Auditor:
    """Audits the database at `url` until it is stopped. `on_report` is called from its thread after every round."""

    def __init__(self, url: str, on_report: Callable[[AuditReport], None], audits: Sequence[Audit] = AUDITS) -> None:
        self._url = url
        self._on_report = on_report
        self._audits = audits
        self._stopping = threading.Event()
        self._engine: Engine | None = None
        self._interrupt: Callable[[], None] = lambda: None
        self._thread = threading.Thread(target=self._run, name="ledger-auditor", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End a running audit, then the thread."""
        self._stopping.set()
        while self._thread.is_alive():
            self._interrupt()  # again and again: the first may come just before its statement
            self._thread.join(timeout=0.05)

    def _run(self) -> None:
        rest_s = FIRST_AFTER_S
        while not self._stopping.wait(rest_s):
            rest_s = EVERY_S
            try:
                report = self.round()
                if not self._stopping.is_set():
                    self._on_report(report)
                rest_s = max(EVERY_S, REST * report.took_s)
            except Exception as error:  # a defect: the next round may find what this one did not look at
                log.error("ledger_audits_broke", error=repr(error), exc_info=error)

    def round(self) -> AuditReport:
        """Run every audit once. What one of them finds is logged at once, as an error."""
        started = time.perf_counter()
        violations: list[Violation] = []
        not_finished = []
        for audit in self._audits:
            if self._stopping.is_set():
                break
            try:
                self._engine = self._engine or read_only(self._url)
                found = self._find(self._engine, audit)
            except (DBAPIError, DatabaseUnusable) as error:
                reason = str(error.orig) if isinstance(error, DBAPIError) else str(error)
                log.warning("ledger_audit_not_finished", audit=audit.name, reason=reason)
                not_finished.append(audit.name)
                continue
            for violation in found:
                log.error("ledger_audit_violated", audit=audit.name, claim=audit.claim, row=dict(violation.row))
            violations += found
        if self._engine is not None:
            self._engine.dispose()  # a connection keeps many of the pages that it has read
        return AuditReport(time.time(), time.perf_counter() - started, tuple(violations), tuple(not_finished))

    def _find(self, engine: Engine, audit: Audit) -> list[Violation]:
        with engine.connect() as connection:
            driver: Any = connection.connection.driver_connection
            self._interrupt = driver.interrupt if engine.dialect.name == "sqlite" else driver.cancel
            overdue = threading.Timer(MAX_AUDIT_S, self._interrupt)
            overdue.start()
            try:
                rows = connection.execute(text(audit.sql)).mappings().fetchmany(MAX_ROWS_PER_AUDIT)
            finally:
                overdue.cancel()
                self._interrupt = lambda: None
        return [Violation(audit.name, audit.claim, dict(row)) for row in rows]


def read_only(url: str) -> Engine:
    """An engine of its own, on which every write fails.

    Raises:
        DatabaseUnusable: it cannot be opened.
    """
    engine = open_database(url)
    if engine.dialect.name == "postgresql":
        return engine.execution_options(postgresql_readonly=True)

    @event.listens_for(engine, "connect")
    def forbid_writing(connection: Any, _record: object) -> None:
        connection.execute("PRAGMA query_only = ON")

    engine.dispose()  # the connection that opened it may write
    return engine
