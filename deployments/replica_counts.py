"""How many replicas of each model are on their way: what only Serve's controller knows."""

import asyncio
import time
from collections.abc import Callable, Mapping

KEEP_S = 2.0
"""Anybody may ask for the status, and each answer costs the controller a call."""
TIMEOUT_S = 2.0


class BootingReplicas:
    """`ask` gives the number of booting replicas by model; it may block."""

    def __init__(self, ask: Callable[[], Mapping[str, int]], clock: Callable[[], float] = time.monotonic) -> None:
        self._ask = ask
        self._clock = clock
        self._asked_at = float("-inf")
        self._known: Mapping[str, int] = {}

    async def counts(self) -> Mapping[str, int]:
        """Raises TimeoutError, or what `ask` raises, if the controller does not answer."""
        if self._clock() - self._asked_at >= KEEP_S:
            async with asyncio.timeout(TIMEOUT_S):
                self._known = await asyncio.to_thread(self._ask)
            self._asked_at = self._clock()
        return self._known


def booting_by_deployment() -> dict[str, int]:
    """Replicas that are starting, over all applications, by deployment."""
    from ray import serve

    counts: dict[str, int] = {}
    for application in serve.status().applications.values():
        for name, deployment in application.deployments.items():
            counts[name] = counts.get(name, 0) + sum(
                number for state, number in deployment.replica_states.items() if state == "STARTING"
            )
    return counts
