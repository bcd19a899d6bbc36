"""The causal few-step student: one latent frame at a time, from a cache of the few before it.

The same network and tensors as the teacher (`dit.py`), run in another way. A latent frame attends to itself and to up
to WINDOW frames before it, of which only the keys and values are kept; no frame is marked as given, so what came before
enters through the cache alone. A frame takes a few denoising passes and one more, at noise level zero, that writes the
cache. Actions are always those of the frame being generated. So a stream costs the same per frame however long it is.

Keys are cached as they are before their rotary embedding, and turned by their place in the window: attention depends on
differences of position only, so a stream never reaches a position that training had not.

Shapes: B rows, C latent channels, T latent frames, H and W the latent grid, S tokens of one latent frame, D model
width, h heads, d features per head, K frames seen, A action features of one latent frame, n pixel frames of one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deployments.world_model.actions import FloatArray, check_actions, encode_actions
from deployments.world_model.config import WorldModelConfig
from deployments.world_model.denoiser import timesteps
from deployments.world_model.dit import Attention, Block, Context, DiT, modulate, modulation, unpatchify
from deployments.world_model.errors import WorldModelError
from deployments.world_model.rollout import Frame, Frames, WorldModel, from_uint8, to_uint8
from deployments.world_model.rope import rotary_tables, rotate
from deployments.world_model.tokenizer import PatchTokenizer

WINDOW = 3  # latent frames before the one being generated that it attends to
# Noise levels of the passes, as DreamDojo's student has them: TrigFlow's times pi/2, atan 15, atan 5 and atan 5/3, by
# sin / (cos + sin).
SIGMAS = (1.0, 15 / 16, 5 / 6, 5 / 8)

KeysValues: TypeAlias = tuple[Tensor, Tensor]  # of one block, each (B, S, h, d), the keys not yet rotated
Attend: TypeAlias = Callable[[int, Tensor, Tensor, Tensor], Tensor]  # block index, q k v (B, T, S, h, d) to the same


@dataclass(frozen=True)
class Cache:
    """Per latent frame, oldest first, and per block: what the next frame sees of them."""

    frames: tuple[tuple[KeysValues, ...], ...] = ()

    def followed_by(self, written: tuple[KeysValues, ...]) -> Cache:
        return Cache((*self.frames, written)[-WINDOW:])

    @property
    def num_bytes(self) -> int:
        return sum(tensor.nbytes for frame in self.frames for block in frame for tensor in block)


def predict_next(
    config: WorldModelConfig, dit: DiT, context: Context, cache: Cache, x_BCHW: Tensor, sigma_B: Tensor,
    actions_BA: Tensor, action_weight_B: Tensor,
) -> tuple[Tensor, tuple[KeysValues, ...]]:  # fmt: skip
    """The clean latents (B, C, H, W) of the frame after the cached ones, and its keys and values per block.

    `actions_BA` lead to this frame; their weight is 0 for the first of a stream, which no action leads to, and else 1.
    """
    position = len(cache.frames)
    written: list[KeysValues] = []

    def attend(index: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        written.append((k[:, 0], v[:, 0]))
        keys = torch.stack([*(frame[index][0] for frame in cache.frames), k[:, 0]], dim=1)
        values = torch.stack([*(frame[index][1] for frame in cache.frames), v[:, 0]], dim=1)
        tables = _tables(dit, x_BCHW, list(range(position + 1)))
        return _attention(
            rotate_frames(q, tables, [position]), rotate_frames(keys, tables, range(position + 1)), values
        )

    sigma_B1, weight_B1 = sigma_B[:, None], action_weight_B[:, None]
    out = _forward(config, dit, context, x_BCHW[:, :, None], sigma_B1, actions_BA[:, None], weight_B1, attend)
    return out[:, :, 0], tuple(written)


def predict_all(
    config: WorldModelConfig, dit: DiT, context: Context, before_BCTHW: Tensor, x_BCTHW: Tensor, sigma_BT: Tensor,
    actions_BTA: Tensor,
) -> Tensor:  # fmt: skip
    """The clean latents (B, C, T, H, W) of T frames at once, frame t seeing only `before` of the WINDOW before it.

    What `predict_next` gives frame by frame with a cache written from `before`, in one forward without a cache: for
    training, and to check the cache against. `actions_BTA` lead to each frame of x, frame 0 having none.
    """
    frames = x_BCTHW.shape[2]
    positions = [*range(frames), *range(frames)]  # all of `before` as clean frames, then all of x
    age = torch.tensor(positions)[:, None] - torch.tensor(positions)[None]
    past = torch.arange(2 * frames) < frames
    # A clean frame sees itself and the clean ones before it; a noisy one itself and the clean ones strictly before.
    seen_by_clean = past[:, None] & past[None] & (age >= 0) & (age <= WINDOW)
    seen_by_noisy = ~past[:, None] & past[None] & (age > 0) & (age <= WINDOW)
    visible = seen_by_clean | seen_by_noisy | torch.eye(2 * frames, dtype=torch.bool)
    tokens = x_BCTHW.shape[-2] * x_BCTHW.shape[-1] // dit.config.patch_spatial**2
    mask_NN = visible.repeat_interleave(tokens, 0).repeat_interleave(tokens, 1).to(x_BCTHW.device)
    tables = _tables(dit, x_BCTHW, list(range(frames)))

    def attend(_: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _attention(rotate_frames(q, tables, positions), rotate_frames(k, tables, positions), v, mask_NN)

    both = torch.cat((before_BCTHW, x_BCTHW), dim=2)
    sigma = torch.cat((torch.zeros_like(sigma_BT), sigma_BT), dim=1)
    weight = torch.ones_like(sigma_BT)
    weight[:, 0] = 0
    out = _forward(config, dit, context, both, sigma, actions_BTA.repeat(1, 2, 1), weight.repeat(1, 2), attend)
    return out[:, :, frames:]


def _forward(
    config: WorldModelConfig, dit: DiT, context: Context, x_BCTHW: Tensor, sigma_BT: Tensor, actions_BTA: Tensor,
    action_weight_BT: Tensor, attend: Attend,
) -> Tensor:  # fmt: skip
    """The teacher's forward with another self-attention, and no frame marked as given."""
    dtype = dit.final_layer.linear.weight.dtype
    batch, _, frames, height, width = x_BCTHW.shape
    patch = dit.config.patch_spatial
    weight_BT1 = action_weight_BT[..., None].to(dtype)
    embedding_BTD, shared_BT3D = dit.embed(
        timesteps(config, sigma_BT),
        weight_BT1 * dit.action_embedder_B_D(actions_BTA.to(dtype)),
        weight_BT1 * dit.action_embedder_B_3D(actions_BTA.to(dtype)),
    )
    x_BTSD = dit.x_embedder(x_BCTHW.to(dtype), torch.zeros_like(sigma_BT))
    for index, (block, text) in enumerate(zip(dit.blocks, context, strict=True)):
        assert isinstance(block, Block)
        shift, scale, gate = modulation(block.adaln_modulation_self_attn, embedding_BTD, shared_BT3D, 3, x_BTSD.dtype)
        attended = _self_attention(block.self_attn, index, modulate(x_BTSD, shift, scale), attend)
        x_BTSD = torch.addcmul(x_BTSD, gate, attended)
        x_BTSD = block.after_attention(x_BTSD, embedding_BTD, shared_BT3D, text)
    patches_BTSP = dit.final_layer(x_BTSD, embedding_BTD, shared_BT3D)
    out = unpatchify(patches_BTSP.view(batch, frames, height // patch, width // patch, -1), patch).to(x_BCTHW.dtype)
    if config.sampler.prediction == "clean":
        return out
    return x_BCTHW - sigma_BT[:, None, :, None, None] * out


def _self_attention(layer: Attention, index: int, x_BTSD: Tensor, attend: Attend) -> Tensor:
    heads = (*x_BTSD.shape[:3], layer.num_heads, -1)
    k, v = layer.keys_and_values(x_BTSD.flatten(1, 2))
    q = layer.q_norm(layer.q_proj(x_BTSD).view(heads))
    out: Tensor = layer.output_proj(attend(index, q, k.view(heads), v.view(heads)).flatten(3))
    return out


def _tables(dit: DiT, x: Tensor, positions: list[int]) -> tuple[Tensor, Tensor]:
    grid = (positions[-1] + 1, x.shape[-2] // dit.config.patch_spatial, x.shape[-1] // dit.config.patch_spatial)
    return rotary_tables(dit.config, grid, x.device)


def rotate_frames(x_BTShd: Tensor, tables: tuple[Tensor, Tensor], positions: Sequence[int]) -> Tensor:
    """Each frame turned by its own position in time."""
    tokens = x_BTShd.shape[2]
    own = tuple(torch.cat([table[at * tokens : (at + 1) * tokens] for at in positions]) for table in tables)
    return rotate(x_BTShd.flatten(1, 2), (own[0], own[1])).view_as(x_BTShd)


def _attention(q_BTShd: Tensor, k_BKShd: Tensor, v_BKShd: Tensor, mask_NN: Tensor | None = None) -> Tensor:
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in (q_BTShd, k_BKShd, v_BKShd))
    if q.device.type == "cpu":
        with torch.autocast("cpu", enabled=False):  # as in `attention.py`: bfloat16 is slow there
            out = functional.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask_NN)
    else:
        out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask_NN)
    return out.transpose(1, 2).to(v_BKShd.dtype).reshape(q_BTShd.shape)


