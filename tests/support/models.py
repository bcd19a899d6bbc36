"""Stand-in world models whose faults are asked for in the actions, so that one cluster serves every fault test.

Column RAISE of a row's first action makes its step raise; column SLEEP_S makes each step take that long; column DIE
ends the process, as an out-of-memory kill would.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deployments.messages import Frame

RAISE, SLEEP_S, DIE = -1, -2, -3


class StandInRow:
    def __init__(self, chunk_input: Any) -> None:
        self.chunk_input = chunk_input
        self.steps = 0

    @property
    def done(self) -> bool:
        return self.steps == self.chunk_input.num_steps


class StandInModel:
    """Frames repeat the start frame, brighter by one level each; one forward costs nothing."""

    def __init__(self, directory: Path, device: str) -> None:
        self.largest_batch = 0
        self.chunks_started: list[int] = []

    def start(self, inputs: Sequence[Any]) -> list[StandInRow]:
        self.chunks_started += (chunk_input.chunk for chunk_input in inputs)
        return [StandInRow(chunk_input) for chunk_input in inputs]

    def step(self, rows: Sequence[StandInRow]) -> None:
        self.largest_batch = max(self.largest_batch, len(rows))
        first_actions = [row.chunk_input.actions[0] for row in rows]
        if any(action[DIE] for action in first_actions):
            os._exit(137)
        time.sleep(max(float(action[SLEEP_S]) for action in first_actions))
        if any(action[RAISE] for action in first_actions):
            raise ValueError("the input is poisoned")
        for row in rows:
            row.steps += 1

    def finish(self, rows: Sequence[StandInRow]) -> list[Frame]:
        return [
            np.stack(
                [row.chunk_input.start_frame + np.uint8(index + 1) for index in range(len(row.chunk_input.actions))]
            )
            for row in rows
        ]


class SteeredModel(StandInModel):
    """Each frame is as many levels brighter than the one before as its action's first value says."""

    def finish(self, rows: Sequence[StandInRow]) -> list[Frame]:
        return [
            np.clip(
                row.chunk_input.start_frame.astype(int)
                + np.cumsum(np.round(row.chunk_input.actions[:, 0])).astype(int)[:, None, None, None],
                0,
                255,
            ).astype(np.uint8)
            for row in rows
        ]

    def latents(self, frames: Frame) -> Any:
        return frames.astype(np.float32) / 255
