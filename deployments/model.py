"""What the engine asks of a world model, whichever it is."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from deployments.messages import Frames

OUT_OF_MEMORY = (MemoryError, torch.OutOfMemoryError)
"""What a model raises when a batch is too large for its device."""


class Model(Protocol):
    """What a world model offers the engine. A row is the model's own object; the engine reads only its `done`."""

    def start(self, inputs: Sequence[Any]) -> list[Any]:
        """One row per input; an input has the fields of `ChunkRow`."""

    def step(self, rows: Sequence[Any]) -> None:
        """One denoising step of every row in one forward. Raising must leave the rows as they were."""

    def finish(self, rows: Sequence[Any]) -> list[Frames]:
        """uint8 (n, H, W, 3) per row: the frames after its start frame.

        A row that gives its frames in parts has a method `take`: the next part that is ready, once, or None. Then this
        is called with parts, and they may have `traces` and `keep_traces`, as a `ChunkPiece`.
        """