class CausalWorldModel:
    """A student checkpoint, ready to stream. Stateless: a `Session` holds what a stream has."""

    def __init__(self, model: WorldModel) -> None:
        if not isinstance(model.tokenizer, PatchTokenizer):
            raise WorldModelError("streaming needs a tokenizer that codes each latent frame by itself")
        self.config, self.dit, self.context, self.device = model.config, model.dit, model.context, model.device
        self.tokenizer = model.tokenizer

    @classmethod
    def load(cls, directory: Path, device: str = "cpu") -> CausalWorldModel:
        return cls(WorldModel.load(directory, device))

    @torch.inference_mode()
    def decoded(self, latents_BCHW: Tensor) -> Frames:
        """The pixel frames (B, n, H, W, 3) of a latent frame that is not a stream's first."""
        # The tokenizer codes each latent frame by itself, so anything may stand for the one before.
        return to_uint8(self.tokenizer.decode_rest(torch.stack((latents_BCHW, latents_BCHW), dim=2)))

    def begin(self, start_frames: Sequence[Frame], seeds: Sequence[int], num_steps: int = len(SIGMAS)) -> Session:
        return Session(self, start_frames, seeds, num_steps)

    def rollouts(
        self, start_frames: Sequence[Frame], actions: Sequence[FloatArray], seeds: Sequence[int],
        num_steps: int = len(SIGMAS),
    ) -> list[Frames]:  # fmt: skip
        """T actions each, T a multiple of the temporal compression, to T + 1 frames, the start frame first."""
        session = self.begin(start_frames, seeds, num_steps)
        group = self.config.temporal_compression
        parts = [np.stack(start_frames)[:, None]]
        for first in range(0, len(actions[0]), group):
            parts.append(session.advance([each[first : first + group] for each in actions]))
        return list(np.concatenate(parts, axis=1))


