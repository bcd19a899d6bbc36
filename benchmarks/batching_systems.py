"""What the batching benchmarks compare: this cluster's scheduler and engine, `@serve.batch`, and the simplest batchers.

All run the same stand-in, whose forward of b rows sleeps a + c*b, in one process and side by side: sleeping leaves the
processor to the others. `Served` is the production path without its hops: the scheduler's actor class, the engine with
its threads, an asyncio future per row in between. `@serve.batch` is Ray's decorator with Ray's queue; only the warning
that asks for a replica's context is switched off.
"""

import asyncio
import itertools
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any

import numpy as np

from deployments.batching import BatchProfile
from deployments.engine import Engine
from deployments.messages import NO_TERMS, ChunkRow, Frame, ReplicaId, Ticket, TicketId, TicketTerms
from deployments.replies import Replies
from deployments.scheduler import Notice, Overloaded, SchedulerLimits, TooLate
from deployments.scheduler_actor import SchedulerActor

RESOLUTION = (16, 16)
ROW = ChunkRow(np.zeros((*RESOLUTION, 3), np.uint8), np.zeros((1, 8), np.float32), 0, 0, 0, 1, 0.0, form="none")
FRAMES = np.zeros((1, *RESOLUTION, 3), np.uint8)


class StandInRow:
    __slots__ = ("chunk_input", "steps")

    def __init__(self, chunk_input: Any) -> None:
        self.chunk_input = chunk_input
        self.steps = 0

    @property
    def done(self) -> bool:
        return self.steps == self.chunk_input.num_steps


class StandIn:
    """A step of b rows takes a + c*b seconds; remembers each batch."""

    def __init__(self, profile: BatchProfile) -> None:
        self.profile = profile
        self.batches: list[int] = []

    def start(self, inputs: Sequence[Any]) -> list[StandInRow]:
        return [StandInRow(each) for each in inputs]

    def step(self, rows: Sequence[StandInRow]) -> None:
        self.forward(len(rows))
        for row in rows:
            row.steps += 1

    def finish(self, rows: Sequence[StandInRow]) -> list[Frame]:
        return [FRAMES] * len(rows)

    def forward(self, rows: int) -> None:
        self.batches.append(rows)
        seconds = self.profile.step_s(rows)
        if seconds > 1e-6:
            time.sleep(seconds)


class Refusal(Exception):
    """Not run. `retry_after_s` is None when it was let in and given up later, or could never have been in time."""

    def __init__(self, retry_after_s: float | None = None) -> None:
        super().__init__(retry_after_s)
        self.retry_after_s = retry_after_s


class Served:
    """The scheduler's actor and one engine."""

    name = "served"

    def __init__(self, model: Any, profile: BatchProfile, cap: int, max_queued_rows: int = 256) -> None:
        self.model = model
        self._profile = profile
        self.scheduler = SchedulerActor(SchedulerLimits(max_queued_rows=max_queued_rows, replica_timeout_s=1e9))
        self.engine = Engine(model, RESOLUTION, 10, cap, profile=profile)
        self.engine.cap = cap
        self._names = itertools.count()
        self._replies: Replies
        self._notices: list[Notice] = []

    async def start(self) -> None:
        self._replies = Replies()
        await self.scheduler.replica_alive(ReplicaId("r"), self.engine.cap, profile=self._profile)

    async def run(self, rows: Sequence[ChunkRow], terms: TicketTerms = NO_TERMS) -> None:
        deadline = None if terms.deadline_s is None else time.monotonic() + terms.deadline_s
        ticket = Ticket(TicketId(str(next(self._names))), len(rows), num_steps=rows[0].num_steps, terms=terms)
        answer = await self.scheduler.acquire(ticket)
        if isinstance(answer, Overloaded):
            raise Refusal(answer.retry_after_s)
        if isinstance(answer, TooLate):
            raise Refusal
        left_s = None if deadline is None else deadline - time.monotonic()
        try:
            report = await self._replies.of(self.engine.submit(rows, terms.service_class, left_s))
        finally:
            self._notice(("complete", ticket.ticket_id))
        if not report.outcomes:
            raise Refusal

    def _notice(self, notice: Notice) -> None:
        """As `ModelClient` does: what ends together is one call."""
        self._notices.append(notice)
        if len(self._notices) == 1:
            asyncio.get_running_loop().call_soon(self._send_notices)

    def _send_notices(self) -> None:
        notices, self._notices = self._notices, []
        self._sending = asyncio.ensure_future(self.scheduler.notice(notices))

    async def stop(self) -> None:
        await asyncio.to_thread(self.engine.stop)


class ServeBatch:
    """`@serve.batch` with the stand-in behind it, one row per call as it takes them."""

    name = "serve_batch"

    def __init__(self, model: StandIn, cap: int, wait_s: float = 0.01) -> None:
        from ray import serve
        from ray.serve import batching

        batching._BatchQueue._warn_if_max_batch_size_exceeds_max_ongoing_requests = lambda _: None
        self.model = model

        @serve.batch(max_batch_size=cap, batch_wait_timeout_s=wait_s)  # type: ignore[untyped-decorator]
        async def forward(items: list[int]) -> list[int]:
            await asyncio.to_thread(model.forward, len(items))
            return items

        self._forward = forward

    async def start(self) -> None:
        pass

    async def run(self, rows: Sequence[ChunkRow], terms: TicketTerms = NO_TERMS) -> None:
        await asyncio.gather(*(self._forward(1) for _ in rows))

    async def stop(self) -> None:
        pass


class Greedy:
    """As little as a work-conserving batcher can be: a thread that takes what waits, first come, first served."""

    name = "greedy"

    def __init__(self, model: StandIn, cap: int) -> None:
        self.model, self._cap = model, cap
        self._waiting: list[Future[None]] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._loop, daemon=True)

    async def start(self) -> None:
        self._thread.start()

    async def run(self, rows: Sequence[ChunkRow], terms: TicketTerms = NO_TERMS) -> None:
        futures = [Future[None]() for _ in rows]
        with self._wake:
            self._waiting += futures
            self._wake.notify()
        await asyncio.gather(*map(asyncio.wrap_future, futures))

    async def stop(self) -> None:
        with self._wake:
            self._stopping = True
            self._wake.notify()
        await asyncio.to_thread(self._thread.join)

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not self._waiting and not self._stopping:
                    self._wake.wait()
                if self._stopping:
                    return
                batch, self._waiting = self._waiting[: self._cap], self._waiting[self._cap :]
            self.model.forward(len(batch))
            for future in batch:
                future.set_result(None)
