"""The audits as the running ledger makes them: again and again, beside a writer that they do not disturb."""

import time
from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError
from structlog.testing import capture_logs

import billing.auditor
from billing.auditor import Auditor, AuditReport, read_only
from billing.database import writer
from billing.invariants import AUDITS, Audit
from tests.billing.conftest import Clock, Desk

SLOW = Audit(
    "slow",
    "It takes for ever.",
    "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i+1 FROM n) SELECT i FROM n WHERE i<0",
)


def url_of(engine: Engine) -> str:
    return engine.url.render_as_string(hide_password=False)


@pytest.fixture
def busy(engine: Engine, clock: Clock) -> Desk:
    """A ledger with some history, which a test may break."""
    desk = Desk(engine, clock)
    account = desk.account(1000)
    desk.settle(desk.reserved(account), 12, "engine failed")
    desk.reserved(account, 10)
    return desk


def edit_history(engine: Engine) -> None:
    """What no role of the service could do: the rules off, and the past rewritten."""
    with writer(engine).connect() as connection:
        if engine.dialect.name == "sqlite":
            driver: Any = connection.connection.driver_connection
            driver.execute("PRAGMA foreign_keys = OFF")  # it does nothing inside a transaction
            driver.execute("DROP TRIGGER tr_entry_update")
        else:
            connection.exec_driver_sql("SET session_replication_role = replica")
        connection.execute(
            text("UPDATE entry SET amount = amount + 7, balance_after = balance_after + 7 WHERE kind = 'credit'")
        )
        connection.commit()


@pytest.fixture
def reports() -> list[AuditReport]:
    return []


@pytest.fixture
def auditor(busy: Desk, reports: list[AuditReport], monkeypatch: pytest.MonkeyPatch) -> Iterator[Auditor]:
    """Running, without any rest between its rounds."""
    for name in ("FIRST_AFTER_S", "EVERY_S", "REST"):
        monkeypatch.setattr(billing.auditor, name, 0)
    running = Auditor(url_of(busy.engine), reports.append)
    running.start()
    yield running
    running.stop()


def next_report(reports: list[AuditReport]) -> AuditReport:
    """Of a round that began after this call."""
    seen = len(reports)
    deadline = time.monotonic() + 30
    while len(reports) < seen + 2:
        assert time.monotonic() < deadline, "no round ended"
        time.sleep(0.005)
    return reports[-1]


def test_a_row_that_contradicts_a_claim_is_reported_and_logged_in_the_next_round(
    busy: Desk, auditor: Auditor, reports: list[AuditReport]
) -> None:
    assert next_report(reports).ok
    with capture_logs() as logs:
        edit_history(busy.engine)
        report = next_report(reports)
    assert not report.ok
    assert {violation.audit for violation in report.violations} == {"conservation", "prefix_sum"}
    found = [line for line in logs if line["event"] == "ledger_audit_violated"]
    assert {line["log_level"] for line in found} == {"error"}
    assert {line["audit"] for line in found} == {"conservation", "prefix_sum"}
    assert all(line["row"] for line in found)


def test_a_ledger_that_is_written_meanwhile_audits_clean(
    busy: Desk, auditor: Auditor, reports: list[AuditReport]
) -> None:
    account = busy.account(10_000)
    begun = len(reports)
    while len(reports) < begun + 5:
        busy.settle(busy.reserved(account, 1), 0)
    assert all(report.ok for report in reports)


def test_the_auditor_cannot_write(busy: Desk) -> None:
    engine = read_only(url_of(busy.engine))
    with engine.connect() as connection, pytest.raises(DBAPIError, match=r"read-?only"):
        connection.execute(text("INSERT INTO writer_fence VALUES (2, 0, 0)"))
    engine.dispose()


def test_an_audit_that_takes_too_long_is_ended_and_the_others_go_on(
    busy: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(billing.auditor, "MAX_AUDIT_S", 0.05)
    report = Auditor(url_of(busy.engine), lambda _: None, (SLOW, *AUDITS[:2])).round()
    assert report.not_finished == ("slow",)
    assert not report.ok
    assert report.violations == ()


def test_stopping_does_not_wait_for_a_long_audit(busy: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(billing.auditor, "FIRST_AFTER_S", 0)
    reports: list[AuditReport] = []
    auditor = Auditor(url_of(busy.engine), reports.append, (SLOW,))
    auditor.start()
    auditor.stop()
    assert reports == []


def test_a_database_that_is_away_is_reported_as_not_audited() -> None:
    report = Auditor("sqlite:////no/such/directory/ledger.db", lambda _: None).round()
    assert report.not_finished == tuple(audit.name for audit in AUDITS)
    assert not report.ok


def test_a_round_that_took_long_is_followed_by_a_longer_rest(busy: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    auditor = Auditor(url_of(busy.engine), lambda _: None)
    rests: list[float] = []

    def wait(rest_s: float) -> bool:
        rests.append(rest_s)
        return len(rests) == 4

    took_s = iter((0.1, 5.0, 1.0))
    monkeypatch.setattr(auditor, "round", lambda: AuditReport(0.0, next(took_s), (), ()))
    monkeypatch.setattr(auditor._stopping, "wait", wait)
    auditor._run()
    assert rests == [billing.auditor.FIRST_AFTER_S, billing.auditor.EVERY_S, 250.0, billing.auditor.EVERY_S]


def test_a_round_that_breaks_is_not_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    auditor = Auditor("sqlite:////no/such/directory/ledger.db", lambda _: None)
    rests: list[float] = []

    def broken() -> AuditReport:
        raise RuntimeError("as nobody expected")

    monkeypatch.setattr(auditor, "round", broken)
    monkeypatch.setattr(auditor._stopping, "wait", lambda rest_s: rests.append(rest_s) or len(rests) == 3)
    with capture_logs() as logs:
        auditor._run()
    assert rests == [billing.auditor.FIRST_AFTER_S, billing.auditor.EVERY_S, billing.auditor.EVERY_S]
    assert [each["event"] for each in logs] == ["ledger_audits_broke"] * 2
