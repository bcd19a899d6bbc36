"""The student behind the engine's interface: rows that give their frames one latent frame at a time.

A row is a chunk of a stream. It goes on from the keys and values of the latent frames before it, which a replica keeps
between the stream's chunks; where they are not, they are written again from the traces of those frames (their latents,
and the actions that led to them), which whoever streams keeps. A latent frame's keys and values depend on the WINDOW
before it, in each block on those of the block below: WINDOW x blocks traces give exactly what was lost.

A latent frame takes its denoising passes, is ready to be decoded, and takes one more pass that writes it to the cache.

Shapes: B rows, C latent channels, H and W pixels or the latent grid, A action features of one latent frame, n actions
of a chunk.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from deployments.world_model.actions import FloatArray, encode_actions
from deployments.world_model.causal import (
    SIGMAS,
    WINDOW,
    Cache,
    CausalWorldModel,
    KeysValues,
    frame_noise,
    predict_next,
)
from deployments.world_model.config import WorldModelConfig
from deployments.world_model.errors import ContextLost, InvalidInputError, WorldModelError
from deployments.world_model.latent_cache import LatentCache
from deployments.world_model.rollout import ChunkInput, Frame, Frames, WorldModel, check_chunk_input, from_uint8

MAX_CONTEXT_BYTES = 256 * 2**20


class Memory(Protocol):
    """What a stream's client keeps of it."""

    @property
    def position(self) -> int:
        """Latent frames generated since its start frame."""

    @property
    def traces(self) -> tuple[bytes, ...] | None:
        """Of the last of them; empty to begin anew from the start frame, None where the context should be cached."""


class StreamInput(Protocol):
    """One chunk to generate: a `ChunkInput`, of a stream."""

    start_frame: Frame
    actions: FloatArray
    seed: int
    candidate: int
    chunk: int
    num_steps: int
    guidance: float
    stream: str  # under which its context is kept; empty to keep none
    memory: Memory


@dataclass(frozen=True, eq=False)
class Part:
    """A latent frame that is ready to be decoded."""

    latents_CHW: Tensor
    num_frames: int  # of those it decodes to, the ones that were asked for
    traces: tuple[bytes, ...]  # it adds them to the stream's memory; none after a frame that was asked for in part
    keep_traces: int  # the last so many of which make the context again


@dataclass(frozen=True, eq=False)
class _Trace:
    latents_CHW: Tensor
    actions_A: Tensor | None  # None of a start frame

    def to_bytes(self) -> bytes:
        parts = [self.latents_CHW.flatten()] + ([] if self.actions_A is None else [self.actions_A])
        return torch.cat(parts).float().cpu().numpy().tobytes()

    @classmethod
    def from_bytes(cls, config: WorldModelConfig, content: bytes, device: torch.device) -> _Trace:
        channels, _, height, width = config.latent_shape
        values = np.frombuffer(content, np.float32)
        num_latents = channels * height * width
        if len(values) not in (num_latents, num_latents + config.grouped_action_dim):
            raise InvalidInputError("memory", f"has a trace of {len(values)} values, which this model did not make")
        tensor = torch.from_numpy(values.copy()).to(device)
        latents, actions = tensor[:num_latents], tensor[num_latents:]
        return cls(latents.view(channels, height, width), actions if len(actions) else None)


@dataclass(frozen=True)
class _Pass:
    """What one forward computes for a row."""

    x_CHW: Tensor
    sigma: float
    actions_A: Tensor | None


