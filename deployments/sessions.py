"""Interactive sessions: a rollout whose actions arrive while it runs, and whose frames leave as soon as they exist.

A session is the chunk loop again, from the last frame of the submission before. What it may cost is reserved when it is
created; what was streamed is kept when it ends, however it ends, and the rest is given back. Knows nothing of sockets:
whoever carries the events reports what it has sent.
"""

import asyncio
import contextlib
import contextvars
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any, Literal
from uuid import uuid4

import structlog
from ray.exceptions import RayError

from billing.commands import CustomerId, KeyId, RequestId, Reserve, Reserved
from billing.money import Mils
from billing.prices import Priced
from deployments.chunk_loop import ChunkPlan, streamed_chunks
from deployments.errors import (
    EngineFailed,
    ModelOverloaded,
    RolloutError,
    SessionBudgetSpent,
    SessionBusy,
    SessionLimit,
    SessionUnknown,
)
from deployments.messages import NO_MEMORY, Actions, ChunkPiece, Frame, ModelSpec, TicketTerms
from deployments.model_client import ModelClient
from deployments.pricing import check_quoted_class
from deployments.reservations import LEASE_S, Reservations
from deployments.session_directory import SessionRecord
from deployments.status import Sample
from deployments.status_client import StatusClient

DETAIL_PREFIX = "session · "
"""How the debit of a session begins, by which its reservation is known for one."""
CONNECT_WITHIN_S = 60.0
"""A session that nobody has connected to by then is refunded."""
POLL_S = 10.0
RETRY_S = 0.5
END_WITHIN_S = 15.0
"""How long the end of a session waits for its settlement, which is tried for longer."""
MAX_QUEUED_SUBMISSIONS = 4
QUEUED_CHUNKS = 2
"""Chunks of frames that wait for a slow reader; generation pauses when they do."""
RESTART_S = 15

log = structlog.get_logger(__name__)

EndReason = Literal["closed", "idle", "restart", "slow reader", "disconnected"]


@dataclass(frozen=True, slots=True)
class SessionLimits:
    budget_frames: int = 1_201
    """Reserved for a session unless it asks for fewer; less where the balance covers less."""
    idle_s: float = 120.0
    """Without a submission for this long a session ends."""


@dataclass(frozen=True, slots=True)
class SessionRequest:
    request_id: RequestId
    customer_id: CustomerId
    key_id: KeyId
    start_frame: Frame
    seed: int
    num_steps: int
    guidance: float
    budget_frames: int
    price: Priced
    """Of the whole budget."""
    quote_id: str = ""


@dataclass(frozen=True, slots=True)
class Submission:
    actions: Actions
    seed: int | None = None
    num_steps: int | None = None


@dataclass(frozen=True, slots=True)
class FrameMade:
    index: int
    """In the session; the start frame is 0."""
    picture: bytes
    """PNG, or JPEG where a PNG would be too large for one message."""


@dataclass(frozen=True, slots=True)
class ChunkStreamed:
    """All frames of a chunk have been handed over."""


@dataclass(frozen=True, slots=True)
class SubmissionDone:
    num_frames: int


@dataclass(frozen=True, slots=True)
class SubmissionFailed:
    error: RolloutError


@dataclass(frozen=True, slots=True)
class SessionOver:
    reason: EndReason


Event = FrameMade | ChunkStreamed | SubmissionDone | SubmissionFailed | SessionOver


