"""Frames to H.264 beside the model, and finished chunks to one mp4 without decoding them again.

Each chunk is encoded on its own, starting with a key frame, so chunks that were made on different replicas join by
concatenation. libx264 (GPL, inside the PyAV wheel) does the encoding.
"""

import io
from collections import deque
from collections.abc import Iterable, Sequence
from fractions import Fraction

import av
import numpy as np

from deployments.messages import Frame

ENCODER_OPTIONS = {"preset": "veryfast", "tune": "zerolatency", "crf": "12", "profile": "baseline", "threads": "1"}
"""Baseline and zerolatency: no B-frames, so decode order is display order and chunks join; crf 12 is about 42 dB."""

MOV_FLAGS = "frag_custom+empty_moov+default_base_moof+skip_trailer"
"""Fragments that stand alone, and need no index at the end."""
UNITS_PER_FRAME = 1000
"""Of the time that fragments are counted in."""


def open_encoder(resolution: tuple[int, int], fps: int) -> av.VideoCodecContext:
    height, width = resolution
    encoder = av.CodecContext.create("libx264", "w")
    assert isinstance(encoder, av.VideoCodecContext)
    encoder.width, encoder.height = width, height
    encoder.pix_fmt = "yuv420p"
    encoder.time_base = Fraction(1, fps)
    encoder.framerate = Fraction(fps)
    encoder.options = ENCODER_OPTIONS
    encoder.open()
    return encoder


class Encoders:
    """One encoder opened ahead, since opening takes as long as a dozen small frames (2 ms). For several threads.

    Each encodes one chunk: what it remembered of another would change the bytes."""

    def __init__(self, resolution: tuple[int, int], fps: int) -> None:
        self._resolution, self._fps = resolution, fps
        self._ready: deque[av.VideoCodecContext] = deque(maxlen=1)
        self._taken = False

    def take(self) -> av.VideoCodecContext:
        self._taken = True
        try:
            return self._ready.pop()
        except IndexError:
            return open_encoder(self._resolution, self._fps)

    def refill(self) -> None:
        """Open the next one, if one has been taken since."""
        if self._taken:
            self._taken = False
            self._ready.append(open_encoder(self._resolution, self._fps))


def encode_chunk(frames: Iterable[Frame], encoder: av.VideoCodecContext) -> bytes:
    """H.264 Annex B of `frames`, uint8 (H, W, 3) each: one key frame, then its differences. `encoder` is spent."""
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


def fragment(chunk: bytes, fps: int, first_frame: int, index: int) -> bytes:
    """One chunk, as `encode_chunk` made it, as the next piece of a fragmented mp4: what has been sent can be played.

    `first_frame` is the number of frames before it, `index` that of fragments; the first carries the file's header.
    """
    output = io.BytesIO()
    options = {
        "movflags": MOV_FLAGS,
        "fragment_index": str(index + 1),
        "video_track_timescale": str(fps * UNITS_PER_FRAME),
    }
    with (
        av.open(io.BytesIO(chunk), "r", format="h264") as source,
        av.open(output, "w", format="mp4", options=options) as target,
    ):
        stream_in = source.streams.video[0]
        stream_out = target.add_stream_from_template(stream_in)
        stream_out.time_base = Fraction(1, fps)
        packets = [packet for packet in source.demux(stream_in) if packet.size]
        for position, packet in enumerate(packets):
            packet.stream = stream_out
            packet.time_base = Fraction(1, fps)
            packet.pts = packet.dts = position
            packet.is_keyframe = position == 0
            packet.duration = 1
            target.mux(packet)
    whole = output.getvalue()
    if index == 0:
        return whole
    piece = bytearray(whole[_find_box(whole, b"moof") :])
    # The muxer counts from the start of its own output. A tfdt box is its size, its name, version 0 or 1, the time.
    time_at = piece.index(b"tfdt") + 8
    time_bytes = 8 if piece[time_at - 4] else 4
    piece[time_at : time_at + time_bytes] = (first_frame * UNITS_PER_FRAME).to_bytes(time_bytes, "big")
    return bytes(piece)


def _find_box(content: bytes, kind: bytes) -> int:
    """Where the first box of that kind begins, on the top level."""
    at = 0
    while content[at + 4 : at + 8] != kind:
        at += int.from_bytes(content[at : at + 4], "big")
    return at