@dataclass(eq=False)
class StreamRow:
    """A chunk in progress. `StreamingWorldModel.step` moves it; nothing else changes it, but for `take`."""

    chunk_input: StreamInput
    config: WorldModelConfig
    actions_FA: Tensor  # encoded, one row per latent frame
    cache: Cache
    unwritten: deque[_Trace]
    position: int  # latent frames of the stream so far
    generated: int = 0  # of this chunk
    step: int = 0  # denoising passes of the frame being generated
    x_CHW: Tensor | None = None
    noise_CHW: Tensor | None = None
    untold: list[bytes] = field(default_factory=list)
    parts: deque[Part] = field(default_factory=deque)

    @property
    def done(self) -> bool:
        return self.generated == len(self.actions_FA) and not self.unwritten

    def take(self) -> Part | None:
        """The next latent frame that is ready to be decoded, once."""
        return self.parts.popleft() if self.parts else None

    def next_pass(self) -> _Pass:
        if self.unwritten:
            return _Pass(self.unwritten[0].latents_CHW, 0.0, self.unwritten[0].actions_A)
        assert self.x_CHW is not None
        return _Pass(self.x_CHW, SIGMAS[self.step], self.actions_FA[self.generated])

    def advance(self, clean_CHW: Tensor, written: tuple[KeysValues, ...]) -> None:
        """Take what the pass gave."""
        if self.unwritten:
            self.unwritten.popleft()
            self.cache = self.cache.followed_by(tuple((k.clone(), v.clone()) for k, v in written))
        else:
            self.step += 1
            if self.step == self.chunk_input.num_steps:
                self._generate(clean_CHW)
            else:  # noised again with the frame's own noise
                assert self.noise_CHW is not None
                sigma = SIGMAS[self.step]
                self.x_CHW = (1 - sigma) * clean_CHW + sigma * self.noise_CHW
        if self.x_CHW is None and not self.unwritten and not self.done:
            self._begin_frame()

    def _generate(self, clean_CHW: Tensor) -> None:
        size = self.config.temporal_compression
        num_frames = min(size, len(self.chunk_input.actions) - size * self.generated)
        trace = _Trace(clean_CHW.clone(), self.actions_FA[self.generated])
        self.x_CHW, self.step = None, 0
        self.generated += 1
        self.position += 1
        whole = num_frames == size
        if whole:
            self.unwritten.append(trace)
            self.untold.append(trace.to_bytes())
        keep = WINDOW * self.config.dit.num_blocks
        self.parts.append(Part(trace.latents_CHW, num_frames, tuple(self.untold) if whole else (), keep))
        self.untold.clear()

    def _begin_frame(self) -> None:
        given = self.chunk_input
        noise = frame_noise(self.config, given.seed, given.candidate, self.position + 1)
        self.x_CHW = self.noise_CHW = torch.from_numpy(noise).to(self.actions_FA.device)


class ContextCache:
    """Each stream's latest context; the least recently used go first once there are more than `max_bytes`."""

    def __init__(self, max_bytes: int = MAX_CONTEXT_BYTES) -> None:
        self.max_bytes = max_bytes
        self._contexts: OrderedDict[str, tuple[int, Cache]] = OrderedDict()
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        """Contexts that had to be written again, or were asked for in vain."""

    def get(self, stream: str, position: int) -> Cache | None:
        """What the latent frame after `position` sees, if that is what is kept of the stream."""
        kept = self._contexts.get(stream)
        if kept is None or kept[0] != position:
            self.misses += 1
            return None
        self.hits += 1
        self._contexts.move_to_end(stream)
        return kept[1]

    def put(self, stream: str, position: int, context: Cache) -> None:
        self._drop(stream)
        self._contexts[stream] = position, context
        self.num_bytes += context.num_bytes
        while self.num_bytes > self.max_bytes:
            self._drop(next(iter(self._contexts)))

    def _drop(self, stream: str) -> None:
        kept = self._contexts.pop(stream, None)
        if kept is not None:
            self.num_bytes -= kept[1].num_bytes


