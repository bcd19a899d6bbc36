import json
from pathlib import Path

import numpy as np
import pytest

from deployments.robot_commands import ROBOT_MODELS, RobotCommands
from serve_app.catalog import CATALOG


@pytest.fixture
def statistics(tmp_path: Path) -> Path:
    """The published shape of a Unitree G1's statistics: 43 dimensions, each from -2 to 2."""
    path = tmp_path / "g1_stats.json"
    path.write_text(json.dumps({"action": {"min": [-2.0] * 43, "max": [2.0] * 43}}))
    return path


def test_commands_become_the_columns_of_their_robot(statistics: Path) -> None:
    robot = RobotCommands.read("dreamdojo-2b-g1", statistics)
    commands = np.zeros((13, robot.num_dimensions), np.float32)
    commands[1:, 0] = np.arange(1, 13) / 10
    actions = robot.actions(commands)
    assert actions.shape == (12, 384)
    assert np.flatnonzero(actions.any(axis=0)).tolist() == [58]
    assert np.allclose(actions[:, 58] * 2, [0.1, 0.2, 0.3, 0.4] * 3)


def test_every_robot_of_the_catalog_has_its_commands() -> None:
    assert set(ROBOT_MODELS) == {slug for slug in CATALOG if slug.startswith("dreamdojo")}


def test_a_model_without_a_robot_and_a_wrong_number_of_commands_are_refused(statistics: Path) -> None:
    with pytest.raises(ValueError, match="tiny-pusher has no robot"):
        RobotCommands.read("tiny-pusher", statistics)
    with pytest.raises(ValueError, match="43"):
        RobotCommands.read("dreamdojo-2b-yam", statistics)
    with pytest.raises(ValueError, match="12 rows"):
        RobotCommands.read("dreamdojo-2b-g1", statistics).actions(np.zeros((12, 43), np.float32))
