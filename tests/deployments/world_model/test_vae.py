"""What the Wan autoencoder promises besides agreeing with its oracle: causality, streams, batches, and its tensors."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deployments.world_model import PRESETS
from deployments.world_model.vae import Stream, WanTokenizer
from tests.support.weights import randomise

PUBLISHED = PRESETS["dreamdojo-2b"].tokenizer
TOLERANCE = 1e-4


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def tokenizer() -> WanTokenizer:
    tokenizer = WanTokenizer(replace(PUBLISHED, width=8))
    randomise(tokenizer)
    return tokenizer


def random_video(frames: int, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, frames, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def random_latents(frames: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 16, frames, 2, 3, generator=torch.Generator().manual_seed(2))


def assert_same(ours: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(ours, expected, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize(("frames", "latent_frames"), [(1, 1), (5, 2), (13, 4)])
def test_1_plus_4n_frames_become_1_plus_n_latents_and_come_back(
    tokenizer: WanTokenizer, frames: int, latent_frames: int
) -> None:
    latents = tokenizer.encode(random_video(frames))
    assert latents.shape == (1, 16, latent_frames, 2, 3)
    assert tokenizer.decode(latents).shape == (1, 3, frames, 16, 24)


@pytest.mark.parametrize("frames", [2, 4, 12])
def test_other_lengths_cannot_be_encoded(tokenizer: WanTokenizer, frames: int) -> None:
    with pytest.raises(ValueError, match=f"{frames} frames"):
        tokenizer.encode(random_video(frames))


def test_one_frame_encodes_to_the_first_latent_of_thirteen(tokenizer: WanTokenizer) -> None:
    video = random_video(13)
    assert_same(tokenizer.encode(video[:, :, :1]), tokenizer.encode(video)[:, :, :1])


def test_latents_do_not_depend_on_later_frames(tokenizer: WanTokenizer) -> None:
    video = random_video(13)
    changed = torch.cat((video[:, :, :9], -video[:, :, 9:]), dim=2)
    before, after = tokenizer.encode(video), tokenizer.encode(changed)
    assert_same(after[:, :, :3], before[:, :, :3])
    assert (after[:, :, 3] - before[:, :, 3]).abs().max() > 0.01


def test_pixels_do_not_depend_on_later_latents(tokenizer: WanTokenizer) -> None:
    latents = random_latents(4)
    assert_same(tokenizer.decode(latents[:, :, :2]), tokenizer.decode(latents)[:, :, :5])


@pytest.mark.parametrize("pieces", [[1, 1, 1, 1], [1, 3], [2, 2], [3, 1]], ids=str)
def test_decoding_in_pieces_equals_decoding_whole(tokenizer: WanTokenizer, pieces: list[int]) -> None:
    latents, stream = random_latents(4), Stream()
    whole = tokenizer.decode_next(latents, Stream())
    assert_same(torch.cat([tokenizer.decode_next(p, stream) for p in latents.split(pieces, dim=2)], dim=2), whole)
    assert_same(tokenizer.decode(latents), whole)
    assert_same(tokenizer.decode_rest(latents), whole[:, :, 1:])


@pytest.mark.parametrize("pieces", [[1, 4, 4, 4], [1, 12], [5, 8], [9, 4]], ids=str)
def test_encoding_in_pieces_equals_encoding_whole(tokenizer: WanTokenizer, pieces: list[int]) -> None:
    video, stream = random_video(13), Stream()
    whole = tokenizer.encode_next(video, Stream())
    assert_same(torch.cat([tokenizer.encode_next(p, stream) for p in video.split(pieces, dim=2)], dim=2), whole)
    assert_same(tokenizer.encode(video), whole)


def test_streams_side_by_side_do_not_disturb_each_other(tokenizer: WanTokenizer) -> None:
    first, second = random_latents(3), random_latents(3).flip(2)
    one, other = Stream(), Stream()
    pieces = [
        (tokenizer.decode_next(a, one), tokenizer.decode_next(b, other))
        for a, b in zip(first.split(1, dim=2), second.split(1, dim=2), strict=True)
    ]
    for latents, decoded in zip((first, second), zip(*pieces, strict=True), strict=True):
        assert_same(torch.cat(decoded, dim=2), tokenizer.decode(latents))


def test_the_first_latent_frame_decodes_to_one_frame_and_each_later_one_to_four(tokenizer: WanTokenizer) -> None:
    stream = Stream()
    assert [tokenizer.decode_next(random_latents(1), stream).shape[2] for _ in range(3)] == [1, 4, 4]


def test_a_batch_is_coded_as_each_alone(tokenizer: WanTokenizer) -> None:
    video, latents = random_video(5, batch=3), random_latents(2, batch=3)
    for row in range(3):
        assert_same(tokenizer.encode(video)[row], tokenizer.encode(video[row : row + 1])[0])
        assert_same(tokenizer.decode(latents)[row], tokenizer.decode(latents[row : row + 1])[0])


def test_in_bfloat16_latents_stay_float32_and_close(tokenizer: WanTokenizer) -> None:
    half = WanTokenizer(replace(PUBLISHED, width=8)).to(torch.bfloat16)
    half.load_state_dict(tokenizer.state_dict())
    video = random_video(5)
    latents, exact = half.encode(video.to(torch.bfloat16)), tokenizer.encode(video)
    assert latents.dtype == torch.float32
    assert (latents - exact).abs().mean() < 0.05 * exact.abs().mean()
    assert half.decode(exact).dtype == torch.bfloat16


@pytest.mark.parametrize("changes", [{"latent_channels": 8}, {"spatial_compression": 16}], ids=str)
def test_another_geometry_than_the_published_one_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="16 latent channels"):
        replace(PUBLISHED, **changes)
