"""Rollouts that nobody waits for: accepted when they are paid for, run when there is room, whatever ends meanwhile.

Every ingress process runs jobs beside the others. A job is one row, its inputs, and its reservation; a process owns it
while it renews the row's lease. Whoever ends in the middle of it leaves it to another, which looks first at what the
first one achieved: a result that is stored is not made again, and a reservation settles once.
"""

import asyncio
import contextlib
import io
import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import numpy as np
import structlog
from numpy.typing import NDArray

from billing.commands import CustomerId, Heartbeat, Repeated, RequestId, Settle, Settled
from billing.database import DATABASE_FAILURES
from billing.money import Mils
from billing.reader import ReservationRecord
from deployments.background import keep_running
from deployments.chunk_loop import FinishedChunk
from deployments.errors import DeadlinePassed, EngineFailed, LedgerUnavailable, ModelOverloaded, TooManyJobs
from deployments.file_groups import FileGroups
from deployments.gather import gather, run_chunks
from deployments.ingress import REFUND_WAIT_S, RESTART_S, Ingress, join_poll_s
from deployments.job_store import Ending, Job, JobStore
from deployments.ledger_client import LedgerClient
from deployments.messages import Extras, RolloutRequest, RolloutResult, TicketTerms
from deployments.model_client import ModelClient
from deployments.reservations import Reservations
from deployments.results import ResultStore
from deployments.status import Sample
from deployments.status_client import StatusClient

JOB_LEASE_S = 15.0
"""A process that has not renewed its jobs for this long is gone, and another takes them over."""
RENEW_EVERY_S = 1.0
"""Also how soon a process hears that one of its jobs was canceled elsewhere."""
POLL_S = 1.0
"""Between looks for work that another process queued, or left."""
RESERVATION_LEASE_S = 120.0
"""A job's money is held for this long at a time, by whichever process sees that half of it has passed."""
KEEP_EVERY_S = 5.0
SWEEP_EVERY_S = 600.0
MAX_OWNERS = 3
"""Processes that may end in the middle of one job before it counts as what ended them."""
ROOM_RETRY_S = 5.0
CANCEL_WAIT_S = 10.0
"""How long the answer to a cancellation waits for the process that runs the job."""
JOB_TTL_S = 30 * 24 * 3600.0
"""For how long a job can be asked about after its end."""
INPUTS, ARRAYS = "inputs", "inputs.npz"
MAX_RETRY_AFTER_S = 60

log = structlog.get_logger(__name__)

Argument = TypeVar("Argument")
Answer = TypeVar("Answer")

Order = Literal["cancel", "stop", "lost"]
"""Why a job's task is being ended: its customer wants no more of it, this process ends, or it is another's by now."""


@dataclass(frozen=True, slots=True)
class JobLimits:
    """Bounds of all processes together, but for `at_once`, which is this one's."""

    at_once: int = 16
    max_live: int = 10_000
    """Jobs that wait or run; each costs a row, its inputs, and a renewal of its reservation a minute."""
    max_live_per_customer: int = 1_000
    timeout_s: float = 24 * 3600.0
    """A job that could not be run for this long is refunded."""


