"""From a robot's recorded commands to the actions that the published models were trained on."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deployments.world_model import PRESETS, InvalidInputError, WorldModelConfig
from deployments.world_model.actions import CommandStatistics, actions_from_commands, encode_actions
from deployments.world_model.config import EMBODIMENTS

DREAMDOJO = PRESETS["dreamdojo-2b"]
COLUMNS = {"gr1": (0, 28), "g1": (58, 100), "yam": (101, 146), "agibot": (147, 168)}  # first and last


def config_of(robot: str) -> WorldModelConfig:
    return replace(DREAMDOJO, embodiment=EMBODIMENTS[robot])


def statistics_of(robot: str, low: float = -1.0, high: float = 1.0) -> CommandStatistics:
    count = EMBODIMENTS[robot].count
    return CommandStatistics((low,) * count, (high,) * count)


def ramp(rows: int, robot: str = "gr1") -> np.ndarray:
    """Every dimension moves by 0.01 a row."""
    return np.repeat(np.arange(rows, dtype=np.float32)[:, None] / 100, EMBODIMENTS[robot].count, axis=1)


@pytest.mark.parametrize("robot", COLUMNS)
def test_each_robot_fills_its_own_columns_and_no_other(robot: str) -> None:
    first, last = COLUMNS[robot]
    actions = actions_from_commands(config_of(robot), statistics_of(robot), ramp(13, robot))
    assert actions.shape == (12, 384)
    assert actions.dtype == np.float32
    filled = np.flatnonzero(actions.any(axis=0))
    assert (filled[0], filled[-1], len(filled)) == (first, last, last - first + 1)


def test_the_robots_columns_do_not_overlap() -> None:
    taken = np.zeros(384, int)
    for robot in EMBODIMENTS.values():
        taken[robot.columns] += 1
    assert taken.max() == 1


def test_an_action_is_the_distance_from_the_command_before_its_block_of_four() -> None:
    """Worked by hand: rows 0 to 12 move by 0.01, so each block reads 0.01, 0.02, 0.03, 0.04 whatever came before."""
    actions = actions_from_commands(DREAMDOJO, statistics_of("gr1"), ramp(13))
    np.testing.assert_allclose(actions[:, 0], [0.01, 0.02, 0.03, 0.04] * 3, atol=1e-6)


def test_a_command_that_jumps_between_blocks_is_measured_from_the_last_of_the_block_before() -> None:
    """Worked by hand: 0 up to row 4, then 0.5. The second block starts at row 5 and is measured from row 4."""
    commands = np.zeros((13, 29), np.float32)
    commands[5:] = 0.5
    actions = actions_from_commands(DREAMDOJO, statistics_of("gr1"), commands)
    np.testing.assert_allclose(actions[:, 3], [0] * 4 + [0.5] * 4 + [0] * 4)


def test_commands_are_normalised_before_they_are_subtracted() -> None:
    """Worked by hand: a range of 2 to 10 makes a move of 0.01 one of 2 * 0.01 / 8 = 0.0025."""
    actions = actions_from_commands(DREAMDOJO, statistics_of("gr1", 2, 10), ramp(13))
    np.testing.assert_allclose(actions[:4, 28], [0.0025, 0.005, 0.0075, 0.01], atol=1e-6)


def test_normalisation_maps_the_range_to_plus_minus_one_and_beyond_it_outside() -> None:
    statistics = CommandStatistics((2.0,), (10.0,))
    normal = statistics.normalise(np.array([[2], [10], [6], [14]], np.float32))
    np.testing.assert_allclose(normal[:, 0], [-1, 1, 0, 2])


def test_a_dimension_that_never_varied_is_zero() -> None:
    statistics = CommandStatistics((0.0, 3.0), (1.0, 3.0))
    np.testing.assert_array_equal(statistics.normalise(np.array([[1, 7]], np.float32)), [[1, 0]])


@pytest.mark.parametrize(("rows", "actions"), [(13, 12), (14, 12), (25, 24), (26, 24), (49, 48), (50, 48)])
def test_12k_plus_1_or_2_rows_give_12k_actions(rows: int, actions: int) -> None:
    assert len(actions_from_commands(DREAMDOJO, statistics_of("gr1"), ramp(rows))) == actions


def test_the_row_beyond_has_no_effect() -> None:
    without = actions_from_commands(DREAMDOJO, statistics_of("gr1"), ramp(13))
    with_it = actions_from_commands(DREAMDOJO, statistics_of("gr1"), np.vstack((ramp(13), np.full((1, 29), 9.0))))
    np.testing.assert_array_equal(with_it, without)


@pytest.mark.parametrize("rows", [0, 1, 2, 12, 15, 24, 27])
def test_other_lengths_are_refused(rows: int) -> None:
    with pytest.raises(InvalidInputError, match=rf"{rows} rows, must be 12k \+ 1 or 12k \+ 2") as caught:
        actions_from_commands(DREAMDOJO, statistics_of("gr1"), ramp(rows))
    assert caught.value.field == "commands"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (np.zeros((13, 28)), r"must be \(R, 29\)"),
        (np.zeros(13), r"must be \(R, 29\)"),
        (np.full((13, 29), np.nan), "finite"),
        (np.full((13, 29), np.inf), "finite"),
        (np.full((13, 29), "x"), "finite"),
    ],
)
def test_bad_commands_are_refused_with_the_reason(bad: np.ndarray, reason: str) -> None:
    with pytest.raises(InvalidInputError, match=reason):
        actions_from_commands(DREAMDOJO, statistics_of("gr1"), bad)


def test_statistics_of_another_robot_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="not of gr1"):
        actions_from_commands(DREAMDOJO, statistics_of("g1"), ramp(13))


def test_actions_from_commands_pass_the_network_unchanged() -> None:
    commands = np.random.default_rng(0).uniform(-1, 1, (13, 29)).astype(np.float32)
    actions = actions_from_commands(DREAMDOJO, statistics_of("gr1"), commands)
    np.testing.assert_array_equal(encode_actions(DREAMDOJO, actions), actions.reshape(3, 4 * 384))


def write_statistics(path: Path, dimensions: int) -> Path:
    low = list(range(dimensions))
    path.write_text(json.dumps({"action": {"min": low, "max": [value + 1 for value in low], "mean": low}}))
    return path


@pytest.mark.parametrize("robot", ["g1", "yam", "agibot"])
def test_published_statistics_are_in_the_order_of_the_columns(tmp_path: Path, robot: str) -> None:
    count = EMBODIMENTS[robot].count
    statistics = CommandStatistics.read(write_statistics(tmp_path / "stats.json", count), EMBODIMENTS[robot])
    assert statistics.minimum == tuple(range(count))
    assert statistics.maximum == tuple(range(1, count + 1))


def test_the_gr1s_published_statistics_are_brought_into_the_order_of_the_columns(tmp_path: Path) -> None:
    """Recorded: left arm 0-6, left hand 7-12, leg, neck, right arm 22-28, right hand 29-34, leg, waist 41-43."""
    statistics = CommandStatistics.read(write_statistics(tmp_path / "stats.json", 44), EMBODIMENTS["gr1"])
    left_arm, right_arm, left_hand, right_hand = range(7), range(22, 29), range(7, 13), range(29, 35)
    assert statistics.minimum == (*left_arm, *right_arm, *left_hand, *right_hand, 41, 42, 43)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"action": {"min": [0]}}', '{"action": {"min": 0, "max": 1}}'])
def test_a_file_that_holds_no_statistics_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "stats.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="does not hold the statistics of actions"):
        CommandStatistics.read(path, EMBODIMENTS["g1"])


def test_a_file_of_another_robot_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has 22 dimensions, g1 has 43"):
        CommandStatistics.read(write_statistics(tmp_path / "stats.json", 22), EMBODIMENTS["g1"])
