"""One served model as the ingress sees it: ask the scheduler for room, run the chunk on the granted replica.

A chunk carries its whole state (the last frame and the next actions), so one whose replica dies is simply run again
elsewhere: same seed, same pixels. Of a stream that includes the traces of the frames before; they stay here while the
replica that ran the last chunk runs the next.
"""

import asyncio
import contextlib
import hashlib
import math
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace

import numpy as np
import structlog

from deployments.background import keep_running
from deployments.channel import Address, CallFailed, Channel, ChannelError, ChannelLost
from deployments.errors import DeadlinePassed, EngineFailed, ModelOverloaded
from deployments.messages import (
    NO_TERMS,
    CallerId,
    ChunkForgotten,
    ChunkJob,
    ChunkPiece,
    ChunkReport,
    ChunkRow,
    Frame,
    ModelSpec,
    ReplicaId,
    Ticket,
    TicketId,
    TicketTerms,
)
from deployments.meter import Series
from deployments.scheduler import Notice, Overloaded, SchedulerStatus, TooLate
from deployments.scheduler_actor import Placed
from deployments.tracing import span

MAX_ATTEMPTS = 3
"""A chunk is tried on another replica at most twice."""
SCHEDULER_RETRY_S = 0.1
TELL_FOR_S = 60.0
"""A scheduler that could not be reached for so long has died, or has missed us and taken back whatever we had."""
STATUS_TIMEOUT_S = 2.0
RETRY_AFTER_TIMEOUT_S = 5
"""What a client is told after it waited in vain: the queue drains slower than anybody should wait."""

OnPiece = Callable[[ChunkPiece], None]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ChunkTiming:
    queue_ms: float
    infer_ms: float


