import numpy as np
import pytest

from deployments.world_model import PRESETS, InvalidInputError
from deployments.world_model.actions import check_actions, encode_actions, pad_to_chunk, split_chunks

TINY = PRESETS["tiny-pusher"]


def actions(count: int) -> np.ndarray:
    return np.arange(count * 8, dtype=np.float32).reshape(count, 8)


@pytest.mark.parametrize(("count", "lengths"), [(1, [1]), (12, [12]), (13, [12, 1]), (48, [12] * 4)])
def test_a_rollout_is_cut_into_chunks_of_twelve(count: int, lengths: list[int]) -> None:
    chunks = split_chunks(TINY, actions(count))
    assert [len(chunk) for chunk in chunks] == lengths
    assert np.array_equal(np.concatenate(chunks), actions(count))


def test_a_short_chunk_is_padded_with_its_last_action() -> None:
    padded = pad_to_chunk(TINY, actions(5))
    assert padded.shape == (12, 8)
    assert np.array_equal(padded[:5], actions(5))
    assert (padded[5:] == actions(5)[-1]).all()


def test_a_whole_chunk_is_not_padded() -> None:
    assert np.array_equal(pad_to_chunk(TINY, actions(12)), actions(12))


def test_actions_are_grouped_by_latent_frame() -> None:
    encoded = encode_actions(TINY, np.full((12, 8), 0.5, np.float32))
    assert encoded.shape == (3, 32)


def test_columns_of_other_embodiments_are_ignored() -> None:
    given = np.random.default_rng(0).uniform(-1, 1, (12, 8)).astype(np.float32)
    blank = given.copy()
    blank[:, 2:] = 0
    assert np.array_equal(encode_actions(TINY, given), encode_actions(TINY, blank))


def test_actions_beyond_the_limit_act_as_the_limit() -> None:
    assert np.array_equal(
        encode_actions(TINY, np.full((12, 8), 7, np.float32)), encode_actions(TINY, np.ones((12, 8), np.float32))
    )


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (np.zeros((12, 8)), "dtype is float64"),
        (np.zeros((12, 7), np.float32), r"must be \(T, 8\)"),
        (np.zeros(8, np.float32), r"must be \(T, 8\)"),
        (np.zeros((0, 8), np.float32), "0 rows"),
        (np.zeros((13, 8), np.float32), "13 rows, must be 1 to 12"),
        (np.full((12, 8), np.nan, np.float32), "NaN"),
        (np.full((12, 8), np.inf, np.float32), "infinity"),
    ],
)
def test_bad_actions_are_refused_with_the_reason(bad: np.ndarray, reason: str) -> None:
    with pytest.raises(InvalidInputError, match=reason) as caught:
        check_actions(TINY, bad, max_actions=12)
    assert caught.value.field == "actions"


def test_as_many_actions_as_allowed_are_accepted() -> None:
    check_actions(TINY, np.zeros((12, 8), np.float32), max_actions=12)
