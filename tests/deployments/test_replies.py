import asyncio
import threading
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from deployments.replies import Replies


async def test_each_waiter_gets_its_own_result_whatever_thread_it_comes_from() -> None:
    replies, futures = Replies(), [Future[int]() for _ in range(1_000)]
    waiting = asyncio.gather(*map(replies.of, futures))
    with ThreadPoolExecutor(8) as threads:
        for number, future in enumerate(futures):
            threads.submit(future.set_result, number)
        assert await waiting == list(range(1_000))


async def test_results_that_come_together_wake_the_loop_once(monkeypatch: pytest.MonkeyPatch) -> None:
    replies, futures, wakes = Replies(), [Future[None]() for _ in range(8)], list[str]()
    loop = asyncio.get_running_loop()
    wake = loop.call_soon_threadsafe
    waiting = [asyncio.create_task(replies.of(future)) for future in futures]
    await asyncio.sleep(0)
    monkeypatch.setattr(loop, "call_soon_threadsafe", lambda call: wakes.append("woken") or wake(call))
    batch = threading.Thread(target=lambda: [future.set_result(None) for future in futures])
    batch.start()
    batch.join()
    await asyncio.gather(*waiting)
    assert wakes == ["woken"]


async def test_an_exception_reaches_its_waiter() -> None:
    future: Future[None] = Future()
    future.set_exception(ValueError("broken"))
    with pytest.raises(ValueError, match="broken"):
        await Replies().of(future)


async def test_who_is_cancelled_while_it_waits_cancels_the_work() -> None:
    replies, future, other = Replies(), Future[None](), Future[str]()
    waiting = asyncio.create_task(replies.of(future))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert future.cancelled()
    other.set_result("still served")
    assert await replies.of(other) == "still served"


async def test_work_that_is_cancelled_elsewhere_cancels_who_waits_for_it() -> None:
    future: Future[None] = Future()
    waiting = asyncio.create_task(Replies().of(future))
    await asyncio.sleep(0)
    future.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
