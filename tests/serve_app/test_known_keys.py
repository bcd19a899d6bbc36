import pytest

from billing.commands import CustomerId, KeyId
from billing.reader import KeyRecord
from serve_app import known_keys
from serve_app.known_keys import KNOWN_S, KnownKeys


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def record(name: str) -> KeyRecord:
    return KeyRecord(KeyId(name), CustomerId("c"), 1.0, 1, False)


def test_a_key_is_known_for_its_time_and_is_then_read_again() -> None:
    clock = Clock()
    keys = KnownKeys(clock)
    keys.add("sha", record("k"))
    clock.now += KNOWN_S - 0.001
    assert keys.get("sha") == record("k")
    clock.now += 0.001
    assert keys.get("sha") is None
    assert keys.get("another") is None


def test_strangers_and_crowds_take_bounded_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(known_keys, "MAX_KEYS", 3)
    keys = KnownKeys(Clock())
    for index in range(5):
        keys.add(f"sha{index}", record(f"k{index}"))
    assert [keys.get(f"sha{index}") is not None for index in range(5)] == [False, False, True, True, True]
