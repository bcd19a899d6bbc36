"""What a replica makes of a finished chunk, beside the model: video or pictures of its frames, and how good they are.

Raw pixels leave a replica only when they are what was asked for.
"""

import io
from typing import Any, Protocol, assert_never

import numpy as np
from PIL import Image

from deployments.messages import ChunkDone, ChunkRow, Closeness, Frame, Frames, Metric
from deployments.video import Encoders, join_chunks

MAX_PICTURE_BYTES = 700_000
"""A PNG that is larger travels as JPEG: in base64 it would be more than the 1 MiB that clients take in one message."""
PNG_LEVEL = 1
"""zlib's fastest: a noisy 480x640 frame takes a fifth of the default's time, and a few percent more bytes."""
JPEG_QUALITY = 95


class FrameDistance(Protocol):
    """A learned metric: the mean distance of frames (F, H, W, 3) from a reference of the same shape."""

    def __call__(self, frames: Frames, reference: Frames) -> float: ...


class Presenter:
    """Turns a row and its frames into what the row asked for. Called from several threads at once.

    `model` is asked for `latents` where a goal is measured in its tokenizer's space; `lpips` is None where its weights
    are not installed.
    """

    def __init__(self, model: Any, resolution: tuple[int, int], fps: int, lpips: FrameDistance | None = None) -> None:
        self._model = model
        self._fps = fps
        self._encoders = Encoders(resolution, fps)
        self._lpips = lpips

    def present(
        self, row: ChunkRow, frames: Frames, traces: tuple[tuple[bytes, ...], ...] = (), keep_traces: int = 0
    ) -> ChunkDone:
        """`frames` uint8 (n, H, W, 3), those after the row's start frame; `traces` as in `ChunkDone`."""
        shown = [] if row.form == "none" else [row.start_frame, *frames] if row.chunk == 0 else list(frames)
        video, pictures, raw = b"", tuple[bytes, ...](), None
        match row.form:
            case "h264":
                video = self._encoders.encode(shown)
            case "mp4":
                video = join_chunks([self._encoders.encode(shown)], self._fps, len(shown))
            case "png":
                pictures = tuple(png(frame) for frame in shown)
            case "jpeg":
                pictures = tuple(jpeg(frame) for frame in shown)
            case "raw":
                raw = np.array(frames)
            case "none":
                pass
            case _:
                assert_never(row.form)
        # What came from another process is read-only, which torch does not take.
        return ChunkDone(
            video=video,
            last_frame=np.array(frames[-1]),
            pictures=pictures,
            frames=raw,
            distance=None
            if row.goal is None
            else self._distance(frames[-1], np.array(row.goal.frame), row.goal.metric),
            closeness=None if row.reference is None else self._closeness(frames, np.array(row.reference)),
            traces=traces,
            keep_traces=keep_traces,
        )

    def present_piece(self, row: ChunkRow, frames: Frames, index: int) -> tuple[bytes, tuple[bytes, ...]]:
        """Video or pictures of the chunk's piece of that number; the video begins with a key frame of its own."""
        shown = [row.start_frame, *frames] if row.chunk == 0 and index == 0 else list(frames)
        match row.form:
            case "h264":
                return self._encoders.encode(shown), ()
            case "png":
                return b"", tuple(png(frame) for frame in shown)
            case "jpeg":
                return b"", tuple(jpeg(frame) for frame in shown)
            case "mp4" | "raw" | "none":
                raise ValueError(f"{row.form} is not made in pieces")
            case _:
                assert_never(row.form)

    def prepare(self) -> None:
        """Make the next chunk's video start sooner; for when nobody waits for this thread."""
        self._encoders.prepare()

    def _distance(self, frame: Frame, goal: Frame, metric: Metric) -> float:
        match metric:
            case "mse" | "psnr":
                return _mse(frame, goal)
            case "ssim":
                from deployments.world_model.metrics import ssim

                return 1 - ssim(frame, goal)
            case "lpips":
                if self._lpips is None:
                    raise ValueError("LPIPS is not installed on this replica")
                return self._lpips(frame[None], goal[None])
            case "latent":
                ours, theirs = self._model.latents(np.stack([frame, goal]))
                return float(np.mean((ours - theirs) ** 2))
            case _:
                assert_never(metric)

    def _closeness(self, frames: Frames, reference: Frames) -> Closeness:
        from deployments.world_model.metrics import ssim

        lpips = None if self._lpips is None else self._lpips(frames, reference)
        return Closeness(_mse(frames, reference), ssim(frames, reference), lpips)


def png(frame: Frame) -> bytes:
    """`frame` as PNG, or as JPEG where that would be too large for one message."""
    exact = exact_png(frame)
    return exact if len(exact) <= MAX_PICTURE_BYTES else jpeg(frame)


def exact_png(frame: Frame) -> bytes:
    return _encode(frame, "PNG", compress_level=PNG_LEVEL)


def jpeg(frame: Frame) -> bytes:
    return _encode(frame, "JPEG", quality=JPEG_QUALITY)


def _encode(frame: Frame, kind: str, **options: Any) -> bytes:
    output = io.BytesIO()
    Image.fromarray(frame).save(output, kind, **options)
    return output.getvalue()


def _mse(frames: Frames, reference: Frames) -> float:
    """Of values in [0, 1]."""
    difference = frames.astype(np.float32) - reference.astype(np.float32)
    return float(np.mean(np.square(difference), dtype=np.float64) / 255.0**2)
