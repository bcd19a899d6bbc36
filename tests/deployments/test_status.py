import pytest

from deployments.status import MAX_SAMPLES, WINDOW_S, LatencyWindow, Percentiles, Sample, StatusActor


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def done(total_ms: float) -> Sample:
    return Sample("m", "succeeded", 49, queue_ms=1.0, infer_ms=2.0, total_ms=total_ms)


def test_percentiles_are_those_of_finished_requests(clock: Clock) -> None:
    window = LatencyWindow(clock)
    for milliseconds in range(1, 102):
        window.add(done(float(milliseconds)))
    window.add(Sample("m", "failed", 49))
    report = window.report()
    assert report.total_ms == Percentiles(p50=51.0, p90=91.0, p99=100.0)
    assert report.frames == 101 * 49
    assert report.requests == 102


def test_a_model_nobody_called_has_no_percentiles_and_no_errors(clock: Clock) -> None:
    report = LatencyWindow(clock).report()
    assert report.total_ms is None
    assert report.error_rate == 0.0


def test_refusals_and_departures_are_not_engine_errors(clock: Clock) -> None:
    window = LatencyWindow(clock)
    for outcome in ("succeeded", "failed", "canceled", "refused", "refused"):
        window.add(Sample("m", outcome, 49))  # type: ignore[arg-type]
    assert window.report().error_rate == pytest.approx(1 / 3)


def test_a_sample_leaves_with_the_window(clock: Clock) -> None:
    window = LatencyWindow(clock)
    window.add(done(1.0))
    clock.now = WINDOW_S
    assert window.report().requests == 1
    clock.now += 1
    assert window.report().requests == 0


def test_memory_is_bounded(clock: Clock) -> None:
    window = LatencyWindow(clock)
    for _ in range(MAX_SAMPLES + 10):
        window.add(Sample("m", "refused", 1))
    assert window.report().requests == MAX_SAMPLES


async def test_the_actor_keeps_models_apart() -> None:
    actor = StatusActor()
    await actor.add([Sample("a", "failed", 1), Sample("b", "refused", 1)])
    _, reports = await actor.report()
    assert (reports["a"].failed, reports["b"].failed) == (1, 0)


async def test_a_report_is_made_anew_at_most_once_a_second(clock: Clock) -> None:
    actor = StatusActor(clock)
    await actor.add([done(1.0)])
    for now, requests in ((0.0, 1), (0.9, 1), (1.0, 2)):
        clock.now = now
        assert (await actor.report())[1]["m"].requests == requests
        if now == 0.0:
            await actor.add([done(1.0)])
