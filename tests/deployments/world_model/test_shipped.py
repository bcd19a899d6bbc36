"""What must hold of the checkpoint that ships: on episodes it never saw, it follows its actions."""

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deployments.world_model import PRESETS, WorldModel, pusher, rollout
from deployments.world_model.checkpoint import WEIGHTS_FILE
from deployments.world_model.evaluate import HELD_OUT_SEED, Figures, embed_actions, evaluate

OTHER_SEED = HELD_OUT_SEED + 1  # episodes that no published figure was measured on


@pytest.fixture(scope="module")
def figures(shipped_model: WorldModel) -> Figures:
    return evaluate(shipped_model, episodes=16, seed=OTHER_SEED)


def test_it_is_the_preset(shipped_model: WorldModel) -> None:
    assert shipped_model.config == PRESETS["tiny-pusher"]


def test_it_is_smaller_than_10_mb(shipped: Path) -> None:
    assert (shipped / WEIGHTS_FILE).stat().st_size < 10_000_000


def test_it_beats_holding_the_first_frame_still(figures: Figures) -> None:
    assert figures.psnr_db > figures.copy_first_psnr_db + 2.0
    assert figures.psnr_db_1_12 > figures.copy_first_psnr_db + 4.0


def test_its_agent_goes_where_the_actions_say(figures: Figures) -> None:
    assert figures.agent_error_px_1_12 < 2.0
    assert figures.agent_error_px < 4.0


def test_actions_of_another_episode_predict_worse(figures: Figures) -> None:
    assert figures.shuffled_psnr_db < figures.psnr_db - 2.0
    assert figures.shuffled_agent_error_px > 3 * figures.agent_error_px


def test_no_actions_predict_worse(figures: Figures) -> None:
    assert figures.zeroed_psnr_db < figures.psnr_db - 2.0


def test_it_knows_more_of_the_puck_than_that_it_may_rest(figures: Figures) -> None:
    assert figures.puck_error_px < figures.copy_first_puck_error_px


@pytest.mark.parametrize(("x", "y"), [(1, 0), (-1, 0), (0, 1), (0, -1)])
def test_the_agent_moves_in_the_direction_asked_for(shipped_model: WorldModel, x: float, y: float) -> None:
    """From the middle of an empty half, one chunk at half speed: 15 pixels each way."""
    start = pusher.PusherState(*(np.array([at], np.float32) for at in ((32, 24), (32, 52), (10, 52))))
    moves = np.tile(np.array([x, y], np.float32) / 2, (1, 12, 1))
    frames = rollout(shipped_model, pusher.render(start)[0], embed_actions(shipped_model, moves)[0], seed=0)
    moved = pusher.read_agent(frames[-1]) - pusher.read_agent(frames[0])
    assert np.abs(moved - 15 * np.array([x, y])).max() < 3.0


def test_the_published_metrics_are_what_is_measured(shipped: Path, shipped_model: WorldModel) -> None:
    published = json.loads((shipped / "metrics.json").read_text())
    assert published["seed"] == HELD_OUT_SEED
    quick = Figures(**published["quick"])
    measured = evaluate(shipped_model, episodes=quick.episodes, num_steps=quick.num_steps)
    for name, value in replace(measured).to_json().items():
        # Another CPU sums in another order; the difference grows over the chunks of a rollout.
        assert getattr(quick, name) == pytest.approx(value, rel=0.02, abs=0.1), name


def test_the_model_card_states_the_published_figures(shipped: Path) -> None:
    card = (shipped / "MODEL_CARD.md").read_text()
    for name, value in json.loads((shipped / "metrics.json").read_text())["held_out"].items():
        assert f"| `{name}` | {value:g} |" in card


def test_a_rollout_of_49_frames_takes_less_than_a_second_of_one_core(shipped_model: WorldModel) -> None:
    start = pusher.reset(1, np.random.default_rng(0))
    frame, actions = pusher.render(start)[0], np.zeros((48, 8), np.float32)
    rollout(shipped_model, frame, actions, seed=0)
    started = time.process_time()
    assert len(rollout(shipped_model, frame, actions, seed=0)) == 49
    assert time.process_time() - started < 1.0
