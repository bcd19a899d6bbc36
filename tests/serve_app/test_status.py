"""What `/v1/status` says of the ledger."""

from typing import Any

import pytest

from billing.auditor import AuditReport
from billing.invariants import Violation
from deployments.scheduler import SchedulerStatus
from deployments.status import Sample
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


async def test_the_status_gives_replicas_load_and_rates_of_each_model(app: App) -> None:
    model = (await app.http.get("/v1/status")).json()["models"]["tiny-pusher"]
    assert (model["state"], model["replicas"], model["booting_replicas"]) == ("ready", 1, 0)
    assert (model["utilisation"], model["max_replicas"]) == (0.0, 1)
    assert set(model["rates"]) == {"1m", "15m", "24h"}


@pytest.mark.parametrize(
    ("status", "capacity", "headroom"),
    [
        # 4 chunks of 4 steps are 16 row-steps a rollout.
        (SchedulerStatus(2, 16, 8, 0, cost_per_s=160.0, recent_cost_per_s=40.0), 10.0, 7.5),
        (SchedulerStatus(2, 16, 8, 9, cost_per_s=160.0, recent_cost_per_s=170.0), 10.0, 0.0),
        (SchedulerStatus(2, 16, 0, 0), None, None),
        (SchedulerStatus(0, 0, 0, 0), 0.0, 0.0),
    ],
    ids=["half busy", "overfull", "no rate known", "no replica"],
)
async def test_the_status_gives_capacity_and_headroom_in_rollouts(
    app: App,
    monkeypatch: pytest.MonkeyPatch,
    status: SchedulerStatus,
    capacity: float | None,
    headroom: float | None,
) -> None:
    async def now() -> SchedulerStatus:
        return status

    monkeypatch.setattr(app.model, "status", now)
    model = (await app.http.get("/v1/status")).json()["models"]["tiny-pusher"]
    assert (model["capacity_rollouts_per_s"], model["headroom_rollouts_per_s"]) == (capacity, headroom)
    page = (await app.http.get("/status")).text
    assert ("rollouts a second" in page) == (capacity is not None)


async def test_a_controller_that_is_away_leaves_the_number_of_booting_replicas_unknown(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away() -> dict[str, int]:
        raise ConnectionError("the controller restarts")

    monkeypatch.setattr(app.services.booting, "_ask", away)
    answer = await app.http.get("/v1/status")
    assert answer.status_code == 200
    assert answer.json()["models"]["tiny-pusher"]["booting_replicas"] is None


async def test_the_summary_is_what_statuspage_readers_expect(app: App) -> None:
    summary = (await app.http.get("/api/v2/summary.json")).json()
    assert set(summary) == {"page", "status", "components", "incidents", "scheduled_maintenances"}
    assert summary["status"] == {"indicator": "none", "description": "All Systems Operational"}
    assert {each["name"]: each["status"] for each in summary["components"]} == {
        "tiny-pusher": "operational",
        "ledger": "operational",
    }


async def test_a_violated_ledger_is_an_outage_in_the_summary(app: App) -> None:
    app.ledger_call.audit_report = AuditReport(1_800_000_000.0, 0.25, FOUND, ())
    summary = (await app.http.get("/api/v2/summary.json")).json()
    assert summary["status"]["indicator"] == "major"


async def test_the_page_is_html_without_scripts_and_draws_latency(app: App) -> None:
    for milliseconds in (100.0, 200.0):
        app.services.status.add(Sample("tiny-pusher", "succeeded", 49, 1.0, 2.0, milliseconds))
    await app.services.status._send()
    answer = await app.http.get("/status")
    assert answer.headers["content-type"].startswith("text/html")
    assert "<script" not in answer.text
    assert "highest 200 ms" in answer.text
    assert "<svg" in answer.text
