"""A small random model for what holds of any weights, and the shipped one for what must hold of it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import deployments.world_model as world_model
from deployments.world_model import PRESETS, ChunkInput, WorldModel, WorldModelConfig
from deployments.world_model.checkpoint import write_checkpoint
from deployments.world_model.dit import DiT
from deployments.world_model.tokenizer import build_tokenizer

SHIPPED = Path(world_model.__file__).parent / "checkpoints" / "tiny-pusher"


@pytest.fixture(scope="session")
def small_config() -> WorldModelConfig:
    tiny = PRESETS["tiny-pusher"]
    return replace(
        tiny,
        name="small",
        dit=replace(tiny.dit, width=32, num_blocks=2, num_heads=2, adaln_rank=8, latent_channels=6),
        tokenizer=replace(tiny.tokenizer, width=16, num_blocks=1, latent_channels=6),
    )


def random_tensors(config: WorldModelConfig, seed: int = 0) -> dict[str, torch.Tensor]:
    """Every tensor of a model drawn at random, the ones that start at zero too, so that nothing is switched off."""
    generator = torch.Generator().manual_seed(seed)
    modules = {"net": DiT(config.dit, config.grouped_action_dim), "tokenizer": build_tokenizer(config)}
    tensors = {f"{part}.{name}": t for part, module in modules.items() for name, t in module.state_dict().items()}
    drawn = {name: torch.randn(t.shape, generator=generator) * 0.1 for name, t in tensors.items()}
    return drawn | {name: torch.ones_like(t) for name, t in tensors.items() if "norm" in name or name.endswith("_std")}


@pytest.fixture(scope="session")
def small_checkpoint(small_config: WorldModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("small")
    write_checkpoint(directory, small_config, random_tensors(small_config))
    return directory


@pytest.fixture(scope="session")
def small_model(small_checkpoint: Path) -> WorldModel:
    return WorldModel.load(small_checkpoint)


@pytest.fixture(scope="session")
def shipped() -> Path:
    return SHIPPED


@pytest.fixture(scope="session")
def shipped_model() -> WorldModel:
    return WorldModel.load(SHIPPED)


@pytest.fixture(scope="session")
def chunk_input() -> Callable[..., ChunkInput]:
    """`chunk_input(index, **changes)`: a valid input whose frame and actions depend on the index."""

    def make(index: int = 0, **changes: Any) -> ChunkInput:
        generator = np.random.default_rng(index)
        valid = ChunkInput(
            start_frame=generator.integers(0, 256, (64, 64, 3), dtype=np.uint8),
            actions=generator.uniform(-1, 1, (12, 8)).astype(np.float32),
            seed=100 + index,
            candidate=0,
            chunk=0,
            num_steps=4,
            guidance=0.0,
        )
        return replace(valid, **changes)

    return make
