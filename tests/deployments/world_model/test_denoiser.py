from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from deployments.world_model import WorldModel, WorldModelConfig
from deployments.world_model.denoiser import predict_clean, predict_guided, timesteps

ROWS = 3


@pytest.fixture
def inputs(small_config: WorldModelConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, sigma, condition, actions."""
    generator = torch.Generator().manual_seed(0)
    channels, frames, height, width = small_config.latent_shape
    return (
        torch.randn(ROWS, channels, frames, height, width, generator=generator),
        torch.tensor([0.9, 0.5, 0.2]),
        torch.randn(ROWS, channels, height, width, generator=generator),
        torch.randn(ROWS, frames - 1, small_config.grouped_action_dim, generator=generator),
    )


def predict(
    model: WorldModel, inputs: tuple[Tensor, ...], weight: float = 1.0, meaning: Literal["clean", "velocity"] = "clean"
) -> Tensor:
    config = replace(model.config, sampler=replace(model.config.sampler, prediction=meaning))
    with torch.no_grad():
        return predict_clean(config, model.dit, model.context, *inputs, torch.full((ROWS,), weight))  # type: ignore[arg-type]


def test_the_first_frame_is_the_condition(small_model: WorldModel, inputs: tuple[Tensor, ...]) -> None:
    assert torch.equal(predict(small_model, inputs)[:, :, 0], inputs[2])


def test_noise_in_place_of_the_condition_is_never_seen(small_model: WorldModel, inputs: tuple[Tensor, ...]) -> None:
    other = inputs[0].clone()
    other[:, :, 0] = 99
    assert torch.equal(predict(small_model, inputs), predict(small_model, (other, *inputs[1:])))


def test_a_velocity_is_noise_minus_clean(small_model: WorldModel, inputs: tuple[Tensor, ...]) -> None:
    """The same network output read both ways: clean = x - sigma * velocity."""
    x, sigma = inputs[:2]
    output = predict(small_model, inputs)[:, :, 1:]
    as_velocity = predict(small_model, inputs, meaning="velocity")[:, :, 1:]
    torch.testing.assert_close(as_velocity, x[:, :, 1:] - sigma.view(-1, 1, 1, 1, 1) * output)


def test_guidance_extrapolates_from_the_unconditional_pass(small_model: WorldModel, inputs: tuple[Tensor, ...]) -> None:
    config, dit, context = small_model.config, small_model.dit, small_model.context
    with torch.no_grad():
        guided = predict_guided(config, dit, context, *inputs, [0.0, 2.0, 0.5])  # type: ignore[arg-type]
    conditional, unconditional = predict(small_model, inputs), predict(small_model, inputs, weight=0.0)
    for row, weight in enumerate([0.0, 2.0, 0.5]):
        expected = conditional[row] + weight * (conditional[row] - unconditional[row])
        torch.testing.assert_close(guided[row], expected, atol=1e-4, rtol=1e-4)


def test_timesteps_are_whole_thousandths(small_config: WorldModelConfig) -> None:
    published = replace(small_config, dit=replace(small_config.dit, timestep_scale=1e-3))
    assert timesteps(published, torch.tensor([0.9998, 0.5, 0.12819])).tolist() == pytest.approx([0.999, 0.5, 0.128])
