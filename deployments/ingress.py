"""A request's whole life: price it, reserve, run its chunks, join the video, settle, answer.

Every way out after the reservation ends in a settlement: all frames delivered, or none and a refund.
"""

import asyncio
import contextlib
import time
from collections import Counter, OrderedDict
from collections.abc import Awaitable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import structlog

from billing.commands import (
    CustomerId,
    KeyId,
    KeyRefused,
    Quote,
    Quoted,
    Repeated,
    Reserve,
    Reserved,
)
from billing.money import Mils
from deployments.errors import (
    DeadlinePassed,
    EngineFailed,
    KeyNotAccepted,
    LedgerUnavailable,
    ModelOverloaded,
    ResultExpired,
    RolloutCanceled,
    RolloutError,
)
from deployments.gather import Gathered, roll_out
from deployments.ledger_client import LedgerClient
from deployments.messages import RolloutRequest, RolloutResult, TicketTerms
from deployments.model_client import ModelClient
from deployments.pricing import check_quoted_class, quote_id_for
from deployments.reservations import LEASE_S, Reservations
from deployments.results import ResultStore
from deployments.status import Outcome, Sample
from deployments.status_client import StatusClient
from deployments.streaming import RolloutStream, StreamForm
from deployments.tracing import span

REFUND_WAIT_S = 15.0
"""How long the answer to a failure waits for its refund; the refund itself is tried for longer."""
RESTART_S = 15
"""What clients are told to wait while this ingress stops."""
QUOTE_VALID_S = 600.0
"""How long the price of a dry run is promised."""
DEDUPE_WINDOW_S = 60.0
"""How far back the same payload of the same customer counts as sent again: clients do so after a lost connection."""
MAX_PAYING = 10_000
HOLD_S = 0.5
"""How long room is held for a price that the ledger has not answered for; it is asked for again afterwards."""
JOIN_POLL_S, MAX_JOIN_POLL_S, JOIN_POLL_SHARE = 0.05, 1.0, 0.1
"""Between looks at a first request that still runs, perhaps on another ingress replica: a tenth of the time so far."""
MAX_JOINING = 64
"""Of one key's requests may wait for another's result at a time: that costs it nothing, and others a place each."""
JOIN_RETRY_S = 2

log = structlog.get_logger(__name__)


