"""Action-conditioned world models on torch alone: a start frame and actions in, a rollout of frames out.

Read `rollout.py` first: it is what callers use. It knows no Ray, no HTTP and no money.
"""

from deployments.world_model.config import MAX_GUIDANCE, MAX_NUM_STEPS, PRESETS, WorldModelConfig
from deployments.world_model.errors import CheckpointError, InvalidInputError, WorldModelError
from deployments.world_model.rollout import ChunkInput, Row, WorldModel, rollout

__all__ = [
    "MAX_GUIDANCE",
    "MAX_NUM_STEPS",
    "PRESETS",
    "CheckpointError",
    "ChunkInput",
    "InvalidInputError",
    "Row",
    "WorldModel",
    "WorldModelConfig",
    "WorldModelError",
    "rollout",
]
