"""The ledger as a Ray actor: a shell around the one writer, which is the only thing that changes money.

Crash-only: when the writer can no longer trust its picture of the database it ends the process; Ray starts a successor,
which takes the fence over.
"""

import asyncio
import os
import time

import structlog

from billing.commands import Command, Outcome
from billing.database import migrate, open_database
from billing.ledger import Ledger
from billing.writer import LedgerWriter

log = structlog.get_logger(__name__)


class LedgerActor:
    def __init__(self, database_url: str) -> None:
        engine = open_database(database_url)
        migrate(engine)
        ledger = Ledger(engine, time.time)
        epoch = ledger.take_over()
        log.info("ledger_writer_ready", epoch=epoch)
        self._writer = LedgerWriter(ledger, on_death=_end_process)

    async def apply(self, commands: list[Command]) -> list[Outcome]:
        """A cancelled caller does not cancel the commit."""
        return await asyncio.shield(asyncio.wrap_future(self._writer.submit(commands)))

    async def ready(self) -> bool:
        return True


def _end_process(error: BaseException) -> None:
    log.error("ledger_writer_stopped", error=type(error).__name__, detail=str(error))
    os._exit(1)
