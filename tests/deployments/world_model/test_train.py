import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from deployments.world_model import WorldModel, WorldModelConfig, train
from deployments.world_model.train import Settings, draw_chunks, schedule

FILES = {"model.safetensors", "config.json", "MODEL_CARD.md", "metrics.json", "losses.csv", "samples.png"}


SETTINGS = Settings(
    out=Path("run"),
    seed=3,
    minutes=None,
    steps=6,
    device=torch.device("cpu"),
    bf16=False,
    compiled=False,
    refine_steps=3,
)


@pytest.fixture(scope="module")
def run(small_config: WorldModelConfig) -> Iterator[Callable[[Settings], None]]:
    with pytest.MonkeyPatch.context() as patch:
        for name in ("EVALUATION_EPISODES", "ROUND_EPISODES", "ROUND_STEPS", "TOKENIZER_BATCH"):
            patch.setattr(train, name, 2)
        for name in ("DIT_BATCH", "REFINE_BATCH"):
            patch.setattr(train, name, 4)
        yield lambda settings: train.train(small_config, settings)


@pytest.fixture(scope="module")
def straight(run: Callable[[Settings], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing stopped."""
    out = tmp_path_factory.mktemp("straight")
    run(replace(SETTINGS, out=out))
    return out


def weights(out: Path) -> bytes:
    return (out / "model.safetensors").read_bytes()


def test_a_run_leaves_a_checkpoint_that_loads_and_its_description(
    straight: Path, small_config: WorldModelConfig
) -> None:
    assert {path.name for path in straight.iterdir()} == FILES | {"train_state.pt"}
    assert WorldModel.load(straight).config == small_config
    metrics = json.loads((straight / "metrics.json").read_text())
    assert metrics["held_out"]["episodes"] == 2
    assert "--steps 6 --seed 3 --refine-steps 3" in (straight / "MODEL_CARD.md").read_text()


@pytest.mark.parametrize("seed", [3, 4])
def test_the_same_seed_trains_the_same_weights(
    straight: Path, run: Callable[[Settings], None], tmp_path: Path, seed: int
) -> None:
    run(replace(SETTINGS, out=tmp_path, seed=seed))
    assert (weights(tmp_path) == weights(straight)) == (seed == SETTINGS.seed)


@pytest.mark.parametrize(
    ("phase", "stop_at"), [("tokenizer_loss", 1), ("dit_loss", 2), ("refine_loss", 1), ("refine_loss", 2)]
)
def test_a_stopped_run_goes_on_to_the_same_weights(
    straight: Path,
    run: Callable[[Settings], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    phase: str,
    stop_at: int,
) -> None:
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
            run(replace(SETTINGS, out=tmp_path))
    run(replace(SETTINGS, out=tmp_path))
    assert weights(tmp_path) == weights(straight)


def test_a_run_is_not_continued_with_another_seed(straight: Path, run: Callable[[Settings], None]) -> None:
    with pytest.raises(SystemExit, match="--seed 3"):
        run(replace(SETTINGS, out=straight, seed=5))


def test_every_step_draws_its_own_data() -> None:
    first, second, again = (draw_chunks([0, 1, step], 2, 4)[0] for step in (0, 1, 0))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, second)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    assert schedule(0.0) == pytest.approx(0.01)
    assert schedule(0.3) == 1.0
    assert schedule(1.0) == pytest.approx(0.01)
