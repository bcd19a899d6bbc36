"""The loop around the ledger: one thread that turns waiting commands into one transaction at a time.

Group commit without a timer: whatever arrived while the last commit was being made durable goes into the next one, so
light load means small batches and low latency, heavy load large batches. Between commits it sweeps expired leases and
charges for provisioned units.
Knows no Ray: the actor is a shell around it, tests and tools run it in process.
"""

import contextlib
import gc
import queue
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Lock, Thread

import structlog

from billing.commands import ChargeUnits, Command, ExpireLeases, LeasesExpired, Outcome, UnitsCharged
from billing.ledger import Ledger

MAX_BATCH = 1_024
"""Commands in one transaction."""
SWEEP_EVERY_S = 5.0

COLLECT_EVERY_OBJECTS = 200_000
"""Python looks for cycles after 700 new objects; a batch makes tens of thousands, in no cycle, and keeps as many."""

log = structlog.get_logger(__name__)

_Item = tuple[tuple[Command, ...], "Future[list[Outcome]]"]


class LedgerWriter:
    """Feeds a `Ledger` that has taken over. `on_death` is called once if the ledger raises: nothing is written after.

    An exception from `Ledger.apply` means that the writer was fenced off or that a commit's outcome is unknown. Either
    way its picture of the database can no longer be trusted, so it stops (crash-only) and its callers ask again.
    """

    def __init__(self, ledger: Ledger, on_death: Callable[[BaseException], None]) -> None:
        self._ledger = ledger
        self._on_death = on_death
        self._waiting: queue.SimpleQueue[_Item | None] = queue.SimpleQueue()
        self._turn = Lock()
        self._stopped = False
        self._thread = Thread(target=self._run, name="ledger-writer", daemon=True)
        self._thread.start()

    def submit(self, commands: Sequence[Command]) -> "Future[list[Outcome]]":
        """Outcomes in command order, once they are durable. A caller that cancels does not take its commands back.

        Raises:
            RuntimeError: the writer has stopped.
        """
        answer: Future[list[Outcome]] = Future()
        answer.set_running_or_notify_cancel()  # from here on it cannot be cancelled, only ignored
        with self._turn:
            if self._stopped:
                raise RuntimeError("the ledger's writer has stopped")
            self._waiting.put((tuple(commands), answer))
        return answer

    def stop(self) -> None:
        """Write what is waiting, then end."""
        with self._turn:
            self._stopped = True
            self._waiting.put(None)
        self._thread.join()

    def _run(self) -> None:
        next_sweep = time.monotonic() + SWEEP_EVERY_S
        running = True
        while running:
            items, running = self._drain(max(0.0, next_sweep - time.monotonic()))
            sweep = time.monotonic() >= next_sweep
            try:
                self._write(items)
                if sweep:
                    expired, charged = self._ledger.apply([ExpireLeases(), ChargeUnits()])
                    if isinstance(expired, LeasesExpired) and expired.request_ids:
                        log.warning("leases_expired", request_ids=expired.request_ids)
                    if isinstance(charged, UnitsCharged) and charged.charged:
                        log.info("units_charged", ids=charged.charged)
                    next_sweep = time.monotonic() + SWEEP_EVERY_S
            except BaseException as error:
                with self._turn:
                    self._stopped = True
                for _, answer in [*items, *self._drain_rest()]:
                    if not answer.done():
                        answer.set_exception(error)
                self._on_death(error)
                break
        self._ledger.close()

    def _drain(self, timeout_s: float) -> tuple[list[_Item], bool]:
        """Everything that waits now, up to `MAX_BATCH` commands; waits only when there is nothing."""
        items: list[_Item] = []
        num_commands = 0
        try:
            item = self._waiting.get(timeout=timeout_s)
            while True:
                if item is None:
                    return items, False
                items.append(item)
                num_commands += len(item[0])
                if num_commands >= MAX_BATCH:
                    break
                item = self._waiting.get_nowait()
        except queue.Empty:
            pass
        return items, True

    def _drain_rest(self) -> list[_Item]:
        rest = []
        with contextlib.suppress(queue.Empty):
            while True:
                item = self._waiting.get_nowait()
                if item is not None:
                    rest.append(item)
        return rest

    def _write(self, items: list[_Item]) -> None:
        if not items:
            return
        outcomes = iter(self._ledger.apply([command for commands, _ in items for command in commands]))
        for commands, answer in items:
            answer.set_result([next(outcomes) for _ in commands])


def collect_rarely() -> None:
    """For a process that does little else than write a ledger: a tenth of its time goes into looking for garbage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_EVERY_OBJECTS)