class Session:
    """B streams side by side: each call takes the actions of one latent frame and gives its pixel frames."""

    @torch.inference_mode()
    def __init__(
        self, model: CausalWorldModel, start_frames: Sequence[Frame], seeds: Sequence[int], steps: int
    ) -> None:
        if not 1 <= steps <= len(SIGMAS):
            raise ValueError(f"{steps} denoising steps, must be 1 to {len(SIGMAS)}")
        self.model, self.seeds, self.sigmas = model, list(seeds), SIGMAS[:steps]
        video = from_uint8(np.stack(start_frames)[:, None], model.device, torch.float32)
        self.latents_BCHW = model.tokenizer.encode(video)[:, :, 0]
        self.index = 0  # of the last latent frame written; the start frame is 0
        self.cache = Cache()
        self.cache = self.cache.followed_by(self._predict(self.latents_BCHW, 0.0, None)[1])

    def advance(self, actions: Sequence[FloatArray]) -> Frames:
        """Per row the (n, action_dim) float32 actions of the next latent frame, to frames (B, n, H, W, 3)."""
        clean_BCHW = self.imagine(actions)
        if not torch.isfinite(clean_BCHW).all():
            raise WorldModelError(f"latent frame {self.index + 1} is not finite")
        self.write(clean_BCHW, actions)
        return self.model.decoded(clean_BCHW)

    @torch.inference_mode()
    def imagine(self, actions: Sequence[FloatArray]) -> Tensor:
        """The next latent frame (B, C, H, W), which is not part of the stream before it is written."""
        actions_BA = self._encoded(actions)
        noise_BCHW = self._noise()
        clean_BCHW = self._predict(noise_BCHW, self.sigmas[0], actions_BA)[0]
        for sigma in self.sigmas[1:]:  # noised again with the frame's own noise
            x_BCHW = (1 - sigma) * clean_BCHW + sigma * noise_BCHW
            clean_BCHW = self._predict(x_BCHW, sigma, actions_BA)[0]
        return clean_BCHW

    @torch.inference_mode()
    def write(self, latents_BCHW: Tensor, actions: Sequence[FloatArray]) -> None:
        """Go on from these latents as the next frame, which the actions led to."""
        self.latents_BCHW = latents_BCHW
        self.cache = self.cache.followed_by(self._predict(latents_BCHW, 0.0, self._encoded(actions))[1])
        self.index += 1

    def _encoded(self, actions: Sequence[FloatArray]) -> Tensor:
        config, group = self.model.config, self.model.config.temporal_compression
        for each in actions:
            check_actions(config, each, max_actions=group)
            if len(each) != group:
                raise ValueError(f"{len(each)} actions, a latent frame takes {group}")
        encoded = np.concatenate([encode_actions(config, each) for each in actions])
        return torch.from_numpy(encoded).to(self.model.device)

    def _predict(
        self, x_BCHW: Tensor, sigma: float, actions_BA: Tensor | None
    ) -> tuple[Tensor, tuple[KeysValues, ...]]:
        model, batch = self.model, len(x_BCHW)
        weight_B = x_BCHW.new_full((batch,), float(actions_BA is not None))
        if actions_BA is None:
            actions_BA = x_BCHW.new_zeros(batch, model.config.grouped_action_dim)
        sigma_B = x_BCHW.new_full((batch,), sigma)
        return predict_next(model.config, model.dit, model.context, self.cache, x_BCHW, sigma_B, actions_BA, weight_B)

    def _noise(self) -> Tensor:
        drawn = [frame_noise(self.model.config, seed, 0, self.index + 1) for seed in self.seeds]
        return torch.from_numpy(np.stack(drawn)).to(self.model.device)


def frame_noise(config: WorldModelConfig, seed: int, candidate: int, index: int) -> FloatArray:
    """Of a stream's latent frame (C, H, W): a function of (seed, candidate, index), the same on every machine."""
    channels, _, height, width = config.latent_shape
    random = np.random.RandomState([seed & 0xFFFFFFFF, seed >> 32, candidate, index])
    return random.standard_normal((channels, height, width)).astype(np.float32)
