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
from av.video.frame import PictureType
from av.video.reformatter import VideoReformatter

from deployments.messages import Frame

ENCODER_OPTIONS = {
    "preset": "veryfast",
    "tune": "zerolatency",
    "profile": "baseline",
    "threads": "1",
    "qp": "11",
    "g": "1000000",
    "sc_threshold": "0",
    "forced-idr": "1",
}
"""Baseline and zerolatency: no B-frames, so decode order is display order and chunks join. A constant quantiser (11 is
about 44 dB) and key frames only where they are asked for: nothing that is left depends on what was encoded before."""

MOV_FLAGS = "frag_custom+empty_moov+default_base_moof+skip_trailer"
"""Fragments that stand alone, and need no index at the end."""
UNITS_PER_FRAME = 1000
"""Of the time that fragments are counted in."""


class Encoder:
    """x264 for one chunk after the other; opening it takes as long as a dozen small frames (2 ms). Of one thread at a
    time.

    A chunk's bytes are the same whatever was encoded before it. x264 numbers key frames 0 and 1 in turn, and tells its
    version in the first; so before each chunk there is a key frame that nobody sees, which `turn` makes.
    """

    def __init__(self, resolution: tuple[int, int], fps: int) -> None:
        height, width = resolution
        codec = av.CodecContext.create("libx264", "w")
        assert isinstance(codec, av.VideoCodecContext)
        codec.width, codec.height = width, height
        codec.pix_fmt = "yuv420p"
        codec.time_base = Fraction(1, fps)
        codec.framerate = Fraction(fps)
        codec.options = ENCODER_OPTIONS
        codec.open()
        self._codec = codec
        self._to_yuv = VideoReformatter()
        self._num_frames = 0
        self._unseen = np.zeros((height, width, 3), np.uint8)
        self._has_turned = False
        self.turn()

    def encode(self, frames: Iterable[Frame]) -> bytes:
        """H.264 Annex B of `frames`, uint8 (H, W, 3) each: one key frame, then its differences."""
        self.turn()
        self._has_turned = False
        return b"".join(self._packet(pixels, is_key=index == 0) for index, pixels in enumerate(frames))

    def turn(self) -> None:
        """Be ready for the next chunk; `encode` does it if nobody did."""
        if not self._has_turned:
            self._packet(self._unseen, is_key=True)
            self._has_turned = True

    def _packet(self, pixels: Frame, is_key: bool) -> bytes:
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        frame = self._to_yuv.reformat(frame, format="yuv420p")
        frame.pts = self._num_frames
        frame.pict_type = PictureType.I if is_key else PictureType.NONE
        self._num_frames += 1
        (packet,) = self._codec.encode(frame)  # zerolatency: each frame is out before the next
        return bytes(packet)


class Encoders:
    """Of one resolution, for several threads: one that is taken is given back when its chunk is encoded."""

    def __init__(self, resolution: tuple[int, int], fps: int) -> None:
        self._resolution, self._fps = resolution, fps
        self._spare: deque[Encoder] = deque()
        """No more than there are threads."""

    def encode(self, frames: Iterable[Frame]) -> bytes:
        """As `Encoder.encode`. One that raises is not used again."""
        try:
            encoder = self._spare.pop()
        except IndexError:
            encoder = Encoder(self._resolution, self._fps)
        chunk = encoder.encode(frames)
        self._spare.append(encoder)
        return chunk

    def prepare(self) -> None:
        """Make the next chunk start sooner; for when nobody waits for this thread."""
        try:
            encoder = self._spare.pop()
        except IndexError:
            return
        encoder.turn()
        self._spare.append(encoder)


def join_chunks(chunks: Sequence[bytes], fps: int, num_frames: int) -> bytes:
    """One mp4 of consecutive chunks, each as `Encoder` made it.

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
    """One chunk, as `Encoder` made it, as the next piece of a fragmented mp4: what has been sent can be played.

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
