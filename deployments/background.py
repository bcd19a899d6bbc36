"""Loops that a process lives by, such as the one that renews leases: one that breaks says so, and is begun again."""

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any

import structlog

RESTART_S = 1.0

log = structlog.get_logger(__name__)


def keep_running(loop: Callable[[], Coroutine[Any, Any, None]]) -> "asyncio.Task[None]":
    """Until it returns, or the task is cancelled. What it expects to fail it handles itself: whatever it raises is a
    defect, which must not be the end of all that it would have done later."""
    return asyncio.get_running_loop().create_task(_again_and_again(loop))


async def _again_and_again(loop: Callable[[], Coroutine[Any, Any, None]]) -> None:
    while True:
        try:
            return await loop()
        except Exception as error:
            log.error("loop_broke", loop=loop.__qualname__, error=repr(error), exc_info=error)
        await asyncio.sleep(RESTART_S)
