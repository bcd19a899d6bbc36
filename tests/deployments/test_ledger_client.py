import asyncio
from collections.abc import AsyncIterator

import pytest

import deployments.ledger_client
from billing.commands import Command, HeartbeatDone, Outcome, RequestId, Settle
from deployments.errors import LedgerUnavailable
from deployments.ledger_client import LedgerClient


class Ledger:
    """Answers each command with its position in the order of arrival; may be told to hang or to fail."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.go = asyncio.Event()
        self.go.set()
        self.failures = 0
        self.too_many = 0
        self.answered = 0

    async def __call__(self, commands: list[Command]) -> list[Outcome]:
        self.calls.append([command.request_id for command in commands if isinstance(command, Settle)])
        await self.go.wait()
        if self.failures:
            self.failures -= 1
            raise ConnectionError("the actor died")
        outcomes: list[Outcome] = []
        for _ in commands:
            outcomes.append(HeartbeatDone(self.answered))
            self.answered += 1
        surplus, self.too_many = outcomes[:1] * self.too_many, 0
        return outcomes + surplus


@pytest.fixture
def ledger() -> Ledger:
    return Ledger()


@pytest.fixture
async def client(ledger: Ledger) -> AsyncIterator[LedgerClient]:
    running = LedgerClient(ledger)
    running.start()
    yield running
    ledger.go.set()
    await running.stop()


def settle(name: str) -> Settle:
    return Settle(RequestId(name), 0, "")


async def test_commands_that_wait_together_travel_as_one_call(client: LedgerClient, ledger: Ledger) -> None:
    ledger.go.clear()
    first = client.submit(settle("a"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    rest = [client.submit(settle(name)) for name in "bcd"]
    ledger.go.set()
    assert await asyncio.gather(first, *rest) == [HeartbeatDone(index) for index in range(4)]
    assert ledger.calls == [["a"], ["b", "c", "d"]]


async def test_a_cancelled_caller_does_not_take_its_command_back(client: LedgerClient, ledger: Ledger) -> None:
    ledger.go.clear()
    caller = asyncio.create_task(client.apply(settle("a")))
    for _ in range(3):
        await asyncio.sleep(0)
    caller.cancel()
    after = client.submit(settle("b"))
    ledger.go.set()
    await after
    assert ledger.calls == [["a"], ["b"]]


async def test_a_failed_call_is_repeated_until_the_ledger_is_back(
    client: LedgerClient, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployments.ledger_client, "RETRY_EVERY_S", 0.0)
    ledger.failures = 3
    assert await client.apply(settle("a")) == HeartbeatDone(0)
    assert ledger.calls == [["a"]] * 4


async def test_a_ledger_that_stays_away_is_reported_and_the_next_command_is_tried(
    client: LedgerClient, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployments.ledger_client, "RETRY_FOR_S", 0.05)
    monkeypatch.setattr(deployments.ledger_client, "RETRY_EVERY_S", 0.01)
    ledger.failures = 1_000_000
    with pytest.raises(LedgerUnavailable):
        await client.apply(settle("a"))
    ledger.failures = 0
    assert await client.apply(settle("b")) == HeartbeatDone(0)


async def test_an_answer_that_does_not_fit_its_question_is_a_failed_call(
    client: LedgerClient, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployments.ledger_client, "RETRY_EVERY_S", 0.0)
    ledger.too_many = 1
    assert await client.apply(settle("a")) == HeartbeatDone(1)
    assert ledger.calls == [["a"]] * 2


async def test_waiting_commands_are_bounded(
    client: LedgerClient, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployments.ledger_client, "MAX_WAITING", 2)
    ledger.go.clear()
    client.submit(settle("a")), client.submit(settle("b"))
    with pytest.raises(LedgerUnavailable):
        client.submit(settle("c"))


async def test_flush_returns_once_everything_submitted_is_answered(client: LedgerClient, ledger: Ledger) -> None:
    answers = [client.submit(settle(name)) for name in "abc"]
    await client.flush()
    assert all(answer.done() for answer in answers)


async def test_flush_waits_for_commands_whose_callers_left(client: LedgerClient, ledger: Ledger) -> None:
    ledger.go.clear()
    caller = asyncio.create_task(client.apply(settle("a")))
    await asyncio.sleep(0)
    caller.cancel()
    flushing = asyncio.create_task(client.flush())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not flushing.done()
    ledger.go.set()
    await flushing
    assert ledger.calls == [["a"]]


async def test_callers_that_left_make_room_for_others_once_they_are_answered(
    client: LedgerClient, ledger: Ledger, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deployments.ledger_client, "MAX_WAITING", 1)
    client.submit(settle("a")).cancel()
    with pytest.raises(LedgerUnavailable):
        client.submit(settle("b"))
    await client.flush()
    assert await client.apply(settle("c")) == HeartbeatDone(1)
