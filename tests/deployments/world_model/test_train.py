import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deployments.world_model import WorldModel, WorldModelConfig, train
from deployments.world_model.train import Settings, draw_chunks, schedule

FILES = {"model.safetensors", "config.json", "MODEL_CARD.md", "metrics.json", "losses.csv", "samples.png"}


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    for name, value in {"EVALUATION_EPISODES": 2, "QUICK_EPISODES": 2, "TOKENIZER_BATCH": 4, "DIT_BATCH": 4}.items():
        monkeypatch.setattr(train, name, value)
    return Settings(
        out=tmp_path / "run", seed=3, minutes=None, steps=8, device=torch.device("cpu"), bf16=False, compiled=False
    )


def weights(settings: Settings) -> bytes:
    return (settings.out / "model.safetensors").read_bytes()


@pytest.fixture
def run(small_config: WorldModelConfig) -> Callable[[Settings], None]:
    return lambda settings: train.train(small_config, settings)


def test_a_run_leaves_a_checkpoint_that_loads_and_its_description(
    settings: Settings, run: Callable[[Settings], None], small_config: WorldModelConfig
) -> None:
    run(settings)
    assert {path.name for path in settings.out.iterdir()} == FILES | {"train_state.pt"}
    assert WorldModel.load(settings.out).config == small_config
    metrics = json.loads((settings.out / "metrics.json").read_text())
    assert metrics["held_out"]["episodes"] == 2
    assert "--steps 8 --seed 3" in (settings.out / "MODEL_CARD.md").read_text()


def test_the_same_seed_trains_the_same_weights(settings: Settings, run: Callable[[Settings], None]) -> None:
    again, other = replace(settings, out=settings.out / "again"), replace(settings, out=settings.out / "other", seed=4)
    for each in (settings, again, other):
        run(each)
    assert weights(settings) == weights(again)
    assert weights(settings) != weights(other)


@pytest.mark.parametrize(("phase", "stop_at"), [("tokenizer_loss", 1), ("dit_loss", 3)])
def test_a_stopped_run_goes_on_to_the_same_weights(
    settings: Settings, run: Callable[[Settings], None], monkeypatch: pytest.MonkeyPatch, phase: str, stop_at: int
) -> None:
    straight = replace(settings, out=settings.out / "straight")
    run(straight)
    loss = getattr(train, phase)

    def interrupted(*args: object) -> torch.Tensor:
        if args[-1] == stop_at:
            raise KeyboardInterrupt
        result: torch.Tensor = loss(*args)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(train, "SAVE_EVERY_S", 0.0)
        patch.setattr(train, phase, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(settings)
    run(settings)
    assert weights(settings) == weights(straight)


def test_a_run_is_not_continued_with_another_seed(settings: Settings, run: Callable[[Settings], None]) -> None:
    run(settings)
    with pytest.raises(SystemExit, match="--seed 3"):
        run(replace(settings, seed=5))


def test_every_step_draws_its_own_data() -> None:
    first, second, again = (draw_chunks([0, 1, step], 2, 4)[0] for step in (0, 1, 0))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    assert schedule(0.0) == pytest.approx(0.01)
    assert schedule(0.3) == 1.0
    assert schedule(1.0) == pytest.approx(0.01)
