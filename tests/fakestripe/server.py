"""Runs the fake on a real port of this machine: inside a test's event loop, or as a process."""

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import uvicorn

from tests.fakestripe import api
from tests.fakestripe.faults import Faults
from tests.fakestripe.state import Stripe
from tests.fakestripe.webhooks import Webhooks

SECRET_KEY = "sk_test_fake"
WEBHOOK_SECRET = "whsec_fake"
DELIVER_EVERY_S = 0.02


class TestClock:
    """Real time, or still until it is moved."""

    __test__ = False

    def __init__(self, start: float | None = None) -> None:
        self._frozen = start
        self._offset = 0.0

    def __call__(self) -> float:
        return (time.time() if self._frozen is None else self._frozen) + self._offset

    def advance(self, seconds: float) -> None:
        self._offset += seconds


@dataclass
class FakeStripe:
    """A running fake: its address, its state to look at and act on, and its deliveries."""

    url: str
    state: Stripe
    faults: Faults
    webhooks: Webhooks
    api: api.Api
    clock: Callable[[], float]

    async def deliver(self) -> None:
        """Send what is due until nothing is."""
        self.state.tick()
        while await self.webhooks.deliver_due():
            pass


@contextlib.asynccontextmanager
async def running(
    clock: Callable[[], float] | None = None, port: int = 0, seed: int = 0, webhook_url: str = "", delivers: bool = True
) -> AsyncIterator[FakeStripe]:
    """`delivers`: send webhooks as they fall due; else only `FakeStripe.deliver` does."""
    clock = clock or TestClock()
    with socket.socket() as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(("127.0.0.1", port))
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        faults = Faults(random.Random(seed))
        state = Stripe(clock, url)
        webhooks = Webhooks(clock, faults, webhook_url, [WEBHOOK_SECRET])
        state.on_event = webhooks.enqueue
        served = api.Api(state, faults, webhooks, SECRET_KEY)
        server = uvicorn.Server(
            uvicorn.Config(served.app, log_level="critical", lifespan="off", timeout_graceful_shutdown=1)
        )
        server.install_signal_handlers = lambda: None  # type: ignore[method-assign]
        task = asyncio.create_task(server._serve([listening]))
        deliveries = asyncio.create_task(_deliver_for_ever(state, webhooks)) if delivers else None
        while not server.started:  # noqa: ASYNC110 - uvicorn tells nobody
            await asyncio.sleep(0.005)
        try:
            yield FakeStripe(url, state, faults, webhooks, served, clock)
        finally:
            if deliveries is not None:
                deliveries.cancel()
            server.should_exit = server.force_exit = True
            await task
            await webhooks.client.aclose()


async def _deliver_for_ever(state: Stripe, webhooks: Webhooks) -> None:
    while True:
        state.tick()
        await webhooks.deliver_due()
        await asyncio.sleep(DELIVER_EVERY_S)