class Session:
    """One connected session. Read `events`, and say `sent` of each frame once it has left."""

    def __init__(self, model: ModelClient, record: SessionRecord, status: StatusClient, idle_s: float) -> None:
        self.record = record
        self.frames_streamed = 0
        self._model = model
        self._status = status
        self._idle_s = idle_s
        self._frame = record.start_frame
        self._memory = NO_MEMORY
        self._chunks = 0
        self._frames_made = 0
        self._frames_promised = 0
        self._num_submissions = 0
        self._submissions: asyncio.Queue[Submission] = asyncio.Queue(MAX_QUEUED_SUBMISSIONS)
        self._events: asyncio.Queue[Event] = asyncio.Queue(QUEUED_CHUNKS * (1 + model.spec.chunk_size))
        self._over: asyncio.Future[EndReason] = asyncio.get_running_loop().create_future()
        self._worker = asyncio.get_running_loop().create_task(self._work())

    @property
    def spec(self) -> ModelSpec:
        return self._model.spec

    @property
    def frames_left(self) -> int:
        """Of its budget, less what the submissions taken so far will use."""
        return self.record.budget_frames - self._frames_promised

    def submit(self, submission: Submission) -> None:
        """Take the next actions; they run after those before them.

        Raises:
            ModelOverloaded: too many submissions wait already.
            SessionBudgetSpent: it would need more frames than are left of the budget.
        """
        if self._submissions.full():
            raise ModelOverloaded(self.record.model, 1)
        needed = len(submission.actions) + (self._frames_promised == 0)
        if needed > self.frames_left:
            raise SessionBudgetSpent(self.frames_left, needed)
        self._frames_promised += needed
        self._submissions.put_nowait(submission)

    def sent(self) -> None:
        self.frames_streamed += 1

    def end(self, reason: EndReason) -> None:
        """Stop as soon as possible: nothing further is generated, and `events` ends with the reason."""
        if not self._over.done():
            self._over.set_result(reason)
        self._worker.cancel()

    async def events(self) -> AsyncGenerator[Event, None]:
        """What happens, in order, up to `SessionOver`. Once the session is over what had not left is dropped."""
        over: asyncio.Future[Any] = self._over
        while not over.done():
            getting: asyncio.Future[Any] = asyncio.ensure_future(self._events.get())
            try:
                await asyncio.wait((getting, over), return_when=asyncio.FIRST_COMPLETED)
                if getting.done() and not over.done():
                    yield getting.result()
            finally:
                getting.cancel()
        yield SessionOver(self._over.result())

    async def _work(self) -> None:
        while True:
            try:
                async with asyncio.timeout(self._idle_s):
                    submission = await self._submissions.get()
            except TimeoutError:
                self._over.set_result("idle")
                return
            promised = len(submission.actions) + (self._chunks == 0)
            made_before = self._frames_made
            try:
                await self._stream(submission)
            except Exception as error:
                self._frames_promised -= promised - (self._frames_made - made_before)
                await self._events.put(SubmissionFailed(self._told(error, promised)))
            else:
                await self._events.put(SubmissionDone(self._frames_made - made_before))

    def _told(self, error: Exception, num_frames: int) -> RolloutError:
        """What the client is told of it; the session goes on from its last good frame."""
        refused = isinstance(error, ModelOverloaded)
        self._status.add(Sample(self.record.model, "refused" if refused else "failed", num_frames))
        if isinstance(error, RolloutError):
            return error
        log.error("session_failed", request_id=self.record.request_id, error=repr(error), exc_info=error)
        return EngineFailed(self.record.model, "the server failed")

    async def _stream(self, submission: Submission) -> None:
        record, started = self.record, time.perf_counter()
        self._num_submissions += 1
        plan = ChunkPlan(
            name=f"{record.request_id}/{self._num_submissions}",
            start_frames=(self._frame,),
            candidates=(submission.actions,),
            seed=record.seed if submission.seed is None else submission.seed,
            num_steps=record.num_steps if submission.num_steps is None else submission.num_steps,
            guidance=record.guidance,
            first_chunk=self._chunks,
            form="png",
            terms=TicketTerms(record.customer_id, "interactive"),
            stream=record.request_id,
            memory=self._memory,
        )
        queue_ms = infer_ms = 0.0
        chunk = self._chunks
        async with aclosing(streamed_chunks(self._model, plan)) as made:
            async for each in made:
                if isinstance(each, ChunkPiece):
                    self._chunks = chunk + 1  # what was shown is not shown again, even if the rest of it fails
                    self._memory = self._memory.after(each.traces, each.keep_traces)
                    if each.last_frame is not None:
                        self._frame = each.last_frame
                    for picture in each.pictures:
                        await self._events.put(FrameMade(self._frames_made, picture))
                        self._frames_made += 1
                else:
                    self._frame, self._memory = each.outcomes[0].last_frame, each.memories[0]
                    queue_ms += each.timing.queue_ms
                    infer_ms += each.timing.infer_ms
                    chunk += 1
                    await self._events.put(ChunkStreamed())
        total_ms = (time.perf_counter() - started) * 1e3
        sample = Sample(record.model, "succeeded", len(submission.actions), queue_ms, infer_ms, total_ms)
        self._status.add(sample)


