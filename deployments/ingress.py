"""A request's whole life: price it, reserve, run its chunks, join the video, settle, answer.

Every way out after the reservation ends in a settlement: all frames delivered, or none and a refund.
"""

import asyncio
import time
from collections.abc import Mapping

import structlog

from billing.commands import Heartbeat, InsufficientCredits, KeyRefused, RequestId, Reserve, Reserved, Settle
from deployments.errors import (
    CreditsInsufficient,
    EngineFailed,
    KeyNotAccepted,
    LedgerUnavailable,
    ModelOverloaded,
    RolloutError,
)
from deployments.ledger_client import LedgerClient
from deployments.messages import ChunkFailed, ChunkRow, RolloutRequest, RolloutResult
from deployments.model_client import ChunkTiming, ModelClient
from deployments.status import Outcome, Sample
from deployments.status_client import StatusClient
from deployments.video import join_chunks

RESTART_S = 15
"""What clients are told to wait while this ingress stops."""
LEASE_S = 30.0
"""An ingress that has not renewed its reservations for this long is gone; the ledger refunds them."""

log = structlog.get_logger(__name__)


class Ingress:
    """Runs paid rollouts on the models it was given."""

    def __init__(self, ledger: LedgerClient, models: Mapping[str, ModelClient], status: StatusClient) -> None:
        self._ledger = ledger
        self._models = models
        self._status = status
        self._open: set[RequestId] = set()
        self._running: set[asyncio.Task[object]] = set()
        self._draining = False
        self._heartbeat: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._ledger.start()
        self._status.start()
        self._heartbeat = asyncio.get_running_loop().create_task(self._renew_leases())

    async def stop(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        await self._ledger.stop()
        await self._status.stop()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new work, wait for what is running, and after `timeout_s` cancel and refund what is left."""
        self._draining = True
        if self._running:
            _, left = await asyncio.wait(self._running, timeout=timeout_s)
            for task in left:
                task.cancel()
        await self._ledger.flush()

    async def run(self, request: RolloutRequest) -> RolloutResult:
        """Reserve the price, roll out all candidates, settle.

        Raises:
            CreditsInsufficient, KeyNotAccepted, LedgerUnavailable: nothing ran and nothing was charged.
            ModelOverloaded, EngineFailed: what was reserved has been refunded.
            asyncio.CancelledError: the client left; what was reserved is being refunded.
        """
        if self._draining:
            raise ModelOverloaded(request.model, RESTART_S)
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        started = time.perf_counter()
        reserved = await self._reserve(request)
        try:
            videos, timings = await self._roll_out(request)
        except BaseException as failure:
            await self._refund(request, failure)
            raise
        await self._settle(request)
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
                self._close(request, frames_delivered=0, reason="not started")
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
            report, timing = await model.run_chunk(f"{request.request_id}/{chunk}", rows)
            timings.append(timing)
            for row, outcome in zip(rows, report.outcomes, strict=True):
                if isinstance(outcome, ChunkFailed):
                    log.error("row_failed", request_id=request.request_id, candidate=row.candidate, why=outcome.reason)
                    raise EngineFailed(request.model, f"it raised on chunk {chunk} of candidate {row.candidate}")
                clips[row.candidate].append(outcome.video)
                frames[row.candidate] = outcome.last_frame
        videos = await asyncio.to_thread(lambda: tuple(join_chunks(clip, model.spec.fps) for clip in clips))
        return videos, timings

    async def _settle(self, request: RolloutRequest) -> None:
        """Settling moves no money, so a ledger that cannot be reached now does not spoil a finished rollout."""
        try:
            await asyncio.shield(self._close(request, request.num_frames, reason=""))
        except LedgerUnavailable:
            log.error("settlement_lost", request_id=request.request_id)

    async def _refund(self, request: RolloutRequest, failure: BaseException) -> None:
        """A failure is answered only once its refund is durable; a client that left is not waited for."""
        canceled = isinstance(failure, asyncio.CancelledError)
        self._report(request, "canceled" if canceled else "failed")
        if not isinstance(failure, RolloutError | asyncio.CancelledError):
            log.error("rollout_failed", request_id=request.request_id, error=repr(failure))
        settling = self._close(request, 0, _refund_reason(failure))
        if not canceled:
            try:
                await asyncio.shield(settling)
            except LedgerUnavailable:
                log.error("refund_left_to_lease", request_id=request.request_id)

    def _close(self, request: RolloutRequest, frames_delivered: int, reason: str) -> "asyncio.Future[object]":
        self._open.discard(request.request_id)
        return self._ledger.submit(Settle(request.request_id, frames_delivered, reason))  # type: ignore[return-value]

    def _report(self, request: RolloutRequest, outcome: Outcome, result: RolloutResult | None = None) -> None:
        if result is None:
            self._status.add(Sample(request.model, outcome, request.num_frames))
        else:
            self._status.add(
                Sample(request.model, outcome, request.num_frames, result.queue_ms, result.infer_ms, result.total_ms)
            )

    async def _renew_leases(self) -> None:
        while True:
            await asyncio.sleep(LEASE_S / 3)
            if self._open:
                try:
                    await self._ledger.apply(Heartbeat(tuple(self._open), LEASE_S))
                except LedgerUnavailable:
                    log.warning("heartbeat_missed", reservations=len(self._open))


def _refund_reason(failure: BaseException) -> str:
    match failure:
        case asyncio.CancelledError():
            return "client disconnected"
        case ModelOverloaded():
            return "overloaded"
        case EngineFailed():
            return "engine failed"
    return "internal error"
