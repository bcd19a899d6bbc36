"""A key may come as often as its bucket says, and is told the truth about when to come again."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve_app import rate_limit
from serve_app.rate_limit import TokenBuckets


class Clock:
    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def test_a_new_key_may_burst_and_no_more() -> None:
    buckets = TokenBuckets(Clock())
    assert [buckets.take("key", 1.0, 3) for _ in range(4)] == [None, None, None, 1]


def test_tokens_come_back_at_the_keys_rate() -> None:
    clock = Clock()
    buckets = TokenBuckets(clock)
    for _ in range(3):
        assert buckets.take("key", 2.0, 3) is None
    clock.now += 0.4
    assert buckets.take("key", 2.0, 3) == 1
    clock.now += 0.1
    assert buckets.take("key", 2.0, 3) is None
    assert buckets.take("key", 2.0, 3) == 1


def test_waiting_longer_than_a_burst_saves_nothing() -> None:
    clock = Clock()
    buckets = TokenBuckets(clock)
    clock.now += 10_000
    assert [buckets.take("key", 1.0, 2) for _ in range(3)] == [None, None, 1]


def test_keys_do_not_share_a_bucket() -> None:
    buckets = TokenBuckets(Clock())
    assert buckets.take("one", 1.0, 1) is None
    assert buckets.take("one", 1.0, 1) == 1
    assert buckets.take("other", 1.0, 1) is None


def test_a_refusal_costs_nothing() -> None:
    clock = Clock()
    buckets = TokenBuckets(clock)
    buckets.take("key", 0.1, 1)
    assert [buckets.take("key", 0.1, 1) for _ in range(100)] == [10] * 100
    clock.now += 10
    assert buckets.take("key", 0.1, 1) is None


@settings(deadline=None)
@given(
    rate=st.one_of(st.floats(1e-6, 1e6), st.integers(1, 10_000).map(lambda seconds: 1 / seconds)),
    burst=st.integers(1, 1000),
    share=st.sampled_from([1.0, 0.5, 1 / 3, 0.1]),
    now=st.floats(0, 1e7),
    early=st.floats(0, 1),
)
def test_waiting_as_long_as_was_said_is_enough(rate: float, burst: int, share: float, now: float, early: float) -> None:
    clock = Clock(now)
    buckets = TokenBuckets(clock, share)
    while (wait_s := buckets.take("key", rate, burst)) is None:
        pass
    clock.now += early * wait_s
    wait_s = buckets.take("key", rate, burst)
    if wait_s is not None:
        clock.now += wait_s
        assert buckets.take("key", rate, burst) is None


@pytest.mark.parametrize(("rate", "wait_s"), [(1000.0, 1), (1.0, 1), (0.5, 2), (1 / 49, 49), (1e-3, 1000)])
def test_the_wait_is_whole_seconds_and_at_least_one(rate: float, wait_s: int) -> None:
    buckets = TokenBuckets(Clock())
    buckets.take("key", rate, 1)
    assert buckets.take("key", rate, 1) == wait_s


def test_a_share_of_the_ingress_is_a_share_of_the_rate_but_never_less_than_one_request() -> None:
    quarter = TokenBuckets(Clock(), share=0.25)
    assert [quarter.take("key", 1.0, 8) for _ in range(3)] == [None, None, 4]
    assert [quarter.take("small", 1.0, 1) for _ in range(2)] == [None, 4]


def test_the_bucket_unused_for_longest_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_limit, "MAX_BUCKETS", 2)
    buckets = TokenBuckets(Clock())
    for key in ("one", "two", "one", "three"):  # two is forgotten
        buckets.take(key, 1.0, 1)
    assert buckets.take("one", 1.0, 1) == 1
    assert buckets.take("three", 1.0, 1) == 1
    assert buckets.take("two", 1.0, 1) is None
