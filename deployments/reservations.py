"""What is held of customers' money while work runs: reserved before it, renewed during it, settled after it.

Every reservation ends in a settlement from a task of its own, whatever becomes of the request that made it.
"""

import asyncio
from collections.abc import Awaitable, Callable

import structlog

from billing.commands import (
    BudgetExceeded,
    ExpireLeases,
    Heartbeat,
    HeartbeatDone,
    IdempotencyConflict,
    InsufficientCredits,
    KeyRefused,
    QuoteRefused,
    Repeated,
    RequestId,
    Reserve,
    Reserved,
    ScopeRefused,
    Settle,
    Settled,
    UnknownReservation,
)
from billing.database import DATABASE_FAILURES
from billing.reader import LedgerReader, ReservationRecord
from deployments.background import keep_running
from deployments.errors import (
    BudgetUsedUp,
    CreditsInsufficient,
    IdempotencyKeyReused,
    KeyNotAccepted,
    KeyNotAllowed,
    LedgerUnavailable,
    QuoteNotAccepted,
)
from deployments.ledger_client import LedgerClient

MAX_SETTLE_ATTEMPTS = 30
SETTLE_RETRY_S = 2.0
"""With the client's own patience of 10 s a settlement is tried for about six minutes."""
SETTLE_WITHIN_S = 0.05
"""A settlement that nobody waits for goes with the next reservation, if there is one so soon: one commit for both."""
STOP_S = 20.0
"""How long a replica that ends waits for its last settlements."""
LEASE_S = 30.0
"""An ingress that has not renewed its reservations for this long is gone; the ledger refunds them."""
HEARTBEAT_EVERY_S = 5.0
"""A beat may take 10 s to be given up, so two may be missed."""

log = structlog.get_logger(__name__)


class Reservations:
    """Of one ingress replica."""

    def __init__(self, ledger: LedgerClient, reader: LedgerReader) -> None:
        self._ledger = ledger
        self._reader = reader
        self._open: set[RequestId] = set()
        self._settling: set[asyncio.Task[Settled | None]] = set()
        self._heartbeat: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._ledger.start()
        self._heartbeat = keep_running(self._renew_leases)

    async def stop(self) -> None:
        """Settle what is left; Serve waits for this when it removes the replica."""
        if self._settling:
            await asyncio.wait(self._settling, timeout=STOP_S)
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        await self._ledger.stop()

    async def settled(self) -> None:
        """Return once every settlement that was begun has been made."""
        if self._settling:
            await asyncio.wait(self._settling)
        await self._ledger.flush()

    async def reserve(self, command: Reserve) -> Reserved | Repeated:
        """Hold a price, or say which request this one repeats. The lease is renewed from here on.

        Raises:
            CreditsInsufficient, KeyNotAccepted, KeyNotAllowed, BudgetUsedUp, QuoteNotAccepted, IdempotencyKeyReused,
                LedgerUnavailable: nothing is held, or what may be held is being given back.
        """
        self._open.add(command.request_id)
        outcome = None
        try:
            outcome = await self._ledger.apply(command)
        finally:
            if outcome is None:  # cancelled, or its fate is unknown: if it was or will be applied, take it back
                self.settle_later(command.request_id, 0, "not started")
        if isinstance(outcome, Reserved):
            return outcome
        self._open.discard(command.request_id)
        match outcome:
            case Repeated():
                return outcome
            case InsufficientCredits(balance_mils, requested_mils):
                raise CreditsInsufficient(balance_mils, requested_mils)
            case KeyRefused():
                raise KeyNotAccepted()
            case IdempotencyConflict():
                raise IdempotencyKeyReused()
            case ScopeRefused(reason):
                raise KeyNotAllowed(reason)
            case QuoteRefused(reason):
                raise QuoteNotAccepted(reason)
            case BudgetExceeded(limit_mils, spent_mils, period, resets_at, requested_mils, source):
                raise BudgetUsedUp(limit_mils, spent_mils, requested_mils, period, resets_at, source)
        raise AssertionError(f"the ledger answered a reservation with {outcome}")

    async def take_over(self, request_id: RequestId) -> bool:
        """Renew a lease that another ingress replica began, or this one, from now on; False if it is over, and what was
        held has been given back.

        Raises:
            LedgerUnavailable: it is not renewed.
        """
        done = await self._ledger.apply(Heartbeat((request_id,), LEASE_S))
        is_open = isinstance(done, HeartbeatDone) and done.renewed == 1
        if is_open:
            self._open.add(request_id)
        return is_open

    def hand_over(self, request_id: RequestId) -> None:
        """Renew that reservation's lease no more: from here on somebody else does, or nobody."""
        self._open.discard(request_id)

    def settle_later(
        self,
        request_id: RequestId,
        frames_delivered: int,
        reason: str,
        first: Callable[[], Awaitable[None]] | None = None,
    ) -> "asyncio.Task[Settled | None]":
        """Close the reservation from a task of its own, which does `first` before; that may not raise.

        Settling what was delivered moves no money, so nobody waits for it. Until the ledger has answered, the lease is
        renewed, so a ledger that is away neither refunds what was delivered nor keeps what was not.
        """
        command = Settle(request_id, frames_delivered, reason)
        task = asyncio.get_running_loop().create_task(self._settle(command, first))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        return task

    async def record(self, request_id: RequestId) -> ReservationRecord | None:
        try:
            return await asyncio.to_thread(self._reader.reservation, request_id)
        except DATABASE_FAILURES as error:
            raise LedgerUnavailable() from error

    async def is_settled(self, request_id: RequestId) -> bool:
        """Raises LedgerUnavailable."""
        record = await self.record(request_id)
        return record is not None and record.state == "settled"

    async def _settle(self, command: Settle, first: Callable[[], Awaitable[None]] | None) -> Settled | None:
        try:
            return await self._settled(command, first)
        finally:  # whatever else: a lease that nobody renews ends
            self._open.discard(command.request_id)

    async def _settled(self, command: Settle, first: Callable[[], Awaitable[None]] | None) -> Settled | None:
        within_s = 0.0
        if first is not None:
            await first()
            within_s = SETTLE_WITHIN_S
        outcome = None
        for attempt in range(MAX_SETTLE_ATTEMPTS):
            try:
                outcome = await self._ledger.apply(command, within_s)
            except LedgerUnavailable:
                log.warning("settlement_delayed", request_id=command.request_id, attempt=attempt)
                within_s = 0.0
                await asyncio.sleep(SETTLE_RETRY_S)
                continue
            if not isinstance(outcome, Settled | UnknownReservation):
                log.error("settlement_refused", request_id=command.request_id, outcome=repr(outcome))
            break
        else:
            log.error("settlement_left_to_lease", request_id=command.request_id)
        return outcome if isinstance(outcome, Settled) else None

    async def _renew_leases(self) -> None:
        """Every beat is a command, so that a ledger that restarted gets a writer and sweeps, with work or without."""
        while True:
            try:
                await self._ledger.apply(Heartbeat(tuple(self._open), LEASE_S) if self._open else ExpireLeases())
            except LedgerUnavailable:
                log.warning("heartbeat_missed", reservations=len(self._open))
            await asyncio.sleep(HEARTBEAT_EVERY_S)
