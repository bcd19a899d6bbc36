"""What `/v1/status` says of the ledger."""

from typing import Any

import pytest

from billing.auditor import AuditReport
from billing.invariants import Violation
from tests.support.app import App

FOUND = (Violation("conservation", "", {"credited": 1}),)


@pytest.mark.parametrize(
    ("report", "audits", "violations"),
    [
        (None, "pending", 0),
        (AuditReport(1_800_000_000.0, 0.25, (), ()), "ok", 0),
        (AuditReport(1_800_000_000.0, 0.25, FOUND, ()), "violated", 1),
        (AuditReport(1_800_000_000.0, 0.25, (), ("conservation",)), "not_finished", 0),
        (AuditReport(1_800_000_000.0, 0.25, FOUND, ("prefix_sum",)), "violated", 1),
    ],
)
async def test_the_status_says_what_the_last_audits_found(
    app: App, report: AuditReport | None, audits: str, violations: int
) -> None:
    app.ledger_call.audit_report = report
    ledger = (await app.http.get("/v1/status")).json()["ledger"]
    assert (ledger["audits"], ledger["violations"]) == (audits, violations)
    assert ledger["audited_at"] == (None if report is None else 1_800_000_000.0)


async def test_a_ledger_that_does_not_answer_is_a_status(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    async def away() -> Any:
        raise ConnectionError("the actor died")

    monkeypatch.setattr(app.ledger_call, "audits", away)
    answer = await app.http.get("/v1/status")
    assert answer.status_code == 200
    assert answer.json()["ledger"]["audits"] == "unreachable"