class ModelClient:
    """`scheduler` is a channel to the model's scheduler, `connect` makes one to the replica at an address."""

    def __init__(
        self,
        spec: ModelSpec,
        scheduler: Channel,
        connect: Callable[[Address], Channel],
        queue_timeout_s: float,
        chunk_timeout_s: float,
    ) -> None:
        self.spec = spec
        self._scheduler = scheduler
        self._connect = connect
        self._replicas: dict[ReplicaId, Channel] = {}
        self._queue_timeout_s = queue_timeout_s
        self._chunk_timeout_s = chunk_timeout_s
        self._begun_timeout_s = queue_timeout_s + 2 * chunk_timeout_s
        """What has begun waits for whatever runs now, and for what had begun before it."""
        self._notices: asyncio.Queue[tuple[Notice, asyncio.Future[None]]] = asyncio.Queue()
        """With what is set once the scheduler was told."""
        self._caller = CallerId(uuid.uuid4().hex)
        self._tasks: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Begin telling the scheduler what became of its grants, and that there is somebody who has them. From tasks of
        its own, outside any request: what a request that is cancelled has to tell must arrive."""
        self._tasks = [keep_running(self._notify_forever), keep_running(self._attend_forever)]

    async def stop(self) -> None:
        if self._tasks:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(STATUS_TIMEOUT_S):
                    await self._notices.join()
        for task in self._tasks:
            task.cancel()
        for channel in (self._scheduler, *self._replicas.values()):
            channel.close()

    async def run_chunk(
        self,
        ticket_prefix: str,
        rows: Sequence[ChunkRow],
        begun: bool,
        terms: TicketTerms = NO_TERMS,
        permit: asyncio.Event | None = None,
        on_piece: OnPiece | None = None,
    ) -> tuple[ChunkReport, ChunkTiming]:
        """Outcomes of `rows` in order. `begun` says that an earlier chunk of the same rollout has run.

        Room is asked for at once, and used once there is a `permit`. With `on_piece` the frames of a model that has
        `piece_frames` leave as they are made, each once, however often the chunk must be run; its outcomes have none.

        Raises:
            ModelOverloaded: the queue is full, or no replica had room within the queue time-out.
            DeadlinePassed: the deadline of `terms` has passed, or can no longer be met.
            EngineFailed: the replica broke or hung on every attempt.
        """
        try:
            async with asyncio.timeout(terms.deadline_s):
                return await self._run_chunk(ticket_prefix, rows, begun, terms, permit, on_piece)
        except TimeoutError as error:
            raise DeadlinePassed(self.spec.slug) from error

    async def _run_chunk(
        self,
        ticket_prefix: str,
        rows: Sequence[ChunkRow],
        begun: bool,
        terms: TicketTerms,
        permit: asyncio.Event | None,
        on_piece: OnPiece | None,
    ) -> tuple[ChunkReport, ChunkTiming]:
        num_steps = max(self.spec.forwards(len(row.actions), row.num_steps, row.guidance) for row in rows)
        affinity = rows[0].stream.rpartition("/")[0]  # all candidates of a work go together
        if not affinity and rows[0].chunk == 0:
            affinity = _digest(rows[0].start_frame)
        affinity_steps = max(len(row.memory.traces or ()) for row in rows)
        if on_piece is not None:
            on_piece = _each_once(on_piece)
        deadline = None if terms.deadline_s is None else time.monotonic() + terms.deadline_s
        told: asyncio.Future[None] | None = None
        for attempt in range(MAX_ATTEMPTS):
            begun = begun or attempt > 0
            patience_s = self._begun_timeout_s if begun else self._queue_timeout_s
            ticket = Ticket(
                TicketId(f"{ticket_prefix}/{attempt}"),
                len(rows),
                begun,
                patience_s,
                num_steps,
                terms._replace(deadline_s=_left_s(deadline)),
                affinity,
                affinity_steps,
                caller=self._caller,
            )
            finished = False
            try:
                started = time.perf_counter()
                with span("queue", {"dream.rows": len(rows), "dream.attempt": attempt}):
                    placed = await self._acquire(ticket, told)
                granted = time.perf_counter()
                if permit is not None:
                    await permit.wait()
                replica_id = placed.grant.replica_id
                replica = self._replica(replica_id, placed.address)
                trusting = tuple(_trusting(row, replica_id) for row in rows)
                job = ChunkJob(ticket.ticket_id, replica_id, trusting, terms.service_class, _left_s(deadline))
                report = await self._run(replica, job, on_piece)
                if any(isinstance(outcome, ChunkForgotten) for outcome in report.outcomes):
                    job = replace(job, rows=tuple(rows), deadline_s=_left_s(deadline))
                    report = await self._run(replica, job, on_piece)
                finished = True
                if not report.outcomes and deadline is None:
                    raise EngineFailed(
                        self.spec.slug, "it was stopped, as this process had not been heard of for a while"
                    )
                if not report.outcomes:
                    raise DeadlinePassed(self.spec.slug)
                return report, ChunkTiming((granted - started) * 1e3, report.infer_ms)
            except ChannelLost as error:
                log.warning("replica_lost", model=self.spec.slug, replica=replica_id, attempt=attempt)
                told = self._notify(("replica_gone", replica_id))
                if attempt + 1 == MAX_ATTEMPTS:
                    raise EngineFailed(self.spec.slug, "its replica died") from error
            finally:
                self._notify(("complete" if finished else "withdraw", ticket.ticket_id))
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def finish_s(self, num_rows: int, num_steps: int, guidance: float, terms: TicketTerms) -> float | None:
        """How long a rollout of these terms, asked for now, would take to finish; None while that is not known."""
        forwards = self.spec.forwards(self.spec.chunk_size, num_steps, guidance)
        ticket = Ticket(TicketId(""), num_rows, num_steps=forwards, terms=terms)
        async with asyncio.timeout(STATUS_TIMEOUT_S):
            seconds: float | None = await self._scheduler.call("finish_s", ticket)
        return seconds

    async def status(self) -> SchedulerStatus:
        async with asyncio.timeout(STATUS_TIMEOUT_S):
            status: SchedulerStatus = await self._scheduler.call("status")
        return status

    async def metrics(self) -> tuple[SchedulerStatus, Series]:
        """Of the model's scheduler and all its replicas."""
        async with asyncio.timeout(STATUS_TIMEOUT_S):
            answer: tuple[SchedulerStatus, Series] = await self._scheduler.call("metrics")
        return answer

    async def _acquire(self, ticket: Ticket, told: "asyncio.Future[None] | None") -> Placed:
        """Wait for room. A scheduler that restarts has lost its queue, so the ticket is sent again until time is up."""
        try:
            async with asyncio.timeout(ticket.patience_s):
                if told is not None:  # or the scheduler would grant the replica that was just lost
                    await told
                while True:
                    try:
                        answer = await self._scheduler.call("place", ticket)
                        break
                    except ChannelError:
                        await asyncio.sleep(SCHEDULER_RETRY_S)
        except TimeoutError as error:
            raise ModelOverloaded(self.spec.slug, RETRY_AFTER_TIMEOUT_S) from error
        if isinstance(answer, Overloaded):
            raise ModelOverloaded(self.spec.slug, max(1, math.ceil(answer.retry_after_s)))
        if isinstance(answer, TooLate):
            raise DeadlinePassed(self.spec.slug)
        assert isinstance(answer, Placed)
        return answer

    def _replica(self, replica_id: ReplicaId, address: Address) -> Channel:
        channel = self._replicas.get(replica_id)
        if channel is None:
            self._replicas = {name: each for name, each in self._replicas.items() if each.is_in_use}
            channel = self._replicas[replica_id] = self._connect(address)
        return channel

    async def _run(self, replica: Channel, job: ChunkJob, on_piece: OnPiece | None) -> ChunkReport:
        """The granted replica's answer. Giving up on it takes its rows out of the batch.

        Raises:
            ChannelLost: the replica is gone, or cannot be reached.
            EngineFailed: it raised, or did not answer.
        """
        try:
            async with asyncio.timeout(self._chunk_timeout_s):
                if on_piece is None or not self.spec.piece_frames:
                    report: ChunkReport = await replica.call("run_chunk", job)
                else:
                    report = await _last_of(replica.stream("stream_chunk", job), on_piece)
        except TimeoutError as error:
            raise EngineFailed(self.spec.slug, f"no answer within {self._chunk_timeout_s:.0f} s") from error
        except CallFailed as error:
            log.error("chunk_failed", model=self.spec.slug, replica=job.replica_id, error=str(error))
            raise EngineFailed(self.spec.slug, "its replica could not run the work") from error
        return report

    async def _attend_forever(self) -> None:
        """Be missed when this process has died, by the scheduler that runs and by the next after its restart."""
        while True:
            with contextlib.suppress(ChannelError):
                await self._scheduler.call("attend", self._caller)
            await asyncio.sleep(SCHEDULER_RETRY_S)

    async def _notify_forever(self) -> None:
        while True:
            noted = [await self._notices.get()]
            while not self._notices.empty():
                noted.append(self._notices.get_nowait())
            try:
                await self._tell([notice for notice, _ in noted])
            finally:
                for _, told in noted:
                    if not told.done():  # nobody may wait for it any more
                        told.set_result(None)
                    self._notices.task_done()

    async def _tell(self, notices: Sequence[Notice]) -> None:
        """For `TELL_FOR_S` at most. What it cannot take it is not told again: the others would wait for that."""
        gives_up_at = time.monotonic() + TELL_FOR_S
        while time.monotonic() < gives_up_at:
            try:
                await self._scheduler.call("notice", notices)
                return
            except CallFailed as error:
                if len(notices) > 1:
                    for notice in notices:
                        await self._tell([notice])
                    return
                log.error("notice_not_taken", model=self.spec.slug, notice=notices[0], error=str(error))
                return
            except ChannelLost:
                await asyncio.sleep(SCHEDULER_RETRY_S)
        log.warning("notices_given_up", model=self.spec.slug, notices=len(notices))

    def _notify(self, notice: Notice) -> "asyncio.Future[None]":
        """Tell the scheduler, some time soon."""
        told: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._notices.put_nowait((notice, told))
        return told


async def _last_of(answers: AsyncGenerator[ChunkPiece | ChunkReport, None], on_piece: OnPiece) -> ChunkReport:
    async with aclosing(answers):
        async for answer in answers:
            if isinstance(answer, ChunkReport):
                return answer
            on_piece(answer)
    raise CallFailed("stream_chunk", "it ended without a report")


def _each_once(on_piece: OnPiece) -> OnPiece:
    """A chunk that is run again makes the pieces again that have left already."""
    num_told: Counter[int] = Counter()

    def tell(piece: ChunkPiece) -> None:
        if piece.index == num_told[piece.row]:
            num_told[piece.row] += 1
            on_piece(piece)

    return tell


def _trusting(row: ChunkRow, replica_id: str) -> ChunkRow:
    """Without its traces, where its context was left."""
    if row.memory.replica_id != replica_id or not row.memory.traces:
        return row
    return replace(row, memory=replace(row.memory, traces=None))


def _digest(frame: Frame) -> str:
    return hashlib.blake2b(np.ascontiguousarray(frame).data, digest_size=16).hexdigest()


def _left_s(deadline: float | None) -> float | None:
    return None if deadline is None else deadline - time.monotonic()
