"""A fleet of GPUs as discrete events: the production scheduler and scaling policy under a simulated clock.

What is simulated is everything around them: requests arrive, replicas boot, work, are reclaimed. A replica runs the
rows it has in one batch whose step takes t(b) = a + c b seconds; rows join and leave between steps, as in
`deployments/engine.py`. A decision is K candidates that run C chunks one after the other, each chunk one ticket.

Shapes: K candidates, C chunks, S denoising steps, b rows in a batch.
"""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from deployments.batching import BatchProfile
from deployments.messages import ReplicaId, Ticket, TicketId, TicketTerms
from deployments.scheduler import Demand, Refused, Scheduler, SchedulerLimits

MAX_ATTEMPTS = 3
"""As in `deployments/model_client.py`."""
SAMPLE_EVERY_S = 10.0


class Arrival(NamedTuple):
    """One decision: `rows` candidates of `chunks` chunks."""

    at: float
    rows: int
    chunks: int


@dataclass(frozen=True, slots=True)
class Service:
    """What one replica does, measured or assumed; seconds."""

    step_fixed_s: float
    step_row_s: float
    num_steps: int
    max_rows: int
    finish_s: float = 0.0
    """From a chunk's last step to its answer: decode and encode, beside the next batch."""
    hop_s: float = 0.0
    """From one chunk's answer to the next chunk's ticket."""
    outside_s: float = 0.0
    """Of a request before its first ticket and after its last chunk: HTTP, the ledger, the mp4."""

    def step_s(self, rows: int) -> float:
        return self.step_fixed_s + self.step_row_s * rows

    @property
    def row_chunk_s(self) -> float:
        """Replica-seconds of one row's chunk when batches are full."""
        return self.num_steps * self.step_s(self.max_rows) / self.max_rows

    def decision_s(self, rows: int, chunks: int) -> float:
        """Of a decision that is alone on an idle replica."""
        chunk_s = self.num_steps * self.step_s(rows) + self.finish_s
        return chunks * chunk_s + (chunks - 1) * self.hop_s + self.outside_s


@dataclass(frozen=True, slots=True)
class Fleet:
    """What replicas cost and how they come and go."""

    boot_s: tuple[float, float]
    """Least and most, evenly distributed."""
    start_replicas: int
    max_replicas: int
    lost_per_hour: float = 0.0
    """Chance per replica and hour of being reclaimed without notice, as spot instances are."""


class Policy(Protocol):
    def target(self, now: float, demand: Demand, ongoing: int, ready: int, target: int) -> int:
        """The number of replicas to have; `ongoing` requests are queued or running."""


@dataclass(slots=True)
class Outcome:
    """What a run came to. Times in seconds; `series` has a row per `SAMPLE_EVERY_S`."""

    latencies: list[float] = field(default_factory=list)
    """Of completed decisions, from arrival to answer."""
    waits: list[float] = field(default_factory=list)
    refused: int = 0
    failed: int = 0
    offered_s: float = 0.0
    frames: int = 0
    gpu_s: float = 0.0
    peak_replicas: int = 0
    events: int = 0
    series: list[dict[str, float]] = field(default_factory=list)

    @property
    def requests(self) -> int:
        return len(self.latencies) + self.refused + self.failed

    def late(self, limit_s: float) -> int:
        """Decisions that were not answered within `limit_s`: refused and failed ones too."""
        return self.refused + self.failed + sum(latency > limit_s for latency in self.latencies)


@dataclass(slots=True, eq=False)
class _Decision:
    arrived_at: float
    rows: int
    chunks_left: int
    chunks: int
    attempt: int = 0


class _Replica:
    """A batch that advances in steps; `ends` holds tickets and their rows by the step at which they are done, `waiting`
    what was granted ahead of its room."""

    __slots__ = (
        "_first_end",
        "_service",
        "_step_s",
        "at",
        "draining",
        "ends",
        "replica_id",
        "rows",
        "steps",
        "version",
        "waiting",
    )

    def __init__(self, replica_id: ReplicaId, service: Service, now: float) -> None:
        self.replica_id = replica_id
        self._service = service
        self._step_s = service.step_s(0)
        """Of the batch as it is."""
        self._first_end = 0
        """The least of `ends`."""
        self.ends: dict[int, list[tuple[TicketId, int]]] = {}
        self.waiting: deque[tuple[TicketId, int]] = deque()
        self.rows = 0
        self.steps = 0.0
        self.at = now
        self.version = 0
        self.draining = False

    def advance(self, now: float) -> None:
        if self.rows:
            self.steps += (now - self.at) / self._step_s
        self.at = now

    def add(self, now: float, ticket_id: TicketId, rows: int) -> None:
        self.advance(now)
        self.waiting.append((ticket_id, rows))
        self._begin()
        self.version += 1

    def _begin(self) -> None:
        rows, waiting, service = self.rows, self.waiting, self._service
        if waiting and (not rows or rows + waiting[0][1] <= service.max_rows):
            end = math.ceil(self.steps - 1e-9) + service.num_steps
            if not self.ends or end < self._first_end:
                self._first_end = end
            joining = self.ends.setdefault(end, [])
            while waiting and (not rows or rows + waiting[0][1] <= service.max_rows):
                joining.append(waiting.popleft())
                rows += joining[-1][1]
            self.rows = rows
        self._step_s = service.step_fixed_s + service.step_row_s * rows

    def pop_finished(self, now: float) -> list[TicketId]:
        """To be called at `next_end`."""
        self.advance(now)
        done = self.ends.pop(self._first_end)
        for _, rows in done:
            self.rows -= rows
        if self.ends:
            self._first_end = min(self.ends)
        self._begin()
        self.version += 1
        return [ticket_id for ticket_id, _ in done]

    def next_end(self) -> float:
        """When the first of its tickets, of which there is one, is done if nothing joins."""
        steps = self._first_end - self.steps
        return self.at + steps * self._step_s if steps > 0 else self.at

    @property
    def tickets(self) -> list[TicketId]:
        return [ticket_id for each in (*self.ends.values(), self.waiting) for ticket_id, _ in each]


