import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from deployments.batching import BatchProfile
from deployments.engine import MAX_FAILED_JOBS, Engine
from deployments.messages import ChunkDone, ChunkFailed, ChunkForgotten, ChunkPiece, ChunkRow
from deployments.video import join_chunks
from deployments.world_model.errors import ContextLost
from tests.support.models import RAISE, StandInModel, StandInRow
from tests.support.video import decode

RESOLUTION, FPS = (64, 64), 10


class SteppedModel(StandInModel):
    """Each step waits for the test's permission, so a test decides what arrives in between."""

    def __init__(self) -> None:
        super().__init__(Path(), "cpu")
        self.entered = threading.Semaphore(0)
        self.permits = threading.Semaphore(0)
        self.batches: list[int] = []

    def step(self, rows: Sequence[StandInRow]) -> None:
        self.entered.release()
        assert self.permits.acquire(timeout=10)
        self.batches.append(len(rows))
        super().step(rows)


@pytest.fixture
def model() -> StandInModel:
    return StandInModel(Path(), "cpu")


@pytest.fixture
def engine(model: StandInModel) -> Iterator[Engine]:
    running = Engine(model, RESOLUTION, FPS, max_rows=8)
    yield running
    running.stop()


@pytest.fixture
def stepped() -> Iterator[tuple[Engine, SteppedModel]]:
    model = SteppedModel()
    running = Engine(model, RESOLUTION, FPS, max_rows=4)
    yield running, model
    model.permits.release(1000)
    running.stop()


def row(candidate: int = 0, chunk: int = 0, num_steps: int = 1, poisoned: bool = False, length: int = 12) -> ChunkRow:
    actions = np.zeros((length, 8), np.float32)
    actions[0, RAISE] = poisoned
    return ChunkRow(
        start_frame=np.full((*RESOLUTION, 3), 100, np.uint8),
        actions=actions,
        seed=0,
        candidate=candidate,
        chunk=chunk,
        num_steps=num_steps,
        guidance=0.0,
    )


def test_candidates_of_one_job_share_one_forward(engine: Engine, model: StandInModel) -> None:
    report = engine.submit([row(candidate) for candidate in range(8)]).result(10)
    assert model.largest_batch == 8
    assert all(isinstance(outcome, ChunkDone) for outcome in report.outcomes)


def test_outcomes_come_in_row_order_and_carry_the_next_start_frame(engine: Engine) -> None:
    report = engine.submit([row(length=3), row(length=5)]).result(10)
    last = [outcome.last_frame for outcome in report.outcomes if isinstance(outcome, ChunkDone)]
    assert [int(frame[0, 0, 0]) for frame in last] == [103, 105]


def test_chunk_zero_begins_with_the_start_frame_and_later_chunks_do_not(engine: Engine) -> None:
    clips = []
    for chunk in (0, 1):
        (outcome,) = engine.submit([row(chunk=chunk)]).result(10).outcomes
        assert isinstance(outcome, ChunkDone)
        clips.append(outcome.video)
    assert len(decode(join_chunks(clips[:1], FPS, 13))) == 13
    assert len(decode(join_chunks(clips[1:], FPS, 12))) == 12


def test_a_poisoned_candidate_fails_alone(engine: Engine) -> None:
    report = engine.submit([row(candidate, poisoned=candidate == 3) for candidate in range(8)]).result(10)
    failed = [isinstance(outcome, ChunkFailed) for outcome in report.outcomes]
    assert failed == [candidate == 3 for candidate in range(8)]
    assert report.outcomes[3] == ChunkFailed("ValueError: the input is poisoned")


def test_a_job_of_one_poisoned_row_fails_and_the_engine_lives_on(engine: Engine) -> None:
    assert isinstance(engine.submit([row(poisoned=True)]).result(10).outcomes[0], ChunkFailed)
    assert isinstance(engine.submit([row()]).result(10).outcomes[0], ChunkDone)
    assert engine.healthy()


