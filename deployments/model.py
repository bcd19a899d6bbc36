"""What the engine asks of a world model, whichever it is."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from deployments.messages import Frame

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""What a model raises when a batch is too large for its device."""


class Model(Protocol):
    """What a world model offers the engine. A row is the model's own object; the engine reads only its `done`."""

    def start(self, inputs: Sequence[Any]) -> list[Any]:
        """One row per input; an input has the fields of `ChunkRow`."""

    def step(self, rows: Sequence[Any]) -> None:
        """One denoising step of every row in one forward. Raising must leave the rows as they were."""

    def finish(self, rows: Sequence[Any]) -> list[Frame]:
        """uint8 (n, H, W, 3) per row: the frames after its start frame."""
