"""What happens to every request: an id, a bound on its body, an answer even if a route breaks, one line in the log."""

import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

import structlog
from opentelemetry.trace import Span
from starlette.datastructures import Headers, MutableHeaders

from billing.keys import mint_request_id
from deployments.meter import Meter
from deployments.metrics import HTTP_REQUESTS, HTTP_SECONDS
from deployments.tracing import request_span
from serve_app.errors import ApiError, BodyTooLarge, GatewayFull, error_response

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]

METHODS = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")
REQUEST_ID_HEADER = "X-DreamEngine-Request-Id"

_MAX_DIGITS = 18
"""A length of more digits is beyond every limit, and Python refuses to read thousands of them."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class _Body:
    received_bytes: int = 0
    held_bytes: int = 0
    """Counted against what all may have: as declared, or as received where that is more or nothing was declared."""


@dataclass(slots=True)
class HeldBodies:
    """Of all requests that one process serves."""

    max_bytes: int
    num_bytes: int = 0


class RequestEnvelope:
    """Mints the request's id (a client's own is never taken for one), and says it in every answer.

    All bodies of the requests that are being served may have `held.max_bytes` together: what arrives beyond them is
    refused, so that no number of uploads takes more memory than that allows.
    """

    def __init__(self, app: Application, max_body_bytes: int, held: HeldBodies, meter: Meter) -> None:
        self._app = app
        self._meter = meter
        self._max_body_bytes = max_body_bytes
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = mint_request_id()
        with (
            structlog.contextvars.bound_contextvars(request_id=request_id),
            request_span(request_id, Headers(scope=scope).get("traceparent", "")) as span,
        ):
            await self._answer(request_id, span, scope, receive, send)

    async def _answer(self, request_id: str, span: Span, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        scope.setdefault("state", {}).update(request_id=request_id, arrived=started)
        status = 0
        body = _Body()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers.setdefault(REQUEST_ID_HEADER, request_id)
            await send(message)

        try:
            refusal = self._refusal(_declared_bytes(scope), body)
            if refusal is not None:
                response = error_response(refusal.status, refusal.code, refusal.message, headers=refusal.headers)
                await response(scope, receive, send_with_id)
            else:
                await self._app(scope, self._bounded(receive, body), send_with_id)
        except Exception as error:
            if status:  # the answer has begun: only a closed connection can still say that it is not whole
                raise
            log.error("request_failed", request_id=request_id, path=scope["path"], error=repr(error), exc_info=error)
            response = error_response(500, "ENGINE_FAILED", "the server failed; what was not delivered is not charged")
            await response(scope, receive, send_with_id)
        finally:
            self._held.num_bytes -= body.held_bytes
            took_s = time.perf_counter() - started
            route = self._measure(scope, status, took_s)
            span.update_name(f"{scope['method']} {route}")
            span.set_attributes({"http.route": route, "http.response.status_code": status})
            log.info(
                "request",
                request_id=request_id,
                method=scope["method"],
                path=scope["path"],
                status=status,
                ms=round(took_s * 1e3, 1),
            )

    def _measure(self, scope: Scope, status: int, took_s: float) -> str:
        """Returns the route's template. `status` is 0 where the client left before an answer began."""
        route = getattr(scope.get("route"), "path", "none")  # the template: nobody can make up new ones
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._meter.count(HTTP_REQUESTS, route, method, str(status))
        self._meter.observe(HTTP_SECONDS, route, value=took_s)
        return str(route)

    def _refusal(self, declared_bytes: int, body: _Body) -> ApiError | None:
        """Why a body of that length is not even begun. Room for it is held from here on: one that is begun is ended."""
        if declared_bytes > self._max_body_bytes:
            return BodyTooLarge(self._max_body_bytes)
        return None if self._hold(body, declared_bytes) else GatewayFull()

    def _hold(self, body: _Body, num_bytes: int) -> bool:
        """Count `num_bytes` for `body`, at least as many as before; False if they do not fit beside the others."""
        more = max(0, num_bytes - body.held_bytes)
        if self._held.num_bytes + more > self._held.max_bytes:
            return False
        body.held_bytes += more
        self._held.num_bytes += more
        return True

    def _bounded(self, receive: Receive, body: _Body) -> Receive:
        async def bounded() -> Message:
            message = await receive()
            body.received_bytes += len(message.get("body", b""))
            if body.received_bytes > self._max_body_bytes:
                raise BodyTooLarge(self._max_body_bytes)
            if not self._hold(body, body.received_bytes):
                raise GatewayFull()
            return message

        return bounded


def _declared_bytes(scope: Scope) -> int:
    declared = Headers(scope=scope).get("content-length", "")
    if not declared.isdecimal():  # absent, or no number: what is received is counted anyway
        return 0
    digits = declared.lstrip("0")
    return int(digits or "0") if len(digits) <= _MAX_DIGITS else 10**_MAX_DIGITS
