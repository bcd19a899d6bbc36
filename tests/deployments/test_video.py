import io

import av
import numpy as np
import pytest

from deployments.messages import Frame
from deployments.video import Encoder, Encoders, join_chunks
from tests.support.video import decode

FPS = 10


def moving_gradient(num_frames: int, height: int, width: int) -> list[Frame]:
    """Grey, since H.264's 4:2:0 halves the resolution of colour and that would be all a small picture measures."""
    across = 127 + 127 * np.sin(2 * np.pi * np.arange(width) / width)[None, :]
    down = 127 + 127 * np.sin(2 * np.pi * np.arange(height) / height)[:, None]
    grey = ((across + down) / 2).astype(np.uint8)
    picture = np.repeat(grey[:, :, None], 3, axis=2)
    return [np.roll(picture, index, axis=1) for index in range(num_frames)]


def encode(frames: list[Frame]) -> bytes:
    return Encoder((64, 64), FPS).encode(frames)


def psnr(one: list[Frame], other: list[Frame]) -> float:
    error = np.mean((np.stack(one).astype(float) - np.stack(other).astype(float)) ** 2)
    return float(10 * np.log10(255**2 / error))


@pytest.mark.parametrize("resolution", [(64, 64), (480, 640), (16, 16)])
def test_chunks_encoded_apart_join_into_one_video_of_all_frames_in_order(resolution: tuple[int, int]) -> None:
    frames = moving_gradient(49, *resolution)
    pieces = [frames[:13], frames[13:25], frames[25:37], frames[37:]]
    video = join_chunks([Encoder(resolution, FPS).encode(piece) for piece in pieces], FPS, 49)
    decoded = decode(video)
    assert len(decoded) == 49
    assert psnr(frames, decoded) > 35


def test_the_mp4_says_its_true_rate_and_length() -> None:
    frames = moving_gradient(49, 64, 64)
    video = join_chunks([encode(frames[:13]), encode(frames[13:])], FPS, 49)
    with av.open(io.BytesIO(video), "r") as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert "Baseline" in str(stream.codec_context.profile)
        assert stream.average_rate == FPS
        assert container.duration == 4_900_000
        stamps = [frame.time for frame in container.decode(stream)]
    assert np.allclose(stamps, np.arange(49) / FPS)


def test_the_same_frames_give_the_same_bytes() -> None:
    frames = moving_gradient(13, 64, 64)
    assert encode(frames) == encode(frames)


@pytest.mark.parametrize("resolution", [(64, 64), (144, 176)])
def test_what_was_encoded_before_changes_no_byte(resolution: tuple[int, int]) -> None:
    noise = np.random.default_rng(0)
    chunks = [moving_gradient(5, *resolution), list(noise.integers(0, 256, (6, *resolution, 3), np.uint8))]
    chunks += [[np.full((*resolution, 3), value, np.uint8) for value in (0, 255, 0)], moving_gradient(1, *resolution)]
    alone = [Encoder(resolution, FPS).encode(chunk) for chunk in chunks]
    encoders = Encoders(resolution, FPS)
    for index in noise.integers(0, len(chunks), 30):
        assert encoders.encode(chunks[index]) == alone[index]
        if noise.integers(2):
            encoders.prepare()


def test_a_chunk_has_one_key_frame_even_where_the_picture_changes_at_once() -> None:
    cut = [np.full((64, 64, 3), 20, np.uint8)] * 3 + moving_gradient(3, 64, 64)
    with av.open(io.BytesIO(join_chunks([encode(cut), encode(cut)], FPS, 12)), "r") as container:
        keys = [packet.is_keyframe for packet in container.demux(video=0) if packet.size]
    assert keys == [True, *[False] * 5] * 2


def test_an_encoder_that_raised_is_not_used_again() -> None:
    encoders, frames = Encoders((64, 64), FPS), moving_gradient(2, 64, 64)
    with pytest.raises(ValueError, match=r"shape|ndim|dimension"):
        encoders.encode([*frames, np.zeros((1, 2), np.uint8)])
    assert encoders.encode(frames) == encode(frames)


def test_a_clip_that_lost_a_frame_is_never_passed_off_as_whole() -> None:
    chunk = encode(moving_gradient(12, 64, 64))
    with pytest.raises(ValueError, match="hold 12 frames, not 13"):
        join_chunks([chunk], FPS, 13)
