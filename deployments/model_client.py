"""One served model as the ingress sees it: ask the scheduler for room, run the chunk on the granted replica.

A chunk carries its whole state (the last frame and the next actions), so one whose replica dies is simply run again
elsewhere: same seed, same pixels.
"""

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import structlog
from ray.exceptions import RayActorError, RayError

from deployments.errors import EngineFailed, ModelOverloaded
from deployments.messages import ChunkJob, ChunkReport, ChunkRow, ModelSpec, TicketId
from deployments.scheduler import Grant, Overloaded, SchedulerStatus, Ticket

MAX_ATTEMPTS = 3
"""A chunk is tried on another replica at most twice."""

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
        self._queue_timeout_s = queue_timeout_s
        self._chunk_timeout_s = chunk_timeout_s

    async def run_chunk(self, ticket_prefix: str, rows: Sequence[ChunkRow]) -> tuple[ChunkReport, ChunkTiming]:
        """Outcomes of `rows` in order.

        Raises:
            ModelOverloaded: the queue is full, or no replica had room within the queue time-out.
            EngineFailed: the replica broke or hung on every attempt.
        """
        for attempt in range(MAX_ATTEMPTS):
            started = time.perf_counter()
            grant = await self._acquire(Ticket(TicketId(f"{ticket_prefix}/{attempt}"), len(rows)))
            granted = time.perf_counter()
            finished = False
            try:
                job = ChunkJob(grant.ticket_id, grant.replica_id, tuple(rows))
                report = await asyncio.wait_for(_answer(self._replicas.run_chunk.remote(job)), self._chunk_timeout_s)
                finished = True
                return report, ChunkTiming((granted - started) * 1e3, report.infer_ms)
            except TimeoutError as error:
                raise EngineFailed(self.spec.slug, f"no answer within {self._chunk_timeout_s:.0f} s") from error
            except RayActorError as error:
                log.warning("replica_lost", model=self.spec.slug, replica=grant.replica_id, attempt=attempt)
                self._scheduler.replica_gone.remote(grant.replica_id)
                if attempt + 1 == MAX_ATTEMPTS:
                    raise EngineFailed(self.spec.slug, "its replica died") from error
            except RayError as error:
                log.error("chunk_failed", model=self.spec.slug, replica=grant.replica_id, error=str(error))
                raise EngineFailed(self.spec.slug, "its replica could not run the work") from error
            finally:
                report_end = self._scheduler.complete if finished else self._scheduler.withdraw
                report_end.remote(grant.ticket_id)
        raise AssertionError("unreachable: the last attempt returns or raises")

    async def status(self) -> SchedulerStatus:
        status: SchedulerStatus = await asyncio.wait_for(_as_future(self._scheduler.status.remote()), 2.0)
        return status

    async def _acquire(self, ticket: Ticket) -> Grant:
        deadline = time.monotonic() + self._queue_timeout_s
        while True:
            try:
                answer = await asyncio.wait_for(
                    _as_future(self._scheduler.acquire.remote(ticket)), max(0.0, deadline - time.monotonic())
                )
            except TimeoutError as error:
                raise ModelOverloaded(self.spec.slug, int(self._queue_timeout_s)) from error
            except RayActorError as error:  # the scheduler restarts; its queue is gone and is built again by asking
                if time.monotonic() > deadline:
                    raise ModelOverloaded(self.spec.slug, int(self._queue_timeout_s)) from error
                await asyncio.sleep(0.1)
                continue
            if isinstance(answer, Overloaded):
                raise ModelOverloaded(self.spec.slug, answer.retry_after_s)
            assert isinstance(answer, Grant)
            return answer


async def _answer(response: Any) -> ChunkReport:
    """Await a replica's answer such that giving up on it takes its rows out of the batch."""
    try:
        report: ChunkReport = await response
    except asyncio.CancelledError:
        response.cancel()
        raise
    return report


async def _as_future(reference: Any) -> Any:
    """Await an actor call such that cancelling the waiter cancels the call in the actor as well."""
    try:
        return await reference
    except asyncio.CancelledError:
        ray.cancel(reference)
        raise
