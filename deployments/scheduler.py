"""Which chunk runs where, and when: a pure state machine with an injected clock, one per model.

Knows neither Ray nor asyncio; the actor around it and a simulator call the same methods. Today's order is first come,
first served. Work-conserving: whenever a replica has room, the head of the queue is granted at once, never after a
timer. The rows of one ticket (the candidates of a decision) are granted together.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from deployments.messages import ReplicaId, TicketId


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_queued_rows: int = 256
    """Rows that may wait; a ticket that would exceed it is refused with a Retry-After."""
    replica_timeout_s: float = 5.0
    """A replica that has not been heard of for this long gets no further work."""
    grant_timeout_s: float = 120.0
    """A grant that is neither completed nor withdrawn for this long is taken back: its ingress is gone."""


@dataclass(frozen=True, slots=True)
class Ticket:
    ticket_id: TicketId
    num_rows: int


@dataclass(frozen=True, slots=True)
class Grant:
    ticket_id: TicketId
    replica_id: ReplicaId


@dataclass(frozen=True, slots=True)
class Overloaded:
    """The queue is full; `retry_after_s` is the backlog over the drain rate, rounded up."""

    retry_after_s: int


@dataclass(frozen=True, slots=True)
class SchedulerStatus:
    replicas: int
    capacity_rows: int
    running_rows: int
    queued_rows: int


@dataclass(slots=True)
class _Replica:
    capacity_rows: int
    seen_at: float
    running: dict[TicketId, int] = field(default_factory=dict)

    @property
    def running_rows(self) -> int:
        return sum(self.running.values())

    def has_room_for(self, rows: int) -> bool:
        """A ticket wider than the whole replica still runs, alone."""
        return not self.running or self.running_rows + rows <= self.capacity_rows


@dataclass(frozen=True, slots=True)
class _Running:
    replica_id: ReplicaId
    num_rows: int
    granted_at: float


class Scheduler:
    """Feed it events, then ask `dispatch` for the grants they allow."""

    def __init__(self, clock: Callable[[], float], limits: SchedulerLimits | None = None) -> None:
        self._clock = clock
        self._limits = limits or SchedulerLimits()
        self._replicas: dict[ReplicaId, _Replica] = {}
        self._queue: deque[Ticket] = deque()
        self._queued: set[TicketId] = set()
        self._queued_rows = 0
        self._running: dict[TicketId, _Running] = {}
        self._row_s = 1.0
        """Moving average of a row's time on a replica, in seconds."""

    def submit(self, ticket: Ticket) -> Overloaded | None:
        """Queue `ticket`, or refuse it because the queue is full. An empty queue takes a ticket of any width."""
        if self._queued_rows and self._queued_rows + ticket.num_rows > self._limits.max_queued_rows:
            return Overloaded(self._retry_after_s())
        self._queue.append(ticket)
        self._queued.add(ticket.ticket_id)
        self._queued_rows += ticket.num_rows
        return None

    def dispatch(self) -> list[Grant]:
        """Grant as much of the queue's head as there is room for, to the least loaded replica first."""
        grants = []
        while self._queue:
            ticket = self._queue[0]
            if ticket.ticket_id not in self._queued:  # withdrawn while it waited
                self._queue.popleft()
                continue
            replica_id = self._roomiest(ticket.num_rows)
            if replica_id is None:
                break
            self._queue.popleft()
            self._unqueue(ticket)
            self._replicas[replica_id].running[ticket.ticket_id] = ticket.num_rows
            self._running[ticket.ticket_id] = _Running(replica_id, ticket.num_rows, self._clock())
            grants.append(Grant(ticket.ticket_id, replica_id))
        return grants

    def complete(self, ticket_id: TicketId) -> None:
        """The granted work is done. A ticket that is not running is ignored, so a repeated report does no harm."""
        running = self._release(ticket_id)
        if running is not None:
            took_s = self._clock() - running.granted_at
            self._row_s += 0.1 * (took_s / running.num_rows - self._row_s)

    def withdraw(self, ticket_id: TicketId) -> None:
        """Its client is gone: drop it from the queue, or free what it holds. Unknown tickets are ignored."""
        if ticket_id in self._queued:
            self._unqueue(next(ticket for ticket in self._queue if ticket.ticket_id == ticket_id))
        else:
            self._release(ticket_id)

    def replica_alive(self, replica_id: ReplicaId, capacity_rows: int) -> None:
        """A replica joined, or is still there."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            self._replicas[replica_id] = _Replica(capacity_rows, self._clock())
        else:
            replica.capacity_rows, replica.seen_at = capacity_rows, self._clock()

    def replica_gone(self, replica_id: ReplicaId) -> None:
        """A caller saw it die, or it said that it leaves. What ran there is forgotten; its callers submit it again."""
        replica = self._replicas.pop(replica_id, None)
        if replica is not None:
            for ticket_id in replica.running:
                del self._running[ticket_id]

    def expire(self) -> None:
        """Forget silent replicas and grants whose ingress never came back."""
        now = self._clock()
        for replica_id in [
            replica_id
            for replica_id, replica in self._replicas.items()
            if now - replica.seen_at > self._limits.replica_timeout_s
        ]:
            self.replica_gone(replica_id)
        for ticket_id in [
            ticket_id
            for ticket_id, running in self._running.items()
            if now - running.granted_at > self._limits.grant_timeout_s
        ]:
            self._release(ticket_id)

    def status(self) -> SchedulerStatus:
        return SchedulerStatus(
            replicas=len(self._replicas),
            capacity_rows=sum(replica.capacity_rows for replica in self._replicas.values()),
            running_rows=sum(running.num_rows for running in self._running.values()),
            queued_rows=self._queued_rows,
        )

    def _roomiest(self, rows: int) -> ReplicaId | None:
        with_room = [
            (replica.capacity_rows - replica.running_rows, replica_id)
            for replica_id, replica in self._replicas.items()
            if replica.has_room_for(rows)
        ]
        return max(with_room)[1] if with_room else None

    def _unqueue(self, ticket: Ticket) -> None:
        self._queued.discard(ticket.ticket_id)
        self._queued_rows -= ticket.num_rows

    def _release(self, ticket_id: TicketId) -> _Running | None:
        running = self._running.pop(ticket_id, None)
        if running is not None:
            self._replicas[running.replica_id].running.pop(ticket_id)
        return running

    def _retry_after_s(self) -> int:
        replicas = max(1, len(self._replicas))
        return 1 + int(self._queued_rows * self._row_s / replicas)
