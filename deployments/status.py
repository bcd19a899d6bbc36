"""What the cluster has done lately: outcomes and latency percentiles per model, over a minute, a quarter and a day.

Ingress replicas report each finished request to one actor, so the figures are the cluster's, not one replica's. Times
go into sketches, one set per quarter of an hour: those of different quarters, and of an actor that was killed and its
successor, add up to the day's percentiles, and what they take does not grow with the number of requests.

A sketch is a relative-error quantile sketch (REQ: Cormode, Karnin, Liberty, Thaler, Vesely 2021), exact at the tail: of
100,000 requests the reported p99 is one that 98.9% to 99.1% of them were faster than.
"""

import base64
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, get_args

import structlog
from datasketches import req_floats_sketch

from deployments.logs import configure_logs
from deployments.meter import Meter, Series
from deployments.metrics import (
    ROLLOUT_INFER_SECONDS,
    ROLLOUT_QUEUE_SECONDS,
    ROLLOUT_SECONDS,
    ROLLOUTS,
)

WINDOW_S = 24 * 3600.0
QUARTER_S = 900.0
"""Of an hour: what is kept in one file, and one point of a sparkline."""
SLICE_S = 10.0
"""Outcomes of the last quarter are counted in slices of this length, for rates over minutes."""
SKETCH_K = 12
"""Accuracy of a sketch; datasketches' default."""
REPORT_EVERY_S = 1.0
"""Anybody may ask, and merging a day's sketches takes milliseconds."""
SAVE_EVERY_S = 10.0
"""A killed actor loses at most this much."""

Outcome = Literal["succeeded", "refused", "failed", "canceled"]
TIMES = ("queue_ms", "infer_ms", "total_ms")

log = structlog.get_logger(__name__)


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


@dataclass(slots=True)
class Counts:
    """Requests by how they ended, and the frames of those that succeeded."""

    succeeded: int = 0
    refused: int = 0
    failed: int = 0
    canceled: int = 0
    frames: int = 0

    def add(self, sample: Sample) -> None:
        setattr(self, sample.outcome, getattr(self, sample.outcome) + 1)
        if sample.outcome == "succeeded":
            self.frames += sample.num_frames

    def plus(self, other: "Counts") -> "Counts":
        return Counts(*(getattr(self, each.name) + getattr(other, each.name) for each in fields(Counts)))

    @property
    def requests(self) -> int:
        return self.succeeded + self.refused + self.failed + self.canceled

    @property
    def ran(self) -> int:
        """Those that were let in and paid for."""
        return self.requests - self.refused

    @property
    def error_rate(self) -> float:
        """Engine failures over requests that ran; refusals and departures of clients are not errors."""
        return self.failed / self.ran if self.ran else 0.0

    @property
    def refund_rate(self) -> float:
        """Requests that were paid back over requests that ran."""
        return (self.failed + self.canceled) / self.ran if self.ran else 0.0


@dataclass(frozen=True, slots=True)
class Rates:
    requests: int
    error_rate: float
    refund_rate: float


@dataclass(frozen=True, slots=True)
class QuarterReport:
    """One point of a sparkline."""

    started_at: float
    requests: int
    total_ms: Percentiles | None


@dataclass(frozen=True, slots=True)
class ModelReport:
    day: Counts
    queue_ms: Percentiles | None
    infer_ms: Percentiles | None
    total_ms: Percentiles | None
    rates: dict[str, Rates]
    """Over `1m`, `15m` and `24h`."""
    quarters: tuple[QuarterReport, ...]
    """Those of the last day in which anything happened, oldest first."""


NO_RATES = Rates(0, 0.0, 0.0)
NOTHING_YET = ModelReport(Counts(), None, None, None, dict.fromkeys(("1m", "15m", "24h"), NO_RATES), ())
"""The report of a model that nobody has called."""


def _sketch() -> req_floats_sketch:
    return req_floats_sketch(SKETCH_K, True)


@dataclass(slots=True)
class _Quarter:
    started_at: float
    counts: Counts = field(default_factory=Counts)
    sketches: dict[str, req_floats_sketch] = field(default_factory=lambda: {name: _sketch() for name in TIMES})
    saved: bool = False

    def add(self, sample: Sample) -> None:
        self.counts.add(sample)
        if sample.outcome == "succeeded":
            for name in TIMES:
                value = getattr(sample, name)
                if value is not None:
                    self.sketches[name].update(value)
        self.saved = False

    def to_json(self) -> str:
        sketches = {name: base64.b64encode(sketch.serialize()).decode() for name, sketch in self.sketches.items()}
        return json.dumps({"started_at": self.started_at, "counts": asdict(self.counts), "sketches": sketches})

    @classmethod
    def from_json(cls, text: str) -> "_Quarter":
        read: dict[str, Any] = json.loads(text)
        sketches = {name: req_floats_sketch.deserialize(base64.b64decode(read["sketches"][name])) for name in TIMES}
        return cls(float(read["started_at"]), Counts(**read["counts"]), sketches, saved=True)


