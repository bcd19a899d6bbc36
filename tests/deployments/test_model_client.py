"""The client of one model, between a real scheduler and replicas that a test plays; replies may be on their way."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest

import deployments.model_client
import deployments.scheduler_actor
from billing.money import Mils
from deployments.channel import Address, CallFailed, Channel, ChannelLost
from deployments.errors import DeadlinePassed, EngineFailed, ModelOverloaded
from deployments.messages import (
    ChunkDone,
    ChunkForgotten,
    ChunkJob,
    ChunkPiece,
    ChunkReport,
    ChunkRow,
    Memory,
    ModelSpec,
    ReplicaId,
    Ticket,
    TicketId,
    TicketTerms,
)
from deployments.model_client import ModelClient
from deployments.room import BATCHES_AHEAD
from deployments.scheduler import Notice, SchedulerLimits
from deployments.scheduler_actor import SchedulerActor

SPEC = ModelSpec("m", (64, 64), 8, 12, 10, 4, 0.0, Mils(5))
ROW = ChunkRow(np.zeros((64, 64, 3), np.uint8), np.zeros((12, 8), np.float32), 0, 0, 0, 1, 0.0)
REPORT = ChunkReport((ChunkDone(b"", ROW.start_frame),), 1.0)


class Calls:
    """A channel to `target`. While `replies` is clear the other side works, but its answers are still on their way."""

    is_in_use = True

    def __init__(self, target: Any) -> None:
        self.target = target
        self.replies = asyncio.Event()
        self.replies.set()

    async def stream(self, method: str, *arguments: Any) -> AsyncGenerator[Any, None]:
        async for part in getattr(self.target, method)(*arguments):
            yield part

    async def call(self, method: str, *arguments: Any) -> Any:
        result = await getattr(self.target, method)(*arguments)
        await self.replies.wait()
        return result

    def close(self) -> None:
        pass


class Replicas:
    """Answers each job with the next of `script`: a report, or what to raise; a job beyond it waits for ever.

    A streamed one is answered with pieces until there is something else in the script.
    """

    def __init__(self) -> None:
        self.script: list[ChunkPiece | ChunkReport | BaseException] = []
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
        assert isinstance(answer, ChunkReport)
        return answer

    async def stream_chunk(self, job: ChunkJob) -> AsyncIterator[ChunkPiece | ChunkReport]:
        self.jobs.append(job)
        while isinstance(answer := self.script.pop(0), ChunkPiece):
            yield answer
        if isinstance(answer, BaseException):
            raise answer
        yield answer


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


@pytest.mark.parametrize("is_granted", [False, True])
async def test_who_asked_again_keeps_its_place_and_its_grant_when_the_first_to_ask_leaves(
    scheduler: Calls, is_granted: bool
) -> None:
    ticket = Ticket(TicketId("a/0/0"), 1)
    if is_granted:
        await announce(scheduler)
    first, again = (asyncio.create_task(scheduler.target.acquire(ticket)) for _ in range(2))
    for _ in range(2):  # the ticket is queued, then granted; who waits for it has not been told yet
        await asyncio.sleep(0)
    first.cancel()
    await settled()
    assert (await scheduler.target.status()).queued_rows == 1 - is_granted
    await announce(scheduler)
    assert (await again).ticket_id == ticket.ticket_id
    assert first.cancelled()
    assert (await scheduler.target.status()).running_rows == 1


async def test_a_replica_that_goes_while_its_grant_is_being_answered_is_answered_with_another(scheduler: Calls) -> None:
    await announce(scheduler, "goes")
    placing = asyncio.create_task(scheduler.target.place(Ticket(TicketId("a/0/0"), 1)))
    for _ in range(2):  # the ticket is queued, then granted; who waits for it has not been told yet
        await asyncio.sleep(0)
    assert (await scheduler.target.status()).running_rows == 1
    await scheduler.target.replica_gone(ReplicaId("goes"))
    await settled()
    assert not placing.done(), "there is no replica"
    await announce(scheduler, "stays")
    assert (await placing).grant.replica_id == "stays"


async def test_a_connection_that_is_being_made_is_kept_when_another_replica_is_called_for_the_first_time(
    scheduler: Calls,
) -> None:
    connecting = []

    def slow(address: Address) -> Channel:
        async def find() -> Address:
            connecting.append(address)
            await asyncio.Event().wait()
            return address

        return Channel(find)

    client = ModelClient(SPEC, cast(Channel, scheduler), slow, queue_timeout_s=30.0, chunk_timeout_s=30.0)
    running = []
    for index, name in enumerate("aba"):
        await announce(scheduler, name)
        running.append(asyncio.create_task(client.run_chunk(f"{index}/0", [ROW], begun=False)))
        await settled()
        await scheduler.target.replica_gone(ReplicaId(name))
    assert len(connecting) == 2, "one for each replica"
    for each in running:
        each.cancel()
    await asyncio.wait(running)


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


@pytest.mark.parametrize(("deadline_s", "expected"), [(None, EngineFailed), (60.0, DeadlinePassed)])
async def test_only_who_has_a_deadline_is_told_that_it_passed(
    client: ModelClient, scheduler: Calls, replicas: Replicas, deadline_s: float | None, expected: type[Exception]
) -> None:
    await announce(scheduler)
    replicas.script = [ChunkReport((), 0.0)]  # of a replica that had dropped it, or was told to stop it
    with pytest.raises(expected):
        await client.run_chunk("a/0", [ROW], begun=False, terms=TicketTerms(deadline_s=deadline_s))
    assert await held_rows(scheduler) == 0


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


class Notices:
    """Stands before a scheduler's `notice`, and may fail."""

    def __init__(self, scheduler: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
        self._notice = scheduler.target.notice
        self.failure: Callable[[Sequence[Notice]], Exception | None] = lambda _: None
        self.on_notice: Callable[[], object] = lambda: None
        monkeypatch.setattr(scheduler.target, "notice", self)

    async def __call__(self, notices: Sequence[Notice]) -> None:
        self.on_notice()
        await asyncio.sleep(0)
        if (failure := self.failure(notices)) is not None:
            raise failure
        await self._notice(notices)


@pytest.fixture
def notices(scheduler: Calls, monkeypatch: pytest.MonkeyPatch) -> Notices:
    return Notices(scheduler, monkeypatch)


async def test_a_notice_that_the_scheduler_cannot_take_holds_back_no_other(
    client: ModelClient, scheduler: Calls, replicas: Replicas, notices: Notices
) -> None:
    await announce(scheduler, rows=4)
    replicas.script = [REPORT] * 3
    poison = ("complete", "poison/0/0")
    notices.failure = lambda told: CallFailed("notice", "KeyError") if poison in told else None
    await asyncio.gather(*(client.run_chunk(f"{name}/0", [ROW], begun=False) for name in ("a", "poison", "b")))
    assert await held_rows(scheduler) == 1, "of that one alone"


async def test_the_next_attempt_does_not_wait_for_what_others_have_to_tell(
    client: ModelClient, scheduler: Calls, replicas: Replicas, notices: Notices
) -> None:
    """Under load there is always something more to tell."""
    await announce(scheduler, "dies")
    notices.on_notice = lambda: client._notify(("complete", "another"))
    replicas.script = [ChannelLost("it died"), REPORT]
    running = asyncio.create_task(client.run_chunk("a/0", [ROW], begun=False))
    await settled()
    await announce(scheduler, "lives")
    async with asyncio.timeout(5):
        assert (await running)[0] is REPORT
    notices.on_notice = lambda: None


async def test_the_next_attempt_waits_no_longer_for_the_scheduler_than_for_room(
    client: ModelClient, scheduler: Calls, replicas: Replicas, notices: Notices, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployments.model_client, "SCHEDULER_RETRY_S", 0.0)
    monkeypatch.setattr(client, "_begun_timeout_s", 0.05)
    notices.failure = lambda _: ChannelLost("it is away")
    await announce(scheduler)
    replicas.script = [ChannelLost("it died")]
    async with asyncio.timeout(5):
        with pytest.raises(ModelOverloaded):
            await client.run_chunk("a/0", [ROW], begun=False)


async def test_a_scheduler_that_stays_away_is_told_only_what_is_new(
    client: ModelClient, scheduler: Calls, replicas: Replicas, notices: Notices, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has taken back what it granted to whom it could not hear; and what waits to be told has a bound."""
    monkeypatch.setattr(deployments.model_client, "SCHEDULER_RETRY_S", 0.0)
    monkeypatch.setattr(deployments.model_client, "TELL_FOR_S", 0.0)
    await announce(scheduler, rows=4)
    replicas.script = [REPORT] * 2
    await client.run_chunk("a/0", [ROW], begun=False)
    assert await held_rows(scheduler) == 1
    assert client._notices.empty()
    monkeypatch.setattr(deployments.model_client, "TELL_FOR_S", 60.0)
    await client.run_chunk("b/0", [ROW], begun=False)
    assert await held_rows(scheduler) == 1, "of the first one alone"


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


def piece(index: int) -> ChunkPiece:
    return ChunkPiece(0, index, 4, b"", (b"",) * 4, (b"trace",), 18)


class TestStreaming:
    @pytest.fixture
    async def client(self, scheduler: Calls, replicas: Replicas) -> AsyncIterator[ModelClient]:
        channels: Any = (scheduler, lambda _: Calls(replicas))
        running = ModelClient(replace(SPEC, piece_frames=4), *channels, queue_timeout_s=30.0, chunk_timeout_s=30.0)
        running.start()
        yield running
        await running.stop()

    def row(self, replica_id: str = "") -> ChunkRow:
        return replace(ROW, stream="work/0", memory=Memory(3, (b"trace",) * 4, ReplicaId(replica_id)))

    async def test_pieces_leave_once_each_though_the_replica_dies_between_them(
        self, client: ModelClient, scheduler: Calls, replicas: Replicas
    ) -> None:
        for name in ("a", "b"):
            await announce(scheduler, name)
        replicas.script = [piece(0), ChannelLost("it died"), piece(0), piece(1), piece(2), REPORT]
        told: list[int] = []
        report, _ = await client.run_chunk(
            "w/1", [self.row()], begun=True, on_piece=lambda each: told.append(each.index)
        )
        assert (told, report) == ([0, 1, 2], REPORT)
        assert await held_rows(scheduler) == 0

    async def test_traces_stay_here_while_the_replica_has_the_context(
        self, client: ModelClient, scheduler: Calls, replicas: Replicas
    ) -> None:
        await announce(scheduler, "home")
        replicas.script = [REPORT, REPORT]
        await client.run_chunk("w/1", [self.row("home")], begun=True)
        await client.run_chunk("w/2", [self.row("elsewhere")], begun=True)
        assert [job.rows[0].memory.traces for job in replicas.jobs] == [None, (b"trace",) * 4]

    async def test_a_replica_that_has_forgotten_is_told_under_the_same_grant(
        self, client: ModelClient, scheduler: Calls, replicas: Replicas
    ) -> None:
        await announce(scheduler, "home")
        replicas.script = [ChunkReport((ChunkForgotten(),), 0.0), REPORT]
        report, _ = await client.run_chunk("w/1", [self.row("home")], begun=True)
        assert report is REPORT
        assert [job.rows[0].memory.traces for job in replicas.jobs] == [None, (b"trace",) * 4]
        assert len({job.ticket_id for job in replicas.jobs}) == 1
        assert await held_rows(scheduler) == 0

    async def test_a_ticket_prefers_the_replica_of_its_work_for_as_long_as_its_traces_take(
        self, client: ModelClient, scheduler: Calls, replicas: Replicas, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await announce(scheduler)
        replicas.script = [REPORT]
        asked: list[Ticket] = []
        submit = scheduler.target._scheduler.submit
        monkeypatch.setattr(scheduler.target._scheduler, "submit", lambda each: asked.append(each) or submit(each))
        await client.run_chunk("w/1", [self.row()], begun=True)
        (ticket,) = asked
        assert (ticket.affinity, ticket.affinity_steps) == ("work", 4)
        assert ticket.num_steps == 3 * (ROW.num_steps + 1)


async def test_a_client_that_died_loses_its_place_and_what_ran_for_it_is_stopped_by_its_replica(
    client: ModelClient, scheduler: Calls, replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployments.scheduler_actor, "RECONNECT_S", 0.0)
    actor = scheduler.target
    await announce(scheduler)
    running = [asyncio.create_task(client.run_chunk(str(index), [ROW], begun=False)) for index in range(3)]
    await settled()
    assert len(replicas.jobs) == BATCHES_AHEAD
    survivor = asyncio.create_task(actor.acquire(Ticket(TicketId("survivor"), 1)))
    await settled()
    assert (await actor.status()).queued_rows == 2
    await client.stop()
    await settled()
    status = await actor.status()
    assert (status.running_rows, status.queued_rows) == (BATCHES_AHEAD, 1)
    assert not survivor.done()
    orphans = await actor.replica_alive(ReplicaId("r"), 1)
    assert set(orphans) == {job.ticket_id for job in replicas.jobs}
    await actor.notice([("withdraw", ticket_id) for ticket_id in orphans])
    assert (await survivor).replica_id == "r"
    assert await actor.replica_alive(ReplicaId("r"), 1) == []
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)


async def test_a_client_that_comes_back_over_another_connection_keeps_what_it_has(
    client: ModelClient, scheduler: Calls, replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployments.scheduler_actor, "RECONNECT_S", 0.0)
    await announce(scheduler)
    running = asyncio.create_task(client.run_chunk("stays", [ROW], begun=False))
    await settled()
    broken = asyncio.create_task(scheduler.target.attend(client._caller))
    await settled()
    broken.cancel()
    await asyncio.sleep(0.01)  # longer than it may be away
    assert await scheduler.target.replica_alive(ReplicaId("r"), 1) == []
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_client_attends_again_once_a_scheduler_is_back(
    client: ModelClient, scheduler: Calls, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployments.model_client, "SCHEDULER_RETRY_S", 0.0)
    attended: asyncio.Queue[str] = asyncio.Queue()

    async def attend(caller: str) -> None:
        attended.put_nowait(caller)
        raise ChannelLost("it restarts")

    monkeypatch.setattr(scheduler.target, "attend", attend)
    channels: Any = (scheduler, lambda _: scheduler)
    again = ModelClient(SPEC, *channels, queue_timeout_s=30.0, chunk_timeout_s=30.0)
    again.start()
    assert {await attended.get() for _ in range(3)} == {again._caller}
    await again.stop()
