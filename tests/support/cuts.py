"""Something happens exactly while a piece of work waits: at its first wait, its second, and so on to its last."""

import asyncio
import itertools
import types
from collections.abc import Callable, Coroutine, Generator
from typing import Any, Literal

Moment = Literal["when it begins to wait", "when what it waits for is there"]
"""In the latter case the answer is lost on its way: what was asked for has been done."""


@types.coroutine
def interrupted(
    work: Coroutine[Any, Any, Any], at_wait: int, moment: Moment, interrupt: Callable[[], object]
) -> Generator[Any, Any, Any]:
    """Drive `work` in this task, and `interrupt` at its `at_wait`-th wait, counted from 1. Returns what it does.

    Raises:
        LookupError: it does not wait so often.
    """
    error: BaseException | None = None
    for number in itertools.count(1):
        try:
            waited_for = work.send(None) if error is None else work.throw(error)
        except StopIteration as end:
            if number <= at_wait:
                raise LookupError from None
            return end.value
        if number == at_wait:
            if moment == "when it begins to wait" or waited_for is None:
                asyncio.get_running_loop().call_soon(interrupt)
            else:
                waited_for.add_done_callback(lambda _: interrupt())
        error = None
        try:
            yield waited_for
        except BaseException as thrown:
            error = thrown


async def left_at(work: Coroutine[Any, Any, Any], at_wait: int, moment: Moment) -> bool:
    """Cancel `work` at that wait; whether it waits so often."""
    task = asyncio.current_task()
    assert task is not None
    try:
        await interrupted(work, at_wait, moment, task.cancel)
    except asyncio.CancelledError:
        task.uncancel()
    except LookupError:
        return False
    return True
