"""Rollouts as the published evaluation makes them: for comparing with published figures, and for nothing else.

It differs from `rollout.rollout` in three ways (NVIDIA/DreamDojo, cosmos_predict2/action_conditioned.py). Chunks after
the first keep the tokenizer's copy of their start frame and drop their last frame instead, so that from frame 13 on
frame k shows time k - 1. Pixels are truncated to whole levels, not rounded. A chunk's noise depends on nothing but the
index of its first action.

Shapes: T actions, A action_dim, F frames, H and W pixels.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from deployments.world_model.actions import FloatArray
from deployments.world_model.errors import InvalidInputError
from deployments.world_model.rollout import ChunkInput, Frame, Frames, WorldModel
from deployments.world_model.sampler import SamplerState


def upstream_rollout(
    model: WorldModel, start_frame: Frame, actions_TA: FloatArray, *, num_steps: int | None = None
) -> Frames:
    """T actions, whole chunks of them, to T + 1 frames, uint8 (T + 1, H, W, 3); the first is the tokenizer's copy.

    Raises:
        InvalidInputError: T is no multiple of the chunk size, or the frame or the actions do not fit the model.
    """
    size = model.config.chunk_size
    if len(actions_TA) % size or not len(actions_TA):
        raise InvalidInputError("actions", f"{len(actions_TA)} rows, must be a multiple of {size}")
    frame = start_frame
    videos: list[Frames] = []
    for first in range(0, len(actions_TA), size):
        video = _chunk(model, frame, actions_TA[first : first + size], first, num_steps)
        videos.append(video[:size] if videos else video)
        frame = video[-1]
    return np.concatenate(videos)


@torch.inference_mode()
def _chunk(model: WorldModel, frame: Frame, actions: FloatArray, first: int, num_steps: int | None) -> Frames:
    """All 1 + chunk_size frames of one chunk."""
    steps = model.config.default_num_steps if num_steps is None else num_steps
    (row,) = model.start([ChunkInput(frame, actions, seed=first, candidate=0, chunk=0, num_steps=steps, guidance=0.0)])
    noise = np.random.RandomState(first).standard_normal(model.config.latent_shape).astype(np.float32)
    row.state = SamplerState.start(torch.from_numpy(noise).to(model.device))
    while not row.done:
        model.step([row])
    latents_CTHW = torch.cat((row.condition_CHW[:, None], row.state.x[:, 1:]), dim=1)
    return to_uint8_truncated(model.tokenizer.decode(latents_CTHW[None])[0])


def to_uint8_truncated(video_3FHW: Tensor) -> Frames:
    """Floats in [-1, 1], clamped, to uint8 (F, H, W, 3)."""
    levels = ((video_3FHW.float() + 1) / 2).clamp(0, 1) * 255
    frames: Frames = levels.to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()
    return frames
