import importlib
from dataclasses import replace

import numpy as np
import pytest
import torch

from deployments.world_model import PRESETS, ChunkInput, InvalidInputError, WorldModel, WorldModelConfig
from deployments.world_model.dit import DiT
from deployments.world_model.tokenizer import build_tokenizer
from deployments.world_model.upstream import to_uint8_truncated, upstream_rollout
from tests.support.weights import randomise

serving = importlib.import_module("deployments.world_model.rollout")  # the package exports a function of that name


@pytest.fixture(scope="module")
def model() -> WorldModel:
    tiny = PRESETS["tiny-pusher"]
    config = replace(
        tiny,
        resolution=(32, 32),
        dit=replace(tiny.dit, width=32, num_blocks=1, num_heads=2, latent_channels=6),
        tokenizer=replace(tiny.tokenizer, width=16, num_blocks=1, latent_channels=6),
    )
    dit, tokenizer = DiT(config.dit, config.grouped_action_dim), build_tokenizer(config)
    for module in (dit, tokenizer):
        randomise(module.requires_grad_(False))
    tokenizer.state_dict()["latent_std"].fill_(1)
    return WorldModel(config, dit, tokenizer)


@pytest.fixture(scope="module")
def start() -> np.ndarray:
    return np.random.default_rng(4).integers(0, 256, (32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def actions() -> np.ndarray:
    return np.random.default_rng(3).uniform(-1, 1, (36, 8)).astype(np.float32)


def test_t_actions_give_t_plus_1_frames(model: WorldModel, start: np.ndarray, actions: np.ndarray) -> None:
    for count in (12, 36):
        frames = upstream_rollout(model, start, actions[:count])
        assert (frames.shape, frames.dtype) == ((count + 1, 32, 32, 3), np.uint8)


def test_later_chunks_keep_the_copy_of_their_start_frame_and_lack_their_last(
    model: WorldModel, start: np.ndarray, actions: np.ndarray
) -> None:
    """So frame 13 shows what frame 12 shows, and a rollout that ends there loses its last moment."""
    frames = upstream_rollout(model, start, actions[:24])
    copy = model.reconstruct(frames[None, 12:13])[0, 0]
    assert np.abs(frames[13].astype(int) - copy).max() <= 1  # one truncates, the other rounds
    assert np.array_equal(frames[:13], upstream_rollout(model, start, actions[:12]))


def test_a_chunk_is_drawn_by_the_index_of_its_first_action(
    model: WorldModel, start: np.ndarray, actions: np.ndarray
) -> None:
    """The same frame and actions as a second chunk and as a first differ by their noise alone."""
    second = upstream_rollout(model, start, actions[:24])[13:]
    middle = upstream_rollout(model, start, actions[:12])[-1]
    first = upstream_rollout(model, middle, actions[12:24])[:12]
    assert np.abs(first[0].astype(int) - second[0]).max() == 0, "the copy of the start frame knows no noise"
    assert np.abs(first[1:].astype(int) - second[1:]).max() > 0


def test_it_is_the_model_that_is_served(
    model: WorldModel, start: np.ndarray, actions: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Given the same noise, the first chunk differs by rounding alone."""

    def published_noise(config: WorldModelConfig, given: ChunkInput) -> np.ndarray:
        return np.random.RandomState(given.seed).standard_normal(config.latent_shape).astype(np.float32)

    monkeypatch.setattr(serving, "noise", published_noise)
    served = serving.rollout(model, start, actions[:12], seed=0)
    published = upstream_rollout(model, start, actions[:12])
    assert np.abs(served[1:].astype(int) - published[1:]).max() <= 1


@pytest.mark.parametrize("count", [0, 5, 13])
def test_parts_of_a_chunk_are_refused(model: WorldModel, start: np.ndarray, actions: np.ndarray, count: int) -> None:
    with pytest.raises(InvalidInputError, match=f"{count} rows, must be a multiple of 12"):
        upstream_rollout(model, start, actions[:count])


def test_pixels_are_truncated() -> None:
    levels = torch.tensor([-2.0, -1.0, -0.5, 0.0, 0.999, 1.0, 2.0]).view(1, 7, 1, 1).expand(3, -1, -1, -1)
    assert to_uint8_truncated(levels)[:, 0, 0, 0].tolist() == [0, 0, 63, 127, 254, 255, 255]
