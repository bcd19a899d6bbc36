"""Video to latents and back: the protocol that the engine relies on, and the small tokenizer of the toy world.

A tokenizer is causal: the first pixel frame becomes the first latent frame alone, and each further group of
`temporal_compression` frames one more. So a start frame can be encoded without the frames that follow it.

Shapes: B batch, F pixel frames (1 + 4n), H and W pixels, Z latent channels, T latent frames (1 + n), h and w the latent
grid. Pixels are floats in [-1, 1]; latents have mean 0 and variance 1 per channel over the training data.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from deployments.world_model.config import TokenizerConfig, WorldModelConfig

STATISTICS_MOMENTUM = 0.02  # of the running latent mean and variance, per training batch


class Tokenizer(Protocol):
    def encode(self, video_B3FHW: Tensor) -> Tensor:
        """Normalised latents (B, Z, T, h, w)."""

    def decode(self, latents_BZThw: Tensor) -> Tensor:
        """Pixels (B, 3, F, H, W), not clamped."""


def build_tokenizer(config: WorldModelConfig) -> PatchTokenizer:
    """The tokenizer that the configuration names, randomly initialised."""
    if config.tokenizer.kind != "patch":
        raise NotImplementedError(
            f"no {config.tokenizer.kind!r} tokenizer is implemented: {config.name} cannot be built"
        )
    return PatchTokenizer(config.tokenizer, config.temporal_compression)


class PatchTokenizer(nn.Module):
    """2-D convolutions on the latent grid, between linear maps from and to pixel patches.

    Each latent frame is coded by itself: a group of four frames is stacked into the channels of one patch grid. On a
    CPU this is many times cheaper than causal 3-D convolutions at pixel resolution, and enough for flat shapes.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, config: TokenizerConfig, temporal_compression: int) -> None:
        super().__init__()
        self.patch = config.spatial_compression
        self.group = temporal_compression
        patch_features, width = 3 * self.patch**2, config.width
        self.first_in = nn.Conv2d(patch_features, width, 1)
        self.group_in = nn.Conv2d(patch_features * self.group, width, 1)
        self.encoder = nn.Sequential(*(ResidualBlock(width) for _ in range(config.num_blocks)))
        self.to_latents = nn.Conv2d(width, config.latent_channels, 1)
        self.from_latents = nn.Conv2d(config.latent_channels, width, 3, padding=1)
        self.decoder = nn.Sequential(*(ResidualBlock(width) for _ in range(config.num_blocks)))
        self.first_out = nn.Conv2d(width, patch_features, 1)
        self.group_out = nn.Conv2d(width, patch_features * self.group, 1)
        self.register_buffer("latent_mean", torch.zeros(config.latent_channels))
        self.register_buffer("latent_std", torch.ones(config.latent_channels))

    def encode(self, video_B3FHW: Tensor) -> Tensor:
        latents_BZThw = self.encode_raw(video_B3FHW)
        return (latents_BZThw - _per_channel(self.latent_mean)) / _per_channel(self.latent_std)

    def decode(self, latents_BZThw: Tensor) -> Tensor:
        batch, _, frames = latents_BZThw.shape[:3]
        grid = self.decoder(self.from_latents(latents_BZThw.transpose(1, 2).flatten(0, 1)))
        grid_BTCHW = grid.view(batch, frames, *grid.shape[1:])
        first = self._to_pixels(self.first_out(grid_BTCHW[:, 0]), batch)
        if frames == 1:
            return first
        rest = self._to_pixels(self.group_out(grid_BTCHW[:, 1:].flatten(0, 1)), batch)
        return torch.cat((first, rest), dim=2)

    def encode_raw(self, video_B3FHW: Tensor) -> Tensor:
        """Latents before normalisation, whose statistics training collects with `update_statistics`."""
        batch, _, frames = video_B3FHW.shape[:3]
        patches = functional.pixel_unshuffle(video_B3FHW.transpose(1, 2).contiguous(), self.patch)  # B F 3pp h w
        grid = self.first_in(patches[:, 0])[:, None]
        if frames > 1:
            groups = patches[:, 1:].reshape(-1, self.group * patches.shape[2], *patches.shape[3:])
            rest = self.group_in(groups)
            grid = torch.cat((grid, rest.view(batch, -1, *rest.shape[1:])), dim=1)
        latents: Tensor = self.to_latents(self.encoder(grid.flatten(0, 1)))
        return latents.view(batch, -1, *latents.shape[1:]).transpose(1, 2)

    def _to_pixels(self, patches: Tensor, batch: int) -> Tensor:
        """(B * groups, frames * 3pp, h, w) to (B, 3, F, H, W)."""
        patches = patches.reshape(batch, -1, 3 * self.patch**2, *patches.shape[2:])
        return functional.pixel_shuffle(patches, self.patch).transpose(1, 2)

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
