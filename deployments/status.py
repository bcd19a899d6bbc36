"""What the cluster has done lately: counts and latency percentiles per model over a rolling window.

Ingress replicas report each finished request to one actor, so the figures are the cluster's, not one replica's. A
bounded number of samples is kept; percentiles are exact over those.
"""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from deployments.logs import configure_logs

WINDOW_S = 24 * 3600.0
MAX_SAMPLES = 50_000
REPORT_EVERY_S = 1.0
"""Anybody may ask, and percentiles of a full window take tens of milliseconds."""

Outcome = Literal["succeeded", "refused", "failed", "canceled"]


@dataclass(frozen=True, slots=True)
class Sample:
    """One request's end. Times are None where the request never got that far."""

    model: str
    outcome: Outcome
    num_frames: int
    queue_ms: float | None = None
    infer_ms: float | None = None
    total_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Percentiles:
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class ModelReport:
    requests: int
    frames: int
    failed: int
    canceled: int
    refused: int
    queue_ms: Percentiles | None
    infer_ms: Percentiles | None
    total_ms: Percentiles | None

    @property
    def error_rate(self) -> float:
        """Engine failures over requests that ran; refusals and departures of clients are not errors."""
        ran = self.requests - self.refused
        return self.failed / ran if ran else 0.0


class LatencyWindow:
    """The last `WINDOW_S` seconds of one model's samples, at most `MAX_SAMPLES`. `clock` in seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._samples: deque[tuple[float, Sample]] = deque(maxlen=MAX_SAMPLES)

    def add(self, sample: Sample) -> None:
        self._samples.append((self._clock(), sample))

    def report(self) -> ModelReport:
        oldest = self._clock() - WINDOW_S
        while self._samples and self._samples[0][0] < oldest:
            self._samples.popleft()
        samples = [sample for _, sample in self._samples]
        succeeded = [sample for sample in samples if sample.outcome == "succeeded"]
        return ModelReport(
            requests=len(samples),
            frames=sum(sample.num_frames for sample in succeeded),
            failed=sum(sample.outcome == "failed" for sample in samples),
            canceled=sum(sample.outcome == "canceled" for sample in samples),
            refused=sum(sample.outcome == "refused" for sample in samples),
            queue_ms=_percentiles([sample.queue_ms for sample in succeeded]),
            infer_ms=_percentiles([sample.infer_ms for sample in succeeded]),
            total_ms=_percentiles([sample.total_ms for sample in succeeded]),
        )


class StatusActor:
    """One per cluster; what it knows starts again with it. `clock` in seconds, monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        configure_logs()
        self._clock = clock
        self._started_at = time.time()
        self._windows: defaultdict[str, LatencyWindow] = defaultdict(lambda: LatencyWindow(clock))
        self._reported_at = float("-inf")
        self._reports: dict[str, ModelReport] = {}

    async def add(self, samples: list[Sample]) -> None:
        for sample in samples:
            self._windows[sample.model].add(sample)

    async def report(self) -> tuple[float, dict[str, ModelReport]]:
        """POSIX seconds at which counting began, and each model's report, made anew at most once a second."""
        if self._clock() - self._reported_at >= REPORT_EVERY_S:
            self._reported_at = self._clock()
            self._reports = {model: window.report() for model, window in self._windows.items()}
        return self._started_at, self._reports


NOTHING_YET = ModelReport(0, 0, 0, 0, 0, None, None, None)
"""The report of a model that nobody has called."""


def _percentiles(values: Sequence[float | None]) -> Percentiles | None:
    known = [value for value in values if value is not None]
    if not known:
        return None
    p50, p90, p99 = (round(float(value), 3) for value in np.percentile(known, (50, 90, 99)))
    return Percentiles(p50, p90, p99)
