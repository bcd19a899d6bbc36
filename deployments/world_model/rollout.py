"""The engine: chunks in, frames out, one batched forward at a time.

A chunk is one start frame and up to `chunk_size` actions; a rollout is a loop over chunks, each starting from the last
frame of the one before. A caller that schedules drives `start`, `step` and `finish` itself, and may step rows together
that are at different denoising steps; a caller that does not uses `generate` or `rollout`.

A row's result depends on its ChunkInput alone. The rows it shares a forward with change only the order of float32 sums,
by at most 1 of 255 levels in a decoded frame; the same batch gives the same bytes.

Shapes: B rows, C latent channels, T latent frames, H and W pixels or the latent grid, F frames, n actions of a chunk,
A action_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from deployments.world_model.actions import FloatArray, check_actions, encode_actions, pad_to_chunk, split_chunks
from deployments.world_model.attention import attention_backend
from deployments.world_model.checkpoint import CONTEXT, read_checkpoint
from deployments.world_model.config import MAX_GUIDANCE, MAX_NUM_STEPS, WorldModelConfig
from deployments.world_model.denoiser import predict_guided
from deployments.world_model.dit import DiT
from deployments.world_model.errors import InvalidInputError, WorldModelError
from deployments.world_model.latent_cache import LatentCache
from deployments.world_model.sampler import SamplerState, advance, sigma
from deployments.world_model.tokenizer import Tokenizer, build_tokenizer

Frame = npt.NDArray[np.uint8]  # (H, W, 3)
Frames = npt.NDArray[np.uint8]  # (F, H, W, 3)


@dataclass(frozen=True, eq=False)
class ChunkInput:
    """One chunk to generate."""

    start_frame: Frame  # uint8 (H, W, 3) at the model's resolution
    actions: FloatArray  # (n, A), 1 <= n <= chunk_size; shorter is padded with its last action and trimmed
    seed: int  # the rollout's, 0 <= seed < 2**63
    candidate: int  # index within its batch: part of the noise key
    chunk: int  # index within the rollout: part of the noise key
    num_steps: int  # denoising steps, 1..MAX_NUM_STEPS
    guidance: float  # classifier-free guidance; 0.0 skips the unconditional pass


@dataclass(eq=False)
class Row:
    """A chunk in progress. `WorldModel.step` moves it; nothing else changes it."""

    chunk_input: ChunkInput
    condition_CHW: Tensor  # latents of the start frame
    actions_FA: Tensor  # encoded, one row per generated latent frame
    state: SamplerState
    step: int = 0

    @property
    def done(self) -> bool:
        return self.step == self.chunk_input.num_steps


class WorldModel:
    """A tokenizer and a denoiser on one device. Stateless between calls but for a cache: rows hold all progress."""

    def __init__(
        self,
        config: WorldModelConfig,
        dit: DiT,
        tokenizer: Tokenizer,
        device: str = "cpu",
        context_LE: Tensor | None = None,
    ) -> None:
        """`context_LE`: the constant prompt, projected; None for a text of zeros."""
        self.config = config
        self.device = torch.device(device)
        self.dit = dit
        self.tokenizer = tokenizer
        self.latent_cache = LatentCache()
        weight = dit.final_layer.linear.weight
        with torch.inference_mode():
            if context_LE is None:
                context_LE = dit.crossattn_proj(torch.zeros(1, config.dit.text_dim).to(weight.device, weight.dtype))
            if (context_LE == context_LE[0]).all():
                context_LE = context_LE[:1]  # equal tokens attend as one
            self.context = dit.projected_context(context_LE.to(weight.device, weight.dtype))

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> WorldModel:
        """Raises CheckpointError, naming the tensor or file, unless the checkpoint fits exactly."""
        config, tensors = read_checkpoint(directory)
        dtype = torch.float32 if torch.device(device).type == "cpu" else getattr(torch, config.dtype)
        with torch.device("meta"):
            dit, tokenizer = DiT(config.dit, config.grouped_action_dim), build_tokenizer(config)
        for prefix, module in (("net.", dit), ("tokenizer.", tokenizer)):
            own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
            module.load_state_dict({name: tensor.to(device, dtype) for name, tensor in own.items()}, assign=True)
            module.eval().requires_grad_(False)
        return cls(config, dit, tokenizer, device, context_LE=tensors.get(CONTEXT))

    @property
    def attention(self) -> str:
        """The kernel that this model's attention runs on: `xformers` or `sdpa`."""
        return attention_backend(self.device, self.dit.final_layer.linear.weight.dtype, self.config.dit.head_dim)

    @torch.inference_mode()
    def start(self, inputs: Sequence[ChunkInput]) -> list[Row]:
        """Rows ready to step. Each distinct start frame is encoded once, and a rollout's first one is remembered.

        Raises InvalidInputError naming the field.
        """
        for chunk_input in inputs:
            check_chunk_input(self.config, chunk_input)
        conditions = self.latent_cache.get_or_encode(
            [chunk_input.start_frame for chunk_input in inputs],
            self._encode,
            keep=[chunk_input.chunk == 0 for chunk_input in inputs],  # later chunks start where nobody was before
        )
        return [
            Row(
                chunk_input,
                condition_CHW=condition_CHW,
                actions_FA=self._actions(chunk_input.actions),
                state=SamplerState.start(torch.from_numpy(noise(self.config, chunk_input)).to(self.device)),
            )
            for chunk_input, condition_CHW in zip(inputs, conditions, strict=True)
        ]

    @torch.inference_mode()
    def step(self, rows: Sequence[Row]) -> None:
        """One denoising step of every row, in one forward."""
        if not rows:
            return
        if any(row.done for row in rows):
            raise ValueError("a finished row cannot be stepped: leave it out of the batch")
        steps = [(row.step, row.chunk_input.num_steps) for row in rows]
        state = SamplerState.stack([row.state for row in rows])
        clean_BCTHW = predict_guided(
            self.config,
            self.dit,
            self.context,
            state.x,
            torch.tensor([sigma(self.config.sampler, *step) for step in steps], device=self.device),
            torch.stack([row.condition_CHW for row in rows]),
            torch.stack([row.actions_FA for row in rows]),
            [row.chunk_input.guidance for row in rows],
        )
        moved = advance(self.config.sampler, state, clean_BCTHW, steps).unstack()
        for row, row_state in zip(rows, moved, strict=True):
            row.state = row_state
            row.step += 1

    @torch.inference_mode()
    def finish(self, rows: Sequence[Row]) -> list[Frames]:
        """The n frames after each row's start frame, uint8 (n, H, W, 3).

        Raises WorldModelError, for the whole batch, where a row's latents are not finite: no frame is made of NaN.
        """
        if not rows:
            return []
        if not all(row.done for row in rows):
            raise ValueError("a row with steps left cannot be finished")
        latents_BCTHW = torch.stack(
            [torch.cat((row.condition_CHW[:, None], row.state.x[:, 1:]), dim=1) for row in rows]
        )
        finite = torch.isfinite(latents_BCTHW).flatten(1).all(dim=1).tolist()
        if not all(finite):
            raise WorldModelError(f"row {finite.index(False)} of {len(rows)} ended in latents that are not finite")
        videos = self.tokenizer.decode_rest(latents_BCTHW)  # the caller has the start frame
        # Row by row: what it takes then stays in a CPU's cache.
        return [to_uint8(video)[: len(row.chunk_input.actions)] for video, row in zip(videos, rows, strict=True)]

    def generate(self, inputs: Sequence[ChunkInput]) -> list[Frames]:
        """Start, step until all are done, finish."""
        rows = self.start(inputs)
        while running := [row for row in rows if not row.done]:
            self.step(running)
        return self.finish(rows)

    @torch.inference_mode()
    def reconstruct(self, videos: Frames) -> Frames:
        """Videos (B, 1 + 4n, H, W, 3) through the tokenizer and back: the best that any rollout could look."""
        return np.stack(
            [
                to_uint8(
                    self.tokenizer.decode(self.tokenizer.encode(from_uint8(video[None], self.device, self._dtype)))
                )[0]
                for video in videos
            ]
        )

    @torch.inference_mode()
    def latents(self, frames: Frames) -> FloatArray:
        """Each of (F, H, W, 3) as the tokenizer sees it alone: float32 (F, C, H, W)."""
        latents: FloatArray = torch.stack(self._encode(list(frames))).cpu().numpy()
        return latents

    def _encode(self, frames: list[Frame]) -> list[Tensor]:
        latents_BC1HW = self.tokenizer.encode(from_uint8(np.stack(frames)[:, None], self.device, self._dtype))
        return list(latents_BC1HW[:, :, 0].float())

    def _actions(self, actions_nA: FloatArray) -> Tensor:
        return torch.from_numpy(encode_actions(self.config, pad_to_chunk(self.config, actions_nA))).to(self.device)

    @property
    def _dtype(self) -> torch.dtype:
        return self.dit.final_layer.linear.weight.dtype


