"""A webhook receiver on a free port of this machine, which answers as a test tells it to."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"


@dataclass
class Receiver:
    url: str = ""
    connections: int = 0
    received: list[tuple[dict[str, str], bytes]] = field(default_factory=list)
    """Headers in lower case, and the body."""
    answers: list[bytes] = field(default_factory=list)
    """What the next ones get; then 200. Empty bytes: nothing at all, until the caller gives up."""
    arrived: asyncio.Event = field(default_factory=asyncio.Event)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
            body = await reader.readexactly(int(headers["content-length"]))
            self.received.append((headers, body))
            self.arrived.set()
            answer = self.answers.pop(0) if self.answers else OK
            if answer:
                writer.write(answer)
                await writer.drain()
            await reader.read()  # until the caller closes
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@contextlib.asynccontextmanager
async def receiving() -> AsyncIterator[Receiver]:
    receiver = Receiver()
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0)
    receiver.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/hook"
    async with server:
        yield receiver
