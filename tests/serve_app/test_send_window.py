"""How far a sender gets ahead of a reader when there is a proxy between them that reads for it."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from serve_app import send_window
from serve_app.send_window import WINDOW_BYTES, SendWindow, TakenReports

Message = dict[str, Any]
PICTURE = b"x" * (WINDOW_BYTES // 8)


class Proxy:
    """As Serve's: whatever is sent is taken at once, and waits for the client without a bound."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        waiting: asyncio.Queue[Message] = asyncio.Queue()

        async def pass_on() -> None:
            while True:
                await send(await waiting.get())
                waiting.task_done()

        passing = asyncio.create_task(pass_on())
        try:
            await self.app(scope, receive, waiting.put)
            await waiting.join()
        finally:
            passing.cancel()


class Client:
    def __init__(self, app: Callable[..., Awaitable[None]], kind: str = "http") -> None:
        self.says: asyncio.Queue[Message] = asyncio.Queue()
        self.hears: asyncio.Queue[Message] = asyncio.Queue(1)
        self.serving = asyncio.ensure_future(app({"type": kind}, self.says.get, self.hears.put))

    async def take(self) -> Message:
        async with asyncio.timeout(10):
            return await self.hears.get()


async def rest() -> None:
    """Until nothing moves any more."""
    for _ in range(200):
        await asyncio.sleep(0)


class Stream:
    """Sends pictures without end, and counts those whose send returned."""

    def __init__(self) -> None:
        self.sent = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        while True:
            await send({"type": "http.response.body", "body": PICTURE, "more_body": True})
            self.sent += 1


async def stop(client: Client) -> None:
    client.serving.cancel()
    with pytest.raises(asyncio.CancelledError):
        await client.serving


async def test_a_sender_is_no_further_ahead_of_its_reader_than_the_window() -> None:
    stream = Stream()
    client = Client(TakenReports(Proxy(SendWindow(stream))))
    await rest()
    assert stream.sent == 8
    for taken in range(1, 50):
        await client.take()
        await rest()
        assert stream.sent - taken <= 9
    assert stream.sent >= 55, "it goes on as the client takes"
    await stop(client)


async def test_where_nobody_reports_nothing_waits() -> None:
    """The server's own socket does, there."""
    sent: list[Message] = []

    async def send(message: Message) -> None:
        sent.append(message)
        if len(sent) == 100:
            raise ConnectionError

    with pytest.raises(ConnectionError):
        await SendWindow(Stream())({"type": "http"}, asyncio.Queue().get, send)


async def test_what_the_client_says_arrives_in_order_beside_the_reports() -> None:
    """While the sender waits, too: it is the listener's message that is not lost to it."""
    heard: list[Message] = []

    async def talk(scope: Any, receive: Any, send: Any) -> None:
        async def listen() -> None:
            while not heard or heard[-1]["type"] != "websocket.disconnect":
                heard.append(await receive())

        listening = asyncio.create_task(listen())
        for _ in range(30):
            await send({"type": "websocket.send", "text": "y" * len(PICTURE)})
        await listening

    client = Client(TakenReports(Proxy(SendWindow(talk))), "websocket")
    for index in range(30):
        await client.says.put({"type": "websocket.receive", "text": str(index)})
        await client.take()
    await client.says.put({"type": "websocket.disconnect", "code": 1000})
    async with asyncio.timeout(10):
        await client.serving
    assert [message.get("text") for message in heard] == [*(str(index) for index in range(30)), None]


async def test_messages_larger_than_the_window_go_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(send_window, "WINDOW_BYTES", len(PICTURE) // 2)
    monkeypatch.setattr(send_window, "REPORT_BYTES", len(PICTURE) // 8)
    stream = Stream()
    client = Client(TakenReports(Proxy(SendWindow(stream))))
    for taken in range(1, 10):
        await client.take()
        await rest()
        assert 1 <= stream.sent - taken <= 2
    await stop(client)


async def test_a_client_that_leaves_does_not_hold_its_sender() -> None:
    sent = asyncio.Event()

    async def once(scope: Any, receive: Any, send: Any) -> None:
        for _ in range(10):
            await send({"type": "http.response.body", "body": PICTURE, "more_body": True})
        sent.set()

    client = Client(TakenReports(Proxy(SendWindow(once))))
    await rest()
    assert not sent.is_set()
    await client.says.put({"type": "http.disconnect"})
    async with asyncio.timeout(10):
        await sent.wait()
    await stop(client)
