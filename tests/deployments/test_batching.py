"""What a batch costs, and how many rows are worth one."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from deployments.batching import NEGLIGIBLE_S, WORTHWHILE, BatchProfile
from deployments.messages import ChunkRow
from deployments.profiling import measure
from tests.support.models import StandInModel, StandInRow

ROW = ChunkRow(np.zeros((64, 64, 3), np.uint8), np.zeros((12, 8), np.float32), 0, 0, 0, 1, 0.0)


@given(st.floats(0, 1), st.floats(0.001, 1))
def test_a_straight_line_is_fitted_exactly(base_s: float, row_s: float) -> None:
    fitted = BatchProfile.fit({rows: base_s + row_s * rows for rows in (1, 2, 4, 8)})
    assert fitted.step_s(3) == pytest.approx(base_s + 3 * row_s, rel=1e-6)


@given(st.dictionaries(st.integers(1, 64), st.floats(1e-6, 10.0), min_size=1))
def test_whatever_was_measured_a_step_takes_time_and_a_larger_batch_is_no_faster(measured_s: dict[int, float]) -> None:
    fitted = BatchProfile.fit(measured_s)
    assert 0 < fitted.step_s(1) < fitted.step_s(64)
    assert 1 <= fitted.cap(16) <= 16


@given(st.floats(0.003, 1), st.floats(0.001, 1), st.integers(1, 64))
def test_up_to_the_cap_each_row_is_worth_it_and_the_next_one_is_not(base_s: float, row_s: float, most: int) -> None:
    profile = BatchProfile(base_s, row_s)
    cap = profile.cap(most)

    def gain(rows: int) -> float:
        return profile.rows_per_s(rows + 1) / profile.rows_per_s(rows) - 1

    if profile.step_s(most) > NEGLIGIBLE_S:
        assert all(gain(rows) >= WORTHWHILE for rows in range(1, cap))
        assert cap == most or gain(cap) < WORTHWHILE


def test_a_model_that_takes_no_time_takes_all_rows() -> None:
    assert BatchProfile(0.0, NEGLIGIBLE_S / 16).cap(16) == 16
    assert BatchProfile(0.0, NEGLIGIBLE_S / 8).cap(16) == 1


class TimedModel(StandInModel):
    """Each step takes 3 + rows seconds of a clock that nobody waits for; it has memory for `room` rows."""

    def __init__(self, room: int) -> None:
        super().__init__(Path(), "cpu")
        self.now, self.room = 0.0, room

    def step(self, rows: Sequence[StandInRow]) -> None:
        if len(rows) > self.room:
            raise torch.OutOfMemoryError
        self.now += 3.0 + len(rows)
        super().step(rows)


@pytest.mark.parametrize("room", [100, 5])
def test_a_model_is_measured_as_far_as_its_memory_goes(room: int) -> None:
    model = TimedModel(room)
    profile = measure(model, ROW, 12, clock=lambda: model.now)
    assert (profile.base_s, profile.row_s) == (pytest.approx(3.0), pytest.approx(1.0))
    assert model.largest_batch == (12 if room == 100 else 4)


def test_a_model_without_memory_for_one_row_cannot_be_measured() -> None:
    model = TimedModel(0)
    with pytest.raises(torch.OutOfMemoryError):
        measure(model, ROW, 8, clock=lambda: model.now)


def test_a_slow_model_is_measured_once_per_batch() -> None:
    model = TimedModel(100)
    measure(model, ROW, 4, clock=lambda: model.now)
    assert model.now == 2 * sum(3.0 + rows for rows in (1, 2, 4))