def rollout(
    model: WorldModel,
    start_frame: Frame,
    actions_TA: FloatArray,
    seed: int,
    *,
    candidate: int = 0,
    num_steps: int | None = None,
    guidance: float | None = None,
) -> Frames:
    """T actions to T + 1 frames, uint8 (T + 1, H, W, 3), the first being the start frame."""
    return rollouts(model, [start_frame], [actions_TA], [seed], [candidate], num_steps=num_steps, guidance=guidance)[0]


def rollouts(
    model: WorldModel,
    start_frames: Sequence[Frame],
    actions: Sequence[FloatArray],
    seeds: Sequence[int],
    candidates: Sequence[int],
    *,
    num_steps: int | None = None,
    guidance: float | None = None,
) -> list[Frames]:
    """As `rollout`, for several of the same number of actions side by side, batched chunk by chunk."""
    config = model.config
    videos = [[frame[None]] for frame in start_frames]
    chunks = [split_chunks(config, actions_TA) for actions_TA in actions]
    for index, chunk_actions in enumerate(zip(*chunks, strict=True)):
        inputs = [
            ChunkInput(
                video[-1][-1],
                own_actions,
                seed,
                candidate,
                index,
                config.default_num_steps if num_steps is None else num_steps,
                config.default_guidance if guidance is None else guidance,
            )
            for video, own_actions, seed, candidate in zip(videos, chunk_actions, seeds, candidates, strict=True)
        ]
        for video, frames in zip(videos, model.generate(inputs), strict=True):
            video.append(frames)
    return [np.concatenate(video) for video in videos]


