"""How fast the backlog drains: what the replicas promised when they started, corrected by what they then did.

Only time during which every replica had a full batch counts: else the rate of completions is that of arrivals.
"""

import math
from collections.abc import Callable

PRIOR_S = 5.0
"""The promise weighs as much as this many seconds of measurement."""
MEMORY_S = 30.0
"""A measurement loses two thirds of its weight in this time."""


class RecentRate:
    """Row-steps completed per second, over about the last `MEMORY_S`. `clock` in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._weighed = 0.0
        self._at = clock()

    def completed(self, cost: int) -> None:
        self._weighed = self._now_weighed() + cost
        self._at = self._clock()

    @property
    def cost_per_s(self) -> float:
        return self._now_weighed() / MEMORY_S

    def _now_weighed(self) -> float:
        return self._weighed * math.exp(-max(0.0, self._clock() - self._at) / MEMORY_S)


class DrainRate:
    """In row-steps per second. `clock` in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._promised_per_s = 0.0
        self._promised = 0.0
        self._done = 0.0
        self._saturated = False
        self._at = clock()

    def promise(self, cost_per_s: float) -> None:
        """What all present replicas do together, by their profiles; 0 if that is not known."""
        self._advance()
        self._promised_per_s = cost_per_s

    def observe(self, saturated: bool) -> None:
        """Whether every replica has a full batch, from now on."""
        self._advance()
        self._saturated = saturated

    def completed(self, cost: int) -> None:
        self._advance()
        if self._saturated:
            self._done += cost

    @property
    def cost_per_s(self) -> float:
        """0 while nothing is known."""
        return self._promised_per_s * self.efficiency

    @property
    def efficiency(self) -> float:
        """Done over promised, while there was enough to do."""
        prior = PRIOR_S * self._promised_per_s
        return (self._done + prior) / (self._promised + prior) if prior else 1.0

    def _advance(self) -> None:
        now = self._clock()
        elapsed_s = now - self._at
        if self._saturated and elapsed_s > 0:
            kept = math.exp(-elapsed_s / MEMORY_S)
            self._promised = (self._promised + self._promised_per_s * elapsed_s) * kept
            self._done *= kept
        self._at = now
