"""The results of other threads, brought to an event loop: those that come together by one wake-up.

`asyncio.wrap_future` wakes the loop once for each, by a write to a socket.
"""

import asyncio
from collections import deque
from concurrent.futures import CancelledError, Future
from functools import partial
from typing import Any, TypeVar

Result = TypeVar("Result")


class Replies:
    """To be made and asked on the loop that waits."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready: deque[asyncio.Future[None]] = deque()
        self._is_woken = False

    async def of(self, future: Future[Result]) -> Result:
        """Its result or exception. Whoever is cancelled while it waits cancels the `future` too, and the reverse."""
        waiter: asyncio.Future[None] = self._loop.create_future()
        future.add_done_callback(partial(self._arrived, waiter))
        try:
            await waiter
        except asyncio.CancelledError:
            future.cancel()
            raise
        try:
            return future.result()
        except CancelledError:
            raise asyncio.CancelledError from None

    def _arrived(self, waiter: asyncio.Future[None], _: Future[Any]) -> None:
        """On the thread that completed it. What is added before the flag is seen set is found by who clears it."""
        self._ready.append(waiter)
        if not self._is_woken and not self._loop.is_closed():
            self._is_woken = True
            self._loop.call_soon_threadsafe(self._deliver)

    def _deliver(self) -> None:
        self._is_woken = False
        while self._ready:
            waiter = self._ready.popleft()
            if not waiter.done():
                waiter.set_result(None)
