"""How long a forward of b rows takes, and what follows from it: how many rows are worth one forward.

t(b) = a + c*b: a is what any forward costs (launches, weights read), c what a row adds. A larger batch shares a among
more rows, for less and less: beyond the cap a further row would raise the throughput by less than `WORTHWHILE`.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

WORTHWHILE = 0.03
NEGLIGIBLE_S = 0.002
"""A step of all rows that takes less than this is not worth splitting, whatever a row adds to it."""


@dataclass(frozen=True, slots=True)
class BatchProfile:
    """Of one denoising step, on the replica that it was measured on."""

    base_s: float
    row_s: float

    def __post_init__(self) -> None:
        if self.base_s < 0 or self.row_s <= 0:
            raise ValueError(f"a step cannot take {self.base_s} s + {self.row_s} s per row")

    @classmethod
    def fit(cls, measured_s: Mapping[int, float]) -> "BatchProfile":
        """Least squares over rows -> seconds, of which there is at least one.

        Relative errors count, so that one slow measurement of a large batch does not bend the small ones.
        """
        rows = np.array(list(measured_s), float)
        seconds = np.array(list(measured_s.values()), float)
        if len(rows) == 1:
            return cls(0.0, float(seconds[0] / rows[0]))
        design = np.stack([1 / seconds, rows / seconds], axis=1)
        (base_s, row_s), *_ = np.linalg.lstsq(design, np.ones(len(rows)), rcond=None)
        if base_s < 0:  # measured as worse than proportional: noise, or a cache that a batch outgrows
            return cls(0.0, float((seconds / rows).mean()))
        least_s = float(seconds.mean()) * 1e-6
        if row_s < least_s:  # a row adds less than can be measured
            return cls(float(seconds.mean()), least_s)
        return cls(float(base_s), float(row_s))

    def step_s(self, rows: int) -> float:
        return self.base_s + self.row_s * rows

    def rows_per_s(self, rows: int) -> float:
        """Row-steps per second at this batch size."""
        return rows / self.step_s(rows)

    def cap(self, max_rows: int) -> int:
        """The batch beyond which a further row gains less than `WORTHWHILE`, at most `max_rows`."""
        if self.step_s(max_rows) <= NEGLIGIBLE_S:
            return max_rows
        rows = 1
        while rows < max_rows and self.rows_per_s(rows + 1) >= (1 + WORTHWHILE) * self.rows_per_s(rows):
            rows += 1
        return rows
