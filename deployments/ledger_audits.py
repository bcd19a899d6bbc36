"""What the ledger's audits found, for those who watch the cluster: metrics, a report for `/v1/status`."""

import asyncio
import time
from typing import Any

from billing.auditor import AuditReport
from billing.invariants import AUDITS
from deployments.meter import Meter, Series
from deployments.metrics import (
    LEDGER_AUDIT_DURATION_SECONDS,
    LEDGER_AUDIT_TIMESTAMP_SECONDS,
    LEDGER_AUDIT_VIOLATIONS,
    LEDGER_AUDITS_NOT_FINISHED,
)

ASK_EVERY_S = 5.0
"""Anybody may ask for the status; the ledger's actor is asked at most this often by each process."""
TIMEOUT_S = 2.0


def measure_audits(meter: Meter, report: AuditReport) -> None:
    found = dict.fromkeys((audit.name for audit in AUDITS), 0)
    for violation in report.violations:
        found[violation.audit] += 1
    for audit, rows in found.items():
        if audit not in report.not_finished:  # of these nothing new is known
            meter.set(LEDGER_AUDIT_VIOLATIONS, audit, to=rows)
    meter.set(LEDGER_AUDITS_NOT_FINISHED, to=len(report.not_finished))
    meter.set(LEDGER_AUDIT_TIMESTAMP_SECONDS, to=report.finished_at)
    meter.set(LEDGER_AUDIT_DURATION_SECONDS, to=report.took_s)


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

    async def metrics(self) -> Series:
        """Of the ledger's actor. Raises as `report` does."""
        async with asyncio.timeout(TIMEOUT_S):
            series: Series = await self._actor.metrics.remote()
        return series
