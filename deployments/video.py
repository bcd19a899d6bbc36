"""Frames to H.264 beside the model, and finished chunks to one mp4 without decoding them again.

Each chunk is encoded on its own, starting with a key frame, so chunks that were made on different replicas join by
concatenation. libx264 (GPL, inside the PyAV wheel) does the encoding.
"""

import io
from collections.abc import Iterable, Sequence
from fractions import Fraction

import av
import numpy as np

from deployments.messages import Frame

ENCODER_OPTIONS = {"preset": "veryfast", "tune": "zerolatency", "crf": "12", "profile": "baseline", "threads": "1"}
"""Baseline and zerolatency: no B-frames, so decode order is display order and chunks join; crf 12 is about 42 dB."""


def encode_chunk(frames: Iterable[Frame], resolution: tuple[int, int], fps: int) -> bytes:
    """H.264 Annex B of `frames`, uint8 (H, W, 3) each: one key frame, then its differences."""
    height, width = resolution
    encoder = av.CodecContext.create("libx264", "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.width, encoder.height = width, height
    encoder.pix_fmt = "yuv420p"
    encoder.time_base = Fraction(1, fps)
    encoder.framerate = Fraction(fps)
    encoder.options = ENCODER_OPTIONS
    packets: list[bytes] = []
    for index, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame.pts = index
        packets += (bytes(packet) for packet in encoder.encode(frame))
    packets += (bytes(packet) for packet in encoder.encode(None))
    return b"".join(packets)


def join_chunks(chunks: Sequence[bytes], fps: int, num_frames: int) -> bytes:
    """One mp4 of consecutive chunks, each as `encode_chunk` made it.

    Raises:
        ValueError: they do not hold exactly `num_frames` frames.
    """
    muxed = 0
    output = io.BytesIO()
    with (
        av.open(io.BytesIO(b"".join(chunks)), "r", format="h264") as source,
        av.open(output, "w", format="mp4") as target,
    ):
        stream_in = source.streams.video[0]
        stream_out = target.add_stream_from_template(stream_in)
        stream_out.time_base = Fraction(1, fps)
        for index, packet in enumerate(packet for packet in source.demux(stream_in) if packet.size):
            packet.stream = stream_out
            packet.time_base = Fraction(1, fps)
            packet.pts = packet.dts = index
            packet.duration = 1
            target.mux(packet)
            muxed += 1
    if muxed != num_frames:
        raise ValueError(f"the chunks hold {muxed} frames, not {num_frames}")
    return output.getvalue()