class RolloutJobs:
    """Accepts jobs, and runs whichever job's turn it is."""

    def __init__(
        self,
        store: JobStore,
        inputs: FileGroups,
        results: ResultStore,
        ingress: Ingress,
        ledger: LedgerClient,
        reservations: Reservations,
        models: Mapping[str, ModelClient],
        status: StatusClient,
        limits: JobLimits,
        on_end: Callable[[], None],
    ) -> None:
        """`on_end` is called whenever a job has ended here: somebody may be waiting to be told."""
        self.store = store
        self._inputs = inputs
        self._results = results
        self._ingress = ingress
        self._ledger = ledger
        self._reservations = reservations
        self._models = models
        self._status = status
        self._limits = limits
        self._on_end = on_end
        self._owner = f"own_{secrets.token_hex(8)}"
        self._running: dict[RequestId, asyncio.Task[None]] = {}
        self._orders: dict[RequestId, Order] = {}
        self._stopping = False
        self._wake = asyncio.Event()
        self._loops: list[asyncio.Task[None]] = []

    def start(self) -> None:
        """Called outside any request, after the ledger's client has started."""
        self._loops = [keep_running(loop) for loop in (self._run_forever, self._renew_forever, self._keep_forever)]

    async def drain(self, timeout_s: float) -> None:
        """Begin no more jobs, let those that run end within `timeout_s`, and put the rest back into the queue."""
        self._stopping = True
        if self._running:
            await asyncio.wait(list(self._running.values()), timeout=timeout_s)
        for request_id in list(self._running):
            self._order(request_id, "stop")
        while self._running:
            await asyncio.wait(list(self._running.values()))

    async def stop(self) -> None:
        await self.drain(0)
        for loop in self._loops:
            loop.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)

    async def submit(
        self, request: RolloutRequest, customer_id: CustomerId, resized: bool, base_url: str, webhook_url: str
    ) -> Job | RolloutResult:
        """Reserve the price of `request` and queue it; or what this customer's same request has become.

        Raises:
            TooManyJobs, ModelOverloaded: no room for another job; nothing was reserved.
            OSError, LedgerUnavailable: it could not be stored; what was reserved is being refunded.
            Whatever `Ingress.reserve` raises.
        """
        if self._stopping:
            raise ModelOverloaded(request.model, RESTART_S)
        await self._make_sure_of_room(request.model, customer_id)
        while True:
            reserved = await self._ingress.reserve(request, RESERVATION_LEASE_S)
            if not isinstance(reserved, Repeated):
                job = Job(
                    request_id=request.request_id,
                    customer_id=reserved.customer_id,
                    key_id=request.key_id,
                    model=request.model,
                    seed=request.seed,
                    num_steps=request.num_steps,
                    guidance=request.guidance,
                    frames=request.num_frames,
                    amount=reserved.amount_mils,
                    payload_sha256=request.payload_sha256,
                    start_frame_resized=resized,
                    score=request.extras.score,
                    base_url=base_url,
                    webhook_url=webhook_url,
                    created_at=time.time(),
                )
                # The client may leave: what is paid for is queued all the same, and found when it is sent again.
                return await asyncio.shield(self._add(job, request))
            with self._ingress.joining(request):
                first = await self._first(reserved)
            if first is not None:
                return first

    async def cancel(self, job: Job) -> Job:
        """End `job` unless it has ended; what had not run by then is refunded. The same again changes nothing more.

        Raises:
            LedgerUnavailable: the database does not answer.
        """
        return await asyncio.shield(self._cancel(job))  # its client may leave: what it held is given back all the same

    async def _cancel(self, job: Job) -> Job:
        canceled: Job | None = await self._ask(self.store.cancel, job.request_id)
        self._order(job.request_id, "cancel")
        gives_up_at = time.monotonic() + CANCEL_WAIT_S
        while canceled is not None and canceled.finished_at is None and time.monotonic() < gives_up_at:
            await asyncio.sleep(0.05)
            canceled = await self._ask(self.store.get, job.request_id)
        assert canceled is not None, "only jobs that ended long ago are forgotten"
        if canceled.state == "canceled":
            self._on_end()
            settling = self._reservations.settle_later(job.request_id, 0, "canceled")
            await asyncio.wait([settling], timeout=REFUND_WAIT_S)
            await self._forget_inputs(job.request_id)
        return canceled

    async def _make_sure_of_room(self, model: str, customer_id: CustomerId) -> None:
        mine, everybodys = await self._ask(self.store.live, customer_id)
        if mine < self._limits.max_live_per_customer and everybodys < self._limits.max_live:
            return
        ended = await self._ask(self.store.ended_since, time.time() - 60)
        retry_after_s = min(MAX_RETRY_AFTER_S, math.ceil(60 / max(1, ended)))
        if mine >= self._limits.max_live_per_customer:
            raise TooManyJobs(self._limits.max_live_per_customer, retry_after_s)
        raise ModelOverloaded(model, retry_after_s)

    async def _ask(self, question: Callable[[Argument], Answer], argument: Argument) -> Answer:
        try:
            return await asyncio.to_thread(question, argument)
        except DATABASE_FAILURES as error:
            raise LedgerUnavailable() from error

    async def _add(self, job: Job, request: RolloutRequest) -> Job:
        stored = False
        try:
            packed = await asyncio.to_thread(_packed, request)
            await asyncio.to_thread(self._inputs.put, _inputs_of(job.request_id), {ARRAYS: packed}, True)
            await asyncio.to_thread(self.store.add, job)
            stored = True
        except DATABASE_FAILURES as error:
            raise LedgerUnavailable() from error
        finally:
            if not stored:
                log.error("job_not_stored", request_id=job.request_id)
                await self._settle(job.request_id, 0, "not started")
            self._reservations.hand_over(job.request_id)
        self._wake.set()
        return job

    async def _first(self, repeated: Repeated) -> Job | RolloutResult | None:
        """What the request that this one repeats has become; None if it was refunded, so that this one may run."""
        began = time.monotonic()
        while True:
            job = await self._ask(self.store.get, repeated.request_id)
            if job is not None:
                return job
            reservation = await self._reservations.record(repeated.request_id)
            if reservation is None or (reservation.state == "settled" and not reservation.frames_delivered):
                return None
            if reservation.state == "settled":  # it was sent without mode=async
                return await self._ingress.first_result(repeated)
            await asyncio.sleep(join_poll_s(began))

    async def _run_forever(self) -> None:
        while not self._stopping:
            self._wake.clear()
            try:
                while len(self._running) < self._limits.at_once and not self._stopping:
                    job = await asyncio.to_thread(self.store.claim, self._owner, JOB_LEASE_S)
                    if job is None:
                        break
                    self._begin(job)
            except DATABASE_FAILURES as error:
                log.warning("jobs_delayed", error=type(error).__name__)
            with contextlib.suppress(TimeoutError):  # not `wait_for`, which may lose a cancellation on 3.11
                async with asyncio.timeout(POLL_S):
                    await self._wake.wait()

    def _begin(self, job: Job) -> None:
        task = asyncio.get_running_loop().create_task(self._run(job))
        self._running[job.request_id] = task

        def ended(_: asyncio.Task[None]) -> None:
            del self._running[job.request_id]
            self._orders.pop(job.request_id, None)
            self._wake.set()

        task.add_done_callback(ended)

    def _order(self, request_id: RequestId, order: Order) -> None:
        task = self._running.get(request_id)
        if task is not None and request_id not in self._orders:
            self._orders[request_id] = order
            task.cancel()

    async def _run(self, job: Job) -> None:
        """One job from its claim to its end, or back into the queue."""
        try:
            ending = await self._ending(job)
            if ending is None:
                return
            finished = await asyncio.to_thread(self.store.finish, job.request_id, self._owner, ending)
            log.info("job", request_id=job.request_id, state=ending.state if finished else "lost")
            if finished:
                self._on_end()
                await self._forget_inputs(job.request_id)
        except _NotNow as reason:
            await self._release(job, time.time() + reason.retry_s)
        except asyncio.CancelledError:
            if self._orders.get(job.request_id) != "lost":
                await self._release(job, 0.0)
        except (*DATABASE_FAILURES, LedgerUnavailable) as error:  # its lease runs out, and it is begun again
            log.warning("job_delayed", request_id=job.request_id, error=type(error).__name__)
            await self._release(job, time.time() + ROOM_RETRY_S)
        except Exception as error:  # a defect of ours: the row is left, and begun again a bounded number of times
            log.error("job_broke", request_id=job.request_id, error=repr(error), exc_info=error)

    async def _ending(self, job: Job) -> Ending | None:
        """Do what is left to do of `job`. None if it is no longer this process's.

        Raises:
            _NotNow: there was no room for it, or the ledger is away.
        """
        reservation = await self._reservations.record(job.request_id)
        if reservation is None or reservation.state == "settled":
            return self._settled_before(job, reservation)
        made = await asyncio.to_thread(self._results.get, job.request_id)
        if made is not None:
            return await self._deliver(job, made)
        if job.cancel_requested_at is not None:
            return await self._give_back(job, Ending("canceled"))
        if job.attempts > MAX_OWNERS:
            return await self._give_back(
                job, _failed("ENGINE_FAILED", "the processes that ran it ended, again and again")
            )
        if time.time() > job.created_at + self._limits.timeout_s:
            return await self._give_back(job, _failed("DEADLINE_EXCEEDED", "there was no room for it in time"))
        model = self._models.get(job.model)
        if model is None:
            return await self._give_back(job, _failed("MODEL_NOT_FOUND", f"{job.model} is not served any more"))
        try:
            request = await asyncio.to_thread(self._read_inputs, job)
        except FileNotFoundError:
            return await self._give_back(job, _failed("ENGINE_FAILED", "its inputs are no longer stored"))
        return await self._roll_out(job, reservation, model, request)

    async def _roll_out(
        self, job: Job, reservation: ReservationRecord, model: ModelClient, request: RolloutRequest
    ) -> Ending | None:
        finished: list[FinishedChunk] = []
        started = time.perf_counter()
        try:
            await run_chunks(model, request, TicketTerms(job.customer_id, request.service_class), finished)
        except ModelOverloaded as error:
            raise _NotNow(error.retry_after_s) from error
        except (EngineFailed, DeadlinePassed) as error:
            log.error("job_failed", request_id=job.request_id, error=str(error))
            self._status.add(Sample(job.model, "failed", job.frames))
            return await self._give_back(job, _failed("ENGINE_FAILED", str(error)))
        except asyncio.CancelledError:
            if self._orders.get(job.request_id) != "cancel":
                raise
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
            self._status.add(Sample(job.model, "canceled", job.frames))
        if not finished:
            return await self._give_back(job, Ending("canceled"))
        gathered = await gather(model, request, finished)
        num_frames = gathered.candidate_frames[0]
        made = RolloutResult(
            request_id=job.request_id,
            model=job.model,
            videos=gathered.outputs,
            created_at=time.time(),
            num_frames=num_frames,
            cost_mils=reservation.cost(num_frames),
            queue_ms=gathered.queue_ms,
            infer_ms=gathered.infer_ms,
            total_ms=(time.perf_counter() - started) * 1e3,
            candidate_frames=gathered.candidate_frames,
            closeness=gathered.closeness,
            seed=job.seed,
        )
        try:
            await asyncio.to_thread(self._results.put, made, True)
        except OSError as error:
            log.error("job_failed", request_id=job.request_id, error=repr(error))
            return await self._give_back(job, _failed("ENGINE_FAILED", "its video could not be stored"))
        if num_frames == job.frames:
            self._status.add(Sample(job.model, "succeeded", num_frames, made.queue_ms, made.infer_ms, made.total_ms))
        return await self._deliver(job, made)

    async def _deliver(self, job: Job, made: RolloutResult) -> Ending:
        """Keep the price of what is stored: of all frames, or of those before a cancellation."""
        whole = made.num_frames == job.frames
        settled = await self._settle(job.request_id, made.num_frames, "" if whole else "canceled")
        return Ending(
            "succeeded" if whole else "canceled",
            delivered=made.num_frames,
            captured=settled.captured_mils,
            infer_ms=made.infer_ms,
            psnr_db=None if made.closeness is None else made.closeness.psnr_db,
            ssim=None if made.closeness is None else made.closeness.ssim,
            lpips=None if made.closeness is None else made.closeness.lpips,
        )

    async def _give_back(self, job: Job, ending: Ending) -> Ending | None:
        """Refund all of it, unless the job is another process's by now: that one may be about to deliver it."""
        if not any(held.request_id == job.request_id for held in await asyncio.to_thread(self.store.held, self._owner)):
            return None
        await self._settle(job.request_id, 0, ending.error or ending.state)
        return ending

    def _settled_before(self, job: Job, reservation: ReservationRecord | None) -> Ending:
        """A process ended between the settlement and the row, or the lease ran out: the ledger says what it was."""
        captured = Mils(0) if reservation is None else reservation.captured_mils
        delivered = 0 if reservation is None else reservation.frames_delivered
        if delivered:
            return Ending("succeeded" if delivered == job.frames else "canceled", delivered, captured)
        if job.cancel_requested_at is not None:
            return Ending("canceled")
        reason = "its reservation is gone" if reservation is None else reservation.reason or "it was refunded"
        return _failed("ENGINE_FAILED", reason)

    async def _settle(self, request_id: RequestId, frames_delivered: int, reason: str) -> Settled:
        """Close the reservation, once, however often this is asked for.

        Raises:
            _NotNow: the ledger was away for minutes.
        """
        settled = await asyncio.shield(self._reservations.settle_later(request_id, frames_delivered, reason))
        if settled is None:
            raise _NotNow(MAX_RETRY_AFTER_S)
        return settled

    async def _release(self, job: Job, not_before: float) -> None:
        try:
            await asyncio.to_thread(self.store.release, job.request_id, self._owner, not_before)
        except DATABASE_FAILURES as error:  # its lease runs out instead
            log.warning("job_not_released", request_id=job.request_id, error=type(error).__name__)

    async def _renew_forever(self) -> None:
        """Hold on to what runs here, and hear what was canceled elsewhere."""
        while True:
            await asyncio.sleep(RENEW_EVERY_S)
            if not self._running:
                continue
            running = list(self._running)
            try:
                held = await asyncio.to_thread(self.store.renew, self._owner, running, JOB_LEASE_S)
            except DATABASE_FAILURES as error:
                log.warning("jobs_not_renewed", error=type(error).__name__, jobs=len(running))
                continue
            canceled = {each.request_id: each.cancel_requested for each in held}
            for request_id in running:
                if canceled.get(request_id, True):
                    self._order(request_id, "cancel" if request_id in canceled else "lost")

    async def _keep_forever(self) -> None:
        """Keep the money of jobs held, whoever queued or runs them, and give back what a cancellation left."""
        swept_at = time.monotonic()
        while True:
            try:
                await self._keep_reservations()
                if time.monotonic() - swept_at > SWEEP_EVERY_S:
                    swept_at = time.monotonic()
                    await asyncio.to_thread(self._sweep)
            except (*DATABASE_FAILURES, LedgerUnavailable, OSError) as error:
                log.warning("job_reservations_not_kept", error=type(error).__name__)
            await asyncio.sleep(KEEP_EVERY_S)

    async def _keep_reservations(self) -> None:
        soon = time.time() + RESERVATION_LEASE_S / 2
        found = await asyncio.to_thread(self.store.open_reservations)
        live = tuple(
            each.request_id for each in found if each.state in ("queued", "running") and each.lease_until < soon
        )
        if live:
            await self._ledger.apply(Heartbeat(live, RESERVATION_LEASE_S))
        for each in found:
            if each.state not in ("queued", "running"):
                await self._ledger.apply(Settle(each.request_id, 0, each.state))

    def _sweep(self) -> None:
        now = time.time()
        self.store.forget(now - JOB_TTL_S)
        for name, written_at in self._inputs.ages(INPUTS):
            if written_at < now - self._limits.timeout_s - SWEEP_EVERY_S:
                self._inputs.remove(name)

    def _read_inputs(self, job: Job) -> RolloutRequest:
        """The request as it was sent. It is run under a name of its own, since tickets bear it."""
        stored = io.BytesIO(self._inputs.read(_inputs_of(job.request_id), ARRAYS))
        with np.load(stored, allow_pickle=False) as arrays:
            return RolloutRequest(
                request_id=RequestId(f"{job.request_id}.{secrets.token_hex(4)}"),
                key_id=job.key_id,
                model=job.model,
                start_frames=(arrays["start_frame"],),
                candidates=(arrays["actions"],),
                seed=job.seed,
                num_steps=job.num_steps,
                guidance=job.guidance,
                payload_sha256=job.payload_sha256,
                service_class="batch",
                extras=Extras(score=job.score, ground_truth=arrays.get("ground_truth")),
            )

    async def _forget_inputs(self, request_id: RequestId) -> None:
        try:
            await asyncio.to_thread(self._inputs.remove, _inputs_of(request_id))
        except FileNotFoundError:
            pass
        except OSError as error:  # they are swept later
            log.warning("job_inputs_not_removed", request_id=request_id, error=type(error).__name__)


class _NotNow(Exception):
    """The job goes back into the queue for `retry_s`."""

    def __init__(self, retry_s: float) -> None:
        super().__init__(retry_s)
        self.retry_s = retry_s


def _failed(code: str, reason: str) -> Ending:
    return Ending("failed", error_code=code, error=reason)


def _inputs_of(request_id: RequestId) -> str:
    return f"{INPUTS}/{request_id}"


def _packed(request: RolloutRequest) -> bytes:
    arrays: dict[str, NDArray[Any]] = {"start_frame": request.start_frames[0], "actions": request.candidates[0]}
    if request.extras.ground_truth is not None:
        arrays["ground_truth"] = request.extras.ground_truth
    output = io.BytesIO()
    np.savez(output, allow_pickle=False, **arrays)
    return output.getvalue()
