from pathlib import Path

import numpy as np
import pytest

from deployments.status import QUARTER_S, SAVE_EVERY_S, WINDOW_S, ModelHistory, Sample, StatusActor


class Clock:
    now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def done(total_ms: float) -> Sample:
    return Sample("m", "succeeded", 49, queue_ms=1.0, infer_ms=2.0, total_ms=total_ms)


def test_percentiles_are_those_of_finished_requests(clock: Clock) -> None:
    history = ModelHistory(clock)
    for milliseconds in range(1, 102):
        history.add(done(float(milliseconds)))
    history.add(Sample("m", "failed", 49))
    report = history.report()
    assert report.total_ms is not None
    assert report.total_ms.p50 == pytest.approx(51, abs=1)
    assert report.total_ms.p99 == pytest.approx(100, abs=1)
    assert (report.day.frames, report.day.requests) == (101 * 49, 102)


def test_percentiles_of_a_day_are_right_to_a_fifth_of_a_percent_in_rank(clock: Clock) -> None:
    history, times = ModelHistory(clock), np.random.default_rng(0).lognormal(5, 1, 40_000)
    for index, milliseconds in enumerate(times):
        history.add(done(float(milliseconds)))
        clock.now += (WINDOW_S - 2 * QUARTER_S) / len(times) if index else 0.0
    total = history.report().total_ms
    assert total is not None
    assert (times <= total.p50).mean() == pytest.approx(0.5, abs=0.02)
    assert (times <= total.p99).mean() == pytest.approx(0.99, abs=0.002)


def test_a_model_nobody_called_has_no_percentiles_and_no_errors(clock: Clock) -> None:
    report = ModelHistory(clock).report()
    assert report.total_ms is None
    assert report.day.error_rate == 0.0


def test_refusals_and_departures_are_not_engine_errors_but_what_was_paid_back_is_a_refund(clock: Clock) -> None:
    history = ModelHistory(clock)
    for outcome in ("succeeded", "failed", "canceled", "refused", "refused"):
        history.add(Sample("m", outcome, 49))  # type: ignore[arg-type]
    rates = history.report().rates["24h"]
    assert (rates.error_rate, rates.refund_rate) == (pytest.approx(1 / 3), pytest.approx(2 / 3))


def test_rates_are_of_the_last_minute_quarter_and_day(clock: Clock) -> None:
    history = ModelHistory(clock)
    for seconds in (3600, 600, 30):
        clock.now = 1_800_000_000.0 + 3600 - seconds
        history.add(Sample("m", "failed", 49))
    clock.now = 1_800_000_000.0 + 3600
    assert {name: rates.requests for name, rates in history.report().rates.items()} == {"1m": 1, "15m": 2, "24h": 3}


def test_a_sample_leaves_with_the_day(clock: Clock) -> None:
    history = ModelHistory(clock)
    history.add(done(1.0))
    clock.now += WINDOW_S
    assert history.report().day.requests == 1
    clock.now += QUARTER_S
    assert history.report().day.requests == 0


async def test_what_was_seen_outlives_the_actor(clock: Clock, tmp_path: Path) -> None:
    first = StatusActor(str(tmp_path), clock)
    await first.add([done(10.0)] * 50)
    clock.now += QUARTER_S
    await first.add([done(30.0)] * 50)
    _, before = await first.report()
    second = StatusActor(str(tmp_path), clock)
    _, after = await second.report()
    assert after["m"].day == before["m"].day
    assert after["m"].total_ms == before["m"].total_ms
    await second.add([done(20.0)])
    clock.now += 1
    assert (await second.report())[1]["m"].day.requests == 101


async def test_files_are_bounded_by_the_day(clock: Clock, tmp_path: Path) -> None:
    actor = StatusActor(str(tmp_path), clock)
    for _ in range(120):
        clock.now += max(QUARTER_S, SAVE_EVERY_S)
        await actor.add([done(10.0)])
    assert 96 <= len(list((tmp_path / "m").iterdir())) <= 98


async def test_a_broken_file_costs_its_quarter_and_nothing_else(clock: Clock, tmp_path: Path) -> None:
    actor = StatusActor(str(tmp_path), clock)
    await actor.add([done(10.0)])
    clock.now += QUARTER_S
    await actor.add([done(10.0)])
    files = sorted((tmp_path / "m").iterdir())
    files[0].write_text("not what it was")
    _, reports = await StatusActor(str(tmp_path), clock).report()
    assert reports["m"].day.requests == 1
