"""What the published 2B costs, counted on the meta device: no weights, no arithmetic, no accelerator.

4,800 tokens pass 28 blocks of width 2,048; a multiplication and an addition count as two. The figures hold only if the
design leaves out what it claims to: an unconditional pass, repeated projections of the text, frames nothing depends on.
"""

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from deployments.world_model import PRESETS
from deployments.world_model.denoiser import predict_guided
from deployments.world_model.dit import DiT
from deployments.world_model.tokenizer import build_tokenizer
from deployments.world_model.vae import WanTokenizer

CONFIG = PRESETS["dreamdojo-2b"]
FORWARD_TFLOP = 21.6  # linear maps 15.8, self-attention 5.3, attention to the text 0.6


@pytest.fixture(scope="module")
def dit() -> DiT:
    with torch.device("meta"):
        return DiT(CONFIG.dit, CONFIG.grouped_action_dim).requires_grad_(False)


@pytest.fixture(scope="module")
def tokenizer() -> WanTokenizer:
    with torch.device("meta"):
        tokenizer = build_tokenizer(CONFIG)
    assert isinstance(tokenizer, WanTokenizer)
    return tokenizer.requires_grad_(False)


def meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def predict(dit: DiT, counter: FlopCounterMode, guidance: list[float], text_tokens: int = 512) -> float:
    rows = len(guidance)
    context = dit.projected_context(meta(text_tokens, 1024))
    with counter:
        predict_guided(
            CONFIG,
            dit,
            context,
            meta(rows, *CONFIG.latent_shape),
            meta(rows),
            meta(rows, 16, 60, 80),
            meta(rows, 3, 1536),
            guidance,
        )
    return counter.get_total_flops() / 1e12


@pytest.fixture
def counter() -> FlopCounterMode:
    return FlopCounterMode(display=False)


def test_a_denoising_step_costs_one_forward(dit: DiT, counter: FlopCounterMode) -> None:
    assert predict(dit, counter, [0.0]) == pytest.approx(FORWARD_TFLOP, rel=0.01)


def test_only_guided_rows_cost_a_second_forward(dit: DiT, counter: FlopCounterMode) -> None:
    assert predict(dit, counter, [0.0, 1.5, 0.0]) == pytest.approx(4 * FORWARD_TFLOP, rel=0.01)


def test_a_prompt_of_zeros_saves_the_attention_to_it(dit: DiT, counter: FlopCounterMode) -> None:
    """Queries and scores need not be computed for a single key; only the shared value's projection is left."""
    saved = FORWARD_TFLOP - predict(dit, counter, [0.0], text_tokens=1)
    assert saved == pytest.approx(28 * 2 * 4800 * 2048 * (2 * 2048 + 2 * 512) / 1e12, rel=0.05)


def test_a_start_frame_is_encoded_alone_at_a_tenth_of_a_chunk(
    tokenizer: WanTokenizer, counter: FlopCounterMode
) -> None:
    with counter:
        tokenizer.encode(meta(1, 3, 1, 480, 640))
    one = counter.get_total_flops()
    with counter:
        tokenizer.encode(meta(1, 3, 13, 480, 640))
    assert one / 1e12 == pytest.approx(2.1, rel=0.05)
    assert counter.get_total_flops() == pytest.approx(10 * one, rel=0.05)


def test_a_chunk_decodes_at_less_than_two_denoising_steps(tokenizer: WanTokenizer, counter: FlopCounterMode) -> None:
    with counter:
        video = tokenizer.decode(meta(1, *CONFIG.latent_shape))
    assert video.shape == (1, 3, 13, 480, 640)
    assert counter.get_total_flops() / 1e12 == pytest.approx(34.6, rel=0.05)
    assert counter.get_total_flops() / 1e12 < 2 * FORWARD_TFLOP


def test_the_14b_runs_at_the_published_resolution() -> None:
    large = PRESETS["dreamdojo-14b"]
    with torch.device("meta"):
        dit: nn.Module = DiT(large.dit, large.grouped_action_dim)
    out = dit(
        meta(2, *large.latent_shape),
        meta(2, 4),
        meta(2, 4),
        meta(2, 3, 1536),
        meta(2),
        dit.projected_context(meta(512, 1024)),
    )  # type: ignore[operator]
    assert out.shape == (2, *large.latent_shape)
