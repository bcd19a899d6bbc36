"""A rollout over HTTP whose frames leave as they are made: pictures one after the other, or a fragmented mp4.

A client that reads slowly holds up its own rollout and nobody's memory: the next chunk is not begun before the last one
was taken. One that takes nothing for `limits.send_timeout_s` is cut off, and pays for what it was sent.
"""

import asyncio
from collections.abc import AsyncGenerator, MutableMapping
from contextlib import aclosing
from typing import Any

import structlog
from fastapi import Request, Response

from deployments.errors import RolloutError
from deployments.messages import RolloutRequest
from deployments.streaming import Piece, RolloutStream, StreamForm
from serve_app.context import Services
from serve_app.errors import InvalidRequest
from serve_app.middleware import REQUEST_ID_HEADER, Receive, Send

MIXED = "multipart/x-mixed-replace"
BOUNDARY = b"frame"

log = structlog.get_logger(__name__)


def asked_form(request: Request, stream: StreamForm | None) -> StreamForm | None:
    """How the answer shall be streamed, if at all: by the query, or by what the client accepts."""
    if stream is None and MIXED in request.headers.get("accept", ""):
        return "jpeg"
    return stream


async def streamed(parts: Services, rollout: RolloutRequest, form: StreamForm) -> Response:
    """The answer to `rollout`, begun: whatever refuses it, or breaks its first chunk, is still an ordinary error."""
    if rollout.idempotency_key:
        raise InvalidRequest("Idempotency-Key", "is not taken with stream: frames that were streamed are not kept")
    if rollout.extras.score:
        raise InvalidRequest("score", "is not taken with stream: it is known when the answer has ended")
    stream = await parts.ingress.stream(rollout, form)
    pieces = stream.pieces()
    try:
        first = await anext(pieces)
    except BaseException as error:
        stream.finish(error)
        raise
    return _StreamedAnswer(stream, first, pieces, parts.args.limits.send_timeout_s)


class _StreamedAnswer(Response):
    def __init__(
        self, stream: RolloutStream, first: Piece, rest: AsyncGenerator[Piece, None], send_timeout_s: float
    ) -> None:
        self._send_timeout_s = send_timeout_s
        self._stream = stream
        self._first = first
        self._rest = rest
        self._is_mixed = stream.form != "mp4"
        media_type = f"{MIXED}; boundary={BOUNDARY.decode()}" if self._is_mixed else "video/mp4"
        request = stream.request
        super().__init__(
            media_type=media_type,
            headers={
                REQUEST_ID_HEADER: request.request_id,
                "X-DreamEngine-Customer-Id": stream.reserved.customer_id,
                "X-DreamEngine-Frames": str(request.num_frames),
                "X-DreamEngine-Model": request.model,
                "Cache-Control": "no-store",
            },
        )
        del self.headers["content-length"]

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        failure: BaseException | None = None
        sending = asyncio.ensure_future(self._send_all(send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            done, _ = await asyncio.wait((sending, leaving), return_when=asyncio.FIRST_COMPLETED)
            if sending in done:
                sending.result()
        except TimeoutError:
            log.info("stream_cut_off", request_id=self._stream.request.request_id, frames=self._stream.frames_sent)
            raise  # only a closed connection can say that this is not all
        except RolloutError as error:
            failure = error
            raise
        finally:
            sending.cancel()
            leaving.cancel()
            self._stream.finish(failure)
            await asyncio.gather(sending, leaving, return_exceptions=True)

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await self._send(send, self._first, 0)
        async with aclosing(self._rest) as rest:
            index = 1
            async for piece in rest:
                await self._send(send, piece, index)
                index += 1
        end = b"--" + BOUNDARY + b"--\r\n" if self._is_mixed else b""
        await send({"type": "http.response.body", "body": end, "more_body": False})

    async def _send(self, send: Send, piece: Piece, index: int) -> None:
        body = self._part(piece, index) if self._is_mixed else piece.content
        async with asyncio.timeout(self._send_timeout_s):
            await send({"type": "http.response.body", "body": body, "more_body": True})
        self._stream.sent(piece)

    def _part(self, piece: Piece, index: int) -> bytes:
        kind = "jpeg" if piece.content[:2] == b"\xff\xd8" else "png"
        head = f"Content-Type: image/{kind}\r\nContent-Length: {len(piece.content)}\r\nX-DreamEngine-Frame: {index}"
        return b"--" + BOUNDARY + b"\r\n" + head.encode() + b"\r\n\r\n" + piece.content + b"\r\n"


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
