"""Rotary position embedding over time, height and width, with NTK-scaled frequencies.

Each head's features are split between the three axes (44/42/42 of 128, 12/10/10 of 32), and rotated in the half-split
layout: feature i pairs with feature i + D/2. Shapes: N tokens = T * H * W in that order, B batch, H heads, D features.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from deployments.world_model.config import DiTConfig


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """How many of a head's features encode time, height and width."""
    spatial = head_dim // 6 * 2
    return head_dim - 2 * spatial, spatial, spatial


@lru_cache(maxsize=32)
def rotary_tables(config: DiTConfig, grid: tuple[int, int, int], device: torch.device) -> tuple[Tensor, Tensor]:
    """(cos_N1D, sin_N1D) in float32 for a grid of (T, H, W) tokens."""
    ratios = (config.rope_ratio_t, config.rope_ratio_h, config.rope_ratio_w)
    # Cached tables may serve a training step later, so they are never inference tensors.
    with torch.inference_mode(False):
        angles = []
        for axis, (dim, ratio, length) in enumerate(zip(axis_dims(config.head_dim), ratios, grid, strict=True)):
            theta = config.rope_theta * ratio ** (dim / (dim - 2))
            frequency = theta ** (-torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim)
            angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequency)
            shape = [1, 1, 1, dim // 2]
            shape[axis] = length
            angles.append(angle.view(shape).expand(*grid, dim // 2))
        angles_ND = torch.cat(angles * 2, dim=-1).flatten(0, 2)
        return angles_ND.cos()[:, None], angles_ND.sin()[:, None]


def rotate(x_BNHD: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate queries or keys by their position, in float32, returned in the dtype they came in."""
    cos_N1D, sin_N1D = tables
    x = x_BNHD.float()
    first, second = x.chunk(2, dim=-1)
    return torch.addcmul(x * cos_N1D, torch.cat((-second, first), dim=-1), sin_N1D).to(x_BNHD.dtype)
