"""How fast the backlog drains: what the replicas promised when they started, corrected by what they then did.

Only time during which every replica had a full batch counts: else the rate of completions is that of arrivals.
"""

import math

PRIOR_S = 5.0
"""The promise weighs as much as this many seconds of measurement."""
MEMORY_S = 30.0
"""A measurement loses two thirds of its weight in this time."""


class RecentRate:
    """Row-steps completed per second, over about the last `MEMORY_S`. Times in seconds, of a clock that does not go
    back."""

    def __init__(self, now: float) -> None:
        self._weighed = 0.0
        self._at = now

    def completed(self, now: float, cost: int) -> None:
        if now > self._at:
            self._weighed *= math.exp((self._at - now) / MEMORY_S)
            self._at = now
        self._weighed += cost

    def cost_per_s(self, now: float) -> float:
        return self._weighed * math.exp((self._at - now) / MEMORY_S) / MEMORY_S


class DrainRate:
    """In row-steps per second. Times in seconds, of a clock that does not go back."""

    def __init__(self, now: float) -> None:
        self._promised_per_s = 0.0
        self._promised = 0.0
        self._done = 0.0
        self._saturated = False
        self._at = now

    def promise(self, now: float, cost_per_s: float) -> None:
        """What all present replicas do together, by their profiles; 0 if that is not known."""
        if self._saturated:
            self._advance(now)
        self._promised_per_s = cost_per_s

    def observe(self, now: float, saturated: bool) -> None:
        """Whether every replica has a full batch, from now on."""
        if self._saturated:
            self._advance(now)
        elif saturated:
            self._at = now
        self._saturated = saturated

    def completed(self, now: float, cost: int) -> None:
        if self._saturated:
            self._advance(now)
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

    def _advance(self, now: float) -> None:
        elapsed_s = now - self._at
        if elapsed_s > 0:
            kept = math.exp(-elapsed_s / MEMORY_S)
            self._promised = (self._promised + self._promised_per_s * elapsed_s) * kept
            self._done *= kept
            self._at = now