class ModelHistory:
    """The last day of one model. `clock` gives POSIX seconds: what is kept must mean the same after a restart."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._quarters: deque[_Quarter] = deque()
        self._slices: deque[tuple[float, Counts]] = deque()

    def add(self, sample: Sample) -> None:
        now = self._clock()
        start = now - now % QUARTER_S
        if not self._quarters or self._quarters[-1].started_at < start:
            self._quarters.append(_Quarter(start))
        self._quarters[-1].add(sample)  # a clock that steps back adds to the newest
        start = now - now % SLICE_S
        if not self._slices or self._slices[-1][0] < start:
            self._slices.append((start, Counts()))
        self._slices[-1][1].add(sample)
        self._forget()

    def report(self) -> ModelReport:
        self._forget()
        day, merged = Counts(), {name: _sketch() for name in TIMES}
        for quarter in self._quarters:
            day = day.plus(quarter.counts)
            for name in TIMES:
                merged[name].merge(quarter.sketches[name])
        counts = {"1m": self._recent(60.0), "15m": self._recent(QUARTER_S), "24h": day}
        return ModelReport(
            day=day,
            **{name: _percentiles(sketch) for name, sketch in merged.items()},
            rates={name: Rates(each.requests, each.error_rate, each.refund_rate) for name, each in counts.items()},
            quarters=tuple(
                QuarterReport(each.started_at, each.counts.requests, _percentiles(each.sketches["total_ms"]))
                for each in self._quarters
            ),
        )

    def save(self, directory: Path) -> None:
        """One file per quarter, written whole; only what has changed is written, and what is too old is removed."""
        directory.mkdir(parents=True, exist_ok=True)
        for quarter in list(self._quarters):
            if not quarter.saved:
                file = directory / f"{int(quarter.started_at)}.json"
                partial = file.with_suffix(".partial")
                quarter.saved = True  # before it is read: what is added meanwhile is saved next time
                partial.write_text(quarter.to_json())
                os.replace(partial, file)
        for file in directory.glob("*.json"):
            if float(file.stem) <= self._clock() - WINDOW_S - QUARTER_S:
                file.unlink(missing_ok=True)

    def load(self, directory: Path) -> None:
        for file in sorted(directory.glob("*.json")):
            try:
                self._quarters.append(_Quarter.from_json(file.read_text()))
            except (ValueError, KeyError, TypeError, RuntimeError) as error:
                log.warning("status_file_unreadable", file=str(file), error=type(error).__name__)
        self._forget()

    def _forget(self) -> None:
        now = self._clock()
        while self._quarters and self._quarters[0].started_at <= now - WINDOW_S - QUARTER_S:
            self._quarters.popleft()
        while self._slices and self._slices[0][0] <= now - QUARTER_S - SLICE_S:
            self._slices.popleft()

    def _recent(self, seconds: float) -> Counts:
        since, total = self._clock() - seconds - SLICE_S, Counts()
        for start, counts in self._slices:
            if start > since:
                total = total.plus(counts)
        return total


class StatusActor:
    """One per cluster. What it knows outlives it in `directory`. `clock` gives POSIX seconds."""

    def __init__(self, directory: str, clock: Callable[[], float] = time.time) -> None:
        configure_logs()
        self._directory = Path(directory)
        self._clock = clock
        self._started_at = clock()
        self._histories: dict[str, ModelHistory] = {}
        self._saved_at = self._reported_at = -math.inf
        self._reports: dict[str, ModelReport] = {}
        self._meter = Meter()
        if self._directory.is_dir():
            for each in sorted(self._directory.iterdir()):
                if each.is_dir():
                    self._history(each.name).load(each)

    async def add(self, samples: list[Sample], measured: Series | None = None) -> None:
        """`measured`: what an ingress replica has counted since it last said so."""
        self._meter.add(measured or {})
        for sample in samples:
            self._history(sample.model).add(sample)
            measure_sample(self._meter, sample)
        if self._clock() - self._saved_at >= SAVE_EVERY_S:
            self._saved_at = self._clock()
            self._save()

    async def report(self) -> tuple[float, dict[str, ModelReport]]:
        """POSIX seconds at which this actor began, and each model's report, made anew at most once a second."""
        if self._clock() - self._reported_at >= REPORT_EVERY_S:
            self._reported_at = self._clock()
            self._reports = {model: history.report() for model, history in self._histories.items()}
        return self._started_at, self._reports

    async def metrics(self) -> Series:
        return self._meter.series()

    def _history(self, model: str) -> ModelHistory:
        if model not in self._histories:
            self._histories[model] = ModelHistory(self._clock)
        return self._histories[model]

    def _save(self) -> None:
        try:
            for model, history in self._histories.items():
                history.save(self._directory / model)
        except OSError as error:
            log.error("status_not_saved", directory=str(self._directory), error=error.strerror)


def measure_sample(meter: Meter, sample: Sample) -> None:
    for outcome in get_args(Outcome):
        # All at once: Prometheus sees no increase in a series that begins with its first event.
        meter.count(ROLLOUTS, sample.model, outcome, by=outcome == sample.outcome)
    if sample.outcome == "succeeded":
        for metric, milliseconds in (
            (ROLLOUT_QUEUE_SECONDS, sample.queue_ms),
            (ROLLOUT_INFER_SECONDS, sample.infer_ms),
            (ROLLOUT_SECONDS, sample.total_ms),
        ):
            if milliseconds is not None:
                meter.observe(metric, sample.model, value=milliseconds / 1e3)


def _percentiles(sketch: req_floats_sketch) -> Percentiles | None:
    if sketch.is_empty():
        return None
    p50, p90, p99 = (round(float(value), 3) for value in sketch.get_quantiles([0.5, 0.9, 0.99]))
    return Percentiles(p50, p90, p99)
