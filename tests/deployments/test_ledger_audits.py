import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.util import metrics

from billing.auditor import AuditReport
from billing.invariants import AUDITS, Violation
from deployments.ledger_audits import AuditGauges, AuditsClient
from tests.support.app import LocalActor

ALERTS = Path(__file__).resolve().parents[2] / "serve_app" / "config" / "alerts.yaml"
OK = AuditReport(1_800_000_000.0, 0.5, (), ())


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], float]:
    """What Ray was told, by gauge and audit."""
    values: dict[tuple[str, str], float] = {}

    def record(gauge: Any, value: float, tags: dict[str, str] | None = None) -> None:
        values[gauge.info["name"], (tags or {}).get("audit", "")] = value

    monkeypatch.setattr(metrics.Gauge, "set", record)
    return values


def violation(audit: str) -> Violation:
    return Violation(audit, "", {"customer_id": "cus_1"})


def test_a_violation_raises_its_gauge_and_its_end_lowers_it(exported: dict[tuple[str, str], float]) -> None:
    gauges = AuditGauges()
    gauges.set(AuditReport(1.0, 0.5, (violation("prefix_sum"), violation("prefix_sum")), ()))
    assert exported["ledger_audit_violations", "prefix_sum"] == 2
    assert exported["ledger_audit_violations", "conservation"] == 0
    gauges.set(OK)
    assert {exported["ledger_audit_violations", audit.name] for audit in AUDITS} == {0}
    assert exported["ledger_audit_timestamp_seconds", ""] == OK.finished_at
    assert exported["ledger_audit_duration_seconds", ""] == 0.5


def test_an_audit_that_gave_no_answer_keeps_its_gauge(exported: dict[tuple[str, str], float]) -> None:
    gauges = AuditGauges()
    gauges.set(AuditReport(1.0, 0.5, (violation("prefix_sum"),), ()))
    gauges.set(AuditReport(2.0, 0.5, (), ("prefix_sum",)))
    assert exported["ledger_audit_violations", "prefix_sum"] == 1
    assert exported["ledger_audits_not_finished", ""] == 1


def test_alert_rules_watch_gauges_that_exist(exported: dict[tuple[str, str], float]) -> None:
    AuditGauges().set(OK)
    exist = {f"ray_{name}" for name, _ in exported}
    rules = [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]
    watched = {name for rule in rules for name in re.findall(r"ray_ledger\w+", rule["expr"])}
    assert watched == exist


async def test_a_process_asks_the_ledger_once_for_many_status_calls() -> None:
    class Actor:
        asked = 0

        async def audits(self) -> AuditReport:
            self.asked += 1
            return OK

    actor = Actor()
    client = AuditsClient(LocalActor(actor))
    assert [await client.report() for _ in range(10)] == [OK] * 10
    assert actor.asked == 1
