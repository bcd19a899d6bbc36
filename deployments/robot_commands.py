"""A robot's own commands to the actions its model takes, for clients that record robots and not models.

Built where a model was given its robot's statistics; only then is the world model's package (and so torch) loaded.
"""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Self

from deployments.messages import Actions

if TYPE_CHECKING:
    from deployments.world_model.actions import CommandStatistics
    from deployments.world_model.config import WorldModelConfig

ROBOT_MODELS = {
    "dreamdojo-2b-gr1": "gr1",
    "dreamdojo-2b-g1": "g1",
    "dreamdojo-2b-yam": "yam",
    "dreamdojo-2b-agibot": "agibot",
}


class RobotCommands:
    """How one model's commands are encoded."""

    def __init__(self, config: "WorldModelConfig", statistics: "CommandStatistics") -> None:
        self._config = config
        self._statistics = statistics

    @classmethod
    def read(cls, slug: str, path: Path) -> Self:
        """For a catalog model, from its robot's published statistics.

        Raises:
            ValueError: the model is of no robot, or the file is not its statistics.
            OSError: the file cannot be read.
        """
        from deployments.world_model.actions import CommandStatistics
        from deployments.world_model.config import EMBODIMENTS, PRESETS

        if slug not in ROBOT_MODELS:
            raise ValueError(f"{slug} has no robot whose commands could be encoded; {', '.join(ROBOT_MODELS)} have")
        config = replace(PRESETS["dreamdojo-2b"], embodiment=EMBODIMENTS[ROBOT_MODELS[slug]])
        return cls(config, CommandStatistics.read(path, config.embodiment))

    @property
    def num_dimensions(self) -> int:
        """Width of a row of commands."""
        return self._config.embodiment.count

    def actions(self, commands: Actions) -> Actions:
        """Encoded actions (12k, A) of commands (12k + 1 or 12k + 2, num_dimensions).

        Raises:
            ValueError: their number or their values do not fit.
        """
        from deployments.world_model.actions import actions_from_commands

        return actions_from_commands(self._config, self._statistics, commands)
