"""The Wan2.1 video autoencoder: causal convolutions, 8x8 smaller in space and 4 in time, 16 latent channels.

Parameter names and shapes are those of the published file (194 tensors), so loading it is an identity map.

No layer looks ahead in time. What a layer needs of the frames before is kept in a `Stream`, so a video may be coded in
pieces, and gives what it gives whole: a whole video is a stream of one piece, and there is no second code path.

The first frame is special, as it has no frames before it to share a latent frame with. Halving time passes it through
untouched; doubling time does not double it, nor lets the convolution over the frames after see it.

Shapes: B batch, C channels, Z latent channels, F pixel frames (1 + 4n), T latent frames (1 + n), H and W pixels, h and
w the latent grid, N frames of all videos, L positions in one. Inside the network, F H W are whatever a layer works on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from deployments.world_model.attention import attention
from deployments.world_model.config import TokenizerConfig

# Per latent channel, over the data that Wan2.1 was trained on: from Wan-AI/Wan2.1, wan/modules/vae.py.
LATENT_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
LATENT_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

LEVELS = (1, 2, 4, 4)  # channels per level, as multiples of the width
HALVES_TIME = (False, True, True)  # between each level and the next; every one of them halves height and width
GROUP = 4  # pixel frames per latent frame, after the first


class WanTokenizer(nn.Module):
    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        channels = config.latent_channels
        self.encoder = Encoder(config)
        self.conv1 = CausalConv3d(2 * channels, 2 * channels, 1)
        self.conv2 = CausalConv3d(channels, channels, 1)
        self.decoder = Decoder(config)

    def encode(self, video_B3FHW: Tensor) -> Tensor:
        """Normalised latents (B, Z, T, h, w) in float32: the posterior's mean."""
        frames = video_B3FHW.shape[2]
        if frames % GROUP != 1:
            raise ValueError(f"{frames} frames cannot be encoded: 1 + {GROUP}n can")
        stream = Stream()
        pieces = torch.split(video_B3FHW, [1] + [GROUP] * (frames // GROUP), dim=2)
        return torch.cat([self.encode_next(piece, stream) for piece in pieces], dim=2)

    def decode(self, latents_BZThw: Tensor) -> Tensor:
        """Pixels (B, 3, F, H, W), not clamped. Latent frame by latent frame, so memory does not grow with length."""
        stream = Stream()
        return torch.cat([self.decode_next(piece, stream) for piece in torch.split(latents_BZThw, 1, dim=2)], dim=2)

    def decode_rest(self, latents_BZThw: Tensor) -> Tensor:
        """As `decode`, which needs the first frame to go on from, without it."""
        return self.decode(latents_BZThw)[:, :, 1:]

    def encode_next(self, video_B3FHW: Tensor, stream: Stream) -> Tensor:
        """The latents of the next frames of a video: at its start 1 + 4n frames, after that 4n."""
        moments = self.conv1(self.encoder(video_B3FHW.to(self.conv1.weight.dtype), stream), stream)
        mean_BZThw = moments.float().chunk(2, dim=1)[0]  # the rest is the posterior's log variance
        latents: Tensor = (mean_BZThw - _per_channel(LATENT_MEAN, moments)) / _per_channel(LATENT_STD, moments)
        return latents

    def decode_next(self, latents_BZThw: Tensor, stream: Stream) -> Tensor:
        """The pixels of the next latent frames of a video: 4 frames of each, 1 of the video's first."""
        latents = latents_BZThw.float() * _per_channel(LATENT_STD, latents_BZThw)
        latents = latents + _per_channel(LATENT_MEAN, latents_BZThw)
        video: Tensor = self.decoder(self.conv2(latents.to(self.conv2.weight.dtype), stream), stream)
        return video


class Stream:
    """What the layers of one encoder or decoder remember of one video (or batch of them) so far; empty at its start."""

    def __init__(self) -> None:
        self._past: dict[nn.Module, Tensor] = {}
        self._begun: set[nn.Module] = set()

    def begins(self, layer: nn.Module) -> bool:
        """Whether the video begins with this call of `layer`: true the first time it asks."""
        begins = layer not in self._begun
        self._begun.add(layer)
        return begins

    def behind_past(self, layer: nn.Module, x_BCFHW: Tensor, frames: int) -> Tensor:
        """`x` with up to `frames` frames that this layer was given before in front of it; remembers its own last."""
        if layer in self._past:
            x_BCFHW = torch.cat((self._past[layer], x_BCFHW), dim=2)
        # A copy, because a view would keep all the frames in memory.
        self._past[layer] = x_BCFHW[:, :, -frames:].clone()
        return x_BCFHW


class CausalConv3d(nn.Conv3d):
    """A convolution whose every output frame sees its own and the kernel - 1 frames before; zeros before the first."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int | tuple[int, int, int]) -> None:
        time, height, width = (kernel,) * 3 if isinstance(kernel, int) else kernel
        super().__init__(in_channels, out_channels, (time, height, width), padding=(0, height // 2, width // 2))
        self.look_back = time - 1

    def forward(self, x_BCFHW: Tensor, stream: Stream) -> Tensor:  # type: ignore[override]
        if self.look_back:
            length = x_BCFHW.shape[2] + self.look_back
            x_BCFHW = stream.behind_past(self, x_BCFHW, self.look_back)
            x_BCFHW = functional.pad(x_BCFHW, (0, 0, 0, 0, length - x_BCFHW.shape[2], 0))
        return super().forward(x_BCFHW)


class Norm(nn.Module):
    """RMS norm over channels, in float32; `dims` is the number of dimensions after the channels."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        length = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
        normed: Tensor = x / length * (len(self.gamma) ** 0.5 * self.gamma)
        return normed.to(x.dtype)


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            Norm(in_channels, 3),
            nn.SiLU(),
            CausalConv3d(in_channels, out_channels, 3),
            Norm(out_channels, 3),
            nn.SiLU(),
            nn.Identity(),  # dropout in training; the published names count it
            CausalConv3d(out_channels, out_channels, 3),
        )
        self.shortcut = CausalConv3d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x_BCFHW: Tensor, stream: Stream) -> Tensor:
        skipped: Tensor = x_BCFHW if self.shortcut is None else self.shortcut(x_BCFHW, stream)
        return skipped + run(self.residual, x_BCFHW, stream)


