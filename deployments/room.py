"""What each replica runs, and which of them has the most room, for as many replicas as there are."""

import bisect
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field

from deployments.batching import BatchProfile
from deployments.messages import ReplicaId, Ticket, TicketId

BATCHES_AHEAD = 2
"""Rows that a replica holds, in batches: the one that runs and the next."""

_Level = tuple[bool, int]
"""Whether it runs something, rows beyond its present batch."""


@dataclass(slots=True, eq=False)
class RunningReplica:
    replica_id: ReplicaId
    capacity_rows: int
    seen_at: float
    attention: str
    profile: BatchProfile | None
    progress_at: float
    """When something that ran here was last completed, or began after the replica was idle."""
    running: set[TicketId] = field(default_factory=set)
    rows: int = 0
    cost: int = 0
    compatibility: str = ""
    level: _Level = (False, 0)
    """Where it is in the order of room."""
    cost_per_s: float = 0.0
    """In full batches; 0 without a profile."""
    is_full: bool = False
    """Whether its present batch is."""
    is_open: bool = False
    """Whether there is room for some ticket."""
    cost_ahead: float = 0.0
    """Of what was granted beyond the batch that runs."""

    def promise(self, capacity_rows: int, profile: BatchProfile | None) -> None:
        self.capacity_rows, self.profile = capacity_rows, profile
        self.cost_per_s = 0.0 if profile is None else profile.rows_per_s(capacity_rows)
        self.take(0, 0)

    def take(self, rows: int, cost: int) -> None:
        self.rows += rows
        self.cost += cost
        beyond = self.rows - self.capacity_rows
        self.is_full = beyond >= 0
        self.is_open = not self.rows or self.rows < BATCHES_AHEAD * self.capacity_rows
        self.cost_ahead = self.cost * beyond / self.rows if beyond > 0 else 0.0

    @property
    def batch_ends_at(self) -> float | None:
        """When the batch that runs is done; None while nothing runs, or no profile tells."""
        if not self.running or self.profile is None:
            return None
        return self.progress_at + self.cost / self.rows * self.profile.step_s(min(self.rows, self.capacity_rows))

    def has_room_for(self, ticket: Ticket) -> bool:
        """A ticket wider than the whole replica still runs, alone."""
        if not self.running:
            return True
        fits = self.rows + ticket.num_rows <= BATCHES_AHEAD * self.capacity_rows
        return fits and self.compatibility == ticket.compatibility


class ByRoom:
    """Idle replicas first, the largest first; then by rows beyond the present batch; of equals, the longest so."""

    def __init__(self) -> None:
        self._levels: dict[_Level, OrderedDict[ReplicaId, RunningReplica]] = {}
        self._order: list[_Level] = []

    def __iter__(self) -> Iterator[RunningReplica]:
        return (replica for level in self._order for replica in self._levels[level].values())

    def first(self) -> RunningReplica | None:
        for level in self._order:
            for replica in self._levels[level].values():
                return replica
        return None

    def add(self, replica: RunningReplica) -> None:
        """As the last of those that have as much room; to be repeated, after `remove`, when that changes."""
        level = replica.level = (replica.rows > 0, replica.rows - replica.capacity_rows)
        equals = self._levels.get(level)
        if equals is None:
            equals = self._levels[level] = OrderedDict()
            bisect.insort(self._order, level)
        equals[replica.replica_id] = replica

    def remove(self, replica: RunningReplica) -> None:
        level = replica.level
        equals = self._levels[level]
        del equals[replica.replica_id]
        if not equals:
            del self._levels[level]
            del self._order[bisect.bisect_left(self._order, level)]
