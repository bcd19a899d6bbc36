"""One served model as the ingress sees it: ask the scheduler for room, run the chunk on the granted replica.

A chunk carries its whole state (the last frame and the next actions), so one whose replica dies is simply run again
elsewhere: same seed, same pixels. Of a stream that includes the traces of the frames before; they stay here while the
replica that ran the last chunk runs the next.
"""

import asyncio
import hashlib
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import ray
import structlog
from ray.exceptions import RayActorError, RayError, TaskCancelledError
from ray.serve.exceptions import RequestCancelledError

from deployments.errors import DeadlinePassed, EngineFailed, ModelOverloaded
from deployments.messages import (
    NO_TERMS,
    ChunkForgotten,
    ChunkJob,
    ChunkPiece,
    ChunkReport,
    ChunkRow,
    Frame,
    ModelSpec,
    Ticket,
    TicketId,
    TicketTerms,
)
from deployments.meter import Series
from deployments.scheduler import Grant, Notice, Overloaded, SchedulerStatus, TooLate
from deployments.tracing import span

MAX_ATTEMPTS = 3
"""A chunk is tried on another replica at most twice."""
SCHEDULER_RETRY_S = 0.1
NOTICE_EVERY_S = 0.002
"""Notices that come within this time of the last call travel in one."""
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
    """`scheduler` is the model's scheduler actor, `replicas` the Serve handle of its replica deployment."""

    def __init__(
        self, spec: ModelSpec, scheduler: Any, replicas: Any, queue_timeout_s: float, chunk_timeout_s: float
    ) -> None:
        self.spec = spec
        self._scheduler = scheduler
        self._replicas = replicas
        self._streams = replicas.options(stream=True) if spec.piece_frames else None
        self._queue_timeout_s = queue_timeout_s
        self._chunk_timeout_s = chunk_timeout_s
        self._begun_timeout_s = queue_timeout_s + 2 * chunk_timeout_s
        """What has begun waits for whatever runs now, and for what had begun before it."""
        self._notices: asyncio.Queue[Notice] = asyncio.Queue()
        self._notifier: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin telling the scheduler what became of its grants. From a task of its own, outside any request: Ray
        cancels the calls that a cancelled request made, and these are the ones that must arrive."""
        self._notifier = asyncio.get_running_loop().create_task(self._notify_forever())

    async def stop(self) -> None:
        if self._notifier is not None:
            self._notifier.cancel()

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
        for attempt in range(MAX_ATTEMPTS):
            if attempt:
                await self._notices.join()  # or the scheduler would grant the replica that was just lost
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
            )
            finished = False
            try:
                started = time.perf_counter()
                with span("queue", {"dream.rows": len(rows), "dream.attempt": attempt}):
                    grant = await self._acquire(ticket)
                granted = time.perf_counter()
                if permit is not None:
                    await permit.wait()
                trusting = [_trusting(row, grant.replica_id) for row in rows]
                job = ChunkJob(
                    grant.ticket_id, grant.replica_id, tuple(trusting), terms.service_class, _left_s(deadline)
                )
                report = await self._run(job, on_piece)
                if any(isinstance(outcome, ChunkForgotten) for outcome in report.outcomes):
                    job = replace(job, rows=tuple(rows), deadline_s=_left_s(deadline))
                    report = await self._run(job, on_piece)
                finished = True
                if not report.outcomes:
                    raise DeadlinePassed(self.spec.slug)
                return report, ChunkTiming((granted - started) * 1e3, report.infer_ms)
            except RayActorError as error:
                log.warning("replica_lost", model=self.spec.slug, replica=grant.replica_id, attempt=attempt)
                self._notices.put_nowait(("replica_gone", grant.replica_id))
                if attempt + 1 == MAX_ATTEMPTS:
                    raise EngineFailed(self.spec.slug, "its replica died") from error
            finally:
                self._notices.put_nowait(("complete" if finished else "withdraw", ticket.ticket_id))
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def finish_s(self, num_rows: int, num_steps: int, guidance: float, terms: TicketTerms) -> float | None:
        """How long a rollout of these terms, asked for now, would take to finish; None while that is not known."""
        ticket = Ticket(TicketId(""), num_rows, num_steps=num_steps * (2 if guidance else 1), terms=terms)
        async with asyncio.timeout(STATUS_TIMEOUT_S):
            seconds: float | None = await self._scheduler.finish_s.remote(ticket)
        return seconds

    async def status(self) -> SchedulerStatus:
        async with asyncio.timeout(STATUS_TIMEOUT_S):
            status: SchedulerStatus = await self._scheduler.status.remote()
        return status

    async def metrics(self) -> tuple[SchedulerStatus, Series]:
        """Of the model's scheduler and all its replicas."""
        async with asyncio.timeout(STATUS_TIMEOUT_S):
            answer: tuple[SchedulerStatus, Series] = await self._scheduler.metrics.remote()
        return answer

    async def _acquire(self, ticket: Ticket) -> Grant:
        """Wait for room. A scheduler that restarts has lost its queue, so the ticket is sent again until time is up."""
        try:
            async with asyncio.timeout(ticket.patience_s):
                while True:
                    call = self._scheduler.acquire.remote(ticket)
                    try:
                        answer = await call
                        break
                    except asyncio.CancelledError:
                        ray.cancel(call)
                        raise
                    except RayActorError:
                        await asyncio.sleep(SCHEDULER_RETRY_S)
        except TimeoutError as error:
            raise ModelOverloaded(self.spec.slug, RETRY_AFTER_TIMEOUT_S) from error
        if isinstance(answer, Overloaded):
            raise ModelOverloaded(self.spec.slug, max(1, math.ceil(answer.retry_after_s)))
        if isinstance(answer, TooLate):
            raise DeadlinePassed(self.spec.slug)
        assert isinstance(answer, Grant)
        return answer

    async def _run(self, job: ChunkJob, on_piece: OnPiece | None) -> ChunkReport:
        """The granted replica's answer. Giving up on it takes its rows out of the batch."""
        if on_piece is None or self._streams is None:
            call = answer = self._replicas.run_chunk.remote(job)
        else:
            call = self._streams.stream_chunk.remote(job)
            answer = _last_of(call, on_piece)
        try:
            async with asyncio.timeout(self._chunk_timeout_s):
                report: ChunkReport = await answer
        except asyncio.CancelledError:
            call.cancel()
            raise
        except TimeoutError as error:
            call.cancel()
            raise EngineFailed(self.spec.slug, f"no answer within {self._chunk_timeout_s:.0f} s") from error
        except (RequestCancelledError, TaskCancelledError) as error:
            raise asyncio.CancelledError from error  # the cancellation reached the replica before it reached us
        except RayActorError:
            raise
        except RayError as error:
            log.error("chunk_failed", model=self.spec.slug, replica=job.replica_id, error=str(error))
            raise EngineFailed(self.spec.slug, "its replica could not run the work") from error
        return report

    async def _notify_forever(self) -> None:
        while True:
            notices = [await self._notices.get()]
            while not self._notices.empty():
                notices.append(self._notices.get_nowait())
            self._scheduler.notice.remote(notices)
            for _ in notices:
                self._notices.task_done()
            await asyncio.sleep(NOTICE_EVERY_S)


async def _last_of(answers: AsyncIterator[ChunkPiece | ChunkReport], on_piece: OnPiece) -> ChunkReport:
    async for answer in answers:
        if isinstance(answer, ChunkReport):
            return answer
        on_piece(answer)
    raise RayError("a replica ended a chunk without a report")


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
