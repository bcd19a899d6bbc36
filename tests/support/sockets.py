"""A WebSocket to the API in this process, whose reader a test can hold: nothing buffers between the two."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI

Message = dict[str, Any]


class Closed(Exception):
    """The server closed the socket, with this code."""


class Socket:
    """The client's end. What the server sends waits until it is received, one message at a time."""

    def __init__(self) -> None:
        self.to_server: asyncio.Queue[Message] = asyncio.Queue()
        self.to_client: asyncio.Queue[Message] = asyncio.Queue(1)
        self.sent_by_server = 0

    async def from_server(self, message: Message) -> None:
        await self.to_client.put(message)
        self.sent_by_server += 1

    async def send(self, **message: Any) -> None:
        await self.send_text(json.dumps(message))

    async def send_text(self, text: str) -> None:
        await self.to_server.put({"type": "websocket.receive", "text": text})

    async def drop(self) -> None:
        await self.to_server.put({"type": "websocket.disconnect", "code": 1006})

    async def receive(self) -> Message:
        async with asyncio.timeout(20):
            message = await self.to_client.get()
        if message["type"] == "websocket.close":
            raise Closed(message.get("code", 1000))
        parsed: Message = json.loads(message["text"])
        return parsed

    async def until(self, kind: str) -> list[Message]:
        """All messages up to the first of that type, which is the last."""
        messages = [await self.receive()]
        while messages[-1]["type"] != kind:
            messages.append(await self.receive())
        return messages

    async def close_code(self) -> int:
        """Read on until the server closes."""
        while True:
            try:
                await self.receive()
            except Closed as closed:
                code: int = closed.args[0]
                return code


@contextlib.asynccontextmanager
async def connected(api: FastAPI, path: str, headers: dict[str, str]) -> AsyncIterator[Socket]:
    """A socket that has been accepted; at the end it is dropped, unless it was closed, and the server has noticed."""
    socket = Socket()
    scope = {
        "type": "websocket",
        "asgi": {"version": "3.0"},
        "scheme": "ws",
        "path": path,
        "raw_path": path.encode(),
        "root_path": "",
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        "subprotocols": [],
        "client": ("127.0.0.1", 1),
        "server": ("cluster.test", 80),
        "state": {},
    }
    await socket.to_server.put({"type": "websocket.connect"})
    serving = asyncio.create_task(api(scope, socket.to_server.get, socket.from_server))  # type: ignore[arg-type]
    accepted = await socket.to_client.get()
    assert accepted["type"] == "websocket.accept", accepted
    try:
        yield socket
    finally:
        await socket.drop()
        while not serving.done():  # whatever it still says is not read by anybody
            with contextlib.suppress(asyncio.QueueEmpty):
                socket.to_client.get_nowait()
            await asyncio.sleep(0.001)
        await serving
