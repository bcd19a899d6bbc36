"""Reports finished requests to the status actor, a batch at a time and off the request's path."""

import asyncio
from collections import deque
from typing import Any

import structlog

from deployments.background import keep_running
from deployments.meter import Meter, Series
from deployments.status import ModelReport, Sample

SEND_EVERY_S = 0.5
REPORT_TIMEOUT_S = 2.0
MAX_WAITING = 10_000
"""Samples kept while the actor cannot be reached; the oldest go first."""

log = structlog.get_logger(__name__)


class StatusClient:
    """`actor` is the cluster's status actor."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor
        self._waiting: deque[Sample] = deque(maxlen=MAX_WAITING)
        self.meter = Meter()
        """Of this process; what it counts goes the same way."""
        self._sender: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._sender = keep_running(self._send_forever)

    async def stop(self) -> None:
        if self._sender is not None:
            self._sender.cancel()

    def add(self, sample: Sample) -> None:
        self._waiting.append(sample)

    async def report(self) -> tuple[float, dict[str, ModelReport]]:
        """What the actor knows; raises TimeoutError or a Ray error if it does not answer."""
        async with asyncio.timeout(REPORT_TIMEOUT_S):
            report: tuple[float, dict[str, ModelReport]] = await self._actor.report.remote()
        return report

    async def metrics(self) -> Series:
        """Of all ingress replicas, and of the status actor; raises as `report` does."""
        await self._send()  # what this one counted is in what it answers
        async with asyncio.timeout(REPORT_TIMEOUT_S):
            series: Series = await self._actor.metrics.remote()
        return series

    async def _send_forever(self) -> None:
        while True:
            await asyncio.sleep(SEND_EVERY_S)
            await self._send()

    async def _send(self) -> None:
        samples, measured = list(self._waiting), self.meter.drain()
        if not samples and not measured:
            return
        self._waiting.clear()
        try:
            await self._actor.add.remote(samples, measured)
        except Exception as error:
            self.meter.add(measured)
            log.warning("status_report_lost", error=type(error).__name__, samples=len(samples))
