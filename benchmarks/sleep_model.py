"""A world model that takes a known time and computes nothing: one step of b rows sleeps a + c b seconds.

`STAND_IN_STEP_MS` in the environment is `a,c`. Sleeping leaves the machine's cores to what is being measured around it.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deployments.messages import Frame

STEP_MS_VARIABLE = "STAND_IN_STEP_MS"


class SleepRow:
    def __init__(self, chunk_input: Any) -> None:
        self.chunk_input = chunk_input
        self.steps_left = chunk_input.num_steps

    @property
    def done(self) -> bool:
        return bool(self.steps_left <= 0)


class SleepModel:
    def __init__(self, directory: Path, device: str) -> None:
        self._fixed_s, self._row_s = (float(ms) / 1e3 for ms in os.environ[STEP_MS_VARIABLE].split(","))

    def start(self, inputs: Sequence[Any]) -> list[SleepRow]:
        return [SleepRow(chunk_input) for chunk_input in inputs]

    def step(self, rows: Sequence[SleepRow]) -> None:
        time.sleep(self._fixed_s + self._row_s * len(rows))
        for row in rows:
            row.steps_left -= 1

    def finish(self, rows: Sequence[SleepRow]) -> list[Frame]:
        return [np.repeat(row.chunk_input.start_frame[None], len(row.chunk_input.actions), axis=0) for row in rows]
