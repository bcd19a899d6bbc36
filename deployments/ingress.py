"""A request's whole life: price it, reserve, run its chunks, join the video, settle, answer.

Every way out after the reservation ends in a settlement: all frames delivered, or none and a refund.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence

import structlog

from billing.commands import (
    Heartbeat,
    InsufficientCredits,
    KeyRefused,
    RequestId,
    Reserve,
    Reserved,
    Settle,
    Settled,
    UnknownReservation,
)
from deployments.errors import (
    CreditsInsufficient,
    EngineFailed,
    KeyNotAccepted,
    LedgerUnavailable,
    ModelOverloaded,
)
from deployments.ledger_client import LedgerClient
from deployments.messages import Actions, ChunkFailed, ChunkRow, RolloutRequest, RolloutResult
from deployments.model_client import ChunkTiming, ModelClient
from deployments.status import Outcome, Sample
from deployments.status_client import StatusClient
from deployments.video import join_chunks

REFUND_WAIT_S = 15.0
"""How long the answer to a failure waits for its refund; the refund itself is tried for longer."""
MAX_SETTLE_ATTEMPTS = 30
SETTLE_RETRY_S = 2.0
"""With the client's own patience of 10 s a settlement is tried for about six minutes."""
RESTART_S = 15
"""What clients are told to wait while this ingress stops."""
LEASE_S = 30.0
"""An ingress that has not renewed its reservations for this long is gone; the ledger refunds them."""
HEARTBEAT_EVERY_S = 5.0
"""A beat may take 10 s to be given up, so two may be missed."""

Keep = Callable[[RequestId, tuple[bytes, ...]], Awaitable[None]]
"""Stores the videos of a request before it is settled; if it raises, the request is refunded."""

log = structlog.get_logger(__name__)


