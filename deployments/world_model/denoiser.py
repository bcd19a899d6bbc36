"""From the network's output to a prediction of the clean latents: conditioning frame, noise level, guidance.

The one place that knows what the network's output means, shared by serving and training.
Shapes: B rows, C latent channels, T latent frames, H and W the latent grid, F = T - 1 generated latent frames,
A action features of one latent frame.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from deployments.world_model.config import WorldModelConfig
from deployments.world_model.dit import Context, DiT


def predict_clean(
    config: WorldModelConfig,
    dit: DiT,
    context: Context,
    x_BCTHW: Tensor,
    sigma_B: Tensor,
    condition_BCHW: Tensor,
    actions_BFA: Tensor,
    action_weight_B: Tensor,
) -> Tensor:
    """Clean latents (B, C, T, H, W); the first frame is the condition, exactly.

    Every latent frame, the given one too, is told the row's noise level, as the published model was trained.
    """
    frames = x_BCTHW.shape[2]
    x_BCTHW = torch.cat((condition_BCHW[:, :, None], x_BCTHW[:, :, 1:]), dim=2)
    timesteps_BT = timesteps(config, sigma_B)[:, None].expand(-1, frames)
    mask_BT = torch.zeros_like(timesteps_BT)
    mask_BT[:, 0] = 1
    dtype = dit.final_layer.linear.weight.dtype
    out = dit(x_BCTHW.to(dtype), mask_BT, timesteps_BT, actions_BFA.to(dtype), action_weight_B.to(dtype), context)
    out = out.to(x_BCTHW.dtype)
    clean = out if config.sampler.prediction == "clean" else x_BCTHW - sigma_B[:, None, None, None, None] * out
    return torch.cat((condition_BCHW[:, :, None], clean[:, :, 1:]), dim=2)


def predict_guided(
    config: WorldModelConfig,
    dit: DiT,
    context: Context,
    x_BCTHW: Tensor,
    sigma_B: Tensor,
    condition_BCHW: Tensor,
    actions_BFA: Tensor,
    guidance: Sequence[float],
) -> Tensor:
    """As `predict_clean`, with clean + guidance * (clean - unconditional) for each row whose guidance is not 0.

    Rows without guidance cost no second pass, and their result is the conditional prediction, untouched. Guided rows
    run their unconditional pass (no action) as further rows of the same forward.
    """
    rows = len(guidance)
    guided = [index for index, weight in enumerate(guidance) if weight != 0.0]
    batch = list(range(rows)) + guided
    weight = torch.ones(len(batch), dtype=x_BCTHW.dtype, device=x_BCTHW.device)
    weight[rows:] = 0
    inputs = (x_BCTHW, sigma_B, condition_BCHW, actions_BFA)
    if guided:
        inputs = tuple(tensor[batch] for tensor in inputs)  # type: ignore[assignment]
    out = predict_clean(config, dit, context, *inputs, weight)
    clean, unconditional = out[:rows], out[rows:]
    for position, index in enumerate(guided):
        clean[index] += guidance[index] * (clean[index] - unconditional[position])
    return clean


def timesteps(config: WorldModelConfig, sigma_B: Tensor) -> Tensor:
    """What the network is told of sigma: a whole number of thousandths, scaled."""
    return torch.floor(sigma_B * 1000) * config.dit.timestep_scale
