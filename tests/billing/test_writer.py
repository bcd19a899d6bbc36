import threading
from collections.abc import Iterator, Sequence

import pytest

import billing.writer
from billing.commands import (
    ChargeUnits,
    Command,
    ExpireLeases,
    HeartbeatDone,
    LeasesExpired,
    Outcome,
    RequestId,
    Settle,
)
from billing.writer import LedgerWriter


class FakeLedger:
    """Records the batches; each `apply` waits for the test's permission."""

    def __init__(self) -> None:
        self.batches: list[list[Command]] = []
        self.entered = threading.Semaphore(0)
        self.permits = threading.Semaphore(0)
        self.failure: BaseException | None = None
        self.closed = False

    def close(self) -> None:
        self.closed = True

    def apply(self, commands: Sequence[Command]) -> list[Outcome]:
        self.entered.release()
        assert self.permits.acquire(timeout=10)
        if self.failure is not None:
            raise self.failure
        self.batches.append(list(commands))
        return [
            LeasesExpired(()) if isinstance(command, ExpireLeases) else HeartbeatDone(index)
            for index, command in enumerate(commands)
        ]


@pytest.fixture
def ledger() -> FakeLedger:
    return FakeLedger()


@pytest.fixture
def deaths() -> list[BaseException]:
    return []


@pytest.fixture
def writer(ledger: FakeLedger, deaths: list[BaseException]) -> Iterator[LedgerWriter]:
    running = LedgerWriter(ledger, deaths.append)  # type: ignore[arg-type]
    yield running
    ledger.permits.release(1000)
    running.stop()


def settle(name: str) -> Settle:
    return Settle(RequestId(name), 0, "")


def test_what_arrives_during_a_commit_shares_the_next_one(writer: LedgerWriter, ledger: FakeLedger) -> None:
    first = writer.submit([settle("a")])
    ledger.entered.acquire(timeout=10)
    rest = [writer.submit([settle("b"), settle("c")]), writer.submit([settle("d")])]
    ledger.permits.release(10)
    assert first.result(10) == [HeartbeatDone(0)]
    assert [answer.result(10) for answer in rest] == [[HeartbeatDone(0), HeartbeatDone(1)], [HeartbeatDone(2)]]
    assert [len(batch) for batch in ledger.batches] == [1, 3]


def test_a_batch_is_bounded(writer: LedgerWriter, ledger: FakeLedger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(billing.writer, "MAX_BATCH", 2)
    writer.submit([settle("a")])
    ledger.entered.acquire(timeout=10)
    rest = [writer.submit([settle(name)]) for name in "bcdef"]
    ledger.permits.release(10)
    for answer in rest:
        answer.result(10)
    assert max(len(batch) for batch in ledger.batches) == 2


def test_expired_leases_are_swept_without_any_traffic(
    ledger: FakeLedger, deaths: list[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(billing.writer, "SWEEP_EVERY_S", 0.01)
    writer = LedgerWriter(ledger, deaths.append)  # type: ignore[arg-type]
    assert ledger.entered.acquire(timeout=10)
    ledger.permits.release(1_000_000)
    writer.stop()
    assert ledger.batches[0] == [ExpireLeases(), ChargeUnits()]
    assert deaths == []
    assert ledger.closed


def test_a_ledger_that_raises_ends_the_writer_and_fails_who_waited(
    ledger: FakeLedger, deaths: list[BaseException]
) -> None:
    writer = LedgerWriter(ledger, deaths.append)  # type: ignore[arg-type]
    ledger.failure = RuntimeError("commit outcome unknown")
    answer = writer.submit([settle("a")])
    ledger.permits.release(10)
    with pytest.raises(RuntimeError, match="unknown"):
        answer.result(10)
    writer.stop()
    assert deaths == [ledger.failure]
    assert ledger.batches == []
