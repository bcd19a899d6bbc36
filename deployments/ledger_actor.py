"""The ledger as a Ray actor: a shell around the one writer, which is the only thing that changes money.

Crash-only: when the writer can no longer trust its picture of the database it ends the process; Ray starts a successor,
which takes the fence over.
"""

import asyncio
import os
import time
from collections import Counter, defaultdict
from threading import Lock
from typing import NoReturn

import structlog
from ray.util import get_node_ip_address

from billing.auditor import Auditor, AuditReport
from billing.database import migrate, open_database
from billing.errors import BillingError
from billing.ledger import Commit, Ledger
from billing.writer import LedgerWriter, collect_rarely
from deployments.channel import Address, listen_in_thread
from deployments.ledger_audits import measure_audits
from deployments.ledger_wire import pack, unpack_commands
from deployments.logs import configure_logs
from deployments.meter import Meter, Series
from deployments.metrics import (
    LEDGER_CAPTURED_MILS,
    LEDGER_COMMIT_COMMANDS,
    LEDGER_COMMIT_SECONDS,
    LEDGER_ENTRIES,
    LEDGER_FRAMES_BILLED,
    LEDGER_REFUNDED_MILS,
)

log = structlog.get_logger(__name__)

RESTART_PAUSE_S = 1.0
"""Between attempts to become the writer while the database cannot be used."""


class LedgerActor:
    """Becomes the writer with its first command, not with its start: after a redeploy an older actor of the same
    database may still be there, and two that took over whenever Ray restarts them would fence each other for ever.

    Its methods are not coroutines: a call waits in a thread of its own, which costs Ray half as much, and cannot be
    cancelled with its caller. Ingress replicas call it past Ray, at `address`."""

    def __init__(self, database_url: str) -> None:
        configure_logs()
        self._database_url = database_url
        self._writer: LedgerWriter | None = None
        self._starting = Lock()
        self._address: Address | None = None
        self._audits: AuditReport | None = None
        self._meter = Meter()

    def apply(self, packed: bytes) -> bytes:
        """Outcomes of commands, both as `ledger_wire` has them, once they are durable."""
        return pack(self._begun_writer().submit(unpack_commands(packed)).result())

    def address(self) -> Address:
        """Where the same `apply` is called through a channel."""
        with self._starting:
            if self._address is None:
                self._address = listen_in_thread({"apply": self._apply}, get_node_ip_address())
            return self._address

    def audits(self) -> AuditReport | None:
        """The last round of audits; None until this actor is the writer and has finished one."""
        return self._audits

    def metrics(self) -> Series:
        return self._meter.series()

    async def _apply(self, packed: bytes) -> bytes:
        """A command is carried out whether or not its caller waits: the writer's futures cannot be cancelled."""
        writer = await asyncio.to_thread(self._begun_writer) if self._writer is None else self._writer
        outcomes = await asyncio.wrap_future(writer.submit(unpack_commands(packed)))
        return pack(outcomes)

    def _begun_writer(self) -> LedgerWriter:
        with self._starting:
            if self._writer is None:
                self._writer = self._take_over()
            return self._writer

    def _take_over(self) -> LedgerWriter:
        try:
            engine = open_database(self._database_url)
            migrate(engine)
            ledger = Ledger(engine, time.time, on_commit=lambda commit: measure_commit(self._meter, commit))
            epoch = ledger.take_over()
        except BillingError as error:  # the database may be back in seconds: callers ask again, of the next process
            time.sleep(RESTART_PAUSE_S)
            _end_process(error)
        collect_rarely()
        log.info("ledger_writer_ready", epoch=epoch)
        Auditor(self._database_url, self._publish).start()
        return LedgerWriter(ledger, on_death=_end_process)

    def _publish(self, report: AuditReport) -> None:
        self._audits = report
        measure_audits(self._meter, report)


def measure_commit(meter: Meter, commit: Commit) -> None:
    """Once for each kind and model, not for each request: the writer's thread does it between commits."""
    meter.observe(LEDGER_COMMIT_SECONDS, value=commit.took_s)
    meter.observe(LEDGER_COMMIT_COMMANDS, value=commit.num_commands)
    for kind, count in Counter(commit.entries).items():
        meter.count(LEDGER_ENTRIES, kind, by=count)
    sums: defaultdict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for model, frames, captured, refunded in commit.settled:
        of_model = sums[model]
        of_model[0] += frames
        of_model[1] += captured
        of_model[2] += refunded
    for model, of_model in sums.items():
        for metric, total in zip(
            (LEDGER_FRAMES_BILLED, LEDGER_CAPTURED_MILS, LEDGER_REFUNDED_MILS), of_model, strict=True
        ):
            meter.count(metric, model, by=total)


def _end_process(error: BaseException) -> NoReturn:
    log.error("ledger_writer_stopped", error=type(error).__name__, detail=str(error))
    os._exit(1)
