"""Payments in one process: the real service on a real ledger, against the fake Stripe on a real port."""

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx

from billing import invariants
from billing.commands import CustomerId
from billing.money import Mils
from billing.payments.commands import AutoTopup, EventHint, EventsReceived, ReceiveEvents, Topup
from billing.payments.reader import PaymentsReader
from deployments.ledger_client import LedgerClient
from deployments.ledger_wire import pack, unpack_commands, unpack_outcomes
from deployments.payments import events
from deployments.payments.actor import _value
from deployments.payments.config import PaymentsConfig
from deployments.payments.desk import PaymentsDesk
from deployments.payments.gateway import StripeGateway
from deployments.payments.service import Payments
from tests.fakestripe.server import SECRET_KEY, WEBHOOK_SECRET, FakeStripe, TestClock, running
from tests.fakestripe.state import GOOD
from tests.support.app import App, Ledgered, LocalActor, ledgered, running_app

START = 1_800_000_000.0
BASE_URL = "http://cluster.test"


async def no_wait(_: float) -> None:
    """Between attempts."""
    await asyncio.sleep(0)


def config(fake: FakeStripe, **changes: Any) -> PaymentsConfig:
    made = PaymentsConfig(SECRET_KEY, (WEBHOOK_SECRET,), fake.url, request_timeout_s=0.6, first_wait_s=0.01)
    return replace(made, **changes)


@dataclass
class Till:
    """A customer's side, Stripe's side and ours."""

    ledger: Ledgered
    fake: FakeStripe
    payments: Payments
    clock: TestClock

    def customer(self, credits_mils: int = 0) -> CustomerId:
        return self.ledger.create_key(credits_mils)[1]

    def balance(self, customer_id: CustomerId) -> Mils:
        return self.ledger.reader.balance(customer_id)

    async def paid(self, customer_id: CustomerId, cents: int = 2_500, card: str = GOOD) -> Topup:
        """A top-up that is paid at Stripe; what we know of it comes by events."""
        topup = await self.payments.topup(customer_id, cents, BASE_URL)
        self.fake.state.pay_session(topup.session_id, card)
        return topup

    async def topped_up(self, customer_id: CustomerId, cents: int = 2_500) -> Topup:
        topup = await self.paid(customer_id, cents)
        return await self.payments.look(topup.topup_id)

    async def receive(self, *received: dict[str, Any]) -> int:
        """Events into the inbox, as the webhook puts them there."""
        hints = tuple(events.hint_of(event) for event in received)
        return (await self.payments.tell(ReceiveEvents(hints, "webhook"), EventsReceived)).new

    async def receive_hint(self, hint: EventHint) -> None:
        await self.payments.tell(ReceiveEvents((hint,), "webhook"), EventsReceived)

    async def agree(self, customer_id: CustomerId, **changes: Any) -> AutoTopup:
        terms = AutoTopup(True, Mils(50_000), 1_000, 10_000, 100_000, consent="yes")
        return await self.payments.set_auto_topup(customer_id, replace(terms, **changes))

    def intent_of(self, topup: Topup) -> str:
        known = self.payments.reader.topup(topup.topup_id)
        assert known is not None
        return known.payment_intent


@contextlib.asynccontextmanager
async def open_till(directory: Path, **changes: Any) -> AsyncIterator[Till]:
    """With clocks that stand still, and deliveries only when a test asks for them."""
    clock = TestClock(START)
    async with running(clock, delivers=False) as fake:
        with ledgered(f"sqlite:///{directory / 'ledger.db'}", clock) as ledger:

            async def call(commands: Any) -> Any:
                sent = unpack_commands(pack(commands))  # as it travels in a cluster
                return unpack_outcomes(pack(await asyncio.wrap_future(ledger.writer.submit(sent))))

            client = LedgerClient(call)
            client.start()
            set_up = config(fake, **changes)
            gateway = StripeGateway(set_up, no_wait)
            payments = Payments(set_up, client, PaymentsReader(ledger.database), gateway, clock)
            yield Till(ledger, fake, payments, clock)
            await client.stop()
            await gateway.close()
            assert invariants.audit(ledger.database) == []


class InProcessActor:
    """`PaymentsActor` without Ray: what waking does is awaited by whoever wakes it."""

    def __init__(self, payments: Payments) -> None:
        self.payments = payments

    async def wake(self) -> None:
        await self.payments.drain()

    async def topup(self, *arguments: Any) -> Any:
        return await _value(self.payments.topup(*arguments))

    async def look(self, topup_id: str) -> Any:
        return await _value(self.payments.look(topup_id))

    async def shortage(self, customer_id: CustomerId, requested_mils: Mils) -> Any:
        return await _value(self.payments.shortage(customer_id, requested_mils))


@dataclass
class Shop:
    """The API with payments on, and the fake Stripe that delivers to its webhook."""

    app: App
    fake: FakeStripe
    payments: Payments

    @property
    def reader(self) -> PaymentsReader:
        return self.payments.reader

    async def pay(self, url: str, card: str = GOOD, action: str = "pay") -> httpx.Response:
        """On the hosted page, as a browser does: the form that it holds, and its redirect followed once."""
        async with httpx.AsyncClient() as browser:
            page = await browser.get(url)
            assert "name=card" in page.text, page.text
            return await browser.post(url, data={"card": card, "action": action})

    async def post_webhook(self, body: bytes | dict[str, Any], signature: str) -> httpx.Response:
        content = json.dumps(body).encode() if isinstance(body, dict) else body
        return await self.app.http.post("/v1/billing/webhook", content=content, headers={"Stripe-Signature": signature})

    async def settled(self) -> None:
        """Everything that waits has been delivered and looked at."""
        await self.fake.deliver()
        await self.payments.drain()


@contextlib.asynccontextmanager
async def open_shop(directory: Path, **changes: Any) -> AsyncIterator[Shop]:
    async with running(delivers=False) as fake:
        made: list[Payments] = []
        set_up = config(fake, **changes)

        def desk(ledger: Ledgered, client: LedgerClient) -> PaymentsDesk:
            reader = PaymentsReader(ledger.database)
            made.append(Payments(set_up, client, reader, StripeGateway(set_up, no_wait)))
            return PaymentsDesk(set_up, client, reader, LocalActor(InProcessActor(made[0])))

        async with running_app(directory, payments=desk) as app:
            fake.webhooks.url = f"{BASE_URL}/v1/billing/webhook"
            await fake.webhooks.client.aclose()
            transport = httpx.ASGITransport(app.api, raise_app_exceptions=False)
            fake.webhooks.client = httpx.AsyncClient(transport=transport)
            yield Shop(app, fake, made[0])
            await made[0].gateway.close()