class Simulator:
    """`policy` None keeps the fleet as it starts."""

    def __init__(
        self,
        service: Service,
        fleet: Fleet,
        limits: SchedulerLimits,
        policy: Policy | None,
        seed: int = 0,
        deadline_s: float | None = None,
    ) -> None:
        """With a `deadline_s`, every request says that it is of no use later than that."""
        self._deadline_s = deadline_s
        self.now = 0.0
        self.outcome = Outcome()
        self._service, self._fleet, self._policy = service, fleet, policy
        self._random = random.Random(seed)
        self._terms: dict[int, TicketTerms] = {}
        """Without a deadline, by chunks left."""
        self._scheduler = Scheduler(lambda: self.now, limits)
        self._events: list[tuple[float, int, Callable[..., None], Any]] = []
        self._order = itertools.count()
        self._replicas: dict[ReplicaId, _Replica] = {}
        self._booting: deque[tuple[float, ReplicaId]] = deque()
        self._born: dict[ReplicaId, float] = {}
        self._decisions: dict[TicketId, _Decision] = {}
        self._numbers = itertools.count()
        self._target = fleet.start_replicas
        self._arrivals: Iterator[Arrival] = iter(())
        self._sampled = 0
        """Latencies that are in the series already."""

    def run(self, arrivals: Iterable[Arrival], until: float) -> Outcome:
        """All arrivals before `until`, and what remains of them afterwards."""
        self._arrivals = iter(arrivals)
        for _ in range(self._fleet.start_replicas):
            replica_id = self._new_replica()
            self._ready(replica_id)
        self._next_arrival()
        self._at(1.0, self._tick, until)
        events = self._events
        count = 0
        while events:
            self.now, _, handler, argument = heapq.heappop(events)
            handler(argument)
            count += 1
        self.outcome.events = count
        for replica_id in list(self._born):
            self._bury(replica_id, until)
        return self.outcome

    def _at(self, time: float, handler: Callable[..., None], argument: Any) -> None:
        heapq.heappush(self._events, (time, next(self._order), handler, argument))

    def _next_arrival(self) -> None:
        arrival = next(self._arrivals, None)
        if arrival is not None:
            self._at(arrival.at, self._arrive, arrival)

    def _arrive(self, arrival: Arrival) -> None:
        self._next_arrival()
        self.outcome.offered_s += arrival.rows * arrival.chunks * self._service.row_chunk_s
        decision = _Decision(self.now, arrival.rows, arrival.chunks, arrival.chunks)
        self._submit(decision, begun=False)

    def _submit(self, decision: _Decision, begun: bool) -> None:
        left = decision.chunks_left
        if self._deadline_s is not None:
            terms = TicketTerms(deadline_s=self._deadline_s - (self.now - decision.arrived_at), chunks_left=left)
        elif left in self._terms:
            terms = self._terms[left]
        else:
            terms = self._terms[left] = TicketTerms(chunks_left=left)
        ticket = Ticket(
            TicketId(str(next(self._numbers))), decision.rows, begun, num_steps=self._service.num_steps, terms=terms
        )
        if self._scheduler.submit(ticket) is not None:
            self.outcome.refused += 1
            return
        self._decisions[ticket.ticket_id] = decision
        self._dispatch()

    def _dispatch(self) -> None:
        now = self.now
        for grant in self._scheduler.dispatch():
            if isinstance(grant, Refused):
                del self._decisions[grant.ticket_id]
                self.outcome.refused += 1
                continue
            decision = self._decisions[grant.ticket_id]
            if decision.chunks_left == decision.chunks:
                self.outcome.waits.append(now - decision.arrived_at)
            replica = self._replicas[grant.replica_id]
            replica.add(now, grant.ticket_id, decision.rows)
            self._at(replica.next_end(), self._work_done, (replica, replica.version))

    def _work_done(self, what: tuple[_Replica, int]) -> None:
        replica, version = what
        if replica.version != version:
            return  # something joined or left meanwhile, which has set another time
        for ticket_id in replica.pop_finished(self.now):
            self._at(self.now + self._service.finish_s, self._answered, ticket_id)
        if replica.ends:
            self._at(replica.next_end(), self._work_done, (replica, replica.version))
        elif replica.draining:
            del self._replicas[replica.replica_id]
            self._bury(replica.replica_id, self.now)

    def _answered(self, ticket_id: TicketId) -> None:
        self._scheduler.complete(ticket_id)
        decision = self._decisions.pop(ticket_id)
        decision.chunks_left -= 1
        if decision.chunks_left:
            self._at(self.now + self._service.hop_s, self._continue, decision)
        else:
            self.outcome.latencies.append(self.now - decision.arrived_at + self._service.outside_s)
            self.outcome.frames += decision.rows * (1 + 12 * decision.chunks)
        self._dispatch()

    def _continue(self, decision: _Decision) -> None:
        self._submit(decision, begun=True)

    def _tick(self, until: float) -> None:
        """Once a second: what has run out of patience is given up, and the policy decides."""
        for refused in self._scheduler.expire():
            del self._decisions[refused.ticket_id]
            self.outcome.refused += 1
        if self._policy is not None:
            demand = self._scheduler.demand()
            ready = sum(not replica.draining for replica in self._replicas.values())
            asked = self._policy.target(self.now, demand, len(self._decisions), ready, self._target)
            self._scale(min(asked, self._fleet.max_replicas))
        if self.now % SAMPLE_EVERY_S < 1.0:
            self._sample()
        if self.now < until or self._decisions:
            self._at(self.now + 1.0, self._tick, until)

    def _scale(self, target: int) -> None:
        serving = [replica for replica in self._replicas.values() if not replica.draining]
        have = len(serving) + len(self._booting)
        self._target = target
        for _ in range(target - have):
            replica_id = self._new_replica()
            boots_at = self.now + self._random.uniform(*self._fleet.boot_s)
            self._booting.append((boots_at, replica_id))
            self._at(boots_at, self._boot, replica_id)
        surplus = have - target
        while surplus > 0 and self._booting:
            _, replica_id = self._booting.pop()
            self._bury(replica_id, self.now)
            surplus -= 1
        if surplus > 0:
            for replica in sorted(serving, key=lambda replica: replica.rows)[:surplus]:
                self._drain(replica)

    def _drain(self, replica: _Replica) -> None:
        """It gets nothing more and goes at the edge of the chunks that it runs."""
        self._scheduler.replica_gone(replica.replica_id)
        replica.draining = True
        if not replica.ends:
            del self._replicas[replica.replica_id]
            self._bury(replica.replica_id, self.now)

    def _new_replica(self) -> ReplicaId:
        replica_id = ReplicaId(f"r{next(self._numbers)}")
        self._born[replica_id] = self.now
        self.outcome.peak_replicas = max(self.outcome.peak_replicas, len(self._born))
        return replica_id

    def _boot(self, replica_id: ReplicaId) -> None:
        if replica_id in self._born:  # or it was cancelled while it booted
            self._booting = deque(each for each in self._booting if each[1] != replica_id)
            self._ready(replica_id)

    def _ready(self, replica_id: ReplicaId) -> None:
        self._replicas[replica_id] = _Replica(replica_id, self._service, self.now)
        profile = BatchProfile(self._service.step_fixed_s, self._service.step_row_s)
        self._scheduler.replica_alive(replica_id, self._service.max_rows, profile=profile)
        if self._fleet.lost_per_hour:
            self._at(self.now + self._random.expovariate(self._fleet.lost_per_hour / 3600), self._lose, replica_id)
        self._dispatch()

    def _lose(self, replica_id: ReplicaId) -> None:
        """Reclaimed: its chunks run again elsewhere, at most twice."""
        replica = self._replicas.pop(replica_id, None)
        if replica is None:
            return
        self._scheduler.replica_gone(replica_id)
        self._bury(replica_id, self.now)
        replica.version += 1
        for ticket_id in replica.tickets:
            decision = self._decisions.pop(ticket_id)
            decision.attempt += 1
            if decision.attempt < MAX_ATTEMPTS:
                self._submit(decision, begun=True)
            else:
                self.outcome.failed += 1

    def _bury(self, replica_id: ReplicaId, now: float) -> None:
        self.outcome.gpu_s += now - self._born.pop(replica_id)

    def _sample(self) -> None:
        out = self.outcome
        lately = sorted(out.latencies[self._sampled :])
        self._sampled = len(out.latencies)
        out.series.append(
            {
                "t_s": self.now,
                "ready": len(self._replicas),
                "booting": len(self._booting),
                "ongoing": len(self._decisions),
                "offered_s": out.offered_s,
                "refused": out.refused,
                "failed": out.failed,
                "completed": len(out.latencies),
                "frames": out.frames,
                "p50_s": lately[len(lately) // 2] if lately else math.nan,
                "p99_s": lately[int(len(lately) * 0.99)] if lately else math.nan,
            }
        )
