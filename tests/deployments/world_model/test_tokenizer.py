import numpy as np
import pytest
import torch

from deployments.world_model import PRESETS, WorldModel, WorldModelConfig, pusher
from deployments.world_model.tokenizer import PatchTokenizer, build_tokenizer
from deployments.world_model.vae import WanTokenizer


@pytest.fixture
def tokenizer(small_config: WorldModelConfig) -> PatchTokenizer:
    torch.manual_seed(0)
    return PatchTokenizer(small_config.tokenizer, small_config.temporal_compression).requires_grad_(False)


def video(frames: int, batch: int = 2) -> torch.Tensor:
    return torch.rand(batch, 3, frames, 64, 64, generator=torch.Generator().manual_seed(frames)) * 2 - 1


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (5, 2), (13, 4)])
def test_one_frame_then_groups_of_four(tokenizer: PatchTokenizer, frames: int, latent_frames: int) -> None:
    latents = tokenizer.encode(video(frames))
    assert latents.shape == (2, 6, latent_frames, 8, 8)
    assert tokenizer.decode(latents).shape == (2, 3, frames, 64, 64)


def test_a_start_frame_encodes_alone_as_it_does_before_others(tokenizer: PatchTokenizer) -> None:
    whole = video(13)
    torch.testing.assert_close(tokenizer.encode(whole[:, :, :1])[:, :, 0], tokenizer.encode(whole)[:, :, 0])


def test_no_latent_frame_sees_later_frames(tokenizer: PatchTokenizer) -> None:
    whole = video(13)
    torch.testing.assert_close(tokenizer.encode(whole[:, :, :9]), tokenizer.encode(whole)[:, :, :3])


def test_what_a_chunk_adds_decodes_as_it_does_after_the_first_frame(tokenizer: PatchTokenizer) -> None:
    latents = tokenizer.encode(video(13))
    torch.testing.assert_close(tokenizer.decode_rest(latents), tokenizer.decode(latents)[:, :, 1:])


def test_frames_decode_in_the_order_they_were_encoded(shipped_model: WorldModel) -> None:
    """An agent that crosses the table at full speed is read off each decoded frame where it was."""
    start = pusher.PusherState(*(np.array([at], np.float32) for at in ((10, 16), (32, 50), (10, 50))))
    moves = np.tile(np.array([1, 0], np.float32), (1, 12, 1))
    frames = np.stack([pusher.render(state) for state in pusher.simulate(start, moves)], axis=1)
    read = pusher.read_agent(shipped_model.reconstruct(frames)[0])[:, 0]
    assert np.abs(read - (10 + pusher.MAX_SPEED * np.arange(13))).max() < pusher.MAX_SPEED / 2


def test_statistics_normalise_latents_per_channel(tokenizer: PatchTokenizer) -> None:
    raw = tokenizer.encode_raw(video(13, batch=8))
    tokenizer.update_statistics(raw, momentum=1.0)
    latents = tokenizer.encode(video(13, batch=8))
    torch.testing.assert_close(latents.mean((0, 2, 3, 4)), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3, 4)), torch.ones(6), atol=1e-3, rtol=0)


def test_the_tokenizer_is_the_one_that_the_configuration_names() -> None:
    with torch.device("meta"):
        assert isinstance(build_tokenizer(PRESETS["dreamdojo-2b"]), WanTokenizer)
        assert isinstance(build_tokenizer(PRESETS["tiny-pusher"]), PatchTokenizer)
