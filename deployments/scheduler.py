"""Which chunk runs where, and when: a pure state machine with an injected clock, one per model.

Knows neither Ray nor asyncio; the actor around it and a simulator call the same methods. Today's order is first come,
first served, except that a rollout which has begun goes before one that has not: what is half done is worth finishing.
Work-conserving: whenever a replica has room, the head of the queue is granted at once, never after a timer. The rows of
one ticket (the candidates of a decision) are granted together.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from deployments.messages import NO_TERMS, ReplicaId, TicketId, TicketTerms


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_queued_rows: int = 256
    """Rows that may wait to begin their rollout; a ticket that would exceed it is refused with a Retry-After."""
    replica_timeout_s: float = 5.0
    """A replica that has not been heard of for this long gets no further work."""
    grant_timeout_s: float = 120.0
    """A grant that is neither completed nor withdrawn for this long is taken back: its ingress is gone."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """One chunk's rows. `begun` marks a rollout's later chunks, admitted with its first and never refused."""

    ticket_id: TicketId
    num_rows: int
    begun: bool = False
    patience_s: float = 60.0
    """How long it may wait; after that nobody does any more."""
    cost: int = 0
    """Row-steps: denoising forwards, summed over its rows."""
    terms: TicketTerms = NO_TERMS
    start_frame: str = ""
    """Digest of the frame that its rows begin with; a replica that has it encoded already is preferred."""


@dataclass(frozen=True, slots=True)
class Grant:
    ticket_id: TicketId
    replica_id: ReplicaId


@dataclass(frozen=True, slots=True)
class Overloaded:
    """The queue is full; `retry_after_s` is the backlog over the drain rate, at most `MAX_RETRY_AFTER_S`."""

    retry_after_s: int


@dataclass(frozen=True, slots=True)
class TooLate:
    """It was not granted by its deadline, or could no longer be done by it."""


MAX_RETRY_AFTER_S = 60
UNKNOWN_RATE_RETRY_AFTER_S = 5
"""What is said while nothing has been completed lately that a rate could be read from."""
RATE_WINDOW_S = 30.0


@dataclass(frozen=True, slots=True)
class SchedulerStatus:
    replicas: int
    capacity_rows: int
    running_rows: int
    queued_rows: int
    attention: str = ""
    """The kernel that the replicas compute attention with; empty while none runs."""
    rows_per_s: float | None = None
    """Rows, a chunk each, that were completed lately; None while none were."""


@dataclass(slots=True)
class _Replica:
    capacity_rows: int
    seen_at: float
    attention: str
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


@dataclass(frozen=True, slots=True)
class _Waiting:
    ticket: Ticket
    gives_up_at: float


class Scheduler:
    """Feed it events, then ask `dispatch` for the grants they allow."""

    def __init__(self, clock: Callable[[], float], limits: SchedulerLimits | None = None) -> None:
        self._clock = clock
        self._limits = limits or SchedulerLimits()
        self._replicas: dict[ReplicaId, _Replica] = {}
        self._queues: tuple[deque[_Waiting], deque[_Waiting]] = (deque(), deque())
        """Rollouts that have begun, then those that have not."""
        self._queued: dict[TicketId, Ticket] = {}
        self._new_rows = 0
        self._running: dict[TicketId, _Running] = {}
        self._completed: deque[tuple[float, int]] = deque()
        """When, and how many rows: the last `RATE_WINDOW_S`."""

    def submit(self, ticket: Ticket) -> Overloaded | None:
        """Queue `ticket`, or refuse it because the queue is full. An empty queue takes a ticket of any width.

        A ticket that is queued or running already is not queued twice.
        """
        if ticket.ticket_id in self._queued or ticket.ticket_id in self._running:
            return None
        if not ticket.begun:
            if self._new_rows and self._new_rows + ticket.num_rows > self._limits.max_queued_rows:
                return Overloaded(self._retry_after_s())
            self._new_rows += ticket.num_rows
        self._queued[ticket.ticket_id] = ticket
        self._queues[0 if ticket.begun else 1].append(_Waiting(ticket, self._clock() + ticket.patience_s))
        return None

    def dispatch(self) -> list[Grant]:
        """Grant as much of the queue's head as there is room for, to the least loaded replica first."""
        grants = []
        while (ticket := self._head()) is not None:
            replica_id = self._roomiest(ticket.num_rows)
            if replica_id is None:
                break
            self._unqueue(ticket)
            self._replicas[replica_id].running[ticket.ticket_id] = ticket.num_rows
            self._running[ticket.ticket_id] = _Running(replica_id, ticket.num_rows, self._clock())
            grants.append(Grant(ticket.ticket_id, replica_id))
        return grants

    def complete(self, ticket_id: TicketId) -> None:
        """The granted work is done. A ticket that is not running is ignored, so a repeated report does no harm."""
        running = self._release(ticket_id)
        if running is not None:
            self._completed.append((self._clock(), running.num_rows))
            self._forget_old_completions()

    def withdraw(self, ticket_id: TicketId) -> None:
        """Its client is gone: drop it from the queue, or free what it holds. Unknown tickets are ignored."""
        ticket = self._queued.get(ticket_id)
        if ticket is not None:
            self._unqueue(ticket)
        else:
            self._release(ticket_id)

    def granted(self, ticket_id: TicketId) -> Grant | None:
        """The grant that `ticket_id` holds: its answer may have been lost on the way."""
        running = self._running.get(ticket_id)
        return None if running is None else Grant(ticket_id, running.replica_id)

    def replica_alive(self, replica_id: ReplicaId, capacity_rows: int, attention: str = "") -> None:
        """A replica joined, or is still there."""
        replica = self._replicas.get(replica_id)
        if replica is None:
            self._replicas[replica_id] = _Replica(capacity_rows, self._clock(), attention)
        else:
            replica.capacity_rows, replica.seen_at = capacity_rows, self._clock()

    def replica_gone(self, replica_id: ReplicaId) -> None:
        """A caller saw it die, or it said that it leaves. What ran there is forgotten; its callers submit it again."""
        replica = self._replicas.pop(replica_id, None)
        if replica is not None:
            for ticket_id in replica.running:
                del self._running[ticket_id]

    def expire(self) -> list[TicketId]:
        """Forget silent replicas, grants whose ingress is gone, and tickets out of patience; returns the latter."""
        now = self._clock()
        given_up = []
        for queue in self._queues:
            for waiting in queue:
                if waiting.gives_up_at < now and self._queued.get(waiting.ticket.ticket_id) is waiting.ticket:
                    self._unqueue(waiting.ticket)
                    given_up.append(waiting.ticket.ticket_id)
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
        return given_up

    def status(self) -> SchedulerStatus:
        return SchedulerStatus(
            replicas=len(self._replicas),
            capacity_rows=sum(replica.capacity_rows for replica in self._replicas.values()),
            running_rows=sum(running.num_rows for running in self._running.values()),
            queued_rows=sum(ticket.num_rows for ticket in self._queued.values()),
            attention=next((replica.attention for replica in self._replicas.values()), ""),
            rows_per_s=self._rows_per_s(),
        )

    def _roomiest(self, rows: int) -> ReplicaId | None:
        with_room = [
            (replica.capacity_rows - replica.running_rows, replica_id)
            for replica_id, replica in self._replicas.items()
            if replica.has_room_for(rows)
        ]
        return max(with_room)[1] if with_room else None

    def _head(self) -> Ticket | None:
        """The next ticket to grant; what was withdrawn while it waited is dropped on the way."""
        for queue in self._queues:
            while queue:
                ticket = queue[0].ticket
                if self._queued.get(ticket.ticket_id) is ticket:
                    return ticket
                queue.popleft()
        return None

    def _unqueue(self, ticket: Ticket) -> None:
        del self._queued[ticket.ticket_id]
        if not ticket.begun:
            self._new_rows -= ticket.num_rows

    def _release(self, ticket_id: TicketId) -> _Running | None:
        running = self._running.pop(ticket_id, None)
        if running is not None:
            self._replicas[running.replica_id].running.pop(ticket_id)
        return running

    def _forget_old_completions(self) -> None:
        while self._completed and self._clock() - self._completed[0][0] > RATE_WINDOW_S:
            self._completed.popleft()

    def _rows_per_s(self) -> float | None:
        self._forget_old_completions()
        if not self._completed:
            return None
        span_s = max(1.0, self._clock() - self._completed[0][0])
        return sum(rows for _, rows in self._completed) / span_s

    def _retry_after_s(self) -> int:
        rows_per_s = self._rows_per_s()
        if rows_per_s is None:
            return UNKNOWN_RATE_RETRY_AFTER_S
        return min(MAX_RETRY_AFTER_S, 1 + int(self._new_rows / rows_per_s))
