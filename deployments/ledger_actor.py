"""The ledger as a Ray actor: a shell around the one writer, which is the only thing that changes money.

Crash-only: when the writer can no longer trust its picture of the database it ends the process; Ray starts a successor,
which takes the fence over.
"""

import asyncio
import os
import time
from typing import NoReturn

import structlog

from billing.commands import Command, Outcome
from billing.database import migrate, open_database
from billing.errors import BillingError
from billing.ledger import Ledger
from billing.writer import LedgerWriter
from deployments.logs import configure_logs

log = structlog.get_logger(__name__)


RESTART_PAUSE_S = 1.0
"""Between attempts to become the writer while the database cannot be used."""


class LedgerActor:
    def __init__(self, database_url: str) -> None:
        configure_logs()
        try:
            engine = open_database(database_url)
            migrate(engine)
            ledger = Ledger(engine, time.time)
            epoch = ledger.take_over()
        except BillingError as error:
            # Raising here would end the actor for good, and a database that is away for seconds would too.
            time.sleep(RESTART_PAUSE_S)
            _end_process(error)
        log.info("ledger_writer_ready", epoch=epoch)
        self._writer = LedgerWriter(ledger, on_death=_end_process)

    async def apply(self, commands: list[Command]) -> list[Outcome]:
        """A cancelled caller does not cancel the commit."""
        return await asyncio.wrap_future(self._writer.submit(commands))


def _end_process(error: BaseException) -> NoReturn:
    log.error("ledger_writer_stopped", error=type(error).__name__, detail=str(error))
    os._exit(1)
