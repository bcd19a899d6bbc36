"""What row-steps per second are in rollouts: of the standard length, one candidate, the model's own number of steps."""

import math

from deployments.messages import ModelSpec
from serve_app.catalog import STANDARD_FRAMES


def rollouts_per_s(spec: ModelSpec, cost_per_s: float) -> float:
    chunks = math.ceil((STANDARD_FRAMES - 1) / spec.chunk_size)
    return cost_per_s / (chunks * spec.forwards(spec.chunk_size, spec.default_num_steps, spec.default_guidance))
