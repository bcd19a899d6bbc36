import asyncio

import pytest

from billing.commands import RequestId
from billing.money import Mils
from deployments.messages import RolloutResult
from deployments.replays import Replays


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def result(name: str = "first", num_bytes: int = 10) -> RolloutResult:
    return RolloutResult(RequestId(name), "m", (bytes(num_bytes),), 1, Mils(5), 0.0, 0.0, 0.0)


class Work:
    """Counts its runs; each waits until the test lets it end."""

    def __init__(self) -> None:
        self.runs = 0
        self.go = asyncio.Event()
        self.failure: BaseException | None = None

    async def __call__(self) -> RolloutResult:
        self.runs += 1
        await self.go.wait()
        if self.failure is not None:
            raise self.failure
        return result(f"run {self.runs}")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def replays(clock: Clock) -> Replays:
    return Replays(clock, window_s=60, max_bytes=100)


async def spin() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


async def test_a_repetition_joins_the_run_that_is_under_way(replays: Replays) -> None:
    work = Work()
    first, second = (asyncio.create_task(replays.run("k", work)) for _ in range(2))
    await spin()
    work.go.set()
    assert await first is await second
    assert work.runs == 1


async def test_a_repetition_within_the_window_gets_the_first_result(replays: Replays, clock: Clock) -> None:
    work = Work()
    work.go.set()
    first = await replays.run("k", work)
    clock.now = 59.9
    assert await replays.run("k", work) is first
    clock.now = 60.0
    assert await replays.run("k", work) is not first
    assert work.runs == 2


async def test_another_payload_is_another_run(replays: Replays) -> None:
    work = Work()
    work.go.set()
    await replays.run("one", work)
    await replays.run("two", work)
    assert work.runs == 2


async def test_a_failure_is_not_replayed(replays: Replays) -> None:
    work = Work()
    work.go.set()
    work.failure = RuntimeError("engine")
    with pytest.raises(RuntimeError):
        await replays.run("k", work)
    work.failure = None
    await replays.run("k", work)
    assert work.runs == 2


async def test_when_the_first_client_leaves_the_one_that_joined_runs_it_itself(replays: Replays) -> None:
    work = Work()
    first, second = (asyncio.create_task(replays.run("k", work)) for _ in range(2))
    await spin()
    first.cancel()
    await spin()
    work.go.set()
    assert (await second).request_id == "run 2"
    assert work.runs == 2


async def test_a_client_that_joined_and_leaves_does_not_stop_the_first(replays: Replays) -> None:
    work = Work()
    first, second = (asyncio.create_task(replays.run("k", work)) for _ in range(2))
    await spin()
    second.cancel()
    await spin()
    work.go.set()
    assert (await first).request_id == "run 1"


async def test_kept_results_are_bounded_in_bytes_oldest_first(replays: Replays) -> None:
    async def run(name: str) -> RolloutResult:
        async def work() -> RolloutResult:
            return result(name, num_bytes=40)

        return await replays.run(name, work)

    kept = [await run(name) for name in "abc"]
    assert await run("c") is kept[2]
    assert await run("b") is kept[1]
    assert await run("a") is not kept[0]


async def test_a_result_larger_than_the_bound_is_simply_not_kept(replays: Replays) -> None:
    async def work() -> RolloutResult:
        return result(num_bytes=101)

    assert await replays.run("k", work) is not await replays.run("k", work)