class StreamingWorldModel:
    """A student checkpoint that an engine drives. Between calls it keeps caches; rows hold all progress."""

    def __init__(self, model: CausalWorldModel) -> None:
        self.model, self.config = model, model.config
        self.latent_cache = LatentCache()
        self.context_cache = ContextCache()

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> StreamingWorldModel:
        """Raises CheckpointError, naming the tensor or file, unless the checkpoint fits exactly."""
        return cls(CausalWorldModel(WorldModel.load(directory, device)))

    @torch.inference_mode()
    def start(self, inputs: Sequence[StreamInput]) -> list[StreamRow]:
        """Rows ready to step.

        Raises InvalidInputError naming the field, and ContextLost where a context is not cached and its traces were
        not sent.
        """
        for each in inputs:
            check_stream_input(self.config, each)
        contexts = [self._context(each) for each in inputs]
        rows = []
        for each, (cache, unwritten, untold) in zip(inputs, contexts, strict=True):
            actions_FA = torch.from_numpy(encode_actions(self.config, _padded(self.config, each.actions)))
            actions_FA = actions_FA.to(self.model.device)
            row = StreamRow(each, self.config, actions_FA, cache, deque(unwritten), each.memory.position)
            row.untold += untold
            if not unwritten:
                row._begin_frame()
            rows.append(row)
        return rows

    def _context(self, given: StreamInput) -> tuple[Cache, list[_Trace], list[bytes]]:
        """What is cached, what is to be written after it, and which traces its client does not have yet."""
        memory = given.memory
        if memory.traces == ():
            (latents_CHW,) = self.latent_cache.get_or_encode([given.start_frame], self._encode, [given.chunk == 0])
            start = _Trace(latents_CHW, None)
            return Cache(), [start], [start.to_bytes()]
        cached = self.context_cache.get(given.stream, memory.position)
        if cached is not None:
            return cached, [], []
        if memory.traces is None:
            raise ContextLost(given.stream)
        traces = [_Trace.from_bytes(self.config, each, self.model.device) for each in memory.traces]
        return Cache(), traces, []

    @torch.inference_mode()
    def step(self, rows: Sequence[StreamRow]) -> None:
        """One pass of every row; those with equally many latent frames before them share a forward."""
        if any(row.done for row in rows):
            raise ValueError("a finished row cannot be stepped: leave it out of the batch")
        by_length: dict[int, list[StreamRow]] = {}
        for row in rows:
            by_length.setdefault(len(row.cache.frames), []).append(row)
        computed = [(group, *self._predict(group)) for group in by_length.values()]  # before any row is changed
        for group, clean_BCHW, written in computed:
            for index, row in enumerate(group):
                row.advance(clean_BCHW[index], tuple((k[index], v[index]) for k, v in written))
                if row.done and row.chunk_input.stream:
                    self.context_cache.put(row.chunk_input.stream, row.position, row.cache)

    def _predict(self, rows: Sequence[StreamRow]) -> tuple[Tensor, tuple[KeysValues, ...]]:
        passes = [row.next_pass() for row in rows]
        x_BCHW = torch.stack([each.x_CHW for each in passes])
        nothing = x_BCHW.new_zeros(self.config.grouped_action_dim)
        return predict_next(
            self.config,
            self.model.dit,
            self.model.context,
            _batched([row.cache for row in rows]),
            x_BCHW,
            x_BCHW.new_tensor([each.sigma for each in passes]),
            torch.stack([nothing if each.actions_A is None else each.actions_A for each in passes]),
            x_BCHW.new_tensor([float(each.actions_A is not None) for each in passes]),
        )

    @torch.inference_mode()
    def finish(self, parts: Sequence[Part]) -> list[Frames]:
        """The frames of each, uint8 (num_frames, H, W, 3).

        Raises WorldModelError, for all of them, where one's latents are not finite: no frame is made of NaN.
        """
        latents_BCHW = torch.stack([part.latents_CHW for part in parts])
        if not torch.isfinite(latents_BCHW).all():
            raise WorldModelError(f"of {len(parts)} latent frames not all are finite")
        videos = self.model.decoded(latents_BCHW)
        return [video[: part.num_frames] for video, part in zip(videos, parts, strict=True)]

    @torch.inference_mode()
    def latents(self, frames: Frames) -> FloatArray:
        """Each of (F, H, W, 3) as the tokenizer sees it alone: float32 (F, C, H, W)."""
        latents: FloatArray = torch.stack(self._encode(list(frames))).cpu().numpy()
        return latents

    def _encode(self, frames: list[Frame]) -> list[Tensor]:
        video_B31HW = from_uint8(np.stack(frames)[:, None], self.model.device, torch.float32)
        return list(self.model.tokenizer.encode(video_B31HW)[:, :, 0])


def check_stream_input(config: WorldModelConfig, given: StreamInput) -> None:
    check_chunk_input(
        config,
        ChunkInput(
            given.start_frame,
            given.actions,
            given.seed,
            given.candidate,
            given.chunk,
            given.num_steps,
            given.guidance,
        ),
    )
    if given.num_steps > len(SIGMAS):
        raise InvalidInputError("num_steps", f"{given.num_steps} is outside 1..{len(SIGMAS)}")
    if given.guidance:
        raise InvalidInputError("guidance", f"{given.guidance:g} must be 0: the student has none")
    if not 0 <= given.memory.position < 2**32 - config.chunk_size:
        raise InvalidInputError("memory", f"position {given.memory.position} is outside 0..2**32")


def _padded(config: WorldModelConfig, actions_nA: FloatArray) -> FloatArray:
    """Whole latent frames: the last action is repeated."""
    return np.pad(actions_nA, ((0, -len(actions_nA) % config.temporal_compression), (0, 0)), mode="edge")


def _batched(caches: Sequence[Cache]) -> Cache:
    """Rows' own caches, whose tensors are (S, h, d), as one of (B, S, h, d)."""

    def stacked(tensors: Iterable[Tensor]) -> Tensor:
        each = list(tensors)
        return each[0][None] if len(each) == 1 else torch.stack(each)

    frames = []
    for rows in zip(*(cache.frames for cache in caches), strict=True):
        blocks = zip(*rows, strict=True)
        frames.append(
            tuple((stacked(k for k, _ in block), stacked(v for _, v in block)) for block in map(list, blocks))
        )
    return Cache(tuple(frames))
