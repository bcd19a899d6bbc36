"""What one process has measured, and how the measurements of many become one page for Prometheus.

Processes that there is one of (ledger, schedulers, status, payments) are asked at each scrape. Of replicas and ingress
replicas there are many, which come and go: what they count travels as increments in messages that they send anyway, and
is added up by the scheduler and the status actor. So a scrape asks a handful of actors however large the cluster is,
and what a replica counted outlives it.
"""

import bisect
import itertools
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from deployments.metrics import BY_NAME, METRICS, Metric

Series = Mapping[tuple[str, tuple[str, ...]], tuple[float, ...]]
"""By metric and labels: a value; of a histogram a count per bucket, the one without a bound, and the sum."""


@dataclass(slots=True)
class Meter:
    """Counts for any thread of one process."""

    _values: dict[tuple[str, tuple[str, ...]], list[float]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, metric: Metric, *labels: str, by: float = 1.0) -> None:
        assert metric.kind == "counter", metric.name
        with self._lock:
            self._entry(metric, labels)[0] += by

    def set(self, metric: Metric, *labels: str, to: float) -> None:
        assert metric.kind == "gauge", metric.name
        with self._lock:
            self._entry(metric, labels)[0] = to

    def observe(self, metric: Metric, *labels: str, value: float) -> None:
        assert metric.kind == "histogram", metric.name
        with self._lock:
            entry = self._entry(metric, labels)
            entry[bisect.bisect_left(metric.buckets, value)] += 1
            entry[-1] += value

    def add(self, series: Series) -> None:
        """Take over increments of another process; a gauge is taken as it is."""
        with self._lock:
            for (name, labels), values in series.items():
                metric = BY_NAME[name]
                entry = self._entry(metric, labels)
                before = entry if metric.kind != "gauge" else [0.0]
                entry[:] = map(float.__add__, before, values)

    def series(self) -> Series:
        with self._lock:
            return {key: tuple(values) for key, values in self._values.items()}

    def drain(self) -> Series:
        """What was measured since the last time, for whoever adds it up; `add` it again if it did not arrive."""
        with self._lock:
            drained = {key: tuple(values) for key, values in self._values.items()}
            self._values.clear()
            return drained

    def _entry(self, metric: Metric, labels: tuple[str, ...]) -> list[float]:
        entry = self._values.get((metric.name, labels))
        if entry is None:
            assert len(labels) == len(metric.labels), (metric.name, labels)
            entry = [0.0] * (len(metric.buckets) + 2 if metric.kind == "histogram" else 1)
            self._values[metric.name, labels] = entry
        return entry


def exposition(parts: Iterable[Series]) -> bytes:
    """Prometheus's text format of all of them. No two parts have the same metric with the same labels."""
    series: dict[tuple[str, tuple[str, ...]], tuple[float, ...]] = {}
    for part in parts:
        assert not series.keys() & part.keys(), series.keys() & part.keys()
        series.update(part)
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collected(series))
    return generate_latest(registry)


class _Collected(Collector):
    def __init__(self, series: Series) -> None:
        self._series = series

    def collect(self) -> Iterator[Family]:
        by_name: dict[str, list[tuple[tuple[str, ...], tuple[float, ...]]]] = {}
        for (name, labels), values in sorted(self._series.items()):
            by_name.setdefault(name, []).append((labels, values))
        for metric in METRICS:
            if metric.name in by_name:
                yield _family(metric, by_name[metric.name])


def _family(metric: Metric, samples: list[tuple[tuple[str, ...], tuple[float, ...]]]) -> Family:
    match metric.kind:
        case "counter":
            counter = CounterMetricFamily(metric.name, metric.help, labels=metric.labels)
            for labels, values in samples:
                counter.add_metric(labels, values[0])
            return counter
        case "gauge":
            gauge = GaugeMetricFamily(metric.name, metric.help, labels=metric.labels)
            for labels, values in samples:
                gauge.add_metric(labels, values[0])
            return gauge
        case "histogram":
            histogram = HistogramMetricFamily(metric.name, metric.help, labels=metric.labels)
            bounds = [*map(str, metric.buckets), "+Inf"]
            for labels, values in samples:
                counts = itertools.accumulate(values[:-1])
                histogram.add_metric(labels, list(zip(bounds, counts, strict=True)), values[-1])
            return histogram
