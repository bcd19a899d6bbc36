"""What happens to every request: an id, a bound on its body, an answer even if a route breaks, one line in the log."""

import time
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import structlog
from starlette.datastructures import Headers, MutableHeaders

from billing.keys import mint_request_id
from serve_app.errors import BodyTooLarge, error_response

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

REQUEST_ID_HEADER = "X-DreamEngine-Request-Id"

_MAX_DIGITS = 18
"""A length of more digits is beyond every limit, and Python refuses to read thousands of them."""

log = structlog.get_logger(__name__)


class RequestEnvelope:
    """Mints the request's id (a client's own is never taken for one), and says it in every answer."""

    def __init__(self, app: Application, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = mint_request_id()
        started = time.perf_counter()
        scope.setdefault("state", {}).update(request_id=request_id, arrived=started)
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.setdefault(REQUEST_ID_HEADER, request_id)
            await send(message)

        try:
            if self._declares_too_much(scope):
                refusal = BodyTooLarge(self._max_body_bytes)
                response = error_response(refusal.status, refusal.code, refusal.message)
                await response(scope, receive, send_with_id)
            else:
                await self._app(scope, self._bounded(receive), send_with_id)
        except Exception as error:
            if status:  # the answer has begun: only a closed connection can still say that it is not whole
                raise
            log.error("request_failed", request_id=request_id, path=scope["path"], error=repr(error), exc_info=error)
            response = error_response(500, "ENGINE_FAILED", "the server failed; what was not delivered is not charged")
            await response(scope, receive, send_with_id)
        finally:
            log.info(
                "request",
                request_id=request_id,
                method=scope["method"],
                path=scope["path"],
                status=status,
                ms=round((time.perf_counter() - started) * 1e3, 1),
            )

    def _declares_too_much(self, scope: Scope) -> bool:
        declared = Headers(scope=scope).get("content-length", "")
        if not declared.isdecimal():  # absent, or no number: what is received is counted anyway
            return False
        digits = declared.lstrip("0")
        return len(digits) > _MAX_DIGITS or int(digits or "0") > self._max_body_bytes

    def _bounded(self, receive: Receive) -> Receive:
        received = 0

        async def bounded() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise BodyTooLarge(self._max_body_bytes)
            return message

        return bounded
