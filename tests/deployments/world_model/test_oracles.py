"""The same random weights here and in `diffusers` give the same numbers, at reduced width, in float32.

What the published checkpoints mean is fixed by the code that trained them; `diffusers` holds an independent copy of
that meaning. Agreement proves patch order, rotary layout, modulation order, the first-frame rules and the solver.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, CosmosTransformer3DModel, UniPCMultistepScheduler
from torch import Tensor

from deployments.world_model import PRESETS
from deployments.world_model.config import DiTConfig, SamplerConfig
from deployments.world_model.dit import DiT
from deployments.world_model.sampler import SamplerState, advance, sigma
from deployments.world_model.vae import LATENT_MEAN, LATENT_STD, WanTokenizer
from tests.support.weights import randomise

TOLERANCE = 1e-4  # max abs difference

DIT = DiTConfig(
    latent_channels=16,
    width=96,
    num_blocks=3,
    num_heads=3,
    mlp_ratio=4.0,
    adaln_rank=16,
    text_dim=40,
    text_tokens=5,
    context_dim=24,
    rope_ratio_h=3.0,
    rope_ratio_w=3.0,
)
VAE = replace(PRESETS["dreamdojo-2b"].tokenizer, width=8)


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def difference(ours: Tensor, theirs: Tensor) -> float:
    assert ours.shape == theirs.shape
    assert theirs.std() > 0.1, "the comparison says nothing if the output is next to nothing"
    return float((ours - theirs).abs().max())


# --- the denoiser


def cosmos_name(name: str) -> str:
    """The name in `diffusers` of a published tensor of the backbone."""
    renames = (
        (r"^x_embedder\.proj\.1\.", "patch_embed.proj."),
        (r"^t_embedder\.1\.", "time_embed.t_embedder."),
        (r"^t_embedding_norm\.", "time_embed.norm."),
        (r"^blocks\.", "transformer_blocks."),
        (r"\.adaln_modulation_self_attn\.(\d)", r".norm1.linear_\1"),
        (r"\.adaln_modulation_cross_attn\.(\d)", r".norm2.linear_\1"),
        (r"\.adaln_modulation_mlp\.(\d)", r".norm3.linear_\1"),
        (r"\.self_attn\.", ".attn1."),
        (r"\.cross_attn\.", ".attn2."),
        (r"\.(q|k|v)_proj\.", r".to_\1."),
        (r"\.output_proj\.", ".to_out.0."),
        (r"\.(q|k)_norm\.", r".norm_\1."),
        (r"\.mlp\.layer1\.", ".ff.net.0.proj."),
        (r"\.mlp\.layer2\.", ".ff.net.2."),
        (r"^final_layer\.linear\.", "proj_out."),
        (r"^final_layer\.adaln_modulation\.(\d)", r"norm_out.linear_\1"),
    )
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


@pytest.fixture(scope="module")
def denoisers() -> tuple[DiT, CosmosTransformer3DModel]:
    ours = DiT(DIT, grouped_action_dim=8)
    randomise(ours)
    theirs = CosmosTransformer3DModel(
        in_channels=DIT.latent_channels + 2,
        out_channels=DIT.latent_channels,
        num_attention_heads=DIT.num_heads,
        attention_head_dim=DIT.head_dim,
        num_layers=DIT.num_blocks,
        mlp_ratio=DIT.mlp_ratio,
        text_embed_dim=DIT.context_dim,
        adaln_lora_dim=DIT.adaln_rank,
        rope_scale=(DIT.rope_ratio_t, DIT.rope_ratio_h, DIT.rope_ratio_w),
        concat_padding_mask=False,  # its two mask channels are passed in instead, which spares it torchvision
        extra_pos_embed_type=None,
        use_crossattn_projection=True,
        crossattn_proj_in_channels=DIT.text_dim,
        encoder_hidden_states_channels=DIT.context_dim,
    ).eval()
    backbone = {cosmos_name(k): v for k, v in ours.state_dict().items() if not k.startswith("action_embedder")}
    theirs.load_state_dict(backbone)
    return ours, theirs


@pytest.mark.parametrize("grid", [(4, 6, 8), (1, 4, 4), (3, 10, 6)], ids=str)
@pytest.mark.parametrize("level", [0.9998, 0.5, 0.002])
def test_the_denoiser_is_the_cosmos_transformer(
    denoisers: tuple[DiT, CosmosTransformer3DModel], grid: tuple[int, int, int], level: float
) -> None:
    ours, theirs = denoisers
    frames = grid[0]
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 16, *grid, generator=generator)
    text = torch.randn(DIT.text_tokens, DIT.text_dim, generator=generator)
    timesteps = torch.full((2, frames), level)
    timesteps[:, 0] /= 2  # a noise level per latent frame, and per row
    timesteps[1] *= 0.7
    mask = torch.zeros(2, frames)
    mask[:, 0] = 1
    actions, no_actions = torch.randn(2, frames - 1, 8, generator=generator), torch.zeros(2)

    masks = torch.zeros(2, 2, *grid)
    masks[:, 0, 0] = 1
    expected = theirs(
        x,
        timesteps[:, None, :, None, None],
        text.expand(2, -1, -1),
        condition_mask=masks,
        return_dict=False,
    )[0]
    assert difference(ours(x, mask, timesteps, actions, no_actions, ours.context(text)), expected) <= TOLERANCE


# --- the tokenizer


def wan_name(name: str) -> str:
    """The name in `diffusers` of a published tensor of the autoencoder."""
    decoder_levels = (0, 4, 8, 12)  # where each level begins in the published flat list
    if match := re.match(r"decoder\.upsamples\.(\d+)\.(.*)", name):
        index, rest = int(match[1]), match[2]
        level = max(i for i, first in enumerate(decoder_levels) if first <= index)
        within = index - decoder_levels[level]
        part = "upsamplers.0" if within == 3 else f"resnets.{within}"
        name = f"decoder.up_blocks.{level}.{part}.{rest}"
    renames = (
        (r"^conv1\.", "quant_conv."),
        (r"^conv2\.", "post_quant_conv."),
        (r"coder\.conv1\.", "coder.conv_in."),
        (r"\.downsamples\.", ".down_blocks."),
        (r"\.middle\.0\.", ".mid_block.resnets.0."),
        (r"\.middle\.1\.", ".mid_block.attentions.0."),
        (r"\.middle\.2\.", ".mid_block.resnets.1."),
        (r"\.residual\.0\.", ".norm1."),
        (r"\.residual\.2\.", ".conv1."),
        (r"\.residual\.3\.", ".norm2."),
        (r"\.residual\.6\.", ".conv2."),
        (r"\.shortcut\.", ".conv_shortcut."),
        (r"\.head\.0\.", ".norm_out."),
        (r"\.head\.2\.", ".conv_out."),
    )
    for pattern, replacement in renames:
        name = re.sub(pattern, replacement, name)
    return name


@pytest.fixture(scope="module")
def autoencoders() -> tuple[WanTokenizer, AutoencoderKLWan]:
    ours = WanTokenizer(VAE)
    randomise(ours)
    ours.state_dict()["decoder.head.2.weight"].mul_(0.4)  # theirs clamps: most pixels are to be within [-1, 1]
    theirs = AutoencoderKLWan(base_dim=VAE.width, z_dim=VAE.latent_channels).eval()
    theirs.load_state_dict({wan_name(name): tensor for name, tensor in ours.state_dict().items()})
    return ours, theirs


def statistics() -> tuple[Tensor, Tensor]:
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in (LATENT_MEAN, LATENT_STD))
    return mean, std


def test_the_latent_statistics_are_the_published_ones(autoencoders: tuple[WanTokenizer, AutoencoderKLWan]) -> None:
    published = autoencoders[1].config
    assert list(LATENT_MEAN) == published.latents_mean
    assert list(LATENT_STD) == published.latents_std


@pytest.mark.parametrize("frames", [1, 5, 9, 13])
def test_encoding_is_that_of_the_wan_autoencoder(
    autoencoders: tuple[WanTokenizer, AutoencoderKLWan], frames: int
) -> None:
    ours, theirs = autoencoders
    video = torch.rand(2, 3, frames, 16, 24, generator=torch.Generator().manual_seed(2)) * 2 - 1
    mean, std = statistics()
    expected = (theirs.encode(video).latent_dist.mode() - mean) / std
    assert difference(ours.encode(video), expected) <= TOLERANCE


@pytest.mark.parametrize("frames", [1, 2, 3, 4])
def test_decoding_is_that_of_the_wan_autoencoder(
    autoencoders: tuple[WanTokenizer, AutoencoderKLWan], frames: int
) -> None:
    ours, theirs = autoencoders
    latents = torch.randn(2, 16, frames, 2, 3, generator=torch.Generator().manual_seed(3))
    mean, std = statistics()
    expected = theirs.decode(latents * std + mean, return_dict=False)[0]
    assert (expected.abs() < 1).float().mean() > 0.8
    assert difference(ours.decode(latents).clamp(-1, 1), expected) <= TOLERANCE


# --- the solver

FLOW = SamplerConfig(solver="unipc", shift=5.0, sigma_max=0.999)


def velocity(x: Tensor, level: float) -> Tensor:
    """A fixed network: smooth, nonlinear, and different at every noise level."""
    return torch.tanh(1.3 * x + level) - 0.4 * x * (1 - level) + 0.2


def their_trajectory(noise: Tensor, num_steps: int) -> list[Tensor]:
    scheduler = UniPCMultistepScheduler(
        solver_order=2,
        prediction_type="flow_prediction",
        use_flow_sigmas=True,
        flow_shift=FLOW.shift,
        solver_type="bh2",
        lower_order_final=True,
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(sigmas=np.linspace(FLOW.sigma_max, 0, num_steps + 1)[:-1])
    x, points = noise, []
    for step, timestep in enumerate(scheduler.timesteps):
        level = sigma(FLOW, step, num_steps)
        x = scheduler.step(velocity(x, level), timestep, x, return_dict=False)[0]
        points.append(x)
    return points


def our_step(rows: SamplerState, steps: list[tuple[int, int]]) -> SamplerState:
    clean = [x - sigma(FLOW, *step) * velocity(x, sigma(FLOW, *step)) for x, step in zip(rows.x, steps, strict=True)]
    return advance(FLOW, rows, torch.stack(clean), steps)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 35])
def test_a_trajectory_is_that_of_the_unipc_scheduler(num_steps: int) -> None:
    noise = torch.randn(4, 6, generator=torch.Generator().manual_seed(4))
    rows = SamplerState.stack([SamplerState.start(noise)])
    for step, expected in enumerate(their_trajectory(noise, num_steps)):
        rows = our_step(rows, [(step, num_steps)])
        assert difference(rows.x[0], expected) <= TOLERANCE


def test_rows_at_different_steps_each_follow_their_own_scheduler() -> None:
    """One row of 35 steps; rows of 10 and of 4 join it later, and all move in the same batch."""
    noise = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(5))
    lengths, joins = (35, 10, 4), (0, 7, 9)
    expected = [their_trajectory(noise[row], length) for row, length in enumerate(lengths)]
    states = [SamplerState.start(noise[row]) for row in range(3)]
    for tick in range(35):
        active = [row for row in range(3) if joins[row] <= tick < joins[row] + lengths[row]]
        steps = [(tick - joins[row], lengths[row]) for row in active]
        moved = our_step(SamplerState.stack([states[row] for row in active]), steps).unstack()
        for row, (step, _), state in zip(active, steps, moved, strict=True):
            states[row] = state
            assert difference(state.x, expected[row][step]) <= TOLERANCE
