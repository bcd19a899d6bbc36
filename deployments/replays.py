"""Identical payloads by one customer within a short window run once.

Clients send a request again after a lost connection or their own time-out, and the public client sends a broken
rollout again by another route and without any key. Such a repetition joins the first run while it lasts and is
answered with its result afterwards. Held in memory by each ingress replica, bounded in time and bytes.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from deployments.messages import RolloutResult


@dataclass(slots=True)
class _Kept:
    result: RolloutResult
    num_bytes: int
    until: float


class Replays:
    """`clock` in seconds, monotonic."""

    def __init__(self, clock: Callable[[], float], window_s: float = 60.0, max_bytes: int = 64 * 2**20) -> None:
        self._clock = clock
        self._window_s = window_s
        self._max_bytes = max_bytes
        self._running: dict[str, asyncio.Future[RolloutResult | None]] = {}
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._kept_bytes = 0

    async def run(self, key: str, work: Callable[[], Awaitable[RolloutResult]]) -> RolloutResult:
        """The result of `work`, or of an identical run that finished lately or is still running.

        Only success is shared: if the first run fails or its client leaves, whoever joined it runs `work` itself.
        """
        self._forget_expired()
        while (running := self._running.get(key)) is not None:
            result = await asyncio.shield(running)
            if result is not None:
                return result
        if key in self._kept:
            return self._kept[key].result
        outcome: asyncio.Future[RolloutResult | None] = asyncio.get_running_loop().create_future()
        self._running[key] = outcome
        result = None
        try:
            result = await work()
            return result
        finally:
            del self._running[key]
            outcome.set_result(result)
            if result is not None:
                self._keep(key, result)

    def _keep(self, key: str, result: RolloutResult) -> None:
        num_bytes = sum(len(video) for video in result.videos)
        self._kept[key] = _Kept(result, num_bytes, self._clock() + self._window_s)
        self._kept_bytes += num_bytes
        while self._kept_bytes > self._max_bytes:
            self._drop_oldest()

    def _forget_expired(self) -> None:
        now = self._clock()
        while self._kept and next(iter(self._kept.values())).until <= now:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, kept = self._kept.popitem(last=False)
        self._kept_bytes -= kept.num_bytes
