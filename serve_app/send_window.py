"""Back-pressure through Serve's default proxy, which reads for its clients: so many bytes may be on their way, no more.

What an ingress replica sends waits in queues without a bound, of the replica and of the proxy, until the client takes
it. So the proxy says how much the client has taken, by messages among those that it hands to the replica anyway, and
the replica stays about `WINDOW_BYTES` ahead of that. A send then waits as it does on a socket, and what bounds a slow
reader there (generation that pauses, a time-out) bounds it here too. Where no proxy says anything, as behind HAProxy,
the replica's own server holds the socket, and nothing here takes part.
"""

import asyncio
from collections import deque
from collections.abc import MutableMapping
from typing import Any

from starlette.middleware import Middleware

from serve_app.middleware import Application, Message, Receive, Scope, Send

WINDOW_BYTES = 4 * 2**20
"""With so much on its way to one client, beside what the sockets hold, nothing further is sent."""
REPORT_BYTES = WINDOW_BYTES // 4
"""The proxy reports when this much more was taken."""
EXTENSION = "dream_engine.taken"
"""Of the ASGI scope, by which a proxy says that it reports; and the type of its reports."""


def proxy_middlewares() -> list[Middleware]:
    """For `RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH`."""
    return [Middleware(TakenReports)]


class TakenReports:
    """In the proxy: reports what the client has taken, beside what it says."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            return await self._app(scope, receive, send)
        scope["extensions"] = {**(scope.get("extensions") or {}), EXTENSION: {}}
        taken, reporting = 0, asyncio.Event()
        receiving: asyncio.Future[Message] | None = None

        async def reported_receive() -> Message:
            nonlocal taken, receiving
            receiving = receiving or asyncio.ensure_future(receive())
            reported = asyncio.ensure_future(reporting.wait())
            try:
                await asyncio.wait((receiving, reported), return_when=asyncio.FIRST_COMPLETED)
            finally:
                reported.cancel()
            if receiving.done():
                message, receiving = receiving.result(), None
                return message
            reporting.clear()
            report, taken = taken, 0
            return {"type": EXTENSION, "bytes": report}

        async def counted_send(message: Message) -> None:
            nonlocal taken
            await send(message)
            taken += num_bytes(message)
            if taken >= REPORT_BYTES:
                reporting.set()

        try:
            await self._app(scope, reported_receive, counted_send)
        finally:
            if receiving is not None:
                receiving.cancel()


class SendWindow:
    """In the ingress replica: a send waits until the client has taken enough of what was sent before."""

    def __init__(self, app: Application) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if EXTENSION not in (scope.get("extensions") or {}):
            return await self._app(scope, receive, send)
        connection = _Connection(receive, send)
        try:
            await self._app(scope, connection.receive, connection.send)
        finally:
            connection.close()


class _Connection:
    def __init__(self, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._on_its_way = 0
        self._messages: deque[Message] = deque()
        self._receiving: asyncio.Task[None] | None = None
        self._gone = False

    async def receive(self) -> Message:
        while not self._messages:
            await self._hear()
        return self._messages.popleft()

    async def send(self, message: Message) -> None:
        while self._on_its_way >= WINDOW_BYTES and not self._gone:
            await self._hear()
        self._on_its_way += num_bytes(message)
        await self._send(message)

    def close(self) -> None:
        if self._receiving is not None:
            self._receiving.cancel()

    async def _hear(self) -> None:
        """Wait for the next message, whoever else does too: both ends of a conversation may."""
        if self._receiving is None or self._receiving.done():
            self._receiving = asyncio.ensure_future(self._take_one())
        receiving = self._receiving
        await asyncio.wait([receiving])
        receiving.result()

    async def _take_one(self) -> None:
        message = await self._receive()
        if message["type"] == EXTENSION:
            self._on_its_way -= message["bytes"]
        else:
            self._gone = self._gone or message["type"].endswith(".disconnect")
            self._messages.append(message)


def num_bytes(message: MutableMapping[str, Any]) -> int:
    return len(message.get("body") or message.get("bytes") or message.get("text") or b"")
