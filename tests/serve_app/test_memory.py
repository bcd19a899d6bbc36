"""What uploads take of a gateway's memory, as the allocator counts it."""

import asyncio
import gc
import tracemalloc
from typing import Any

from starlette.requests import Request

from deployments.meter import Meter
from serve_app.errors import GatewayFull
from serve_app.forms import Form, read_form
from serve_app.middleware import HeldBodies, RequestEnvelope
from tests.support.hostile import MULTIPART, disposition, multipart

SLICE_BYTES = 2**16
"""What a server hands on at a time."""
UPLOAD = multipart(*((disposition(f"part{index}", "x.npy"), bytes([index]) * 50_000) for index in range(8)))
"""400 kB in eight files."""
SCOPE: dict[str, Any] = {
    "type": "http",
    "method": "POST",
    "path": "/",
    "headers": [
        (b"content-length", str(len(UPLOAD)).encode()),
        *((name.lower().encode(), value.encode()) for name, value in MULTIPART.items()),
    ],
}
MAX_HELD_BYTES = 10 * len(UPLOAD)


class Arriving:
    """A body as it comes in, slice by slice."""

    def __init__(self, body: bytes) -> None:
        self._body = body
        self._at = 0

    async def __call__(self) -> dict[str, Any]:
        await asyncio.sleep(0)
        part = self._body[self._at : self._at + SLICE_BYTES]
        self._at += SLICE_BYTES
        return {"type": "http.request", "body": part, "more_body": self._at < len(self._body)}


def content(form: Form) -> int:
    return sum(len(form.file(f"part{index}")) for index in range(8))


async def test_a_body_takes_at_most_2_2_times_its_size() -> None:
    await read_form(Request(dict(SCOPE), Arriving(UPLOAD)), 8, 10)  # imports and caches
    gc.collect()
    tracemalloc.start()
    try:
        form = await read_form(Request(dict(SCOPE), Arriving(UPLOAD)), 8, 10)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert content(form) == 400_000
    assert peak <= 2.2 * len(UPLOAD)
    assert held <= 1.1 * len(UPLOAD)


async def test_a_hundred_uploads_at_once_stay_under_the_bound_and_who_does_not_fit_is_told_so() -> None:
    """Ten fit, and are served; the others are refused before they are read, and not when memory has run out."""
    arrived: list[Form] = []
    refused = 0
    release, decided = asyncio.Event(), asyncio.Event()

    async def application(scope: Any, receive: Any, send: Any) -> None:
        arrived.append(await read_form(Request(scope, receive), 8, 10))
        if len(arrived) + refused == 100:
            decided.set()
        await release.wait()

    async def send(message: Any) -> None:
        nonlocal refused
        refused += message.get("status") == 503
        if len(arrived) + refused == 100:
            decided.set()

    gateway = RequestEnvelope(application, 2**20, HeldBodies(MAX_HELD_BYTES), Meter())
    gc.collect()
    tracemalloc.start()
    try:
        uploads = [asyncio.create_task(gateway(dict(SCOPE), Arriving(UPLOAD), send)) for _ in range(100)]
        await decided.wait()
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (len(arrived), refused) == (10, 90)
    assert peak <= 2.2 * MAX_HELD_BYTES
    release.set()
    await asyncio.gather(*uploads)
    assert gateway._held.num_bytes == 0, "and everything is given back"


async def test_a_body_that_does_not_say_its_length_is_counted_as_it_arrives() -> None:
    outcomes: list[str] = []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        try:
            await read_form(Request(scope, receive), 8, 10)
            outcomes.append("read")
        except GatewayFull:
            outcomes.append("refused")

    async def send(_: Any) -> None:
        raise AssertionError("nothing is sent")

    unsized = SCOPE | {"headers": [header for header in SCOPE["headers"] if header[0] != b"content-length"]}
    for max_held_bytes in (len(UPLOAD), len(UPLOAD) - 1):
        gateway = RequestEnvelope(application, 2**20, HeldBodies(max_held_bytes), Meter())
        await gateway(dict(unsized), Arriving(UPLOAD), send)
        assert gateway._held.num_bytes == 0
    assert outcomes == ["read", "refused"]
