"""Which chunk runs where, and when: a pure state machine with an injected clock, one per model.

Knows neither Ray nor asyncio; the actor around it and a simulator call the same methods. The order is `FairQueue`'s.
Work-conserving: while a replica has room the head is granted at once, never after a timer, to the replica with the most
room. A replica takes its next batch while it runs one, so that it never waits for the way back and forth. What cannot
be done by its deadline is refused as soon as that is known: at the door, and again at the head of the queue.
"""

import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from billing.commands import CustomerId
from deployments.batching import BatchProfile
from deployments.drain_rate import DrainRate, RecentRate
from deployments.fair_queue import FairQueue, Waiting
from deployments.messages import CallerId, ReplicaId, ServiceClass, Ticket, TicketId
from deployments.present_batches import PresentBatches
from deployments.room import ByRoom, RunningReplica

CAUTION = 1.05
"""At the door the estimate must leave this much while others are there: who is let in and is late after all has lost
more than who is not."""
REMEMBERED_AFFINITIES = 4096
"""Start frames and streams of which the scheduler knows which replica had them last."""
UNKNOWN_BATCH_S = 1.0
"""What a present batch is taken to last, where no profile tells; only what has something ready is compared by it."""
MAX_RETRY_AFTER_S = 60.0
UNKNOWN_COST_PER_S = 10.0
"""A replica's rate, for counting demand, until one has said its own."""
UNKNOWN_RATE_RETRY_AFTER_S = 5.0
"""What is said while nothing is known that a rate could be read from."""


Notice = tuple[Literal["complete", "withdraw", "replica_gone"], str]
"""What became of a ticket, or of a replica, by the name of the method that takes it."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    max_queued_rows: int = 256
    """Rows that may wait to begin their rollout, per class: each customer's fair part of it, see `FairQueue`."""
    usual_steps: int = 1
    """A row counts as many times as it has this number of denoising steps."""
    max_customer_rows: int = 0
    """Rows that one customer may have running, however idle the model is; 0 sets no limit."""
    customer_weights: Mapping[CustomerId, float] = field(default_factory=dict)
    """Fair shares other than 1."""
    replica_timeout_s: float = 5.0
    """A replica that has not been heard of for this long gets no further work."""
    grant_timeout_s: float = 120.0
    """A grant that is neither completed nor withdrawn for this long is taken back: its ingress is gone."""
    boot_s: float = 0.0
    """Of the first replica, from when it is asked for until it serves."""
    cold_start_budget_s: float = 0.0
    """How long a request may wait for that; 0 for a model that is never scaled to zero: its requests wait as ever."""

    @property
    def max_queued_cost(self) -> int:
        return self.max_queued_rows * self.usual_steps


class Grant(NamedTuple):
    ticket_id: TicketId
    replica_id: ReplicaId


@dataclass(frozen=True, slots=True)
class Overloaded:
    """No place in the queue; `retry_after_s` is when what waits before such a ticket will have been done."""

    retry_after_s: float


@dataclass(frozen=True, slots=True)
class TooLate:
    """It was not granted by its deadline, or could no longer be done by it."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A ticket that was queued and leaves ungranted."""

    ticket_id: TicketId
    why: Overloaded | TooLate


@dataclass(frozen=True, slots=True)
class SchedulerStatus:
    replicas: int
    capacity_rows: int
    """Rows in one forward, summed over replicas."""
    running_rows: int
    queued_rows: int
    attention: str = ""
    """The kernel that the replicas compute attention with; empty while none runs."""
    wait_s: float | None = None
    """How long a customer's first ticket would wait now; None while no rate is known."""
    profile: BatchProfile | None = None
    """What a replica measured when it started."""
    cost_per_s: float = 0.0
    """Row-steps that the replicas do in full batches, corrected by what they did; 0 while that is not known."""
    recent_cost_per_s: float = 0.0
    """Row-steps that they did lately."""
    queued: Mapping[ServiceClass, tuple[int, int]] = field(default_factory=dict)
    """Rows and row-steps that wait."""

    @property
    def headroom_cost_per_s(self) -> float:
        return max(0.0, self.cost_per_s - self.recent_cost_per_s)