class Sessions:
    """The sessions that one ingress replica created or carries."""

    def __init__(
        self,
        reservations: Reservations,
        models: Mapping[str, ModelClient],
        directory: Any,
        status: StatusClient,
        limits: SessionLimits,
    ) -> None:
        self.limits = limits
        self._reservations = reservations
        self._models = models
        self._directory = directory
        self._status = status
        self._owner = uuid4().hex
        self._draining = False
        self._connected: dict[RequestId, Session] = {}
        self._left = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._context = contextvars.Context()

    async def create(self, request: SessionRequest, model: str) -> tuple[SessionRecord, Reserved]:
        """Reserve the session's budget, and wait a while for somebody to connect to it.

        Raises:
            SessionLimit: the customer has as many as it may; nothing was reserved.
            RolloutError: as `Reservations.reserve`; nothing was reserved.
        """
        if self._draining:
            raise ModelOverloaded(model, RESTART_S)
        check_quoted_class(request.quote_id, "interactive")
        record = SessionRecord(
            request_id=request.request_id,
            customer_id=request.customer_id,
            key_id=request.key_id,
            model=model,
            start_frame=request.start_frame,
            seed=request.seed,
            num_steps=request.num_steps,
            guidance=request.guidance,
            budget_frames=request.budget_frames,
            mils_per_frame=request.price.mils_per_frame,
            per_frames=request.price.per_frames,
            created_at=time.time(),
        )
        try:
            if await self._directory.create.remote(record) == "too many":
                raise SessionLimit()
            reserved = await self._reservations.reserve(
                Reserve(
                    request_id=request.request_id,
                    key_id=request.key_id,
                    frames=request.budget_frames,
                    mils_per_frame=record.mils_per_frame,
                    per_frames=record.per_frames,
                    detail=f"{DETAIL_PREFIX}{model} · up to {request.budget_frames} frames",
                    lease_s=LEASE_S,
                    model=model,
                    quote_id=request.quote_id,
                )
            )
        except BaseException:
            self._forget_later(request.request_id)
            raise
        assert isinstance(reserved, Reserved), reserved
        self._spawn(self._wait_for_its_client(record))
        return record, reserved

    async def connect(self, request_id: RequestId, customer_id: CustomerId) -> Session:
        """Carry the session from here on; `finish` must follow.

        Raises:
            SessionUnknown, SessionBusy: it cannot be connected to, or no longer.
            asyncio.CancelledError: whoever asked has left; if it was connected to, it has been finished.
        """
        connecting: asyncio.Task[Session] = self._spawn(self._connect(request_id, customer_id))
        try:
            return await asyncio.shield(connecting)
        except asyncio.CancelledError:
            self._spawn(self._finish_unread(connecting))
            raise

    async def _connect(self, request_id: RequestId, customer_id: CustomerId) -> Session:
        reserved = await self._reservations.record(request_id)
        if reserved is None or self._draining:
            raise SessionUnknown()
        try:
            claimed = await self._directory.claim.remote(request_id, customer_id, self._owner)
        except RayError:  # it may be claimed for this replica, or be another's: whoever does not carry it lets go of it
            self._hand_over(request_id)
            raise
        if claimed == "unknown":
            raise SessionUnknown()
        if claimed == "connected":
            raise SessionBusy()
        try:
            # The rate that was reserved is a quote's, if there was one.
            return await self._carry(
                replace(
                    claimed,
                    mils_per_frame=reserved.mils_per_frame,
                    per_frames=reserved.per_frames,
                    frames_covered=reserved.frames_covered,
                )
            )
        except BaseException:  # nobody else can connect to it any more
            self._spawn(self._give_back(request_id, "session not connected"))
            raise

    async def _carry(self, record: SessionRecord) -> Session:
        """Raises SessionUnknown if it was refunded meanwhile, as when its ingress died, or needs another deployment."""
        model = self._models.get(record.model)
        if model is None or not await self._reservations.take_over(record.request_id):
            raise SessionUnknown()
        session = Session(model, record, self._status, self.limits.idle_s)
        self._connected[record.request_id] = session
        self._spawn(self._end_when_told(session))
        if self._draining:
            session.end("restart")
        return session

    async def _finish_unread(self, connecting: "asyncio.Task[Session]") -> None:
        """Of a client that left while it was being connected."""
        try:
            session = await connecting
        except Exception as error:
            log.info("session_not_connected", error=repr(error))
        else:
            await self.finish(session, "disconnected")

    async def finish(self, session: Session, reason: EndReason) -> Mils:
        """Settle what was streamed; the mils that it cost. Safe to be cancelled: the settlement goes on."""
        session.end(reason)
        record = session.record
        self._connected.pop(record.request_id, None)
        self._left.set()
        why = f"session {reason}"
        settling = self._reservations.settle_later(record.request_id, session.frames_streamed, why)
        self._spawn(self._leave(record.request_id, settling))
        await asyncio.wait([settling], timeout=END_WITHIN_S)
        return record.cost(session.frames_streamed)

    async def close(self, request_id: RequestId) -> bool:
        """End the session wherever it is, and settle it; False if there is none (it may have ended before).

        One that is settled has ended, though its ingress may have died before it could say so.
        """
        record = await self._reservations.record(request_id)
        if record is not None and record.state == "settled":
            await self._directory.ended.remote(request_id)
            return True
        answer = await self._directory.close.remote(request_id, END_WITHIN_S)
        if answer == "unclaimed":
            await self._give_back(request_id, "session closed")
        return bool(answer != "unknown")

    async def find(self, request_id: RequestId) -> tuple[SessionRecord, bool] | None:
        """A session that has not ended, and whether somebody is connected to it."""
        found: tuple[SessionRecord, bool] | None = await self._directory.find.remote(request_id)
        return found

    @property
    def num_connected(self) -> int:
        return len(self._connected)

    def start(self) -> None:
        """From here on tasks run in the context of this call: Ray cancels what a cancelled request has called."""
        self._context = contextvars.copy_context()

    async def drain(self) -> None:
        """End every session that is carried here; its client may create another elsewhere."""
        self._draining = True
        for session in list(self._connected.values()):
            session.end("restart")
        while self._connected:
            self._left.clear()
            await self._left.wait()

    async def stop(self) -> None:
        """After `drain`, and before the ledger's client stops."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _wait_for_its_client(self, record: SessionRecord) -> None:
        """Whatever comes of it, this replica renews the lease of nothing that it does not carry."""
        request_id = record.request_id
        try:
            owner = await self._directory.wait_claimed.remote(request_id, CONNECT_WITHIN_S)
        except Exception as error:  # it has most likely forgotten the session, to which nobody can connect then
            log.warning("session_directory_lost", request_id=request_id, error=type(error).__name__)
            self._hand_over(request_id)
            return
        if not owner:
            await self._give_back(request_id, "session never connected to")
        elif owner != self._owner:
            self._hand_over(request_id)

    def _hand_over(self, request_id: RequestId) -> None:
        """Whoever carries the session renews its lease, or it is refunded when that ends."""
        if request_id not in self._connected:
            self._reservations.hand_over(request_id)

    async def _give_back(self, request_id: RequestId, reason: str) -> None:
        settling = self._reservations.settle_later(request_id, 0, reason)
        await self._leave(request_id, settling)

    async def _leave(self, request_id: RequestId, settling: "asyncio.Task[Any]") -> None:
        """Only once it is settled is it gone: who asked for its end is answered with what was refunded."""
        await asyncio.wait([settling])
        with contextlib.suppress(RayError):  # then the directory knows nothing of it anyway
            await self._directory.ended.remote(request_id)

    async def _end_when_told(self, session: Session) -> None:
        """By its customer, or by the ledger: this process was frozen, say, while the lease ended."""
        request_id = session.record.request_id
        while request_id in self._connected:
            try:
                word = await self._directory.wait_closing.remote(request_id, POLL_S)
                if word == "closing":
                    session.end("closed")
                    return
                if word == "unknown" and request_id in self._connected:
                    await self._directory.register.remote(session.record, self._owner)
                if await self._reservations.is_settled(request_id) and request_id in self._connected:
                    log.error("session_lease_lost", request_id=request_id)
                    session.end("restart")
                    return
            except Exception as error:
                log.warning("session_not_watched", request_id=request_id, error=type(error).__name__)
                await asyncio.sleep(RETRY_S)

    def _forget_later(self, request_id: RequestId) -> None:
        async def forget() -> None:
            with contextlib.suppress(RayError):
                await self._directory.ended.remote(request_id)

        self._spawn(forget())

    def _spawn(self, work: Coroutine[Any, Any, Any]) -> "asyncio.Task[Any]":
        task = asyncio.get_running_loop().create_task(work, context=self._context.copy())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