class SpatialAttention(nn.Module):
    """One head over the positions of each frame by itself."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels, 2)
        self.to_qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCFHW: Tensor) -> Tensor:
        return x_BCFHW + per_frame(self._attend, x_BCFHW)

    def _attend(self, x_NCHW: Tensor) -> Tensor:
        qkv_NL3C = self.to_qkv(self.norm(x_NCHW)).flatten(2).transpose(1, 2)
        q, k, v = (part[:, :, None] for part in qkv_NL3C.chunk(3, dim=-1))
        out_NLC = attention(q, k, v)[:, :, 0]
        out: Tensor = self.proj(out_NLC.transpose(1, 2).reshape(x_NCHW.shape))
        return out


class Downsample(nn.Module):
    """Halves height and width, and time where `halves_time`."""

    def __init__(self, channels: int, halves_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(channels, channels, 3, stride=2))
        self.time_conv = nn.Conv3d(channels, channels, (3, 1, 1), stride=(2, 1, 1)) if halves_time else None

    def forward(self, x_BCFHW: Tensor, stream: Stream) -> Tensor:
        x_BCFHW = per_frame(self.resample, x_BCFHW)
        if self.time_conv is None:
            return x_BCFHW
        outputs = [x_BCFHW[:, :, :1]] if stream.begins(self) else []
        # Every other output sees a pair of frames and the one before it.
        joined = stream.behind_past(self, x_BCFHW, 1)
        if joined.shape[2] > 1:
            outputs.append(self.time_conv(joined))
        return torch.cat(outputs, dim=2)


class Upsample(nn.Module):
    """Doubles height and width, and time where `doubles_time`; halves the channels."""

    def __init__(self, channels: int, doubles_time: bool) -> None:
        super().__init__()
        self.resample = nn.Sequential(
            nn.Upsample(scale_factor=2.0, mode="nearest-exact"), nn.Conv2d(channels, channels // 2, 3, padding=1)
        )
        self.time_conv = CausalConv3d(channels, 2 * channels, (3, 1, 1)) if doubles_time else None

    def forward(self, x_BCFHW: Tensor, stream: Stream) -> Tensor:
        if self.time_conv is not None:
            outputs = []
            if stream.begins(self):
                outputs, x_BCFHW = [x_BCFHW[:, :, :1]], x_BCFHW[:, :, 1:]
            if x_BCFHW.shape[2]:
                # The convolution's channels are those of a frame's first half, then those of its second.
                halves_BPCFHW = self.time_conv(x_BCFHW, stream).unflatten(1, (2, -1))
                outputs.append(halves_BPCFHW.permute(0, 2, 3, 1, 4, 5).flatten(2, 3))
            x_BCFHW = torch.cat(outputs, dim=2)
        return per_frame(self.resample, x_BCFHW)


class Encoder(nn.Module):
    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        channels = config.width * LEVELS[0]
        self.conv1 = CausalConv3d(3, channels, 3)
        layers: list[nn.Module] = []
        for level, multiple in enumerate(LEVELS):
            for _ in range(config.num_blocks):
                layers.append(ResidualBlock(channels, config.width * multiple))
                channels = config.width * multiple
            if level < len(HALVES_TIME):
                layers.append(Downsample(channels, HALVES_TIME[level]))
        self.downsamples = nn.Sequential(*layers)
        self.middle = middle(channels)
        self.head = head(channels, 2 * config.latent_channels)

    def forward(self, video_B3FHW: Tensor, stream: Stream) -> Tensor:
        return run((self.conv1, *self.downsamples, *self.middle, *self.head), video_B3FHW, stream)


class Decoder(nn.Module):
    def __init__(self, config: TokenizerConfig) -> None:
        super().__init__()
        channels = config.width * LEVELS[-1]
        self.conv1 = CausalConv3d(config.latent_channels, channels, 3)
        self.middle = middle(channels)
        layers: list[nn.Module] = []
        for level, multiple in reversed(list(enumerate(LEVELS))):
            for _ in range(config.num_blocks + 1):
                layers.append(ResidualBlock(channels, config.width * multiple))
                channels = config.width * multiple
            if level:
                layers.append(Upsample(channels, HALVES_TIME[level - 1]))
                channels //= 2
        self.upsamples = nn.Sequential(*layers)
        self.head = head(channels, 3)

    def forward(self, latents_BZThw: Tensor, stream: Stream) -> Tensor:
        return run((self.conv1, *self.middle, *self.upsamples, *self.head), latents_BZThw, stream)


def middle(channels: int) -> nn.Sequential:
    return nn.Sequential(
        ResidualBlock(channels, channels), SpatialAttention(channels), ResidualBlock(channels, channels)
    )


def head(channels: int, out_channels: int) -> nn.Sequential:
    return nn.Sequential(Norm(channels, 3), nn.SiLU(), CausalConv3d(channels, out_channels, 3))


def run(layers: Iterable[nn.Module], x_BCFHW: Tensor, stream: Stream) -> Tensor:
    """One layer after the other, with the stream for those that look back in time."""
    for layer in layers:
        looks_back = isinstance(layer, CausalConv3d | ResidualBlock | Downsample | Upsample)
        x_BCFHW = layer(x_BCFHW, stream) if looks_back else layer(x_BCFHW)
    return x_BCFHW


def per_frame(layer: Callable[[Tensor], Tensor], x_BCFHW: Tensor) -> Tensor:
    """Apply a layer of images to every frame."""
    out_NCHW = layer(x_BCFHW.transpose(1, 2).flatten(0, 1))
    return out_NCHW.view(x_BCFHW.shape[0], x_BCFHW.shape[2], *out_NCHW.shape[1:]).transpose(1, 2)


def _per_channel(values: tuple[float, ...], like: Tensor) -> Tensor:
    return torch.tensor(values, device=like.device).view(-1, 1, 1, 1)
