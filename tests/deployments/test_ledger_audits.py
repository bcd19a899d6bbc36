from billing.auditor import AuditReport
from billing.invariants import AUDITS, Violation
from deployments.ledger_audits import AuditsClient, measure_audits
from deployments.meter import Meter
from tests.support.app import LocalActor

OK = AuditReport(1_800_000_000.0, 0.5, (), ())


def violation(audit: str) -> Violation:
    return Violation(audit, "", {"customer_id": "cus_1"})


def value(meter: Meter, name: str, *labels: str) -> float:
    return meter.series()[name, labels][0]


def test_a_violation_raises_its_gauge_and_its_end_lowers_it() -> None:
    meter = Meter()
    measure_audits(meter, AuditReport(1.0, 0.5, (violation("prefix_sum"), violation("prefix_sum")), ()))
    assert value(meter, "dream_ledger_audit_violations", "prefix_sum") == 2
    assert value(meter, "dream_ledger_audit_violations", "conservation") == 0
    measure_audits(meter, OK)
    assert {value(meter, "dream_ledger_audit_violations", audit.name) for audit in AUDITS} == {0}
    assert value(meter, "dream_ledger_audit_timestamp_seconds") == OK.finished_at
    assert value(meter, "dream_ledger_audit_duration_seconds") == 0.5


def test_an_audit_that_gave_no_answer_keeps_its_gauge() -> None:
    meter = Meter()
    measure_audits(meter, AuditReport(1.0, 0.5, (violation("prefix_sum"),), ()))
    measure_audits(meter, AuditReport(2.0, 0.5, (), ("prefix_sum",)))
    assert value(meter, "dream_ledger_audit_violations", "prefix_sum") == 1
    assert value(meter, "dream_ledger_audits_not_finished") == 1


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
