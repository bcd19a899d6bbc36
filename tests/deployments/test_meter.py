"""What is measured in one process arrives on the page, once, whatever the way."""

import asyncio
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from deployments.engine import Engine
from deployments.messages import ReplicaId, Ticket, TicketId, TicketTerms
from deployments.meter import Meter, Series, exposition
from deployments.metrics import (
    ENGINE_BISECTIONS,
    ENGINE_STEP_ROWS,
    HTTP_REQUESTS,
    LATENT_CACHE_BYTES,
    LEDGER_ENTRIES,
    METRICS,
    REPLICAS,
)
from deployments.scheduler import SchedulerLimits
from deployments.scheduler_actor import SchedulerActor
from deployments.status import Sample, measure_sample
from deployments.status_client import StatusClient
from tests.support.app import LocalActor
from tests.support.models import StandInModel


def samples(page: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    families = text_string_to_metric_families(page.decode())
    return {(each.name, tuple(sorted(each.labels.items()))): each.value for one in families for each in one.samples}


def test_a_value_at_a_bound_is_in_that_bucket_and_one_beyond_the_last_in_none_but_infinity() -> None:
    meter = Meter()
    for rows in (1, 2, 2, 3, 1000):
        meter.observe(ENGINE_STEP_ROWS, "m", value=rows)
    page = samples(exposition([meter.series()]))

    def below(bound: str) -> float:
        return page["dream_engine_step_rows_bucket", (("le", bound), ("model", "m"))]

    assert [below(bound) for bound in ("1.0", "2.0", "4.0", "256.0", "+Inf")] == [1, 3, 4, 4, 5]
    assert page["dream_engine_step_rows_sum", (("model", "m"),)] == 1008
    assert page["dream_engine_step_rows_count", (("model", "m"),)] == 5


def test_drained_increments_add_up_to_what_was_counted_and_gauges_to_what_they_are() -> None:
    replica, scheduler = Meter(), Meter()
    for gauge in (7.0, 3.0):
        replica.count(ENGINE_BISECTIONS, "m", by=2)
        replica.observe(ENGINE_STEP_ROWS, "m", value=4)
        replica.set(LATENT_CACHE_BYTES, "m", to=gauge)
        scheduler.add(replica.drain())
    assert replica.series() == {}
    series = scheduler.series()
    assert series["dream_engine_bisections_total", ("m",)] == (4.0,)
    assert series["dream_latent_cache_bytes", ("m",)] == (3.0,)
    assert sum(series["dream_engine_step_rows", ("m",)][:-1]) == 2


def test_what_is_rare_is_on_the_page_at_nought_before_it_happens_so_that_an_alert_sees_the_first() -> None:
    meter = Meter()
    Engine(StandInModel(Path(), "cpu"), (16, 16), fps=10, max_rows=2, slug="m", meter=meter).stop()
    measure_sample(meter, Sample("m", "succeeded", num_frames=49))
    page = samples(exposition([meter.series()]))
    for name in ("dream_engine_out_of_memory_total", "dream_engine_rows_failed_total", "dream_engine_bisections_total"):
        assert page[name, (("model", "m"),)] == 0
    by_outcome = {"succeeded": 1, "refused": 0, "failed": 0, "canceled": 0}
    assert {key: page["dream_rollouts_total", (("model", "m"), ("outcome", key))] for key in by_outcome} == by_outcome


def test_labels_reach_the_page_whatever_is_in_them() -> None:
    meter = Meter()
    meter.count(HTTP_REQUESTS, 'a "quoted"\nroute\\', "GET", "200")
    ((_, labels),) = samples(exposition([meter.series()]))
    assert dict(labels)["route"] == 'a "quoted"\nroute\\'


def test_two_parts_that_claim_the_same_series_are_a_defect() -> None:
    meter = Meter()
    meter.set(REPLICAS, "m", "ready", to=1)
    with pytest.raises(AssertionError):
        exposition([meter.series(), meter.series()])


def test_names_follow_prometheus_rules() -> None:
    for metric in METRICS:
        assert metric.name.startswith("dream_")
        assert metric.name.endswith("_total") == (metric.kind == "counter"), metric.name
        assert bool(metric.buckets) == (metric.kind == "histogram"), metric.name
        assert list(metric.buckets) == sorted(set(metric.buckets))
        assert not any(bad in metric.name for bad in ("_ms", "_mb", "_pct")), metric.name
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_no_metric_is_counted_by_customer_or_request() -> None:
    assert not {label for metric in METRICS for label in metric.labels} & {
        "customer",
        "customer_id",
        "key",
        "key_id",
        "request_id",
        "replica",
        "replica_id",
        "path",
    }


async def test_what_a_lost_replica_counted_stays_and_its_gauges_go() -> None:
    def measured(num_bytes: float) -> Series:
        meter = Meter()
        meter.count(ENGINE_BISECTIONS, "m")
        meter.set(LATENT_CACHE_BYTES, "m", to=num_bytes)
        return meter.drain()

    actor = SchedulerActor(SchedulerLimits(), "m")
    for name, num_bytes in (("a", 10.0), ("b", 5.0)):
        await actor.replica_alive(ReplicaId(name), 4, measured=measured(num_bytes))
    _, series = await actor.metrics()
    assert series["dream_latent_cache_bytes", ("m",)] == (15.0,)
    await actor.replica_gone(ReplicaId("a"))
    _, series = await actor.metrics()
    assert series["dream_latent_cache_bytes", ("m",)] == (5.0,)
    assert series["dream_engine_bisections_total", ("m",)] == (2.0,)
    _stop(actor)


async def test_grants_refusals_and_what_waits_are_counted_by_class() -> None:
    actor = SchedulerActor(SchedulerLimits(max_queued_rows=2), "m")
    await actor.replica_alive(ReplicaId("r"), 1)

    def ticket(name: str, rows: int = 1) -> Ticket:
        return Ticket(TicketId(name), rows, terms=TicketTerms(service_class="batch"))

    for name in ("running", "next"):
        await actor.acquire(ticket(name))
    waiting = [asyncio.create_task(actor.acquire(ticket(name, rows))) for name, rows in (("w", 2), ("refused", 2))]
    await waiting[1]
    status, series = await actor.metrics()
    assert status.queued["batch"] == (2, 2)
    assert status.queued["interactive"] == (0, 0)
    assert sum(series["dream_scheduler_grant_seconds", ("m", "batch")][:-1]) == 2
    assert series["dream_scheduler_refusals_total", ("m", "batch", "overloaded")] == (1.0,)
    waiting[0].cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    status, series = await actor.metrics()
    assert status.queued["batch"] == (0, 0)
    assert series["dream_scheduler_refusals_total", ("m", "batch", "withdrawn")] == (1.0,)
    _stop(actor)


async def test_increments_that_did_not_arrive_are_sent_again() -> None:
    class Actor:
        away = True
        meter = Meter()

        async def add(self, _: list[Any], measured: Series) -> None:
            if self.away:
                raise ConnectionError("it restarts")
            self.meter.add(measured)

        async def metrics(self) -> Series:
            return self.meter.series()

    actor = Actor()
    client = StatusClient(LocalActor(actor))
    client.meter.count(LEDGER_ENTRIES, "debit")
    await client._send()
    actor.away = False
    client.meter.count(LEDGER_ENTRIES, "debit")
    assert (await client.metrics())["dream_ledger_entries_total", ("debit",)] == (2.0,)


def _stop(actor: SchedulerActor) -> None:
    assert actor._expiry is not None
    actor._expiry.cancel()