def noise(config: WorldModelConfig, chunk_input: ChunkInput) -> FloatArray:
    """The chunk's initial noise (C, T, H, W): a function of (seed, candidate, chunk), the same on every machine.

    RandomState, because NumPy promises that its stream never changes; the key is four words, so no two keys collide.
    """
    seed = chunk_input.seed
    key = [seed & 0xFFFFFFFF, seed >> 32, chunk_input.candidate, chunk_input.chunk]
    return np.random.RandomState(key).standard_normal(config.latent_shape).astype(np.float32)


def check_chunk_input(config: WorldModelConfig, chunk_input: ChunkInput) -> None:
    frame, shape = chunk_input.start_frame, (*config.resolution, 3)
    if frame.dtype != np.uint8 or frame.shape != shape:
        raise InvalidInputError("start_frame", f"is {frame.dtype} {frame.shape}, must be uint8 {shape}")
    check_actions(config, chunk_input.actions, max_actions=config.chunk_size)
    if not 0 <= chunk_input.seed < 2**63:
        raise InvalidInputError("seed", f"{chunk_input.seed} is outside 0..2**63-1")
    for field in ("candidate", "chunk"):
        if not 0 <= getattr(chunk_input, field) < 2**32:
            raise InvalidInputError(field, f"{getattr(chunk_input, field)} is outside 0..2**32-1")
    if not 1 <= chunk_input.num_steps <= MAX_NUM_STEPS:
        raise InvalidInputError("num_steps", f"{chunk_input.num_steps} is outside 1..{MAX_NUM_STEPS}")
    if not 0 <= chunk_input.guidance <= MAX_GUIDANCE:  # false for NaN too
        raise InvalidInputError("guidance", f"{chunk_input.guidance} is outside 0..{MAX_GUIDANCE:g}")


def from_uint8(frames_BFHWC: Frames, device: torch.device, dtype: torch.dtype) -> Tensor:
    """uint8 (B, F, H, W, 3) to floats in [-1, 1], (B, 3, F, H, W)."""
    return torch.from_numpy(frames_BFHWC).to(device).permute(0, 4, 1, 2, 3).to(dtype) / 127.5 - 1


def to_uint8(video_3FHW: Tensor) -> Frames:
    """Floats in [-1, 1] (..., 3, F, H, W), clamped, to uint8 (..., F, H, W, 3)."""
    levels = video_3FHW.float().clamp(-1, 1).add_(1).mul_(127.5).round_()
    frames: Frames = levels.to(torch.uint8).movedim(-4, -1).cpu().numpy()
    return frames
