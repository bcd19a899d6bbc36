"""The engine's contract, on a small model with random weights: it holds whatever the weights are."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from deployments.world_model import (
    MAX_GUIDANCE,
    MAX_NUM_STEPS,
    ChunkInput,
    InvalidInputError,
    WorldModel,
    WorldModelError,
    rollout,
)
from deployments.world_model.latent_cache import LatentCache
from deployments.world_model.rollout import Frames, Row, noise

Make = Callable[..., ChunkInput]

LEVELS = 1  # how much sharing a batch may change a frame, of 255; see rollout.py
LATENTS = 1e-4  # and a latent, whose scale is 1


def assert_close(frames: Frames, others: Frames) -> None:
    assert frames.shape == others.shape
    assert np.abs(frames.astype(int) - others.astype(int)).max() <= LEVELS


@pytest.fixture
def forwards(small_model: WorldModel) -> Iterator[list[int]]:
    """The rows of each forward of the denoiser, as they happen."""
    rows: list[int] = []
    handle = small_model.dit.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    yield rows
    handle.remove()


def test_frames_are_the_n_after_the_start_frame(small_model: WorldModel, chunk_input: Make) -> None:
    frames = small_model.generate([chunk_input(), chunk_input(1, actions=chunk_input(1).actions[:5])])
    assert [(f.shape, f.dtype) for f in frames] == [((12, 64, 64, 3), np.uint8), ((5, 64, 64, 3), np.uint8)]


def test_a_short_chunk_is_the_beginning_of_the_padded_one(small_model: WorldModel, chunk_input: Make) -> None:
    actions = chunk_input().actions
    padded = np.concatenate((actions[:5], np.repeat(actions[4:5], 7, axis=0)))
    short, whole = (small_model.generate([chunk_input(actions=a)])[0] for a in (actions[:5], padded))
    assert np.array_equal(short, whole[:5])


def test_a_batch_gives_what_each_row_gives_alone(small_model: WorldModel, chunk_input: Make) -> None:
    inputs = [chunk_input(i, num_steps=steps) for i, steps in enumerate((4, 1, 7, 4, 2, 4, 10, 4))]
    for together, alone in zip(small_model.generate(inputs), inputs, strict=True):
        assert_close(together, small_model.generate([alone])[0])


def test_the_order_of_a_batch_changes_nothing(small_model: WorldModel, chunk_input: Make) -> None:
    inputs = [chunk_input(i) for i in range(4)]
    for forward, backward in zip(
        small_model.generate(inputs), reversed(small_model.generate(inputs[::-1])), strict=True
    ):
        assert_close(forward, backward)


def test_rows_admitted_at_different_steps_give_what_they_give_alone(small_model: WorldModel, chunk_input: Make) -> None:
    inputs = [chunk_input(i, num_steps=6) for i in range(4)]
    waiting, active, done = list(inputs), [], {}
    while waiting or active:
        if waiting:
            active += small_model.start([waiting.pop(0)])
        small_model.step(active)
        done |= {id(row.chunk_input): row for row in active if row.done}
        active = [row for row in active if not row.done]
    for frames, alone in zip(small_model.finish([done[id(i)] for i in inputs]), inputs, strict=True):
        assert_close(frames, small_model.generate([alone])[0])


def test_latents_of_a_batched_row_agree_with_those_alone(small_model: WorldModel, chunk_input: Make) -> None:
    rows, (alone,) = small_model.start([chunk_input(i) for i in range(5)]), small_model.start([chunk_input(3)])
    for _ in range(4):
        small_model.step(rows)
        small_model.step([alone])
    torch.testing.assert_close(rows[3].state.x, alone.state.x, atol=LATENTS, rtol=0)


def test_the_same_batch_gives_the_same_bytes(small_model: WorldModel, chunk_input: Make) -> None:
    inputs = [chunk_input(i) for i in range(3)]
    first, second = small_model.generate(inputs), small_model.generate(inputs)
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("change", [{"seed": 1}, {"candidate": 1}, {"chunk": 1}], ids=lambda change: next(iter(change)))
def test_each_part_of_the_noise_key_changes_the_noise(
    small_model: WorldModel, chunk_input: Make, change: dict[str, Any]
) -> None:
    before, after = (noise(small_model.config, chunk_input(**changes)) for changes in ({}, change))
    assert not np.array_equal(before, after)


def test_a_seed_above_32_bits_is_used_in_full(small_model: WorldModel, chunk_input: Make) -> None:
    low, high = (noise(small_model.config, chunk_input(seed=seed)) for seed in (7, 7 + 2**40))
    assert not np.array_equal(low, high)


GOLDEN_NOISE = [-0.766013, 1.124776, 0.197484, -0.883013]


def test_noise_is_the_same_on_every_machine(small_model: WorldModel, chunk_input: Make) -> None:
    drawn = noise(small_model.config, chunk_input(seed=2**62 + 5, candidate=3, chunk=2))
    assert drawn.dtype == np.float32
    assert drawn.ravel()[:4].tolist() == pytest.approx(GOLDEN_NOISE, abs=1e-6)


def test_noise_is_standard_normal(shipped_model: WorldModel, chunk_input: Make) -> None:
    drawn = noise(shipped_model.config, chunk_input())
    assert abs(drawn.mean()) < 0.05
    assert drawn.std() == pytest.approx(1, abs=0.05)


def test_different_noise_gives_different_frames(small_model: WorldModel, chunk_input: Make) -> None:
    first, second = small_model.generate([chunk_input(), chunk_input(candidate=1)])
    assert not np.array_equal(first, second)


def test_guidance_0_costs_no_unconditional_pass(
    small_model: WorldModel, chunk_input: Make, forwards: list[int]
) -> None:
    small_model.generate([chunk_input(0), chunk_input(1)])
    assert forwards == [2] * 4


def test_a_guided_row_costs_one_more_in_the_same_forward(
    small_model: WorldModel, chunk_input: Make, forwards: list[int]
) -> None:
    small_model.generate([chunk_input(0), chunk_input(1, guidance=1.5)])
    assert forwards == [3] * 4


def test_guidance_of_one_row_leaves_the_others_alone(small_model: WorldModel, chunk_input: Make) -> None:
    beside, _ = small_model.generate([chunk_input(0), chunk_input(1, guidance=1.5)])
    assert_close(beside, small_model.generate([chunk_input(0)])[0])


def test_guidance_changes_the_frames(small_model: WorldModel, chunk_input: Make) -> None:
    plain, guided = small_model.generate([chunk_input(), chunk_input(guidance=3.0)])
    assert not np.array_equal(plain, guided)


def test_each_distinct_start_frame_is_encoded_once(
    small_model: WorldModel, chunk_input: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: list[int] = []
    encode = small_model.tokenizer.encode
    monkeypatch.setattr(small_model.tokenizer, "encode", lambda video: encoded.append(len(video)) or encode(video))
    monkeypatch.setattr(small_model, "latent_cache", LatentCache())
    shared = chunk_input(0).start_frame
    small_model.start([chunk_input(i, start_frame=shared.copy()) for i in range(8)] + [chunk_input(9)])
    assert encoded == [2]


def test_a_finished_row_is_not_stepped_further(small_model: WorldModel, chunk_input: Make) -> None:
    (row,) = small_model.start([chunk_input(num_steps=1)])
    small_model.step([row])
    assert row.done
    with pytest.raises(ValueError, match="finished row"):
        small_model.step([row])


def test_a_row_with_steps_left_is_not_finished(small_model: WorldModel, chunk_input: Make) -> None:
    with pytest.raises(ValueError, match="steps left"):
        small_model.finish(small_model.start([chunk_input()]))


def test_no_frame_is_made_of_nan(small_model: WorldModel, chunk_input: Make) -> None:
    rows = small_model.start([chunk_input(i, num_steps=1) for i in range(2)])
    small_model.step(rows)
    rows[1].state = replace(rows[1].state, x=torch.full_like(rows[1].state.x, torch.nan))
    with pytest.raises(WorldModelError, match="row 1 of 2"):
        small_model.finish(rows)
    assert len(small_model.finish(rows[:1])) == 1


def test_a_step_that_fails_leaves_its_rows_as_they_were(
    small_model: WorldModel, chunk_input: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[Row] = small_model.start([chunk_input(0), chunk_input(1)])
    small_model.step(rows)
    before = [(row.step, row.state) for row in rows]

    def fail(*args: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(small_model.dit, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            small_model.step(rows)
    assert [(row.step, row.state) for row in rows] == before


def test_no_rows_is_no_work(small_model: WorldModel) -> None:
    small_model.step([])
    assert small_model.generate([]) == []


@pytest.mark.parametrize("count", [1, 11, 12, 13, 30])
def test_t_actions_give_t_plus_1_frames(small_model: WorldModel, chunk_input: Make, count: int) -> None:
    actions = np.random.default_rng(0).uniform(-1, 1, (count, 8)).astype(np.float32)
    frames = rollout(small_model, chunk_input().start_frame, actions, seed=1, num_steps=1)
    assert len(frames) == count + 1
    assert np.array_equal(frames[0], chunk_input().start_frame)


def test_a_chunk_starts_from_the_last_frame_of_the_one_before(small_model: WorldModel, chunk_input: Make) -> None:
    given = chunk_input()
    actions = np.concatenate((given.actions, chunk_input(1).actions))
    whole = rollout(small_model, given.start_frame, actions, seed=given.seed)
    first = small_model.generate([given])[0]
    second = small_model.generate([chunk_input(1, start_frame=first[-1], seed=given.seed, chunk=1)])[0]
    assert np.array_equal(whole[1:13], first)
    assert np.array_equal(whole[13:], second)


def test_the_caller_s_random_state_is_left_alone(small_model: WorldModel, chunk_input: Make) -> None:
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    small_model.generate([chunk_input()])
    assert torch.equal(torch.rand(1), expected)


FRAME = np.zeros((64, 64, 3), np.uint8)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("start_frame", FRAME[:63]),
        ("start_frame", FRAME.astype(np.float32)),
        ("actions", np.zeros((13, 8), np.float32)),
        ("actions", np.zeros((0, 8), np.float32)),
        ("actions", np.zeros((12, 384), np.float32)),
        ("actions", np.full((12, 8), np.nan, np.float32)),
        ("seed", -1),
        ("seed", 2**63),
        ("candidate", -1),
        ("chunk", 2**32),
        ("num_steps", 0),
        ("num_steps", MAX_NUM_STEPS + 1),
        ("guidance", -0.1),
        ("guidance", MAX_GUIDANCE * 1.01),
        ("guidance", float("nan")),
    ],
)
def test_a_bad_input_is_refused_by_field(small_model: WorldModel, chunk_input: Make, field: str, value: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        small_model.start([chunk_input(0), chunk_input(1, **{field: value})])
    assert caught.value.field == field


def test_inputs_at_their_bounds_are_accepted(small_model: WorldModel, chunk_input: Make) -> None:
    edge = chunk_input(seed=2**63 - 1, candidate=2**32 - 1, num_steps=MAX_NUM_STEPS, guidance=MAX_GUIDANCE)
    assert len(small_model.start([edge])) == 1