class Ingress:
    """Runs paid rollouts on the models it was given."""

    def __init__(
        self,
        ledger: LedgerClient,
        reservations: Reservations,
        models: Mapping[str, ModelClient],
        results: ResultStore,
        status: StatusClient,
    ) -> None:
        self._ledger = ledger
        self._reservations = reservations
        self._results = results
        self._models = models
        self._status = status
        self._paying: OrderedDict[KeyId, CustomerId] = OrderedDict()
        """Keys whose last price could be reserved."""
        self._joining: Counter[KeyId] = Counter()
        self._running: set[asyncio.Task[object]] = set()
        self._stopped: set[asyncio.Task[object]] = set()
        self._draining = False

    def start(self) -> None:
        self._reservations.start()
        self._status.start()
        for model in self._models.values():
            model.start()

    async def stop(self) -> None:
        """Settle what is left; Serve waits for this when it removes the replica."""
        await self._reservations.stop()
        await self._status.stop()
        for model in self._models.values():
            await model.stop()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new work, wait for what is running, and after `timeout_s` end and refund what is left."""
        self._draining = True
        running = set(self._running)
        if running:
            _, left = await asyncio.wait(running, timeout=timeout_s)
            left &= self._running  # the others have their result, and are answering
            for task in left:
                self._stopped.add(task)
                task.cancel()
            if left:
                await asyncio.wait(left)
        await self._reservations.settled()

    async def run(self, request: RolloutRequest, lasting: bool = False) -> RolloutResult:
        """Reserve the price, roll out all candidates, store the result, settle; or answer what was answered before.

        A request that the ledger recognises (by its idempotency key, or as a payload that this customer sent lately)
        waits for the first one if that still runs, and gets its result; if the first was refunded, this one runs.
        `lasting` results are kept for a link; those with an idempotency key always are.

        Raises:
            CreditsInsufficient, KeyNotAccepted, KeyNotAllowed, BudgetUsedUp, QuoteNotAccepted, LedgerUnavailable:
                nothing ran and nothing was charged.
            IdempotencyKeyReused, ResultExpired, RolloutCanceled: nothing ran, the first request stands.
            ModelOverloaded, DeadlinePassed, EngineFailed, OSError: what was reserved has been refunded.
            asyncio.CancelledError: the client left; what was reserved is being refunded.
        """
        if self._draining:
            raise ModelOverloaded(request.model, RESTART_S)
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        started = time.perf_counter()
        early = self._queue_early(request, started)
        try:
            while True:
                reserved = await self._reserve_noting_who_pays(request)
                if isinstance(reserved, Reserved):
                    return await self._run(request, reserved, lasting or bool(request.idempotency_key), started, early)
                early.withdraw()
                with self.joining(request):
                    first = await self.first_result(reserved)
                if first is not None:
                    if first.num_frames != request.num_frames and request.extras.keep == 1:
                        raise RolloutCanceled()
                    return first
        except asyncio.CancelledError:
            if task not in self._stopped:
                raise
            task.uncancel()  # it was this ingress that stopped, not the client: that one is owed an answer
            raise ModelOverloaded(request.model, RESTART_S) from None
        finally:
            early.withdraw()
            self._running.discard(task)
            self._stopped.discard(task)

    async def stream(self, request: RolloutRequest, form: StreamForm) -> RolloutStream:
        """Reserve the price of one candidate, to be sent as it is made. Its own run, whatever ran before: no frame that
        was streamed is kept. Whoever reads it finishes it.

        Raises:
            CreditsInsufficient, KeyNotAccepted, KeyNotAllowed, BudgetUsedUp, QuoteNotAccepted, LedgerUnavailable:
                nothing ran and nothing was charged.
        """
        if self._draining:
            raise ModelOverloaded(request.model, RESTART_S)
        request = replace(request, payload_sha256="")
        reserved = await self.reserve(request)
        assert isinstance(reserved, Reserved), reserved
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        return RolloutStream(
            self._models[request.model],
            request,
            reserved,
            form,
            self._reservations,
            self._status,
            on_finish=lambda: self._running.discard(task),
        )

    async def quote(self, request: RolloutRequest) -> Quoted:
        """Promise what `request` costs now for `QUOTE_VALID_S`. Nothing runs and nothing is reserved.

        Raises:
            KeyNotAccepted, LedgerUnavailable: nothing was promised.
        """
        assert request.price is not None
        outcome = await self._ledger.apply(
            Quote(
                quote_id=quote_id_for(request.service_class),
                key_id=request.key_id,
                model=request.model,
                frames=request.num_frames,
                mils_per_frame=request.price.mils_per_frame,
                per_frames=request.price.per_frames,
                price_version=request.price.version.version,
                valid_s=QUOTE_VALID_S,
            )
        )
        if isinstance(outcome, KeyRefused):
            raise KeyNotAccepted()
        assert isinstance(outcome, Quoted), outcome
        return outcome

    def _queue_early(self, request: RolloutRequest, started: float) -> "_Early":
        """Ask for room while the ledger is asked for the price: each takes a millisecond or more.

        Only where the key's last price was paid: whoever cannot pay takes no room, and is no reason for more replicas.
        """
        customer_id = self._paying.get(request.key_id)
        if customer_id is None:
            return _Early(None, asyncio.Event())
        permit = asyncio.Event()
        rolling = roll_out(self._models[request.model], request, _terms(request, customer_id, started), permit)
        return _Early(asyncio.get_running_loop().create_task(rolling), permit)

    async def _reserve_noting_who_pays(self, request: RolloutRequest) -> Reserved | Repeated:
        try:
            reserved = await self.reserve(request)
        except RolloutError:
            self._paying.pop(request.key_id, None)
            raise
        if isinstance(reserved, Reserved):
            self._paying[request.key_id] = reserved.customer_id
            self._paying.move_to_end(request.key_id)
            if len(self._paying) > MAX_PAYING:
                self._paying.popitem(last=False)
        return reserved

    async def _run(
        self, request: RolloutRequest, reserved: Reserved, lasting: bool, started: float, early: "_Early"
    ) -> RolloutResult:
        try:
            rolling = early.permitted()
            if rolling is None:
                terms = _terms(request, reserved.customer_id, started)
                rolling = roll_out(self._models[request.model], request, terms)
            gathered = await rolling
            num_frames = sum(gathered.candidate_frames)
            result = RolloutResult(
                request_id=request.request_id,
                model=request.model,
                videos=gathered.outputs,
                created_at=time.time(),
                num_frames=num_frames,
                cost_mils=await self._cost(request, reserved, num_frames),
                queue_ms=gathered.queue_ms,
                infer_ms=gathered.infer_ms,
                total_ms=(time.perf_counter() - started) * 1e3,
                candidate_frames=gathered.candidate_frames,
                distances=gathered.distances,
                closeness=gathered.closeness,
                seed=request.seed,
            )
            if lasting:
                await asyncio.to_thread(self._results.put, result, True)
        except BaseException as failure:
            await self._refund(request, failure)
            raise
        # No await from here on: the frames exist, so nothing may come between them and their caller.
        self._reservations.settle_later(
            request.request_id,
            num_frames,
            "pruned" if num_frames < request.num_frames else "",
            first=None if lasting else partial(self._keep, result),
        )
        self._report(request, "succeeded", result)
        return result

    async def _keep(self, result: RolloutResult) -> None:
        """For a repetition, which reads it once it is captured; without it, it learns that the result has expired."""
        try:
            await asyncio.to_thread(self._results.put, result, False)
        except Exception as error:  # an object store has its own
            log.error("result_not_kept", request_id=result.request_id, error=repr(error))

    async def _cost(self, request: RolloutRequest, reserved: Reserved, num_frames: int) -> Mils:
        """What the settlement will keep: at the rate that was reserved, which is a quote's if there was one."""
        if num_frames == request.num_frames:
            return reserved.amount_mils
        record = await self._reservations.record(request.request_id)
        assert record is not None
        return record.cost(num_frames)

    @contextlib.contextmanager
    def joining(self, request: RolloutRequest) -> Iterator[None]:
        """While `request` waits for another's result.

        Raises:
            ModelOverloaded: its key has too many that do.
        """
        if self._joining[request.key_id] >= MAX_JOINING:
            raise ModelOverloaded(request.model, JOIN_RETRY_S)
        self._joining[request.key_id] += 1
        try:
            yield
        finally:
            self._joining[request.key_id] -= 1
            self._joining += Counter()  # drops those at zero

    async def first_result(self, repeated: Repeated) -> RolloutResult | None:
        """What the request that this one repeats was answered with; None if it was refunded after all.

        Raises:
            ResultExpired: it was delivered, and its result is no longer kept.
        """
        state, began = repeated.state, time.monotonic()
        while state == "open":
            first = await self._reservations.record(repeated.request_id)
            if first is None or (first.state == "settled" and not first.frames_delivered):
                return None
            state = first.state
            if state == "open":
                await asyncio.sleep(join_poll_s(began))
        result = await asyncio.to_thread(self._results.get, repeated.request_id)
        if result is None:
            raise ResultExpired()
        return result

    async def reserve(self, request: RolloutRequest, lease_s: float = LEASE_S) -> Reserved | Repeated:
        """Hold the price of `request`, or say which request it repeats. Raises what `Reservations.reserve` does."""
        assert request.price is not None
        check_quoted_class(request.quote_id, request.service_class)
        kind = "predict" if len(request.candidates) == 1 else f"predict_batch ×{len(request.candidates)}"
        try:
            with span("reserve", {"dream.frames": request.num_frames}):
                return await self._reservations.reserve(
                    Reserve(
                        request_id=request.request_id,
                        key_id=request.key_id,
                        frames=request.num_frames,
                        mils_per_frame=request.price.mils_per_frame,
                        per_frames=request.price.per_frames,
                        detail=f"{kind} · {request.model} · {request.num_frames} frames",
                        lease_s=lease_s,
                        idempotency_key=request.idempotency_key,
                        payload_sha256=request.payload_sha256,
                        dedupe_window_s=DEDUPE_WINDOW_S if request.payload_sha256 else 0.0,
                        model=request.model,
                        quote_id=request.quote_id,
                    )
                )
        except LedgerUnavailable:
            raise
        except RolloutError:
            self._report(request, "refused")
            raise

    async def _refund(self, request: RolloutRequest, failure: BaseException) -> None:
        """A failure is answered only once its refund is durable; a client that left is not waited for."""
        left = isinstance(failure, asyncio.CancelledError)
        outcome: Outcome
        match failure:
            case asyncio.CancelledError():
                outcome, reason = "canceled", "server stopping" if self._draining else "client disconnected"
            case ModelOverloaded():
                outcome, reason = "refused", "overloaded"
            case DeadlinePassed():
                outcome, reason = "refused", "deadline passed"
            case EngineFailed():
                outcome, reason = "failed", "engine failed"
            case _:
                outcome, reason = "failed", "internal error"
                log.error("rollout_failed", request_id=request.request_id, error=repr(failure), exc_info=failure)
        self._report(request, outcome)
        settling = self._reservations.settle_later(request.request_id, 0, reason)
        if not left:
            await asyncio.wait([settling], timeout=REFUND_WAIT_S)

    def _report(self, request: RolloutRequest, outcome: Outcome, result: RolloutResult | None = None) -> None:
        if result is None:
            self._status.add(Sample(request.model, outcome, request.num_frames))
        else:
            self._status.add(
                Sample(request.model, outcome, request.num_frames, result.queue_ms, result.infer_ms, result.total_ms)
            )


