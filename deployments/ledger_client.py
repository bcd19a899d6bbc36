"""How a process talks to the ledger: the commands that wait together travel as one call.

The calls are made by a task of its own, so a request that is cancelled never takes its ledger command with it, and
commands reach the ledger in the order in which they were submitted.
"""

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, NamedTuple

import structlog

from billing.commands import Command, Outcome
from deployments.background import keep_running
from deployments.channel import Address, Channel
from deployments.errors import LedgerUnavailable
from deployments.ledger_wire import pack, unpack_outcomes

RETRY_FOR_S = 10.0
"""How long a command is tried after it was submitted; every command is idempotent, so asking again is safe."""
RETRY_EVERY_S = 0.25
MAX_WAITING = 10_000
MAX_BATCH = 256

log = structlog.get_logger(__name__)


class _Waiting(NamedTuple):
    command: Command
    answer: asyncio.Future[Outcome]
    gives_up_at: float


class LedgerClient:
    """`call` sends commands to the writer and returns their outcomes; it raises if the writer cannot be reached."""

    def __init__(self, call: Callable[[list[Command]], Awaitable[list[Outcome]]]) -> None:
        self._call = call
        self._waiting: deque[_Waiting] = deque()
        self._num_unanswered = 0
        self._arrived = asyncio.Event()
        self._idle = asyncio.Event()
        self._sender: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin sending. Called outside any request: Ray would cancel calls made in a cancelled request's context."""
        self._sender = keep_running(self._send_forever)

    async def flush(self) -> None:
        """Return once everything submitted so far has been answered."""
        while self._num_unanswered:
            self._arrived.set()
            self._idle.clear()
            await self._idle.wait()

    async def stop(self) -> None:
        """Send what is waiting, then end."""
        await self.flush()
        if self._sender is not None:
            self._sender.cancel()

    def submit(self, command: Command, within_s: float = 0.0) -> "asyncio.Future[Outcome]":
        """The command's outcome to come. It is sent whether or not anybody waits, even if the future is cancelled: with
        the next command, and `within_s` at the latest.

        Raises:
            LedgerUnavailable: too many commands are waiting already.
        """
        if self._num_unanswered >= MAX_WAITING:
            raise LedgerUnavailable()
        answer: asyncio.Future[Outcome] = asyncio.get_running_loop().create_future()
        self._num_unanswered += 1
        self._waiting.append(_Waiting(command, answer, time.monotonic() + RETRY_FOR_S))
        if within_s:
            asyncio.get_running_loop().call_later(within_s, self._arrived.set)
        else:
            self._arrived.set()
        return answer

    async def apply(self, command: Command, within_s: float = 0.0) -> Outcome:
        """The command's outcome; being cancelled while waiting does not take the command back.

        Raises:
            LedgerUnavailable: the writer could not be reached in time; the command may or may not have been applied.
        """
        return await self.submit(command, within_s)

    async def _send_forever(self) -> None:
        while True:
            await self._arrived.wait()
            batch = [self._waiting.popleft() for _ in range(min(MAX_BATCH, len(self._waiting)))]
            if not self._waiting:
                self._arrived.clear()
            while batch:
                try:
                    async with asyncio.timeout(RETRY_FOR_S):
                        outcomes = await self._call([waiting.command for waiting in batch])
                    if len(outcomes) != len(batch):
                        raise ValueError(f"{len(outcomes)} outcomes of {len(batch)} commands")
                except Exception as error:
                    log.warning("ledger_call_failed", error=type(error).__name__, commands=len(batch))
                    batch = self._give_up_on_the_late(batch, error)
                    self._waiting = deque(self._give_up_on_the_late(self._waiting, error))
                    await asyncio.sleep(RETRY_EVERY_S)
                else:
                    for waiting, outcome in zip(batch, outcomes, strict=True):
                        if not waiting.answer.done():  # its caller may have been cancelled
                            waiting.answer.set_result(outcome)
                    self._answered(len(batch))
                    break

    def _give_up_on_the_late(self, commands: Iterable[_Waiting], error: Exception) -> list[_Waiting]:
        """Fail those whose time is up; the others, to be sent again."""
        now = time.monotonic()
        left = []
        for waiting in commands:
            if waiting.gives_up_at > now:
                left.append(waiting)
                continue
            failure = LedgerUnavailable()
            failure.__cause__ = error
            if not waiting.answer.done():
                waiting.answer.set_exception(failure)
                waiting.answer.exception()  # a command that nobody waits for is not an unhandled error
            self._answered(1)
        return left

    def _answered(self, count: int) -> None:
        self._num_unanswered -= count
        if not self._num_unanswered:
            self._idle.set()


def connect(actor: Any) -> LedgerClient:
    """A client of the cluster's ledger actor."""
    return LedgerClient(calls_of(actor))


def calls_of(actor: Any) -> Callable[[list[Command]], Awaitable[list[Outcome]]]:
    """Through a channel to the actor's process, wherever it is at the time."""

    async def find() -> Address:
        address: Address = await actor.address.remote()
        return address

    channel = Channel(find)

    async def call(commands: list[Command]) -> list[Outcome]:
        try:
            return unpack_outcomes(await channel.call("apply", pack(commands)))
        except asyncio.CancelledError:  # no answer in time: it may be a process that hangs, and another its successor
            channel.close()
            raise

    return call


def apply_once(actor: Any, command: Command, timeout_s: float) -> Outcome:
    """For tools: one command, and no second attempt. Raises a Ray error if the ledger does not answer in time."""
    import ray

    (outcome,) = unpack_outcomes(ray.get(actor.apply.remote(pack([command])), timeout=timeout_s))
    return outcome
