"""Video to latents and back: the protocol that the engine relies on, and the small tokenizer of the toy world.

A tokenizer is causal: the first pixel frame becomes the first latent frame alone, and each further group of
`temporal_compression` frames one more. So a start frame can be encoded without the frames that follow it.

Shapes: B batch, F pixel frames (1 + 4n), H and W pixels, Z latent channels, T latent frames (1 + n), h and w the latent
grid. Pixels are floats in [-1, 1]; latents have mean 0 and variance 1 per channel over the training data.
"""

from __future__ import annotations

from typing import Protocol, assert_never

import torch
from torch import Tensor, nn
from torch.nn import functional

from deployments.world_model.config import TokenizerConfig, WorldModelConfig
from deployments.world_model.vae import WanTokenizer

STATISTICS_MOMENTUM = 0.02  # of the running latent mean and variance, per training batch


class Tokenizer(Protocol):
    def encode(self, video_B3FHW: Tensor) -> Tensor:
        """Normalised latents (B, Z, T, h, w)."""

    def decode(self, latents_BZThw: Tensor) -> Tensor:
        """Pixels (B, 3, F, H, W), not clamped."""

    def decode_rest(self, latents_BZThw: Tensor) -> Tensor:
        """As `decode`, without the first frame: (B, 3, F - 1, H, W). What a chunk adds to its start frame."""


def build_tokenizer(config: WorldModelConfig) -> PatchTokenizer | WanTokenizer:
    """The tokenizer that the configuration names, randomly initialised."""
    match config.tokenizer.kind:
        case "patch":
            return PatchTokenizer(config.tokenizer, config.temporal_compression)
        case "wan":
            return WanTokenizer(config.tokenizer)
        case unknown:
            assert_never(unknown)


class PatchTokenizer(nn.Module):
    """2-D convolutions on the latent grid, between linear maps from and to pixel patches.

    Each latent frame is coded by itself: a group of four frames is stacked into the features of one patch grid. On a
    CPU this is many times cheaper than causal 3-D convolutions at pixel resolution, and enough for flat shapes.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: TokenizerConfig, temporal_compression: int) -> None:
        super().__init__()
        self.patch = config.spatial_compression
        self.group = temporal_compression
        patch_features, width = 3 * self.patch**2, config.width
        self.first_in = nn.Linear(patch_features, width)
        self.group_in = nn.Linear(patch_features * self.group, width)
        self.encoder = nn.Sequential(*(ResidualBlock(width) for _ in range(config.num_blocks)))
        self.to_latents = nn.Conv2d(width, config.latent_channels, 1)
        self.from_latents = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.decoder = nn.Sequential(*(ResidualBlock(width) for _ in range(config.num_blocks)))
        self.first_out = nn.Linear(width, patch_features)
        self.group_out = nn.Linear(width, patch_features * self.group)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    def encode(self, video_B3FHW: Tensor) -> Tensor:
        latents_BZThw = self.encode_raw(video_B3FHW)
        return (latents_BZThw - _per_channel(self.latent_mean)) / _per_channel(self.latent_std)

    def encode_raw(self, video_B3FHW: Tensor) -> Tensor:
        """Latents before normalisation, whose statistics training collects with `update_statistics`."""
        batch = len(video_B3FHW)
        grid_BThwD = self.first_in(self._patches(video_B3FHW[:, :, :1], 1))
        if video_B3FHW.shape[2] > 1:
            rest_BThwD = self.group_in(self._patches(video_B3FHW[:, :, 1:], self.group))
            grid_BThwD = torch.cat((grid_BThwD, rest_BThwD), dim=1)
        # Channels stay last in memory, which is what both the linear maps and the convolutions like best.
        latents: Tensor = self.to_latents(self.encoder(grid_BThwD.flatten(0, 1).permute(0, 3, 1, 2)))
        return latents.view(batch, -1, *latents.shape[1:]).transpose(1, 2)

    def decode(self, latents_BZThw: Tensor) -> Tensor:
        grid_BThwD = self._decoded_grid(latents_BZThw)
        first = self._pixels(self.first_out(grid_BThwD[:, :1]), 1)
        if latents_BZThw.shape[2] == 1:
            return first
        return torch.cat((first, self._pixels(self.group_out(grid_BThwD[:, 1:]), self.group)), dim=2)

    def decode_rest(self, latents_BZThw: Tensor) -> Tensor:
        return self._pixels(self.group_out(self._decoded_grid(latents_BZThw[:, :, 1:])), self.group)

    def _decoded_grid(self, latents_BZThw: Tensor) -> Tensor:
        """(B, T, h, w, D), each latent frame by itself."""
        batch, _, frames = latents_BZThw.shape[:3]
        latents = latents_BZThw.transpose(1, 2).flatten(0, 1).contiguous(memory_format=torch.channels_last)
        grid: Tensor = self.decoder(self.from_latents(latents)).permute(0, 2, 3, 1)
        return grid.reshape(batch, frames, *grid.shape[1:])

    def _patches(self, video_B3FHW: Tensor, group: int) -> Tensor:
        """(B, T, h, w, group * p * p * 3), with `group` frames to a latent frame."""
        batch, _, frames, height, width = video_B3FHW.shape
        p = self.patch
        pixels_BFHW3 = video_B3FHW.permute(0, 2, 3, 4, 1)
        split = pixels_BFHW3.reshape(batch, frames // group, group, height // p, p, width // p, p, 3)
        return split.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)

    def _pixels(self, patches_BThwP: Tensor, group: int) -> Tensor:
        """(B, 3, F, H, W), undoing `_patches`."""
        batch, frames, height, width, _ = patches_BThwP.shape
        p = self.patch
        split = patches_BThwP.view(batch, frames, height, width, group, p, p, 3)
        pixels_BFHW3 = split.permute(0, 1, 4, 2, 5, 3, 6, 7).reshape(batch, frames * group, height * p, width * p, 3)
        return pixels_BFHW3.permute(0, 4, 1, 2, 3)

    @torch.no_grad()
    def update_statistics(self, raw_BZThw: Tensor, momentum: float = STATISTICS_MOMENTUM) -> None:
        """Move the running mean and standard deviation towards those of a training batch."""
        self.latent_mean.lerp_(raw_BZThw.float().mean((0, 2, 3, 4)), momentum)
        self.latent_std.lerp_(raw_BZThw.float().std((0, 2, 3, 4)).clamp_min(1e-4), momentum)


class ResidualBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.conv_1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_2 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.conv_2(functional.silu(self.conv_1(functional.silu(self.norm(x)))))
        return out


def _per_channel(values_Z: Tensor) -> Tensor:
    return values_Z[:, None, None, None]