class _Early:
    """A rollout that has asked for room and may not run yet, or none."""

    def __init__(self, rolling: asyncio.Task[Gathered] | None, permit: asyncio.Event) -> None:
        self._rolling = rolling
        self._permit = permit
        self._timer: asyncio.TimerHandle | None = None
        if rolling is not None:
            rolling.add_done_callback(_seen)
            self._timer = asyncio.get_running_loop().call_later(HOLD_S, self.withdraw)

    def permitted(self) -> Awaitable[Gathered] | None:
        """It runs from here on; None if there is none."""
        rolling, self._rolling = self._rolling, None
        if rolling is not None:
            self._permit.set()
        self._end_timer()
        return rolling

    def withdraw(self) -> None:
        """Give its room back. Nothing has run, unless it was permitted: then this does nothing."""
        if self._rolling is not None:
            self._rolling.cancel()
            self._rolling = None
        self._end_timer()

    def _end_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()


def join_poll_s(began: float) -> float:
    """Until the next look at what has been waited for since `began`, on the monotonic clock."""
    return min(MAX_JOIN_POLL_S, max(JOIN_POLL_S, JOIN_POLL_SHARE * (time.monotonic() - began)))


def _terms(request: RolloutRequest, customer_id: CustomerId, started: float) -> TicketTerms:
    left_s = None if request.deadline_s is None else request.deadline_s - (time.perf_counter() - started)
    return TicketTerms(customer_id, request.service_class, left_s)


def _seen(rolling: asyncio.Task[Gathered]) -> None:
    """What was withdrawn may have failed as well: that is nobody's concern."""
    if not rolling.cancelled():
        rolling.exception()
