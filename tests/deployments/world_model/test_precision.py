"""With weights in bfloat16, what the published models compute in float32 is computed in float32 here."""

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from deployments.world_model import PRESETS, WorldModelConfig
from deployments.world_model.dit import DiT, modulation
from tests.support.weights import randomise


@pytest.fixture(scope="module", autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def config() -> WorldModelConfig:
    full = PRESETS["dreamdojo-2b"]
    return replace(full, dit=replace(full.dit, width=32, num_blocks=2, num_heads=2, adaln_rank=8, text_dim=4))


@pytest.fixture(scope="module")
def half(config: WorldModelConfig) -> DiT:
    dit = DiT(config.dit, config.grouped_action_dim)
    randomise(dit)
    return dit.bfloat16()


@pytest.fixture(scope="module")
def exact(half: DiT) -> DiT:
    """The same weights, computed with in float32."""
    return copy.deepcopy(half).float()


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_the_embedding_of_a_noise_level_is_exact(half: DiT, exact: DiT) -> None:
    levels = torch.tensor([[0.997, 0.998, 0.999]])
    for ours, expected in zip(half.t_embedder(levels), exact.t_embedder(levels), strict=True):
        assert torch.equal(ours, expected)
        assert len(ours[0].unique(dim=0)) == 3, "a thousandth makes a difference"


def test_modulation_is_rounded_once_when_it_is_used(half: DiT, exact: DiT) -> None:
    embedding, shared = random(1, 4, 32), random(1, 4, 96)
    for block, exact_block in zip(half.blocks, exact.blocks, strict=True):
        ours = modulation(block.adaln_modulation_mlp, embedding, shared, 3, torch.bfloat16)
        expected = modulation(exact_block.adaln_modulation_mlp, embedding, shared, 3, torch.float32)
        for one, other in zip(ours, expected, strict=True):
            assert torch.equal(one, other.bfloat16())


def test_the_last_layer_is_exact(half: DiT, exact: DiT) -> None:
    tokens, embedding, shared = random(1, 4, 6, 32).bfloat16(), random(1, 4, 32), random(1, 4, 96)
    out = half.final_layer(tokens, embedding, shared)
    assert out.dtype == torch.float32
    assert torch.equal(out, exact.final_layer(tokens.float(), embedding, shared))


def test_a_forward_in_bfloat16_is_close_to_one_in_float32(half: DiT, exact: DiT) -> None:
    arguments = (random(1, 16, 4, 4, 4), torch.zeros(1, 4), torch.full((1, 4), 0.5), random(1, 3, 1536), torch.ones(1))
    x, mask, timesteps, actions, weight = arguments
    text = random(2, 4)
    out = half(x.bfloat16(), mask, timesteps, actions.bfloat16(), weight.bfloat16(), half.context(text.bfloat16()))
    expected = exact(*arguments, exact.context(text))
    assert (out - expected).abs().mean() < 0.03 * expected.abs().mean()
