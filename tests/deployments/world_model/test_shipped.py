"""What must hold of the checkpoint that ships: on episodes it never saw, it follows its actions.

The bars are those that the model has to meet, on the episodes that the published figures were measured on.
"""

import json
from pathlib import Path

import numpy as np
import pytest

from deployments.world_model import PRESETS, WorldModel, pusher, rollout
from deployments.world_model.checkpoint import WEIGHTS_FILE
from deployments.world_model.evaluate import (
    HELD_OUT_SEED,
    Accuracy,
    accuracy,
    embed_actions,
    held_out_episodes,
    predict,
)

FEW = 8  # episodes for what is many times beyond its bar


@pytest.fixture(scope="module")
def published(shipped: Path) -> dict[str, float]:
    metrics = json.loads((shipped / "metrics.json").read_text())
    assert metrics["seed"] == HELD_OUT_SEED
    figures: dict[str, float] = metrics["held_out"]
    return figures


@pytest.fixture(scope="module")
def measured(shipped_model: WorldModel, published: dict[str, float]) -> Accuracy:
    episodes = held_out_episodes(shipped_model, int(published["episodes"]))
    return accuracy(predict(shipped_model, episodes, episodes.actions), episodes)


def test_it_is_the_preset(shipped_model: WorldModel) -> None:
    assert shipped_model.config == PRESETS["tiny-pusher"]


def test_it_is_smaller_than_10_mb(shipped: Path) -> None:
    assert (shipped / WEIGHTS_FILE).stat().st_size < 10_000_000


def test_its_first_chunk_has_27_db(measured: Accuracy) -> None:
    assert measured.psnr_db_1_12 >= 27


def test_its_rollouts_are_3_5_db_above_holding_the_first_frame_still(
    measured: Accuracy, published: dict[str, float]
) -> None:
    assert measured.psnr_db >= published["copy_first_psnr_db"] + 3.5


def test_its_agent_goes_where_the_actions_say(measured: Accuracy) -> None:
    assert measured.agent_error_px_1_12 < 0.7
    assert measured.agent_error_px < 3.0


def test_its_pucks_are_where_they_truly_are_in_the_first_chunk_and_mostly_at_the_end(measured: Accuracy) -> None:
    assert measured.puck_error_px_1_12 < 0.65
    assert measured.puck_error_px < 4.2
    # 0.85 is the goal, and not reached: `benchmarks/predictability.py` tells what stands in the way.
    assert measured.goal_distance_pearson > 0.78


def test_actions_of_another_episode_or_none_predict_clearly_worse(shipped_model: WorldModel) -> None:
    episodes = held_out_episodes(shipped_model, FEW)
    own, other, none = (
        accuracy(predict(shipped_model, episodes, actions), episodes)
        for actions in (episodes.actions, np.roll(episodes.actions, 1, axis=0), np.zeros_like(episodes.actions))
    )
    for worse in (other, none):
        assert worse.psnr_db < own.psnr_db - 3
        assert worse.agent_error_px > 3 * own.agent_error_px


@pytest.mark.parametrize(("x", "y"), [(1, 0), (-1, 0), (0, 1), (0, -1)])
def test_the_agent_moves_in_the_direction_asked_for(shipped_model: WorldModel, x: float, y: float) -> None:
    """From the middle of an empty half, one chunk at half speed: 15 pixels each way."""
    start = pusher.PusherState(*(np.array([at], np.float32) for at in ((32, 24), (32, 52), (10, 52))))
    moves = np.tile(np.array([x, y], np.float32) / 2, (1, 12, 1))
    frames = rollout(shipped_model, pusher.render(start)[0], embed_actions(shipped_model, moves)[0], seed=0)
    moved = pusher.read_agent(frames[-1]) - pusher.read_agent(frames[0])
    assert np.abs(moved - 15 * np.array([x, y])).max() < 3.0


def test_the_published_figures_are_what_is_measured(measured: Accuracy, published: dict[str, float]) -> None:
    for name, value in measured.to_json().items():
        # Another CPU sums in another order; the difference grows over the chunks of a rollout.
        assert published[name] == pytest.approx(value, rel=0.02, abs=0.1 if name.endswith("_px") else 0.02), name


def test_the_model_card_states_the_published_figures(shipped: Path, published: dict[str, float]) -> None:
    card = (shipped / "MODEL_CARD.md").read_text()
    for name, value in published.items():
        assert f"| `{name}` | {value:g} |" in card
