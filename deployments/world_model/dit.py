"""The denoiser: a diffusion transformer over latent video, conditioned on actions (DreamDojo's design).

Parameter names and shapes are those of the published checkpoints, so loading one is an identity map. Actions enter in
two places only, both per latent frame: added to the timestep embedding, and added to the AdaLN vector that every block
shares. The text prompt is constant, so its keys and values are computed once (`context`) and passed to every forward.

It does not know noise levels, solvers or guidance: see `denoiser.py`.

Shapes: B batch, C latent channels, T latent frames, H and W the latent grid, N tokens (T * H/2 * W/2 in that order),
S tokens of one latent frame, D model width, h heads, d features per head, L text tokens, F generated latent frames
(T - 1), A action features of one latent frame.
"""

from __future__ import annotations

import math
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from deployments.world_model.attention import attention
from deployments.world_model.config import DiTConfig
from deployments.world_model.rope import rotary_tables, rotate

Context: TypeAlias = tuple[tuple[Tensor, Tensor], ...]  # per block: keys and values of the text, each (1, L, h, d)

NORM_EPS = 1e-6
MASK_CHANNELS = 2  # which latent frame is given (1) or to be generated (0), and padding (always 0)


class DiT(nn.Module):
    def __init__(self, config: DiTConfig, grouped_action_dim: int) -> None:
        """`grouped_action_dim`: action features per latent frame, i.e. action_dim * temporal compression."""
        super().__init__()
        self.config = config
        width, patch_area = config.width, config.patch_spatial**2
        self.x_embedder = PatchEmbed(config)
        self.t_embedder = nn.Sequential(Sinusoid(width), TimestepEmbedding(width))
        self.t_embedding_norm = nn.RMSNorm(width, eps=NORM_EPS)
        self.crossattn_proj = nn.Sequential(nn.Linear(config.text_dim, config.context_dim), nn.GELU())
        self.action_embedder_B_D = ActionMLP(grouped_action_dim, 4 * width, width)
        self.action_embedder_B_3D = ActionMLP(grouped_action_dim, 4 * width, 3 * width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_blocks))
        self.final_layer = FinalLayer(config, patch_area * config.latent_channels)

    def forward(
        self,
        x_BCTHW: Tensor,
        mask_BT: Tensor,
        timesteps_BT: Tensor,
        actions_BFA: Tensor,
        action_weight_B: Tensor,
        context: Context,
    ) -> Tensor:
        """The network's output for each latent, (B, C, T, H, W).

        `mask_BT` is 1 for a given latent frame and 0 for one to generate. `actions_BFA` holds the actions that lead to
        each latent frame after the first; `action_weight_B` is 1 to condition on them, 0 for the unconditional pass.
        """
        batch, _, frames, height, width = x_BCTHW.shape
        grid = (frames, height // self.config.patch_spatial, width // self.config.patch_spatial)
        weight_B11 = action_weight_B[:, None, None]
        # The zero row: no action leads to the first frame.
        action_BTD = functional.pad(weight_B11 * self.action_embedder_B_D(actions_BFA), (0, 0, 1, 0))
        action_BT3D = functional.pad(weight_B11 * self.action_embedder_B_3D(actions_BFA), (0, 0, 1, 0))
        embedding_BTD, shared_BT3D = self.embed(timesteps_BT, action_BTD, action_BT3D)

        tables = rotary_tables(self.config, grid, x_BCTHW.device)
        tokens_BTSD = self.x_embedder(x_BCTHW, mask_BT)
        for block, text in zip(self.blocks, context, strict=True):
            tokens_BTSD = block(tokens_BTSD, embedding_BTD, shared_BT3D, tables, text)
        patches_BTSP = self.final_layer(tokens_BTSD, embedding_BTD, shared_BT3D)
        return unpatchify(patches_BTSP.view(batch, *grid, -1), self.config.patch_spatial)

    def embed(self, timesteps_BT: Tensor, action_BTD: Tensor, action_BT3D: Tensor) -> tuple[Tensor, Tensor]:
        """Per latent frame: the embedding that each block's modulation is made of, and the vector that all share."""
        embedding_BTD, shared_BT3D = self.t_embedder(timesteps_BT)
        norm = self.t_embedding_norm
        embedding_BTD = functional.rms_norm(
            embedding_BTD + action_BTD, norm.normalized_shape, norm.weight.float(), norm.eps
        )
        return embedding_BTD, shared_BT3D + action_BT3D

    def context(self, text_LE: Tensor) -> Context:
        """Every block's keys and values of the constant text; compute once per loaded model."""
        return self.projected_context(self.crossattn_proj(text_LE))

    def projected_context(self, context_LE: Tensor) -> Context:
        """As `context`, of text that `crossattn_proj` was applied to before."""
        return tuple(block.cross_attn.keys_and_values(context_LE[None]) for block in self.blocks)  # type: ignore[union-attr, operator]


class PatchEmbed(nn.Module):
    """2x2 patches of the latents and of their two mask channels, flattened channel-major, to tokens."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        features = (config.latent_channels + MASK_CHANNELS) * config.patch_spatial**2
        self.patch = config.patch_spatial
        # The published name is `proj.1`: there, index 0 is the rearrangement that `forward` does.
        self.proj = nn.Sequential(nn.Identity(), nn.Linear(features, config.width, bias=False))

    def forward(self, x_BCTHW: Tensor, mask_BT: Tensor) -> Tensor:
        batch, _, frames, height, width = x_BCTHW.shape
        patch = self.patch
        mask_B1THW = mask_BT[:, None, :, None, None].expand(batch, 1, frames, height, width).to(x_BCTHW.dtype)
        x = torch.cat((x_BCTHW, mask_B1THW, torch.zeros_like(mask_B1THW)), dim=1)
        x = x.view(batch, -1, frames, height // patch, patch, width // patch, patch)  # B C T H p W q
        x = x.permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(2, 3)  # B T (H W) (C p q)
        tokens_BTSD: Tensor = self.proj(x)
        return tokens_BTSD


def unpatchify(x_BTHWP: Tensor, patch: int) -> Tensor:
    """(B, T, H, W, p * q * C), channel fastest, to (B, C, T, H * p, W * q)."""
    x = x_BTHWP.view(*x_BTHWP.shape[:-1], patch, patch, -1)  # B T H W p q C
    return x.permute(0, 6, 1, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


class Sinusoid(nn.Module):
    """[cos, sin] features of a timestep, base 10,000."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width

    def forward(self, timesteps_BT: Tensor) -> Tensor:
        half = self.width // 2
        exponent = torch.arange(half, dtype=torch.float32, device=timesteps_BT.device) / half
        angles = timesteps_BT.float()[..., None] * torch.exp(-math.log(10_000.0) * exponent)
        return torch.cat((angles.cos(), angles.sin()), dim=-1)


class TimestepEmbedding(nn.Module):
    """The sinusoid itself, and the AdaLN vector that all blocks share."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(width, width, bias=False)
        self.linear_2 = nn.Linear(width, 3 * width, bias=False)

    def forward(self, sinusoid_BTD: Tensor) -> tuple[Tensor, Tensor]:
        return sinusoid_BTD, linear_float32(self.linear_2, functional.silu(linear_float32(self.linear_1, sinusoid_BTD)))


class ActionMLP(nn.Module):
    def __init__(self, in_features: int, hidden: int, out_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden)
        self.fc2 = nn.Linear(hidden, out_features)

    def forward(self, actions_BTA: Tensor) -> Tensor:
        out: Tensor = self.fc2(functional.gelu(self.fc1(actions_BTA), approximate="tanh"))
        return out


class Block(nn.Module):
    """Self-attention, attention to the text, MLP; each a gated residual under its own AdaLN-LoRA modulation."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config, config.width)
        self.cross_attn = Attention(config, config.context_dim)
        self.mlp = MLP(config)
        self.adaln_modulation_self_attn = adaln(config, 3)
        self.adaln_modulation_cross_attn = adaln(config, 3)
        self.adaln_modulation_mlp = adaln(config, 3)

    def forward(self, x_BTSD: Tensor, embedding_BTD: Tensor, shared_BT3D: Tensor, tables: tuple[Tensor, Tensor],
                text: tuple[Tensor, Tensor]) -> Tensor:  # fmt: skip
        shift, scale, gate = modulation(self.adaln_modulation_self_attn, embedding_BTD, shared_BT3D, 3, x_BTSD.dtype)
        x_BTSD = torch.addcmul(x_BTSD, gate, self.self_attn(modulate(x_BTSD, shift, scale), tables))
        return self.after_attention(x_BTSD, embedding_BTD, shared_BT3D, text)

    def after_attention(
        self, x_BTSD: Tensor, embedding_BTD: Tensor, shared_BT3D: Tensor, text: tuple[Tensor, Tensor]
    ) -> Tensor:
        """The branches in which a token sees no other: text and MLP."""
        shift, scale, gate = modulation(self.adaln_modulation_cross_attn, embedding_BTD, shared_BT3D, 3, x_BTSD.dtype)
        value_1Lhd = text[1]
        if value_1Lhd.shape[1] == 1:  # a single key has all the weight, whatever the query
            x_BTSD = x_BTSD + gate * self.cross_attn.output_proj(value_1Lhd.flatten(2))
        else:
            x_BTSD = torch.addcmul(x_BTSD, gate, self.cross_attn.attend(modulate(x_BTSD, shift, scale), *text))
        shift, scale, gate = modulation(self.adaln_modulation_mlp, embedding_BTD, shared_BT3D, 3, x_BTSD.dtype)
        return torch.addcmul(x_BTSD, gate, self.mlp(modulate(x_BTSD, shift, scale)))


class Attention(nn.Module):
    """Multi-head attention with RMS-normalised queries and keys and no biases."""

    def __init__(self, config: DiTConfig, key_dim: int) -> None:
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(config.width, config.width, bias=False)
        self.k_proj = nn.Linear(key_dim, config.width, bias=False)
        self.v_proj = nn.Linear(key_dim, config.width, bias=False)
        self.output_proj = nn.Linear(config.width, config.width, bias=False)
        self.q_norm = nn.RMSNorm(config.head_dim, eps=NORM_EPS)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=NORM_EPS)

    def forward(self, x_BTSD: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """Self-attention over all tokens of all latent frames."""
        x_BND = x_BTSD.flatten(1, 2)
        k_BNhd, v_BNhd = self.keys_and_values(x_BND)
        q_BNhd = self.q_norm(self._heads(self.q_proj(x_BND)))
        out_BNhd = attention(rotate(q_BNhd, tables), rotate(k_BNhd, tables), v_BNhd)
        out: Tensor = self.output_proj(out_BNhd.flatten(2)).view_as(x_BTSD)
        return out

    def attend(self, x_BTSD: Tensor, k_1Lhd: Tensor, v_1Lhd: Tensor) -> Tensor:
        """Attention to keys and values computed beforehand, the same for every row."""
        batch = x_BTSD.shape[0]
        q_BNhd = self.q_norm(self._heads(self.q_proj(x_BTSD.flatten(1, 2))))
        out_BNhd = attention(q_BNhd, k_1Lhd.expand(batch, -1, -1, -1), v_1Lhd.expand(batch, -1, -1, -1))
        out: Tensor = self.output_proj(out_BNhd.flatten(2)).view_as(x_BTSD)
        return out

    def keys_and_values(self, x_BLE: Tensor) -> tuple[Tensor, Tensor]:
        k_BLhd: Tensor = self.k_norm(self._heads(self.k_proj(x_BLE)))
        return k_BLhd, self._heads(self.v_proj(x_BLE))

    def _heads(self, x_BND: Tensor) -> Tensor:
        return x_BND.view(*x_BND.shape[:2], self.num_heads, -1)


class MLP(nn.Module):
    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        hidden = int(config.width * config.mlp_ratio)
        self.layer1 = nn.Linear(config.width, hidden, bias=False)
        self.layer2 = nn.Linear(hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layer2(functional.gelu(self.layer1(x)))
        return out


class FinalLayer(nn.Module):
    def __init__(self, config: DiTConfig, out_features: int) -> None:
        super().__init__()
        self.adaln_modulation = adaln(config, 2)
        self.linear = nn.Linear(config.width, out_features, bias=False)

    def forward(self, x_BTSD: Tensor, embedding_BTD: Tensor, shared_BT3D: Tensor) -> Tensor:
        shift, scale = modulation(self.adaln_modulation, embedding_BTD, shared_BT3D, 2, torch.float32)
        return linear_float32(self.linear, modulate(x_BTSD.float(), shift, scale))


def adaln(config: DiTConfig, vectors: int) -> nn.Sequential:
    """AdaLN-LoRA: `vectors` modulation vectors from the embedding through a low rank. Starts at zero."""
    layers = nn.Sequential(
        nn.SiLU(),
        nn.Linear(config.width, config.adaln_rank, bias=False),
        nn.Linear(config.adaln_rank, vectors * config.width, bias=False),
    )
    nn.init.zeros_(layers[2].weight)  # type: ignore[arg-type]
    return layers


def modulation(
    layers: nn.Sequential, embedding_BTD: Tensor, shared_BT3D: Tensor, vectors: int, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """Shift, scale (and gate), each (B, T, 1, D): a latent frame's modulation holds for all its tokens."""
    width = embedding_BTD.shape[-1]
    _, down, up = layers
    low_rank = linear_float32(down, functional.silu(embedding_BTD))
    combined: Tensor = linear_float32(up, low_rank) + shared_BT3D[..., : vectors * width]
    return combined[:, :, None].to(dtype).chunk(vectors, dim=-1)


def linear_float32(layer: nn.Module, x: Tensor) -> Tensor:
    """The layer in float32, whatever its weights are stored in.

    The published models compute so what depends on the noise level, and their last layer: bfloat16 cannot tell noise
    levels near one apart that differ by less than four thousandths.
    """
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return functional.linear(x.float(), weight.float())


def modulate(x_BTSD: Tensor, shift_BT1D: Tensor, scale_BT1D: Tensor) -> Tensor:
    normed = functional.layer_norm(x_BTSD, x_BTSD.shape[-1:], eps=NORM_EPS)
    return torch.addcmul(shift_BT1D, normed, 1 + scale_BT1D)
