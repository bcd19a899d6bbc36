"""A world model that computes nothing: what remains of a request is the control plane."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deployments.messages import Frame


class NoOpRow:
    done = False

    def __init__(self, chunk_input: Any) -> None:
        self.chunk_input = chunk_input


class NoOpModel:
    """Every frame is the start frame; one denoising step costs nothing."""

    def __init__(self, directory: Path, device: str) -> None:
        pass

    def start(self, inputs: Sequence[Any]) -> list[NoOpRow]:
        return [NoOpRow(chunk_input) for chunk_input in inputs]

    def step(self, rows: Sequence[NoOpRow]) -> None:
        for row in rows:
            row.done = True

    def finish(self, rows: Sequence[NoOpRow]) -> list[Frame]:
        return [np.repeat(row.chunk_input.start_frame[None], len(row.chunk_input.actions), axis=0) for row in rows]