class Ingress:
    """Runs paid rollouts on the models it was given."""

    def __init__(self, ledger: LedgerClient, models: Mapping[str, ModelClient], status: StatusClient) -> None:
        self._ledger = ledger
        self._models = models
        self._status = status
        self._open: set[RequestId] = set()
        self._running: set[asyncio.Task[object]] = set()
        self._stopped: set[asyncio.Task[object]] = set()
        self._settling: set[asyncio.Task[None]] = set()
        self._draining = False
        self._heartbeat: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._ledger.start()
        self._status.start()
        for model in self._models.values():
            model.start()
        self._heartbeat = asyncio.get_running_loop().create_task(self._renew_leases())

    async def stop(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        await self._ledger.stop()
        await self._status.stop()
        for model in self._models.values():
            await model.stop()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new work, wait for what is running, and after `timeout_s` end and refund what is left."""
        self._draining = True
        running = set(self._running)
        if running:
            _, left = await asyncio.wait(running, timeout=timeout_s)
            for task in left:
                self._stopped.add(task)
                task.cancel()
            if left:
                await asyncio.wait(left)
        if self._settling:
            await asyncio.wait(self._settling)
        await self._ledger.flush()

    async def run(self, request: RolloutRequest, keep: Keep | None = None) -> RolloutResult:
        """Reserve the price, roll out all candidates, keep the videos if asked to, settle.

        Raises:
            CreditsInsufficient, KeyNotAccepted, LedgerUnavailable: nothing ran and nothing was charged.
            ModelOverloaded, EngineFailed: what was reserved has been refunded.
            asyncio.CancelledError: the client left; what was reserved is being refunded.
            Whatever `keep` raises: what was reserved has been refunded.
        """
        if self._draining:
            raise ModelOverloaded(request.model, RESTART_S)
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        try:
            return await self._run(request, keep)
        except asyncio.CancelledError:
            if task not in self._stopped:
                raise
            task.uncancel()  # it was this ingress that stopped, not the client: that one is owed an answer
            raise ModelOverloaded(request.model, RESTART_S) from None
        finally:
            self._running.discard(task)
            self._stopped.discard(task)

    async def _run(self, request: RolloutRequest, keep: Keep | None) -> RolloutResult:
        started = time.perf_counter()
        reserved = await self._reserve(request)
        try:
            videos, timings = await self._roll_out(request)
            if keep is not None:
                await keep(request.request_id, videos)
        except BaseException as failure:
            await self._refund(request, failure)
            raise
        # No await from here on: the frames exist, so nothing may come between them and their caller.
        self._settle_later(request)
        result = RolloutResult(
            request_id=request.request_id,
            model=request.model,
            videos=videos,
            num_frames=request.num_frames,
            cost_mils=reserved.amount_mils,
            queue_ms=sum(timing.queue_ms for timing in timings),
            infer_ms=sum(timing.infer_ms for timing in timings),
            total_ms=(time.perf_counter() - started) * 1e3,
        )
        self._report(request, "succeeded", result)
        return result

    async def _reserve(self, request: RolloutRequest) -> Reserved:
        kind = "predict" if len(request.candidates) == 1 else f"predict_batch ×{len(request.candidates)}"
        self._open.add(request.request_id)
        outcome = None
        try:
            outcome = await self._ledger.apply(
                Reserve(
                    request_id=request.request_id,
                    key_id=request.key_id,
                    frames=request.num_frames,
                    mils_per_frame=self._models[request.model].spec.mils_per_frame,
                    detail=f"{kind} · {request.model} · {request.num_frames} frames",
                    lease_s=LEASE_S,
                )
            )
        finally:
            if outcome is None:  # cancelled, or its fate is unknown: if it was or will be applied, take it back
                self._settle_later(request, frames_delivered=0, reason="not started")
        if isinstance(outcome, Reserved):
            return outcome
        self._open.discard(request.request_id)
        self._report(request, "refused")
        match outcome:
            case InsufficientCredits(balance_mils, requested_mils):
                raise CreditsInsufficient(balance_mils, requested_mils)
            case KeyRefused():
                raise KeyNotAccepted()
        raise AssertionError(f"the ledger answered a reservation with {outcome}")

    async def _roll_out(self, request: RolloutRequest) -> tuple[tuple[bytes, ...], list[ChunkTiming]]:
        """Chunk after chunk, each for all candidates that still have actions; then one mp4 per candidate."""
        model = self._models[request.model]
        size = model.spec.chunk_size
        frames = [request.start_frame] * len(request.candidates)
        clips: list[list[bytes]] = [[] for _ in request.candidates]
        timings = []
        for chunk in range(max(-(-len(actions) // size) for actions in request.candidates)):
            rows = [
                ChunkRow(
                    start_frame=frames[candidate],
                    actions=actions[chunk * size : (chunk + 1) * size],
                    seed=request.seed,
                    candidate=candidate,
                    chunk=chunk,
                    num_steps=request.num_steps,
                    guidance=request.guidance,
                )
                for candidate, actions in enumerate(request.candidates)
                if len(actions) > chunk * size
            ]
            report, timing = await model.run_chunk(f"{request.request_id}/{chunk}", rows, begun=chunk > 0)
            timings.append(timing)
            for row, outcome in zip(rows, report.outcomes, strict=True):
                if isinstance(outcome, ChunkFailed):
                    log.error("row_failed", request_id=request.request_id, candidate=row.candidate, why=outcome.reason)
                    raise EngineFailed(request.model, f"it raised on chunk {chunk} of candidate {row.candidate}")
                clips[row.candidate].append(outcome.video)
                frames[row.candidate] = outcome.last_frame
        videos = await asyncio.to_thread(_join_all, clips, request.candidates, model.spec.fps)
        return videos, timings

    async def _refund(self, request: RolloutRequest, failure: BaseException) -> None:
        """A failure is answered only once its refund is durable; a client that left is not waited for."""
        left = isinstance(failure, asyncio.CancelledError)
        outcome: Outcome
        match failure:
            case asyncio.CancelledError():
                outcome, reason = "canceled", "server stopping" if self._draining else "client disconnected"
            case ModelOverloaded():
                outcome, reason = "refused", "overloaded"
            case EngineFailed():
                outcome, reason = "failed", "engine failed"
            case _:
                outcome, reason = "failed", "internal error"
                log.error("rollout_failed", request_id=request.request_id, error=repr(failure), exc_info=failure)
        self._report(request, outcome)
        settling = self._settle_later(request, frames_delivered=0, reason=reason)
        if not left:
            await asyncio.wait([settling], timeout=REFUND_WAIT_S)

    def _settle_later(
        self, request: RolloutRequest, frames_delivered: int | None = None, reason: str = ""
    ) -> asyncio.Task[None]:
        """Close the reservation from a task of its own: all frames delivered unless said otherwise.

        Settling a delivered rollout moves no money, so nobody waits for it. Until the ledger has answered, the lease is
        renewed, so a ledger that is away neither refunds what was delivered nor keeps what was not.
        """
        frames = request.num_frames if frames_delivered is None else frames_delivered
        task = asyncio.get_running_loop().create_task(self._settle(Settle(request.request_id, frames, reason)))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)
        return task

    async def _settle(self, command: Settle) -> None:
        for attempt in range(MAX_SETTLE_ATTEMPTS):
            try:
                outcome = await self._ledger.apply(command)
            except LedgerUnavailable:
                log.warning("settlement_delayed", request_id=command.request_id, attempt=attempt)
                await asyncio.sleep(SETTLE_RETRY_S)
                continue
            if not isinstance(outcome, Settled | UnknownReservation):
                log.error("settlement_refused", request_id=command.request_id, outcome=repr(outcome))
            break
        else:
            log.error("settlement_left_to_lease", request_id=command.request_id)
        self._open.discard(command.request_id)

    def _report(self, request: RolloutRequest, outcome: Outcome, result: RolloutResult | None = None) -> None:
        if result is None:
            self._status.add(Sample(request.model, outcome, request.num_frames))
        else:
            self._status.add(
                Sample(request.model, outcome, request.num_frames, result.queue_ms, result.infer_ms, result.total_ms)
            )

    async def _renew_leases(self) -> None:
        while True:
            await asyncio.sleep(HEARTBEAT_EVERY_S)
            if self._open:
                try:
                    await self._ledger.apply(Heartbeat(tuple(self._open), LEASE_S))
                except LedgerUnavailable:
                    log.warning("heartbeat_missed", reservations=len(self._open))


def _join_all(clips: list[list[bytes]], candidates: Sequence[Actions], fps: int) -> tuple[bytes, ...]:
    return tuple(join_chunks(clip, fps, 1 + len(actions)) for clip, actions in zip(clips, candidates, strict=True))
