"""`/v1/sessions`: interactive streaming. A session is created over HTTP, and steered over one WebSocket.

Frames wait for a slow reader in a bounded queue, and generation waits with them; a reader that takes nothing for
`limits.send_timeout_s` is closed. A socket does that by itself; behind Serve's default proxy `send_window` does.
"""

import asyncio
import base64
import contextlib
import json
import time
from contextlib import aclosing
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit, urlunsplit

import numpy as np
import structlog
from fastapi import APIRouter, Depends, Request, WebSocket, WebSocketDisconnect
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from pydantic import ValidationError as PydanticError

from billing.commands import RequestId
from billing.money import usd
from billing.prices import Priced
from billing.reader import KeyRecord
from deployments.errors import KeyNotAllowed, LedgerUnavailable, ModelOverloaded, RolloutError, SessionUnknown
from deployments.messages import Frame, ModelSpec, RolloutRequest, ServiceClass
from deployments.session_directory import SessionRecord
from deployments.sessions import (
    DETAIL_PREFIX,
    ChunkStreamed,
    EndReason,
    FrameMade,
    Session,
    SessionOver,
    SessionRequest,
    Submission,
    SubmissionDone,
    SubmissionFailed,
)
from serve_app.context import ActiveSlug, Caller, Parts, Services, authenticate
from serve_app.errors import ROLLOUT_ERRORS, ApiError, InvalidRequest, ModelRefused, RateLimited
from serve_app.forms import Form, read_form
from serve_app.routes.frames import uploaded
from serve_app.routes.inputs import FILE, check_denoising, multipart
from serve_app.routes.quotes import DryRun, estimate, presented_quote
from serve_app.schemas import MAX_GUIDANCE, MAX_NUM_STEPS, MAX_SEED, Estimate
from serve_app.uploads import decode_start_frame

SERVICE_CLASS: ServiceClass = "interactive"
MAX_MESSAGE_BYTES = 16 * 2**20
"""Of a client's message: 1,200 actions of 384 values as JSON have about 10 MB."""
CLOSE_CODES: dict[EndReason, int] = {
    "closed": 1000,
    "idle": 4000,
    "slow reader": 4008,
    "restart": 1012,
    "disconnected": 1000,
}
UNAUTHENTICATED, UNKNOWN, BUSY = 4001, 4004, 4009

log = structlog.get_logger(__name__)

router = APIRouter(tags=["sessions"], dependencies=[Depends(authenticate)])
sockets = APIRouter()
"""Without dependencies: a socket says what is wrong in a message, which a refused handshake cannot."""


class SessionParams(BaseModel):
    """The form fields of `POST /v1/sessions`, beside `initial_frame`."""

    model_config = ConfigDict(extra="forbid")

    model: str
    seed: int = Field(0, ge=0, le=MAX_SEED)
    num_steps: int | None = Field(None, ge=1, le=MAX_NUM_STEPS)
    guidance: float | None = Field(None, ge=0.0, le=MAX_GUIDANCE, allow_inf_nan=False)
    max_frames: int | None = Field(None, ge=2, description="Reserve so many frames at most")
    initial_frame_id: str | None = Field(None, description="Of an uploaded frame, in place of the file `initial_frame`")


class SessionEnvelope(BaseModel):
    id: str
    object: Literal["session"] = "session"
    model: str | None = Field(description="Null of a session that has ended")
    created: int
    state: Literal["created", "streaming", "closed"]
    ws_url: str
    frames_streamed: int | None = Field(description="Null while it streams")
    frames_reserved: int
    reserved_mils: int
    cost_mils: int | None = Field(description="What was streamed costs; null until it is settled")
    cost_usd: float | None


