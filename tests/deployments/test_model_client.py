"""The client of one model, between a real scheduler and replicas that a test plays; replies may be on their way."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest

import deployments.model_client
from billing.money import Mils
from deployments.channel import Address, CallFailed, ChannelLost
from deployments.errors import DeadlinePassed, EngineFailed, ModelOverloaded
from deployments.messages import (
    ChunkDone,
    ChunkJob,
    ChunkReport,
    ChunkRow,
    ModelSpec,
    ReplicaId,
    Ticket,
    TicketId,
    TicketTerms,
)
from deployments.model_client import ModelClient
from deployments.scheduler import SchedulerLimits
from deployments.scheduler_actor import SchedulerActor

SPEC = ModelSpec("m", (64, 64), 8, 12, 10, 4, 0.0, Mils(5))
ROW = ChunkRow(np.zeros((64, 64, 3), np.uint8), np.zeros((12, 8), np.float32), 0, 0, 0, 1, 0.0)
REPORT = ChunkReport((ChunkDone(b"", ROW.start_frame),), 1.0)


class Calls:
    """A channel to `target`. While `replies` is clear the other side works, but its answers are still on their way."""

    is_connected = True

    def __init__(self, target: Any) -> None:
        self.target = target
        self.replies = asyncio.Event()
        self.replies.set()

    async def call(self, method: str, *arguments: Any) -> Any:
        result = await getattr(self.target, method)(*arguments)
        await self.replies.wait()
        return result

    def close(self) -> None:
        pass


class Replicas:
    """Answers each job with the next of `script`: a report, or what to raise; a job beyond it waits for ever."""

    def __init__(self) -> None:
        self.script: list[ChunkReport | BaseException] = []
        self.jobs: list[ChunkJob] = []
        self.cancelled = 0

    async def run_chunk(self, job: ChunkJob) -> ChunkReport:
        self.jobs.append(job)
        if not self.script:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                self.cancelled += 1
                raise
        answer = self.script.pop(0)
        if isinstance(answer, BaseException):
            raise answer
        return answer


@pytest.fixture
def scheduler() -> Calls:
    return Calls(SchedulerActor(SchedulerLimits(max_queued_rows=4)))


@pytest.fixture
def replicas() -> Replicas:
    return Replicas()


@pytest.fixture
async def client(scheduler: Calls, replicas: Replicas) -> AsyncIterator[ModelClient]:
    channels: Any = (scheduler, lambda _: Calls(replicas))
    running = ModelClient(SPEC, *channels, queue_timeout_s=30.0, chunk_timeout_s=30.0)
    running.start()
    yield running
    await running.stop()


async def announce(scheduler: Calls, name: str = "r", rows: int = 1) -> None:
    await scheduler.target.replica_alive(ReplicaId(name), rows, address=Address("127.0.0.1", 1, b""))


async def settled() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def held_rows(scheduler: Calls) -> int:
    await settled()
    status = await scheduler.target.status()
    return int(status.running_rows + status.queued_rows)


async def test_a_chunk_runs_on_the_granted_replica_and_frees_its_room(
    client: ModelClient, scheduler: Calls, replicas: Replicas
) -> None:
    await announce(scheduler, "the one")
    replicas.script = [REPORT]
    report, _ = await client.run_chunk("a/0", [ROW], begun=False)
    assert report is REPORT
    assert replicas.jobs[0].replica_id == "the one"
    assert await held_rows(scheduler) == 0


async def test_a_replica_that_dies_is_reported_and_the_same_rows_run_elsewhere(
    client: ModelClient, scheduler: Calls, replicas: Replicas
) -> None:
    await announce(scheduler, "dies")
    replicas.script = [ChannelLost("it died"), REPORT]
    running = asyncio.create_task(client.run_chunk("a/0", [ROW], begun=False))
    await settled()
    await announce(scheduler, "lives")
    await running
    assert [job.replica_id for job in replicas.jobs] == ["dies", "lives"]
    assert replicas.jobs[0].rows == replicas.jobs[1].rows
    assert await held_rows(scheduler) == 0


async def test_the_next_attempt_never_goes_to_the_replica_that_was_just_lost(
    client: ModelClient, scheduler: Calls, replicas: Replicas
) -> None:
    for name in ("a", "z"):  # the second would be granted again, being the roomiest by name
        await announce(scheduler, name)
    replicas.script = [ChannelLost("it died"), REPORT]
    await client.run_chunk("a/0", [ROW], begun=False)
    assert {job.replica_id for job in replicas.jobs} == {"a", "z"}
    assert await held_rows(scheduler) == 0


async def test_a_grant_whose_answer_was_lost_is_answered_again(scheduler: Calls) -> None:
    await announce(scheduler)
    ticket = Ticket(TicketId("a/0/0"), 1)
    first = await scheduler.target.acquire(ticket)
    assert await scheduler.target.acquire(ticket) == first


async def test_a_chunk_is_given_up_after_three_dead_replicas(
    client: ModelClient, scheduler: Calls, replicas: Replicas
) -> None:
    for name in "abc":
        await announce(scheduler, name)
    replicas.script = [ChannelLost("it died") for _ in range(3)]
    with pytest.raises(EngineFailed, match="died"):
        await client.run_chunk("a/0", [ROW], begun=False)
    assert len({job.replica_id for job in replicas.jobs}) == 3
    assert await held_rows(scheduler) == 0


async def test_a_replica_that_raises_is_an_engine_failure_that_says_nothing_of_its_inside(
    client: ModelClient, scheduler: Calls, replicas: Replicas
) -> None:
    await announce(scheduler)
    replicas.script = [CallFailed("run_chunk", "SecretError")]
    with pytest.raises(EngineFailed) as failure:
        await client.run_chunk("a/0", [ROW], begun=False)
    assert "Secret" not in str(failure.value)
    assert await held_rows(scheduler) == 0


async def test_a_hung_replica_is_given_up_and_its_work_cancelled(
    client: ModelClient, scheduler: Calls, replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_chunk_timeout_s", 0.01)
    await announce(scheduler)
    with pytest.raises(EngineFailed, match="no answer"):
        await client.run_chunk("a/0", [ROW], begun=False)
    assert await held_rows(scheduler) == 0
    assert replicas.cancelled == 1


@pytest.mark.parametrize("stage", ["queued", "grant on its way", "running"])
async def test_a_client_that_leaves_holds_no_room_whatever_was_under_way(
    client: ModelClient, scheduler: Calls, replicas: Replicas, stage: str
) -> None:
    if stage != "queued":
        await announce(scheduler)
    if stage == "grant on its way":
        scheduler.replies.clear()
    running = asyncio.create_task(client.run_chunk("a/0", [ROW], begun=False))
    await settled()
    assert await held_rows(scheduler) == 1
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    scheduler.replies.set()
    assert await held_rows(scheduler) == 0
    assert replicas.cancelled == (1 if stage == "running" else 0)


@pytest.mark.parametrize("stage", ["queued", "running"])
async def test_a_deadline_ends_the_work_wherever_it_is_and_frees_its_room(
    client: ModelClient, scheduler: Calls, replicas: Replicas, stage: str
) -> None:
    if stage == "running":
        await announce(scheduler)
    with pytest.raises(DeadlinePassed):
        await client.run_chunk("a/0", [ROW], begun=False, terms=TicketTerms(deadline_s=0.01))
    assert await held_rows(scheduler) == 0
    assert replicas.cancelled == (1 if stage == "running" else 0)


async def test_waiting_in_vain_is_overload_and_leaves_the_queue(
    client: ModelClient, scheduler: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_queue_timeout_s", 0.01)
    with pytest.raises(ModelOverloaded):
        await client.run_chunk("a/0", [ROW], begun=False)
    assert await held_rows(scheduler) == 0


async def test_a_full_queue_is_overload_at_once(client: ModelClient, scheduler: Calls) -> None:
    waiting = asyncio.create_task(client.run_chunk("a/0", [ROW] * 4, begun=False))
    await settled()
    with pytest.raises(ModelOverloaded):
        await client.run_chunk("b/0", [ROW], begun=False)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


async def test_a_scheduler_that_restarts_is_asked_again(
    client: ModelClient, scheduler: Calls, replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployments.model_client, "SCHEDULER_RETRY_S", 0.0)
    works, deaths = scheduler.target.place, 2

    async def dies_at_first(ticket: Any) -> Any:
        nonlocal deaths
        if deaths:
            deaths -= 1
            raise ChannelLost("it died")
        return await works(ticket)

    monkeypatch.setattr(scheduler.target, "place", dies_at_first)
    await announce(scheduler)
    replicas.script = [REPORT]
    assert (await client.run_chunk("a/0", [ROW], begun=False))[0] is REPORT


async def test_room_is_taken_at_once_and_used_only_with_the_permit(
    client: ModelClient, scheduler: Calls, replicas: Replicas
) -> None:
    await announce(scheduler)
    permit = asyncio.Event()
    replicas.script = [REPORT]
    running = asyncio.create_task(client.run_chunk("a/0", [ROW], begun=False, permit=permit))
    assert await held_rows(scheduler) == 1
    assert replicas.jobs == []
    permit.set()
    assert (await running)[0] is REPORT


async def test_whoever_gives_up_before_the_permit_gives_the_room_back(
    client: ModelClient, scheduler: Calls, replicas: Replicas
) -> None:
    await announce(scheduler)
    running = asyncio.create_task(client.run_chunk("a/0", [ROW], begun=False, permit=asyncio.Event()))
    assert await held_rows(scheduler) == 1
    running.cancel()
    await asyncio.wait([running])
    assert await held_rows(scheduler) == 0
    assert replicas.jobs == []