@pytest.mark.parametrize("stage", ["start", "finish"])
def test_a_model_that_raises_outside_its_steps_fails_only_that_row(
    engine: Engine, model: StandInModel, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    works = getattr(model, stage)

    def raises_for_candidate_one(items: Sequence[Any]) -> Any:
        if any(getattr(item, "chunk_input", item).candidate == 1 for item in items):
            raise RuntimeError("candidate one")
        return works(items)

    monkeypatch.setattr(model, stage, raises_for_candidate_one)
    outcomes = engine.submit([row(0), row(1), row(2)]).result(10).outcomes
    assert [type(outcome) for outcome in outcomes] == [ChunkDone, ChunkFailed, ChunkDone]


def test_a_row_that_arrives_during_a_step_joins_the_next_one(stepped: tuple[Engine, SteppedModel]) -> None:
    engine, model = stepped
    first = engine.submit([row(num_steps=3)])
    model.entered.acquire(timeout=10)
    second = engine.submit([row(num_steps=1)])
    model.permits.release(10)
    first.result(10), second.result(10)
    assert model.batches == [1, 2, 1]


def test_a_job_that_does_not_fit_whole_fills_the_batch_and_goes_on_in_the_next(
    stepped: tuple[Engine, SteppedModel],
) -> None:
    engine, model = stepped
    first = engine.submit([row(candidate, num_steps=2) for candidate in range(3)])
    model.entered.acquire(timeout=10)
    second = engine.submit([row(candidate) for candidate in range(2)])
    model.permits.release(10)
    first.result(10), second.result(10)
    assert model.batches == [3, 4, 1]


def test_a_job_wider_than_the_engine_runs_a_part_at_a_time(engine: Engine, model: StandInModel) -> None:
    report = engine.submit([row(candidate, length=1 + candidate % 3) for candidate in range(20)]).result(10)
    last = [int(outcome.last_frame[0, 0, 0]) for outcome in report.outcomes if isinstance(outcome, ChunkDone)]
    assert last == [101 + candidate % 3 for candidate in range(20)]
    assert model.largest_batch == 8


class LimitedModel(SteppedModel):
    """Has memory for `room` rows; every batch that was tried is kept."""

    def __init__(self, room: int) -> None:
        super().__init__()
        self.permits.release(1000)
        self.room = room
        self.tried: list[int] = []

    def step(self, rows: Sequence[StandInRow]) -> None:
        self.tried.append(len(rows))
        if len(rows) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        super().step(rows)


def test_a_batch_beyond_memory_is_halved_until_it_fits_and_none_is_that_large_again() -> None:
    model = LimitedModel(room=3)
    engine = Engine(model, RESOLUTION, FPS, max_rows=8)
    outcomes = engine.submit([row(candidate, num_steps=2) for candidate in range(8)]).result(10).outcomes
    assert all(isinstance(outcome, ChunkDone) for outcome in outcomes)
    assert engine.cap == 2
    assert model.tried[:3] == [8, 4, 2]
    engine.submit([row(candidate) for candidate in range(8)]).result(10)
    assert max(model.tried[-4:]) == 2
    assert engine.healthy()
    engine.stop()


def test_a_row_that_no_memory_suffices_for_fails_alone() -> None:
    engine = Engine(LimitedModel(room=0), RESOLUTION, FPS, max_rows=8)
    outcomes = engine.submit([row(0), row(1)]).result(10).outcomes
    assert [type(outcome) for outcome in outcomes] == [ChunkFailed, ChunkFailed]
    assert engine.cap == 1
    engine.stop()


def test_the_poisoned_row_of_many_is_found_in_few_batches() -> None:
    model = LimitedModel(room=64)
    engine = Engine(model, RESOLUTION, FPS, max_rows=64)
    engine.submit([row(candidate, poisoned=candidate == 41) for candidate in range(64)]).result(10)
    assert len(model.tried) == 1 + 2 * 6
    engine.stop()


SECOND_PER_ROW = BatchProfile(0.0, 1.0)


class TestDeadlines:
    @pytest.fixture
    def timed(self) -> Iterator[tuple[Engine, SteppedModel, list[float]]]:
        model, now = SteppedModel(), [0.0]
        engine = Engine(model, RESOLUTION, FPS, 4, clock=lambda: now[0], profile=SECOND_PER_ROW)
        assert engine.cap == 1  # rows that cost as much each as alone are not worth a batch
        engine.cap = 4
        yield engine, model, now
        model.permits.release(1000)
        engine.stop()

    def test_a_job_that_cannot_be_done_in_time_is_given_up_unrun(
        self, timed: tuple[Engine, SteppedModel, list[float]]
    ) -> None:
        engine, model, _ = timed
        assert engine.submit([row(), row()], deadline_s=1.9).result(10).outcomes == ()
        assert model.batches == []
        assert engine.healthy()

    def test_a_job_that_a_full_batch_would_make_late_does_not_make_the_batch_small(
        self, timed: tuple[Engine, SteppedModel, list[float]]
    ) -> None:
        engine, model, now = timed
        first = engine.submit([row()])
        model.entered.acquire(timeout=10)
        tight = engine.submit([row()], deadline_s=3.5)
        others = [engine.submit([row()], deadline_s=100.0) for _ in range(4)]
        model.permits.release()
        model.entered.acquire(timeout=10)
        now[0] = 4.0
        model.permits.release(10)
        assert all(other.result(10).outcomes for other in (first, *others))
        assert tight.result(10).outcomes == ()
        assert model.batches == [1, 4]

    def test_interactive_rows_join_before_those_that_came_earlier(
        self, timed: tuple[Engine, SteppedModel, list[float]]
    ) -> None:
        engine, model, _ = timed
        running = engine.submit([row(candidate) for candidate in range(4)])
        model.entered.acquire(timeout=10)
        standard = engine.submit([row(candidate) for candidate in range(4)])
        interactive = engine.submit([row()], "interactive")
        model.permits.release(2)
        interactive.result(10)
        assert not standard.done()
        model.permits.release(10)
        running.result(10), standard.result(10)


def test_a_job_beyond_the_worthwhile_batch_stays_whole_while_it_fits_into_memory() -> None:
    model = SteppedModel()
    engine = Engine(model, RESOLUTION, FPS, max_rows=8, profile=BatchProfile(0.01, 0.01))
    assert engine.cap == 5
    first = engine.submit([row(num_steps=2)])
    model.entered.acquire(timeout=10)
    gang = engine.submit([row(candidate) for candidate in range(6)])
    model.permits.release(10)
    first.result(10), gang.result(10)
    assert model.batches == [1, 7]
    engine.stop()


def test_finished_rows_are_decoded_beside_the_next_step(
    stepped: tuple[Engine, SteppedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, model = stepped
    decoding, may_end = threading.Event(), threading.Event()
    finish = model.finish

    def slow_finish(rows: Sequence[StandInRow]) -> Any:
        decoding.set()
        assert may_end.wait(10)
        return finish(rows)

    monkeypatch.setattr(model, "finish", slow_finish)
    first = engine.submit([row()])
    model.permits.release()
    assert decoding.wait(10)
    second = engine.submit([row(num_steps=2)])
    model.permits.release(2)
    for _ in range(3):
        model.entered.acquire(timeout=10)
    assert not first.done()
    may_end.set()
    first.result(10), second.result(10)


def test_a_cancelled_job_leaves_the_batch_at_the_next_step(stepped: tuple[Engine, SteppedModel]) -> None:
    engine, model = stepped
    leaves, stays = engine.submit([row(num_steps=50)]), engine.submit([row(num_steps=4)])
    model.entered.acquire(timeout=10)
    model.permits.release()
    model.entered.acquire(timeout=10)
    assert leaves.cancel()
    model.permits.release(100)
    stays.result(10)
    assert model.batches[-1] == 1
    assert sum(model.batches) <= 4 + 2


def test_a_job_cancelled_before_its_turn_never_runs(stepped: tuple[Engine, SteppedModel]) -> None:
    engine, model = stepped
    running = engine.submit([row(candidate) for candidate in range(4)])
    model.entered.acquire(timeout=10)
    waiting = engine.submit([row()])
    assert waiting.cancel()
    model.permits.release(10)
    running.result(10)
    engine.submit([row()]).result(10)
    assert model.batches == [4, 1]


def test_stopping_finishes_what_runs_and_takes_nothing_more(model: StandInModel) -> None:
    engine = Engine(model, RESOLUTION, FPS, max_rows=8)
    report = engine.submit([row(num_steps=5)])
    engine.stop()
    assert isinstance(report.result(0).outcomes[0], ChunkDone)
    with pytest.raises(RuntimeError, match="has stopped"):
        engine.submit([row()])


def test_a_cancelled_job_at_the_head_does_not_hold_up_the_next(stepped: tuple[Engine, SteppedModel]) -> None:
    engine, model = stepped
    running = engine.submit([row(num_steps=3)])
    model.entered.acquire(timeout=10)
    wide, narrow = engine.submit([row(candidate) for candidate in range(4)]), engine.submit([row()])
    assert wide.cancel()
    model.permits.release(10)
    running.result(10), narrow.result(10)
    assert model.batches == [1, 2, 1]


def test_a_hung_model_is_not_healthy() -> None:
    model, now = SteppedModel(), [0.0]
    engine = Engine(model, RESOLUTION, FPS, max_rows=4, stall_s=60.0, clock=lambda: now[0])
    report = engine.submit([row()])
    model.entered.acquire(timeout=10)
    now[0] = 60.0
    assert engine.healthy()
    now[0] = 60.1
    assert not engine.healthy()
    model.permits.release(10)
    report.result(10)
    assert engine.healthy()
    engine.stop()


def test_a_model_that_fails_every_job_is_not_healthy_and_one_success_clears_it(engine: Engine) -> None:
    for _ in range(MAX_FAILED_JOBS - 1):
        engine.submit([row(poisoned=True)]).result(10)
    assert engine.healthy()
    engine.submit([row(poisoned=True), row()]).result(10)
    for _ in range(MAX_FAILED_JOBS):
        engine.submit([row(poisoned=True)]).result(10)
    assert not engine.healthy()
    engine.submit([row()]).result(10)
    assert engine.healthy()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_engine_whose_loop_breaks_fails_its_jobs_and_takes_no_more(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(engine, "_admit", broken)
    with pytest.raises(RuntimeError, match="has stopped"):
        engine.submit([row()]).result(10)
    with pytest.raises(RuntimeError, match="has stopped"):
        engine.submit([row()])
    engine.stop()
    assert not engine.healthy()


class RowInParts(StandInRow):
    """Two frames are ready after each step."""

    taken = 0

    def take(self) -> tuple["RowInParts", int] | None:
        if self.taken == self.steps:
            return None
        self.taken += 1
        return self, self.taken - 1


class ModelInParts(StandInModel):
    fails_at = -1

    def start(self, inputs: Sequence[Any]) -> list[StandInRow]:
        return [RowInParts(each) for each in inputs]

    def finish(self, parts: Sequence[Any]) -> list[np.ndarray]:
        if any(index == self.fails_at for _, index in parts):
            raise ValueError("it cannot be decoded")
        return [
            np.stack([part.chunk_input.start_frame + np.uint8(1 + 2 * index + offset) for offset in range(2)])
            for part, index in parts
        ]


class TestParts:
    @pytest.fixture
    def model(self) -> ModelInParts:
        return ModelInParts(Path(), "cpu")

    def test_pieces_are_told_in_order_although_a_later_one_is_made_sooner(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        present, second_is_made = engine._presenter.present_piece, threading.Event()

        def slow_at_first(row: ChunkRow, frames: np.ndarray, index: int) -> Any:
            if index == 0:
                assert second_is_made.wait(10)
            made = present(row, frames, index)
            if index == 1:
                second_is_made.set()
            return made

        monkeypatch.setattr(engine._presenter, "present_piece", slow_at_first)
        told: list[ChunkPiece] = []
        report = engine.submit([row(num_steps=6)], on_piece=told.append).result(10)
        assert [piece.index for piece in told] == list(range(6))
        assert [len(decode(join_chunks([piece.video], FPS, 2 + (piece.index == 0)))) for piece in told] == [3] + [2] * 5
        (outcome,) = report.outcomes
        assert isinstance(outcome, ChunkDone)
        assert (outcome.video, int(outcome.last_frame[0, 0, 0])) == (b"", 112)

    def test_a_job_that_takes_no_pieces_gets_the_whole(self, engine: Engine) -> None:
        (outcome,) = engine.submit([row(num_steps=6)]).result(10).outcomes
        assert isinstance(outcome, ChunkDone)
        assert len(decode(join_chunks([outcome.video], FPS, 13))) == 13

    def test_a_part_that_cannot_be_decoded_fails_its_row_and_nothing_after_it_is_told(
        self, engine: Engine, model: ModelInParts
    ) -> None:
        model.fails_at = 3
        told: list[ChunkPiece] = []
        (outcome,) = engine.submit([row(num_steps=6)], on_piece=told.append).result(10).outcomes
        assert outcome == ChunkFailed("ValueError: it cannot be decoded")
        assert [piece.index for piece in told] == list(range(len(told)))
        assert len(told) <= 3
        assert engine.healthy()

    def test_a_context_that_is_not_there_is_no_failure_of_the_model(
        self, engine: Engine, model: ModelInParts, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def forgets(inputs: Sequence[Any]) -> list[StandInRow]:
            raise ContextLost("stream")

        monkeypatch.setattr(model, "start", forgets)
        for _ in range(MAX_FAILED_JOBS + 1):
            assert engine.submit([row()]).result(10).outcomes == (ChunkForgotten(),)
        assert engine.healthy()
