"""The scheduler as a Ray actor: turns its grants into answers to waiting callers.

One per model. A caller that is cancelled while it waits is withdrawn. State is not durable: after a restart replicas
announce themselves again within a heart-beat, and callers submit again what was lost.
"""

import asyncio
import time

from deployments.batching import BatchProfile
from deployments.logs import configure_logs
from deployments.messages import ReplicaId, Ticket, TicketId
from deployments.scheduler import (
    Demand,
    Grant,
    Overloaded,
    Refused,
    Scheduler,
    SchedulerLimits,
    SchedulerStatus,
    TooLate,
)

EXPIRE_EVERY_S = 1.0


class SchedulerActor:
    def __init__(self, limits: SchedulerLimits) -> None:
        configure_logs()
        self._scheduler = Scheduler(time.monotonic, limits)
        self._waiting: dict[TicketId, asyncio.Future[Grant | Overloaded | TooLate]] = {}
        self._expiry: asyncio.Task[None] | None = None

    async def acquire(self, ticket: Ticket) -> Grant | Overloaded | TooLate:
        """Wait until a replica has room for `ticket`, or refuse it at once."""
        granted_before = self._scheduler.granted(ticket.ticket_id)
        if granted_before is not None:
            return granted_before
        refusal = self._scheduler.submit(ticket)
        if refusal is not None:
            return refusal
        earlier = self._waiting.get(ticket.ticket_id)
        if earlier is not None:  # asked again over a connection that broke: both get the one answer
            return await asyncio.shield(earlier)
        granted: asyncio.Future[Grant | Overloaded | TooLate] = asyncio.get_running_loop().create_future()
        self._waiting[ticket.ticket_id] = granted
        self._dispatch()
        try:
            return await granted
        except asyncio.CancelledError:
            await self.withdraw(ticket.ticket_id)
            raise
        finally:
            self._waiting.pop(ticket.ticket_id, None)

    async def complete(self, ticket_id: TicketId) -> None:
        self._scheduler.complete(ticket_id)
        self._dispatch()

    async def withdraw(self, ticket_id: TicketId) -> None:
        self._scheduler.withdraw(ticket_id)
        self._dispatch()

    async def replica_alive(
        self, replica_id: ReplicaId, capacity_rows: int, attention: str = "", profile: BatchProfile | None = None
    ) -> None:
        if self._expiry is None:
            self._expiry = asyncio.get_running_loop().create_task(self._expire_forever())
        self._scheduler.replica_alive(replica_id, capacity_rows, attention, profile)
        self._dispatch()

    async def replica_gone(self, replica_id: ReplicaId) -> None:
        self._scheduler.replica_gone(replica_id)

    async def status(self) -> SchedulerStatus:
        return self._scheduler.status()

    async def finish_s(self, ticket: Ticket) -> float | None:
        """See `Scheduler.finish_s`; the ticket is not queued."""
        return self._scheduler.finish_s(ticket)

    async def demand(self) -> Demand:
        return self._scheduler.demand()

    def _dispatch(self) -> None:
        for answer in self._scheduler.dispatch():
            self._answer(answer)

    def _answer(self, answer: Grant | Refused) -> None:
        waiting = self._waiting.get(answer.ticket_id)
        if waiting is None or waiting.done():
            self._scheduler.withdraw(answer.ticket_id)  # nobody is there to use it
        else:
            waiting.set_result(answer if isinstance(answer, Grant) else answer.why)

    async def _expire_forever(self) -> None:
        while True:
            await asyncio.sleep(EXPIRE_EVERY_S)
            for refused in self._scheduler.expire():
                self._answer(refused)
            self._dispatch()
