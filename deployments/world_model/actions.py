"""Action arrays: checked, cleaned for the embodiment, cut into chunks, padded to a whole chunk; or made from commands.

T actions lead to T + 1 frames, the start frame included.
Shapes: T actions of a rollout, n of a chunk, N = chunk_size, A = action_dim, R rows of commands, E robot dimensions.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from deployments.world_model.config import Embodiment, WorldModelConfig
from deployments.world_model.errors import InvalidInputError

FloatArray = npt.NDArray[np.float32]

# The GR-1's published statistics are in the order of its recordings, with legs and neck, which no action moves: left
# arm, left hand, left leg, neck, right arm, right hand, right leg, waist (NVIDIA/DreamDojo, GR1_unified_modality.json).
GR1_RECORDED = 44
GR1_ORDER = (*range(7), *range(22, 29), *range(7, 13), *range(29, 35), *range(41, 44))


def check_actions(config: WorldModelConfig, actions_TA: npt.NDArray[np.generic], *, max_actions: int) -> None:
    """Raises InvalidInputError unless this is a finite float32 array (1..max_actions, action_dim)."""
    if actions_TA.dtype != np.float32:
        raise InvalidInputError("actions", f"dtype is {actions_TA.dtype}, must be float32")
    if actions_TA.ndim != 2 or actions_TA.shape[1] != config.action_dim:
        raise InvalidInputError("actions", f"shape is {actions_TA.shape}, must be (T, {config.action_dim})")
    if not 1 <= actions_TA.shape[0] <= max_actions:
        raise InvalidInputError("actions", f"{actions_TA.shape[0]} rows, must be 1 to {max_actions}")
    if not np.isfinite(actions_TA).all():
        raise InvalidInputError("actions", "holds NaN or infinity")


def split_chunks(config: WorldModelConfig, actions_TA: FloatArray) -> list[FloatArray]:
    """The actions of each chunk, in order; the last may be shorter than chunk_size."""
    return [actions_TA[i : i + config.chunk_size] for i in range(0, len(actions_TA), config.chunk_size)]


def pad_to_chunk(config: WorldModelConfig, actions_nA: FloatArray) -> FloatArray:
    """A whole chunk: the last action is repeated, and the frames it adds are trimmed by whoever decodes them."""
    return np.pad(actions_nA, ((0, config.chunk_size - len(actions_nA)), (0, 0)), mode="edge")


def encode_actions(config: WorldModelConfig, actions_NA: FloatArray) -> FloatArray:
    """What the network is given: the embodiment's columns, clipped, all others zero; grouped per latent frame.

    Returns (N / temporal_compression, temporal_compression * A). Training saw zeros in the columns of other
    embodiments and values within the limit, so anything else there would be noise to the network.
    """
    encoded = np.zeros_like(actions_NA)
    columns, limit = config.embodiment.columns, config.embodiment.limit
    encoded[:, columns] = actions_NA[:, columns] if limit is None else np.clip(actions_NA[:, columns], -limit, limit)
    return encoded.reshape(-1, config.grouped_action_dim)


@dataclass(frozen=True)
class CommandStatistics:
    """The least and greatest command of a robot's training data, per dimension, in the order of its action columns."""

    minimum: tuple[float, ...]
    maximum: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.minimum) != len(self.maximum):
            raise ValueError(f"{len(self.minimum)} minima and {len(self.maximum)} maxima")

    @classmethod
    def read(cls, path: Path, embodiment: Embodiment) -> CommandStatistics:
        """From a published `*_stats.json` of this robot.

        Raises:
            ValueError: it is no such file, or not of this robot.
        """
        try:
            action = json.loads(path.read_bytes())["action"]
            minimum, maximum = ([float(value) for value in action[name]] for name in ("min", "max"))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} does not hold the statistics of actions ({error!r})") from error
        recorded = GR1_RECORDED if embodiment.name == "gr1" else embodiment.count
        if len(minimum) != recorded or len(maximum) != recorded:
            raise ValueError(f"{path} has {len(minimum)} dimensions, {embodiment.name} has {recorded}")
        indices = GR1_ORDER if embodiment.name == "gr1" else range(embodiment.count)
        return cls(tuple(minimum[i] for i in indices), tuple(maximum[i] for i in indices))

    def normalise(self, commands_TE: FloatArray) -> FloatArray:
        """To [-1, 1] over the training data's range, beyond it outside; 0 in a dimension that never varied."""
        low, high = np.array(self.minimum, np.float32), np.array(self.maximum, np.float32)
        varies = low != high
        span = np.where(varies, high - low, 1)
        normal: FloatArray = np.where(varies, 2 * ((commands_TE - low) / span) - 1, 0).astype(np.float32)
        return normal


def actions_from_commands(
    config: WorldModelConfig, statistics: CommandStatistics, commands_RE: npt.NDArray[np.generic]
) -> FloatArray:
    """A robot's recorded commands to actions (12k, action_dim), as the published models were trained.

    Row 0 of `commands_RE` is the command before the start frame, row 1 the one at it; 12k + 1 rows give 12k actions. A
    last row beyond these, the command at the last frame, is accepted and has no effect, since it leads to no frame.

    Commands are absolute positions, normalised. An action is the distance from the command just before its block of
    four, so it grows within a block and starts again in the next.

    Raises:
        InvalidInputError: the commands are not finite, or not of a length or width that fits.
    """
    embodiment, block = config.embodiment, config.temporal_compression
    if commands_RE.ndim != 2 or commands_RE.shape[1] != embodiment.count:
        raise InvalidInputError("commands", f"shape is {commands_RE.shape}, must be (R, {embodiment.count})")
    if len(statistics.minimum) != embodiment.count:
        raise InvalidInputError("commands", f"the statistics are not of {embodiment.name}")
    chunks, left = divmod(len(commands_RE) - 1, config.chunk_size)
    if chunks < 1 or left > 1:
        size = config.chunk_size
        raise InvalidInputError("commands", f"{len(commands_RE)} rows, must be {size}k + 1 or {size}k + 2, k >= 1")
    if commands_RE.dtype.kind not in "fiu" or not np.isfinite(commands_RE).all():
        raise InvalidInputError("commands", "must hold finite numbers")
    normal_RE = statistics.normalise(commands_RE.astype(np.float32))
    num_actions = chunks * config.chunk_size
    blocks = normal_RE[1 : 1 + num_actions].reshape(-1, block, embodiment.count)
    before = normal_RE[0:num_actions:block, None]
    actions_TA = np.zeros((num_actions, config.action_dim), np.float32)
    actions_TA[:, embodiment.columns] = (blocks - before).reshape(num_actions, -1)
    return actions_TA
