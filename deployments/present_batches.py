"""What is left of the batches that run now, summed over replicas, without looking at each of them."""

import heapq

from deployments.messages import ReplicaId


class PresentBatches:
    """Times in seconds, on a clock that does not go back."""

    def __init__(self) -> None:
        self._ends: dict[ReplicaId, float] = {}
        self._sum = 0.0
        self._by_end: list[tuple[float, ReplicaId]] = []
        """A heap; entries may be stale."""

    def expect(self, replica_id: ReplicaId, end: float) -> None:
        """Its present batch is done at `end`, whatever was expected before."""
        self.forget(replica_id)
        self._ends[replica_id] = end
        self._sum += end
        heapq.heappush(self._by_end, (end, replica_id))
        if len(self._by_end) > 2 * len(self._ends) + 64:
            self._by_end = [(end, replica_id) for replica_id, end in self._ends.items()]
            heapq.heapify(self._by_end)

    def forget(self, replica_id: ReplicaId) -> None:
        """It runs nothing, or is gone."""
        end = self._ends.pop(replica_id, None)
        if end is not None:
            self._sum = self._sum - end if self._ends else 0.0

    def left_s(self, now: float) -> float:
        while self._by_end and self._by_end[0][0] <= now:
            end, replica_id = heapq.heappop(self._by_end)
            if self._ends.get(replica_id) == end:
                self.forget(replica_id)
        return max(0.0, self._sum - now * len(self._ends))