@dataclass(frozen=True, slots=True)
class Demand:
    """What a scheduler has counted so far, in replica-seconds: what it takes of one replica that runs full batches."""

    offered_s: float
    """Asked for since it started, refused work included: a full queue must not hide what is wanted."""
    backlog_s: float
    """Of the rollouts whose tickets wait or run: those chunks and the ones after them."""


@dataclass(slots=True, eq=False)
class _Running:
    ticket: Ticket
    cost: int
    replica: RunningReplica
    granted_at: float


class Scheduler:
    """Feed it events, then ask `dispatch` for the grants they allow."""

    def __init__(self, clock: Callable[[], float], limits: SchedulerLimits | None = None) -> None:
        self._clock = clock
        self._limits = limits or SchedulerLimits()
        self._replicas: dict[ReplicaId, RunningReplica] = {}
        self._by_room = ByRoom()
        self._queue = FairQueue(self._limits.customer_weights)
        self._arrivals = 0
        self._patience: list[tuple[float, TicketId]] = []
        self._running: dict[TicketId, _Running] = {}
        """In the order in which they were granted."""
        self._orphans: set[TicketId] = set()
        """Running, for callers who have died."""
        self._rows_of: dict[CustomerId, int] = {}
        """Running, per customer."""
        self._ready_on: OrderedDict[str, ReplicaId] = OrderedDict()
        self._num_full = 0
        """Replicas with a full batch."""
        self._num_open = 0
        """Replicas with room for some ticket."""
        self._began_at = clock()
        self._asked_for_at: float | None = None
        """When somebody first wanted the model and there was no replica, which makes the scaling policy ask for one."""
        self._num_busy = 0
        self._cost_ahead = 0.0
        """Granted to replicas beyond their present batches."""
        self._present = PresentBatches()
        self._unexpected: dict[ReplicaId, RunningReplica] = {}
        """Those whose present batch has changed since `_present` was last told."""
        self._promised_per_s = 0.0
        self._backlog_cost = 0
        """Of the rollouts whose tickets wait or run, with their later chunks."""
        self._offered_cost = 0
        self._replica_cost_per_s = UNKNOWN_COST_PER_S
        self._drain = DrainRate(self._began_at)
        self._recent = RecentRate(self._began_at)

    def limit(self, limits: SchedulerLimits) -> None:
        """Other limits from now on. What waits and runs already stays."""
        if limits == self._limits:
            return
        self._limits = limits
        self._queue.reweigh(limits.customer_weights)
        for customer_id in {waiting.ticket.terms.customer_id for waiting in self._queue}:
            self._queue.release(customer_id)

    def submit(self, ticket: Ticket) -> Overloaded | TooLate | None:
        """Queue `ticket`, or refuse it. A rollout that has begun is refused only when its deadline is lost.

        A ticket that is queued or running already is not queued twice.
        """
        if ticket.ticket_id in self._queue or ticket.ticket_id in self._running:
            return None
        now, terms, cost = self._clock(), ticket.terms, ticket.cost
        if not ticket.begun:
            self._offered_cost += cost * terms.chunks_left
        deadline = math.inf if terms.deadline_s is None else now + terms.deadline_s
        if not self._replicas and not ticket.begun and self._limits.cold_start_budget_s:
            boots_in_s = self._boots_in_s(now)
            if boots_in_s > self._limits.cold_start_budget_s or now + boots_in_s > deadline:
                return Overloaded(boots_in_s)
        if deadline < math.inf:
            replica = next(iter(self._replicas.values()), None)
            if replica is not None and now + self._shortest_run_s(ticket, replica) > deadline:
                return TooLate()
            finish_s = self.finish_s(ticket) if self._running or len(self._queue) else None
            if finish_s is not None and now + CAUTION * finish_s > deadline:
                return TooLate() if ticket.begun else Overloaded(self._retry_after_s(ticket))
        if not ticket.begun and not self._queue.has_place(
            terms.service_class, terms.customer_id, cost, self._limits.max_queued_cost
        ):
            return Overloaded(self._retry_after_s(ticket))
        self._arrivals += 1
        self._queue.add(Waiting(ticket, cost, self._arrivals, deadline))
        self._backlog_cost += cost * terms.chunks_left
        heapq.heappush(self._patience, (min(deadline, now + ticket.patience_s), ticket.ticket_id))
        return None

    def dispatch(self) -> list[Grant | Refused]:
        """Grant as much of the queue's head as there is room for; refuse what has come to the head too late."""
        answers: list[Grant | Refused] = []
        now = self._clock()
        while self._num_open and (waiting := self._queue.head()) is not None:
            ticket = waiting.ticket
            if self._limits.max_customer_rows and self._exceeds_its_rows(ticket):
                self._queue.hold(waiting)
                continue
            replica = self._replica_for(ticket)
            if replica is None:
                break
            if waiting.deadline < math.inf and now + self._shortest_run_s(ticket, replica) > waiting.deadline:
                self._leave_queue(waiting)
                answers.append(Refused(ticket.ticket_id, TooLate()))
                continue
            self._queue.take(ticket.ticket_id)
            self._start(waiting, replica, now)
            answers.append(Grant(ticket.ticket_id, replica.replica_id))
        self._drain.observe(now, saturated=self._num_full == len(self._replicas))
        return answers

    def complete(self, ticket_id: TicketId) -> None:
        """The granted work is done. A ticket that is not running is ignored, so a repeated report does no harm."""
        now = self._clock()
        running = self._release(ticket_id, now)
        if running is not None:
            self._drain.completed(now, running.cost)
            self._recent.completed(now, running.cost)

    def withdraw(self, ticket_id: TicketId) -> None:
        """Its client is gone: drop it from the queue, or free what it holds. Unknown tickets are ignored."""
        waiting = self._queue.get(ticket_id)
        if waiting is not None:
            self._leave_queue(waiting)
        else:
            self._release(ticket_id, self._clock())

    def caller_gone(self, caller: CallerId) -> list[TicketId]:
        """It has died. What it had queued leaves, and is named. What runs for it keeps its room until it is withdrawn
        by its replica, to which `orphans_on` says what is to stop."""
        queued = [waiting for waiting in self._queue if waiting.ticket.caller == caller]
        for waiting in queued:
            self._leave_queue(waiting)
        running = self._running.items()
        self._orphans |= {ticket_id for ticket_id, each in running if each.ticket.caller == caller}
        return [waiting.ticket.ticket_id for waiting in queued]

    def orphans_on(self, replica_id: ReplicaId) -> list[TicketId]:
        return sorted(each for each in self._orphans if self._running[each].replica.replica_id == replica_id)

    def granted(self, ticket_id: TicketId) -> Grant | None:
        """The grant that `ticket_id` holds: its answer may have been lost on the way."""
        running = self._running.get(ticket_id)
        return None if running is None else Grant(ticket_id, running.replica.replica_id)

    def replica_alive(
        self, replica_id: ReplicaId, capacity_rows: int, attention: str = "", profile: BatchProfile | None = None
    ) -> None:
        """A replica joined, or is still there; its capacity may have changed."""
        now = self._clock()
        replica = self._replicas.get(replica_id)
        if replica is None:
            replica = RunningReplica(replica_id, 0, now, attention, None, now)
            self._asked_for_at = None
            self._replicas[replica_id] = replica
            self._count(replica, 1)
        if (replica.capacity_rows, replica.profile) != (capacity_rows, profile):
            self._count(replica, -1)
            replica.promise(capacity_rows, profile)
            self._count(replica, 1)
            self._promise()
        replica.seen_at = now

    def replica_gone(self, replica_id: ReplicaId) -> None:
        """A caller saw it die, or it said that it leaves. What ran there is forgotten; its callers submit it again."""
        replica = self._replicas.get(replica_id)
        if replica is not None:
            now = self._clock()
            for ticket_id in list(replica.running):
                self._release(ticket_id, now)
            self._count(replica, -1)
            del self._replicas[replica_id]
            self._promise()

    def expire(self) -> list[Refused]:
        """Forget silent replicas, grants whose ingress is gone, and tickets out of patience or time."""
        now = self._clock()
        refused: list[Refused] = []
        while self._patience and self._patience[0][0] < now:
            _, ticket_id = heapq.heappop(self._patience)
            waiting = self._queue.get(ticket_id)
            if waiting is not None:
                self._leave_queue(waiting)
                why = TooLate() if waiting.deadline < now else Overloaded(self._retry_after_s(waiting.ticket))
                refused.append(Refused(ticket_id, why))
        if len(self._patience) > 2 * len(self._queue) + 64:
            self._patience = [entry for entry in self._patience if entry[1] in self._queue]
            heapq.heapify(self._patience)
        for replica_id, replica in list(self._replicas.items()):
            if now - replica.seen_at > self._limits.replica_timeout_s:
                self.replica_gone(replica_id)
        while self._running:
            oldest = next(iter(self._running.values()))
            if now - oldest.granted_at <= self._limits.grant_timeout_s:
                break
            self._release(oldest.ticket.ticket_id, now)
        return refused

    def finish_s(self, ticket: Ticket) -> float | None:
        """How long until `ticket`, submitted now, and the later chunks of its rollout would be done; None if unknown.

        What waits before it runs in full batches. The last of them it shares, with those who come after it too if there
        is a backlog.
        """
        if not self._rate():
            return None
        terms = ticket.terms
        ahead = self._queue.cost_before(terms.service_class, terms.customer_id, ticket.cost) - ticket.cost
        return self._finish_after_s(ticket, ahead)

    def status(self) -> SchedulerStatus:
        first = next(iter(self._replicas.values()), None)
        rate = self._drain.cost_per_s
        waiting = self._queue.cost_before("standard", CustomerId(""), 0) + self._unfinished_cost()
        return SchedulerStatus(
            replicas=len(self._replicas),
            capacity_rows=sum(replica.capacity_rows for replica in self._replicas.values()),
            running_rows=sum(replica.rows for replica in self._replicas.values()),
            queued_rows=self._queue.num_rows,
            attention="" if first is None else first.attention,
            wait_s=waiting / rate if rate else None,
            profile=None if first is None else first.profile,
            cost_per_s=rate,
            recent_cost_per_s=self._recent.cost_per_s(self._clock()),
            queued=self._queue.by_class(),
        )

    @property
    def replica_ids(self) -> Collection[ReplicaId]:
        return self._replicas.keys()

    def demand(self) -> Demand:
        return Demand(self._offered_cost / self._replica_cost_per_s, self._backlog_cost / self._replica_cost_per_s)

    def _leave_queue(self, waiting: Waiting) -> None:
        self._queue.remove(waiting.ticket.ticket_id)
        self._backlog_cost -= waiting.cost * waiting.ticket.terms.chunks_left

    def _replica_for(self, ticket: Ticket) -> RunningReplica | None:
        """The replica that has ready what it needs, unless it would begin later there by more than that is worth; else
        the roomiest."""
        roomiest = self._by_room.first()
        if roomiest is not None and not roomiest.has_room_for(ticket):
            roomiest = None
        known = self._replicas.get(self._ready_on.get(ticket.affinity, ReplicaId(""))) if ticket.affinity else None
        if known is None or known is roomiest or not known.has_room_for(ticket):
            return roomiest
        if roomiest is None:
            return known
        worth_s = 0.0 if known.profile is None else ticket.affinity_steps * known.profile.step_s(ticket.num_rows)
        waits_longer_s = self._begins_in_s(ticket, known) - self._begins_in_s(ticket, roomiest)
        return known if waits_longer_s <= worth_s else roomiest

    def _begins_in_s(self, ticket: Ticket, replica: RunningReplica) -> float:
        """Until the engine there has a place for its rows: at once, or when its present batch is done."""
        if replica.rows + ticket.num_rows <= replica.capacity_rows:
            return 0.0
        ends_at = replica.batch_ends_at
        return UNKNOWN_BATCH_S if ends_at is None else max(0.0, ends_at - self._clock())

    def _start(self, waiting: Waiting, replica: RunningReplica, now: float) -> None:
        ticket, replica_id = waiting.ticket, replica.replica_id
        if not replica.running:
            replica.progress_at, replica.compatibility = now, ticket.compatibility
            self._num_busy += 1
        replica.running.add(ticket.ticket_id)
        self._add(replica, ticket.num_rows, waiting.cost)
        self._running[ticket.ticket_id] = _Running(ticket, waiting.cost, replica, now)
        customer_id = ticket.terms.customer_id
        self._rows_of[customer_id] = self._rows_of.get(customer_id, 0) + ticket.num_rows
        if ticket.affinity:
            self._ready_on[ticket.affinity] = replica_id
            self._ready_on.move_to_end(ticket.affinity)
            if len(self._ready_on) > REMEMBERED_AFFINITIES:
                self._ready_on.popitem(last=False)

    def _release(self, ticket_id: TicketId, now: float) -> _Running | None:
        running = self._running.pop(ticket_id, None)
        if running is None:
            return None
        self._orphans.discard(ticket_id)
        ticket, replica = running.ticket, running.replica
        self._backlog_cost -= running.cost * ticket.terms.chunks_left
        replica.running.remove(ticket_id)
        replica.progress_at = now
        if not replica.running:
            self._num_busy -= 1
        self._add(replica, -ticket.num_rows, -running.cost)
        customer_id = ticket.terms.customer_id
        rows = self._rows_of[customer_id] - ticket.num_rows
        if rows:
            self._rows_of[customer_id] = rows
        else:
            del self._rows_of[customer_id]
        if self._limits.max_customer_rows:
            self._queue.release(customer_id)
        return running

    def _count(self, replica: RunningReplica, sign: int) -> None:
        """Add a replica to the totals and the order of room, or before a change take it out of them."""
        self._num_full += sign * replica.is_full
        self._num_open += sign * replica.is_open
        self._num_busy += sign * bool(replica.running)
        self._cost_ahead += sign * replica.cost_ahead
        self._promised_per_s += sign * replica.cost_per_s
        if sign > 0:
            self._by_room.add(replica)
            self._unexpected[replica.replica_id] = replica
        else:
            self._by_room.remove(replica)
            self._unexpected.pop(replica.replica_id, None)
            self._present.forget(replica.replica_id)

    def _add(self, replica: RunningReplica, rows: int, cost: int) -> None:
        was_full, was_open, was_ahead = replica.is_full, replica.is_open, replica.cost_ahead
        self._by_room.remove(replica)
        replica.take(rows, cost)
        self._by_room.add(replica)
        if replica.is_full != was_full:
            self._num_full += 1 if replica.is_full else -1
        if replica.is_open != was_open:
            self._num_open += 1 if replica.is_open else -1
        if replica.cost_ahead != was_ahead:
            self._cost_ahead += replica.cost_ahead - was_ahead
        self._unexpected[replica.replica_id] = replica

    def _present_left_s(self) -> float:
        """Of all replicas' present batches, summed."""
        for replica_id, replica in self._unexpected.items():
            end = replica.batch_ends_at
            if end is None:
                self._present.forget(replica_id)
            else:
                self._present.expect(replica_id, end)
        self._unexpected.clear()
        return self._present.left_s(self._clock())

    def _promise(self) -> None:
        promised = round(self._promised_per_s, 6) if self._replicas else 0.0  # what is added and taken away leaves dust
        self._drain.promise(self._clock(), promised)
        if promised:
            self._replica_cost_per_s = promised / len(self._replicas)

    def _exceeds_its_rows(self, ticket: Ticket) -> bool:
        """Whether its customer has as much running as it may; an only ticket may be wider."""
        most, running = self._limits.max_customer_rows, self._rows_of.get(ticket.terms.customer_id, 0)
        return most > 0 and running > 0 and running + ticket.num_rows > most

    def _rate(self) -> float:
        return self._drain.cost_per_s

    def _finish_after_s(self, ticket: Ticket, ahead: float) -> float:
        """The same for one that runs after `ahead` row-steps of the queue."""
        first = next(iter(self._replicas.values()))
        assert first.profile is not None
        cap, profile = first.capacity_rows, first.profile
        present_s, batches, shared = self._batches_before(ahead, ticket.num_steps)
        more_batches, rows = divmod(shared + ticket.num_rows, cap)
        last_s = profile.step_s(cap if batches else rows) if rows else 0.0
        step_s = (batches + more_batches) * profile.step_s(cap) + last_s
        own_later_s = (ticket.terms.chunks_left - 1) * self._shortest_run_s(ticket, first) / ticket.terms.chunks_left
        return present_s + ticket.num_steps * step_s / self._drain.efficiency + own_later_s

    def _batches_before(self, ahead: float, num_steps: int) -> tuple[float, int, int]:
        """Seconds that the present batch still takes, full batches after it, and the rows beyond those, per replica.

        Of `ahead` row-steps of the queue and of what was granted ahead, if all have `num_steps`.
        """
        num_replicas, cap = len(self._replicas), next(iter(self._replicas.values())).capacity_rows
        present_s = self._present_left_s() / num_replicas if self._num_busy == num_replicas else 0.0
        batches, rows = divmod(round((ahead + self._cost_ahead) / num_replicas / num_steps), cap)
        return present_s, batches, rows

    def _shortest_run_s(self, ticket: Ticket, replica: RunningReplica) -> float:
        """What its chunks would take if nobody else were there."""
        if replica.profile is None:
            return 0.0
        batches, rows = divmod(ticket.num_rows, replica.capacity_rows)
        step_s = batches * replica.profile.step_s(replica.capacity_rows) + (replica.profile.step_s(rows) if rows else 0)
        return ticket.terms.chunks_left * ticket.num_steps * step_s

    def _unfinished_cost(self) -> float:
        """What is left of the running tickets, if each replica has kept its profile since it last completed one."""
        now, busy = self._clock(), [replica for replica in self._replicas.values() if replica.running]
        return max(0.0, sum(replica.cost - (now - replica.progress_at) * replica.cost_per_s for replica in busy))

    def _boots_in_s(self, now: float) -> float:
        """Until the first replica serves. One that is overdue may come at any time, and is given up after as long."""
        if self._asked_for_at is None or now - self._asked_for_at > 2 * self._limits.boot_s:
            self._asked_for_at = now
        if now - self._began_at < self._limits.replica_timeout_s:
            return 0.0  # replicas that serve already have not all said so yet
        return max(0.0, self._asked_for_at + self._limits.boot_s - now)

    def _retry_after_s(self, ticket: Ticket) -> float:
        if not self._rate():
            return UNKNOWN_RATE_RETRY_AFTER_S
        ahead = self._queue.cost_before(ticket.terms.service_class, ticket.terms.customer_id, 0)
        present_s, batches, rows = self._batches_before(ahead, ticket.num_steps)
        first = next(iter(self._replicas.values()))
        assert first.profile is not None
        batch_s = ticket.num_steps * first.profile.step_s(first.capacity_rows) / self._drain.efficiency
        return min(MAX_RETRY_AFTER_S, present_s + (batches + (rows > 0)) * batch_s)
