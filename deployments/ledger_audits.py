"""What the ledger's audits found, for those who watch the cluster: gauges for Prometheus, a report for `/v1/status`."""

import asyncio
import time
from typing import Any

from ray.util.metrics import Gauge

from billing.auditor import AuditReport
from billing.invariants import AUDITS

ASK_EVERY_S = 5.0
"""Anybody may ask for the status; the ledger's actor is asked at most this often by each process."""
TIMEOUT_S = 2.0


class AuditGauges:
    """Ray exports them from every node with the prefix `ray_`; `serve_app/config/alerts.yaml` watches them."""

    def __init__(self) -> None:
        self._violations = Gauge(
            "ledger_audit_violations", "Rows that contradict this audit's claim; must be 0.", tag_keys=("audit",)
        )
        self._not_finished = Gauge("ledger_audits_not_finished", "Audits of the last round that gave no answer.")
        self._finished_at = Gauge("ledger_audit_timestamp_seconds", "When the last round of audits ended, POSIX time.")
        self._took_s = Gauge("ledger_audit_duration_seconds", "How long the last round of audits took.")

    def set(self, report: AuditReport) -> None:
        found = dict.fromkeys((audit.name for audit in AUDITS), 0)
        for violation in report.violations:
            found[violation.audit] += 1
        for audit, rows in found.items():
            if audit not in report.not_finished:  # of these nothing new is known
                self._violations.set(rows, tags={"audit": audit})
        self._not_finished.set(len(report.not_finished))
        self._finished_at.set(report.finished_at)
        self._took_s.set(report.took_s)


class AuditsClient:
    """Asks the ledger's actor for its last report. Raises TimeoutError or a Ray error if it does not answer."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._asked_at = float("-inf")
        self._report: AuditReport | None = None

    async def report(self) -> AuditReport | None:
        if time.monotonic() - self._asked_at >= ASK_EVERY_S:
            async with asyncio.timeout(TIMEOUT_S):
                self._report = await self._actor.audits.remote()
            self._asked_at = time.monotonic()
        return self._report
