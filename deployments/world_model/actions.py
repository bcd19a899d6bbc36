"""Action arrays: checked, cleaned for the embodiment, cut into chunks, padded to a whole chunk.

T actions lead to T + 1 frames, the start frame included.
Shapes: T actions of a rollout, n of a chunk, N = chunk_size, A = action_dim.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from deployments.world_model.config import WorldModelConfig
from deployments.world_model.errors import InvalidInputError

FloatArray = npt.NDArray[np.float32]


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