class SubmitActions(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: Literal["submit_actions"]
    actions: list[list[float]]
    num_steps: int | None = Field(None, ge=1, le=MAX_NUM_STEPS)
    seed: int | None = Field(None, ge=0, le=MAX_SEED)


class Ping(BaseModel):
    type: Literal["ping"]


class Control(BaseModel):
    type: Literal["control"]
    command: Literal["stop"]


ClientMessage = TypeAdapter[SubmitActions | Ping | Control](
    Annotated[SubmitActions | Ping | Control, Field(discriminator="type")]
)


@router.post(
    "/v1/sessions",
    openapi_extra=multipart(["model"], initial_frame=FILE, **SessionParams.model_json_schema()["properties"]),
)
async def create_session(
    request: Request, parts: Parts, caller: Caller, active: ActiveSlug, dry_run: DryRun = False
) -> SessionEnvelope | Estimate:
    """Reserve a budget of frames for a session; what is not streamed is refunded at its end."""
    form = await read_form(request, 8, parts.args.limits.body_timeout_s)
    names = list(SessionParams.model_fields)
    form.only(files=("initial_frame",), fields=names)
    params = form.fields(SessionParams)
    model = parts.models.get(params.model)
    if model is None:
        raise ModelRefused("model", f"{params.model!r} is not served here; see /v1/models")
    if "base_model" in request.path_params and params.model != active:
        raise ModelRefused("model", f"{params.model!r} is not active under this base URL; {active!r} is")
    spec = model.spec
    num_steps = spec.default_num_steps if params.num_steps is None else params.num_steps
    if num_steps > (most := parts.max_row_steps[spec.slug]):
        raise InvalidRequest("num_steps", f"is {num_steps}; up to {most} are accepted")
    guidance = spec.default_guidance if params.guidance is None else params.guidance
    check_denoising(spec, num_steps, guidance)
    start_frame = await _start_frame(parts, caller, form, params, spec)
    budget = params.max_frames or parts.sessions.limits.budget_frames
    if not params.max_frames:
        now = time.time()
        spendable = await parts.ask(parts.reader.spendable, caller.customer_id, now)
        covered = await parts.ask(parts.units.frames_left, now, caller.customer_id, spec.slug)
        price = await parts.prices.price(spec, budget, caller.customer_id, SERVICE_CLASS)
        budget = max(1 + spec.chunk_size, min(budget, covered + spendable * price.per_frames // price.mils_per_frame))
    budget = min(budget, parts.sessions.limits.budget_frames)
    price = await parts.prices.price(spec, budget, caller.customer_id, SERVICE_CLASS)
    if dry_run:
        return await estimate(parts, caller, _as_rollout(request, caller, spec, start_frame, budget, price))
    session = SessionRequest(
        request_id=request.state.request_id,
        customer_id=caller.customer_id,
        key_id=caller.key_id,
        start_frame=start_frame,
        seed=params.seed,
        num_steps=num_steps,
        guidance=guidance,
        budget_frames=budget,
        price=price,
        quote_id=presented_quote(request),
    )
    record, reserved = await parts.sessions.create(session, spec.slug)
    return SessionEnvelope(
        id=session_id(record.request_id),
        model=spec.slug,
        created=int(record.created_at),
        state="created",
        ws_url=_ws_url(request, parts, record.request_id),
        frames_streamed=0,
        frames_reserved=record.budget_frames,
        reserved_mils=reserved.amount_mils,
        cost_mils=None,
        cost_usd=None,
    )


async def _start_frame(parts: Services, caller: KeyRecord, form: Form, params: SessionParams, spec: ModelSpec) -> Frame:
    picture = await uploaded(parts, caller, form, "initial_frame", params.initial_frame_id)
    if isinstance(picture, np.ndarray):
        if picture.shape[:2] != spec.resolution:
            raise InvalidRequest("initial_frame_id", f"is of another size; upload it under the base URL of {spec.slug}")
        return picture
    frame, _ = await asyncio.get_running_loop().run_in_executor(
        parts.decoders,
        decode_start_frame,
        form.file("initial_frame"),
        "initial_frame",
        spec.resolution,
        parts.args.limits.max_image_pixels,
    )
    return frame


@router.get("/v1/sessions/{session_id}")
async def get_session(session_id: str, request: Request, parts: Parts, caller: Caller) -> SessionEnvelope:
    """A session of this customer, also after its end."""
    return await _envelope(request, parts, caller, _request_id(session_id))


@router.delete("/v1/sessions/{session_id}")
async def close_session(session_id: str, request: Request, parts: Parts, caller: Caller) -> SessionEnvelope:
    """End it wherever it streams, settle it, and say what it cost. As often as you like."""
    _may_spend(caller)
    request_id = _request_id(session_id)
    await _envelope(request, parts, caller, request_id)  # whose it is comes first
    await parts.sessions.close(request_id)
    return await _envelope(request, parts, caller, request_id)


@sockets.websocket("/v1/sessions/{session_id}/stream")
async def stream(socket: WebSocket, session_id: str) -> None:
    parts: Services = socket.app.state.services
    await socket.accept()
    try:
        caller = await authenticate(socket)
        _may_spend(caller)
        session = await parts.sessions.connect(_request_id(session_id), caller.customer_id)
    except (ApiError, RolloutError) as error:
        await _refuse(socket, error)
        return
    except Exception as error:
        log.error("session_not_connected", session_id=session_id, error=repr(error), exc_info=error)
        await _refuse(socket, ApiError("the server failed; what was not delivered is not charged"))
        return
    reason: EndReason = "disconnected"
    try:
        reason = await Conversation(socket, parts, caller, session).run()
    except (WebSocketDisconnect, RuntimeError):  # starlette raises the latter when it sends to a socket that is gone
        pass
    finally:
        cost = await parts.sessions.finish(session, reason)
        log.info("session", request_id=session.record.request_id, reason=reason, frames=session.frames_streamed)
    if reason != "disconnected":
        with contextlib.suppress(WebSocketDisconnect, RuntimeError):
            if reason == "closed":
                with contextlib.suppress(LedgerUnavailable):  # only the balance is not known
                    await _send(socket, await _billing(parts, session, cost, settled=True))
            await socket.close(CLOSE_CODES[reason], reason)


class Conversation:
    """One connected socket: what the client says becomes submissions, what happens becomes messages."""

    def __init__(self, socket: WebSocket, parts: Services, caller: KeyRecord, session: Session) -> None:
        self._socket = socket
        self._parts = parts
        self._caller = caller
        self._session = session
        self._sending = asyncio.Lock()

    async def run(self) -> EndReason:
        """Until either side ends it. Raises WebSocketDisconnect if the client is gone."""
        record = self._session.record
        await self._send(
            type="session_started",
            session_id=session_id(record.request_id),
            model=record.model,
            resolution=list(self._session.spec.resolution),
            action_dim=self._session.spec.action_dim,
            chunk_size=self._session.spec.chunk_size,
            fps=self._session.spec.fps,
            frames_reserved=record.budget_frames,
        )
        listening = asyncio.ensure_future(self._listen())
        telling = asyncio.ensure_future(self._tell())
        try:
            done, _ = await asyncio.wait((listening, telling), return_when=asyncio.FIRST_COMPLETED)
            return (listening if listening in done else telling).result()
        except TimeoutError:
            return "slow reader"
        finally:
            listening.cancel()
            telling.cancel()
            await asyncio.gather(listening, telling, return_exceptions=True)

    async def _listen(self) -> EndReason:
        while True:
            text = await self._socket.receive_text()
            try:
                message = await asyncio.to_thread(self._parse, text)
                if isinstance(message, Ping):
                    await self._send(type="pong", ts=time.time())
                elif isinstance(message, Control):
                    return "closed"
                else:
                    self._take_token()
                    self._session.submit(message)
            except (ApiError, RolloutError) as error:
                await self._send(**_error(error))

    async def _tell(self) -> EndReason:
        async with aclosing(self._session.events()) as events:
            async for event in events:
                match event:
                    case FrameMade(index, picture):
                        encoded = "jpeg" if picture[:2] == b"\xff\xd8" else "png"
                        data = base64.b64encode(picture).decode()
                        await self._send(type="frame", index=index, encoding=encoded, data=data)
                        self._session.sent()
                    case ChunkStreamed():
                        with contextlib.suppress(LedgerUnavailable):  # its frames go on, and it is told next time
                            await self._send(**await self._billing())
                    case SubmissionDone(num_frames):
                        total = self._session.frames_streamed
                        await self._send(
                            type="rollout_complete", frames_streamed=num_frames, frames_streamed_total=total
                        )
                    case SubmissionFailed(error):
                        await self._send(**_error(error))
                    case SessionOver(reason):
                        return reason
        raise AssertionError("a session's events end with its end")

    def _parse(self, text: str) -> Ping | Control | Submission:
        if len(text) > MAX_MESSAGE_BYTES:
            raise InvalidRequest("message", f"has {len(text)} bytes; up to {MAX_MESSAGE_BYTES} are accepted")
        try:
            message = ClientMessage.validate_json(text)
        except PydanticError as error:
            problem = error.errors(include_url=False, include_input=False, include_context=False)[0]
            path = ".".join(str(part) for part in problem["loc"] if part != "submit_actions") or "message"
            raise InvalidRequest(path, problem["msg"]) from None
        if not isinstance(message, SubmitActions):
            return message
        spec, most = self._session.spec, self._parts.args.limits.max_actions
        if not 1 <= len(message.actions) <= most:
            raise InvalidRequest("actions", f"has {len(message.actions)} actions; 1 to {most} are accepted")
        if any(len(action) != spec.action_dim for action in message.actions):
            raise InvalidRequest("actions", f"has rows of another length; (T, {spec.action_dim}) is accepted")
        with np.errstate(over="ignore"):  # beyond float32 it is infinite, and refused as that
            actions = np.array(message.actions, np.float32)
        if not np.isfinite(actions).all():
            raise InvalidRequest("actions", "has values that are not finite float32 numbers")
        most_steps = self._parts.max_row_steps[spec.slug]
        if message.num_steps is not None and message.num_steps > most_steps:
            raise InvalidRequest("num_steps", f"is {message.num_steps}; up to {most_steps} are accepted")
        if message.num_steps is not None:
            check_denoising(spec, message.num_steps)
        return Submission(actions, message.seed, message.num_steps)

    def _take_token(self) -> None:
        key = self._caller
        retry_after_s = self._parts.buckets.take(key.key_id, key.refill_per_s, key.burst)
        if retry_after_s is not None:
            raise RateLimited(retry_after_s)

    async def _billing(self) -> dict[str, Any]:
        cost = self._session.record.cost(self._session.frames_streamed)
        return await _billing(self._parts, self._session, cost, settled=False)

    async def _send(self, **message: Any) -> None:
        """Raises TimeoutError if the client does not take it."""
        async with self._sending, asyncio.timeout(self._parts.args.limits.send_timeout_s):
            await _send(self._socket, message)


async def _billing(parts: Services, session: Session, cost_mils: int, settled: bool) -> dict[str, Any]:
    """What the session has cost, and what its customer could spend if it ended now."""
    record = session.record
    balance = await parts.ask(parts.reader.balance, record.customer_id)
    held = 0 if settled else record.cost(record.budget_frames) - cost_mils
    return {
        "type": "billing",
        "frames_streamed": session.frames_streamed,
        "debited_mils": cost_mils,
        "balance_mils": balance + held,
    }


async def _send(socket: WebSocket, message: dict[str, Any]) -> None:
    await socket.send_text(json.dumps(message))


async def _refuse(socket: WebSocket, error: ApiError | RolloutError) -> None:
    code = {401: UNAUTHENTICATED, 403: UNAUTHENTICATED, 404: UNKNOWN, 409: BUSY}.get(_status(error), 1011)
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        await _send(socket, _error(error))
        await socket.close(code)


def _status(error: ApiError | RolloutError) -> int:
    return error.status if isinstance(error, ApiError) else ROLLOUT_ERRORS[type(error)][0]


def _error(error: ApiError | RolloutError) -> dict[str, Any]:
    code = error.code if isinstance(error, ApiError) else ROLLOUT_ERRORS[type(error)][1]
    body: dict[str, Any] = {"code": code, "message": str(error)}
    if isinstance(error, ModelOverloaded | RateLimited):
        body["retry_after_s"] = error.retry_after_s
    return {"type": "error", "error": body}


async def _envelope(request: Request, parts: Services, caller: KeyRecord, request_id: RequestId) -> SessionEnvelope:
    reservation = await parts.ask(parts.reader.reservation, request_id)
    if reservation is None or reservation.customer_id != caller.customer_id:
        raise SessionUnknown()
    found = await parts.sessions.find(request_id)
    settled = reservation.state == "settled"
    if found is None and not settled:
        raise SessionUnknown()  # another kind of request, or one whose ingress is gone and which is being refunded
    if found is None and not (await parts.ask(parts.reader.debit_detail, request_id)).startswith(DETAIL_PREFIX):
        raise SessionUnknown()
    record: SessionRecord | None = found[0] if found else None
    cost = reservation.captured_mils if settled else None
    state: Literal["created", "streaming", "closed"] = "created"
    if settled:
        state = "closed"
    elif found and found[1]:
        state = "streaming"
    return SessionEnvelope(
        id=session_id(request_id),
        model=record.model if record else None,
        created=int(reservation.created_at),
        state=state,
        ws_url=_ws_url(request, parts, request_id),
        frames_streamed=reservation.frames_delivered,
        frames_reserved=reservation.frames,
        reserved_mils=reservation.amount_mils,
        cost_mils=cost,
        cost_usd=None if cost is None else usd(cost),
    )


def _as_rollout(
    request: Request, caller: KeyRecord, spec: ModelSpec, start_frame: Frame, budget: int, price: Priced
) -> RolloutRequest:
    """What the budget would cost, in the terms of a quote."""
    return RolloutRequest(
        request_id=request.state.request_id,
        key_id=caller.key_id,
        model=spec.slug,
        start_frames=(start_frame,),
        candidates=(np.zeros((budget - 1, spec.action_dim), np.float32),),
        seed=0,
        num_steps=1,
        guidance=0.0,
        payload_sha256="",
        quote_id=presented_quote(request),
        price=price,
        service_class=SERVICE_CLASS,
    )


def _may_spend(caller: KeyRecord) -> None:
    if caller.terms.scope != "spend":
        raise KeyNotAllowed("this key may read, and neither steer nor end a session")


def session_id(request_id: RequestId) -> str:
    return f"session_{request_id.removeprefix('req_')}"


def _request_id(session_id: str) -> RequestId:
    return RequestId(f"req_{session_id.removeprefix('session_')}")


def _ws_url(request: Request, parts: Services, request_id: RequestId) -> str:
    scheme, host, path, _, _ = urlsplit(parts.args.public_url.rstrip("/") or str(request.base_url).rstrip("/"))
    secure = "wss" if scheme == "https" else "ws"
    return urlunsplit((secure, host, f"{path}/v1/sessions/{session_id(request_id)}/stream", "", ""))
