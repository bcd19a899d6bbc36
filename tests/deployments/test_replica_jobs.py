"""What a replica stops when nobody waits for it any more."""

from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from deployments.engine import Engine
from deployments.messages import ChunkJob, ChunkReport, ReplicaId, TicketId
from deployments.replica_jobs import REMEMBERED_TICKETS, ReplicaJobs
from tests.deployments.test_engine import FPS, RESOLUTION, SteppedModel, row


@pytest.fixture
def withdrawn() -> list[str]:
    return []


@pytest.fixture
def stepped(withdrawn: list[str]) -> Iterator[tuple[ReplicaJobs, SteppedModel]]:
    model = SteppedModel()
    engine = Engine(model, RESOLUTION, FPS, max_rows=4)
    yield ReplicaJobs(engine, withdrawn.append), model
    model.permits.release(1000)
    engine.stop()


def job(name: str, num_steps: int = 1) -> ChunkJob:
    return ChunkJob(TicketId(name), ReplicaId("r"), (row(num_steps=num_steps),))


def test_a_stopped_job_leaves_the_batch_at_the_next_step_and_the_others_stay(
    stepped: tuple[ReplicaJobs, SteppedModel], withdrawn: list[str]
) -> None:
    jobs, model = stepped
    orphan, other = jobs.start(job("orphan", 50)), jobs.start(job("other", 4))
    model.entered.acquire(timeout=10)
    jobs.stop([TicketId("orphan")])
    model.permits.release(100)
    assert len(other.result(10).outcomes) == 1
    with pytest.raises(CancelledError):
        orphan.result(10)
    assert sum(model.batches) <= 4 + 2
    assert withdrawn == ["orphan"]


def test_a_job_whose_caller_hung_up_is_withdrawn_though_nobody_is_left_to_say_so(
    stepped: tuple[ReplicaJobs, SteppedModel], withdrawn: list[str]
) -> None:
    jobs, model = stepped
    jobs.start(job("left", 50)).cancel()
    model.permits.release(10)
    assert len(jobs.start(job("stays")).result(10).outcomes) == 1
    assert withdrawn == ["left"]


def test_a_job_that_arrives_after_it_was_stopped_does_not_run(
    stepped: tuple[ReplicaJobs, SteppedModel], withdrawn: list[str]
) -> None:
    jobs, model = stepped
    jobs.stop([TicketId("late")])
    assert withdrawn == ["late"]
    assert jobs.start(job("late")).result(0) == ChunkReport((), 0.0)
    assert model.batches == []


def test_stopping_what_is_done_or_unknown_does_nothing_and_what_is_remembered_is_bounded(
    stepped: tuple[ReplicaJobs, SteppedModel],
) -> None:
    jobs, model = stepped
    model.permits.release(10)
    done = jobs.start(job("done"))
    assert len(done.result(10).outcomes) == 1
    jobs.stop([TicketId("done"), *(TicketId(str(index)) for index in range(2 * REMEMBERED_TICKETS))])
    assert len(done.result(0).outcomes) == 1
    assert (len(jobs._running), len(jobs._stopped)) == (0, REMEMBERED_TICKETS)
