"""The scheduler as a Ray actor: turns its grants into answers to waiting callers.

One per model. A caller that is cancelled while it waits is withdrawn, and one that has died loses what it had. State is
not durable: after a restart replicas announce themselves again within a heart-beat, and callers submit again what was
lost.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import structlog
from ray.util import get_node_ip_address

from deployments.background import keep_running
from deployments.batching import BatchProfile
from deployments.channel import Address, Listener
from deployments.logs import configure_logs
from deployments.messages import CallerId, ReplicaId, Ticket, TicketId
from deployments.meter import Meter, Series
from deployments.metrics import BY_NAME, SCHEDULER_GRANT_SECONDS, SCHEDULER_REFUSALS
from deployments.scheduler import (
    Demand,
    Grant,
    Notice,
    Overloaded,
    Refused,
    Scheduler,
    SchedulerLimits,
    SchedulerStatus,
    TooLate,
)

EXPIRE_EVERY_S = 1.0
RECONNECT_S = 5.0
"""A caller that has not come back so long after its connection broke has died. One that ends breaks it at once."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Placed:
    grant: Grant
    address: Address
    """Of the replica."""


class SchedulerActor:
    def __init__(self, limits: SchedulerLimits, slug: str = "") -> None:
        configure_logs()
        self._slug = slug
        self._meter = Meter()
        self._replica_gauges: dict[ReplicaId, Series] = {}
        self._scheduler = Scheduler(time.monotonic, limits)
        self._waiting: dict[TicketId, list[asyncio.Future[Grant | Overloaded | TooLate]]] = {}
        """More than one for a ticket that was asked for again over another connection: all get the one answer."""
        self._expiry: asyncio.Task[None] | None = None
        self._is_dispatching = False
        self._addresses: dict[ReplicaId, Address] = {}
        self._listening: asyncio.Task[Address] | None = None
        self._attending: Counter[CallerId] = Counter()

    async def address(self) -> Address:
        """Where ingress replicas call the methods below, past Ray."""
        if self._listening is None:
            methods = (self.place, self.notice, self.attend, self.finish_s, self.status, self.metrics)
            listener = Listener({method.__name__: method for method in methods})
            self._listening = asyncio.get_running_loop().create_task(listener.start(get_node_ip_address()))
        return await asyncio.shield(self._listening)

    async def place(self, ticket: Ticket) -> "Placed | Overloaded | TooLate":
        """As `acquire`, with where the replica is called."""
        while True:
            answer = await self.acquire(ticket)
            if not isinstance(answer, Grant):
                return answer
            if answer.replica_id in self._scheduler.replica_ids:  # else it has gone since, and the grant with it
                return Placed(answer, self._addresses[answer.replica_id])

    async def acquire(self, ticket: Ticket) -> Grant | Overloaded | TooLate:
        """Wait until a replica has room for `ticket`, or refuse it at once."""
        granted_before = self._scheduler.granted(ticket.ticket_id)
        if granted_before is not None:
            return granted_before
        started = time.monotonic()
        refusal = self._scheduler.submit(ticket)
        if refusal is not None:
            self._measure(ticket, refusal, started)
            return refusal
        granted: asyncio.Future[Grant | Overloaded | TooLate] = asyncio.get_running_loop().create_future()
        askers = self._waiting.setdefault(ticket.ticket_id, [])
        askers.append(granted)
        self._dispatch()
        try:
            answer = await granted
        except asyncio.CancelledError:
            askers.remove(granted)
            if not askers and self._waiting.get(ticket.ticket_id, askers) is askers:
                self._waiting.pop(ticket.ticket_id, None)
                self._measure(ticket, None, started)
                self._scheduler.withdraw(ticket.ticket_id)
                self._dispatch()
            raise
        self._measure(ticket, answer, started)
        return answer

    async def attend(self, caller: CallerId) -> None:
        """Never answers: it ends with the caller's connection. What a caller holds that does not come back is taken
        back."""
        self._attending[caller] += 1
        try:
            await asyncio.Event().wait()
        finally:
            self._attending[caller] -= 1
            asyncio.get_running_loop().call_later(RECONNECT_S, self._miss, caller)

    def _miss(self, caller: CallerId) -> None:
        if self._attending[caller]:
            return
        del self._attending[caller]
        queued = self._scheduler.caller_gone(caller)
        log.info("caller_gone", model=self._slug, queued=len(queued))
        for ticket_id in queued:
            for asker in self._waiting[ticket_id]:
                asker.cancel()

    async def notice(self, notices: Sequence[Notice]) -> None:
        """What callers saw, in order."""
        for kind, name in notices:
            match kind:
                case "complete":
                    self._scheduler.complete(TicketId(name))
                case "withdraw":
                    self._scheduler.withdraw(TicketId(name))
                case "replica_gone":
                    self._scheduler.replica_gone(ReplicaId(name))
        self._dispatch()

    async def replica_alive(
        self,
        replica_id: ReplicaId,
        capacity_rows: int,
        attention: str = "",
        profile: BatchProfile | None = None,
        measured: Series | None = None,
        limits: SchedulerLimits | None = None,
        address: Address | None = None,
    ) -> list[TicketId]:
        """`measured`: what the replica has counted since it last said so. `limits`: of its configuration. `address`:
        where it is called; None where nobody calls `place`.

        What it is to stop, and then to withdraw: those who waited for it have died."""
        if address is not None:
            self._addresses[replica_id] = address
        if limits is not None:
            self._scheduler.limit(limits)
        gauges = {key: values for key, values in (measured or {}).items() if BY_NAME[key[0]].kind == "gauge"}
        self._meter.add({key: values for key, values in (measured or {}).items() if key not in gauges})
        self._replica_gauges[replica_id] = gauges
        if self._expiry is None:
            self._expiry = keep_running(self._expire_forever)
        self._scheduler.replica_alive(replica_id, capacity_rows, attention, profile)
        self._dispatch()
        return self._scheduler.orphans_on(replica_id)

    async def replica_gone(self, replica_id: ReplicaId) -> None:
        self._scheduler.replica_gone(replica_id)
        self._dispatch()

    async def status(self) -> SchedulerStatus:
        return self._scheduler.status()

    async def metrics(self) -> tuple[SchedulerStatus, Series]:
        """The state, and what was counted here and on the replicas; their gauges are summed."""
        self._forget_absent()
        gauges: dict[tuple[str, tuple[str, ...]], tuple[float, ...]] = {}
        for each in self._replica_gauges.values():
            for key, (value,) in each.items():
                gauges[key] = (gauges.get(key, (0.0,))[0] + value,)
        return self._scheduler.status(), {**self._meter.series(), **gauges}

    async def finish_s(self, ticket: Ticket) -> float | None:
        """See `Scheduler.finish_s`; the ticket is not queued."""
        return self._scheduler.finish_s(ticket)

    async def demand(self) -> Demand:
        return self._scheduler.demand()

    def _measure(self, ticket: Ticket, answer: Grant | Overloaded | TooLate | None, started: float) -> None:
        service_class = ticket.terms.service_class
        match answer:
            case Grant():
                waited_s = time.monotonic() - started
                self._meter.observe(SCHEDULER_GRANT_SECONDS, self._slug, service_class, value=waited_s)
            case Overloaded():
                self._meter.count(SCHEDULER_REFUSALS, self._slug, service_class, "overloaded")
            case TooLate():
                self._meter.count(SCHEDULER_REFUSALS, self._slug, service_class, "too_late")
            case None:
                self._meter.count(SCHEDULER_REFUSALS, self._slug, service_class, "withdrawn")

    def _dispatch(self) -> None:
        """Once for all that happens in one turn of the loop."""
        if not self._is_dispatching:
            self._is_dispatching = True
            asyncio.get_running_loop().call_soon(self._dispatch_now)

    def _dispatch_now(self) -> None:
        self._is_dispatching = False
        for answer in self._scheduler.dispatch():
            self._answer(answer)

    def _answer(self, answer: Grant | Refused) -> None:
        outcome, is_used = answer if isinstance(answer, Grant) else answer.why, False
        for asker in self._waiting.pop(answer.ticket_id, ()):
            if not asker.done():
                asker.set_result(outcome)
                is_used = True
        if not is_used:
            self._scheduler.withdraw(answer.ticket_id)

    async def _expire_forever(self) -> None:
        while True:
            await asyncio.sleep(EXPIRE_EVERY_S)
            for refused in self._scheduler.expire():
                self._answer(refused)
            self._forget_absent()
            self._dispatch()

    def _forget_absent(self) -> None:
        present = self._scheduler.replica_ids
        self._addresses = {name: each for name, each in self._addresses.items() if name in present}
        self._replica_gauges = {name: each for name, each in self._replica_gauges.items() if name in present}
