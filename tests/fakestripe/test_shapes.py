"""The fake's objects are what the pinned library says Stripe's are, and it takes what the library can send."""

import contextlib
import typing
from collections.abc import AsyncIterator
from typing import Any, Literal, Union, get_args, get_origin

import httpx
import pytest
import stripe
from stripe import HTTPXClient, StripeClient, StripeObject

from tests.fakestripe.parameters import hints_of
from tests.fakestripe.server import SECRET_KEY, FakeStripe, TestClock, running
from tests.fakestripe.state import BANK, DECLINED_LATER, GOOD, INSUFFICIENT, SUSPICIOUS, Refused, Stripe

CLASSES = {
    "customer": stripe.Customer,
    "payment_method": stripe.PaymentMethod,
    "checkout.session": stripe.checkout.Session,
    "payment_intent": stripe.PaymentIntent,
    "charge": stripe.Charge,
    "refund": stripe.Refund,
    "dispute": stripe.Dispute,
    "invoice": stripe.Invoice,
    "invoiceitem": stripe.InvoiceItem,
    "invoice_payment": stripe.InvoicePayment,
    "balance_transaction": stripe.BalanceTransaction,
    "radar.early_fraud_warning": stripe.radar.EarlyFraudWarning,
    "event": stripe.Event,
}


def problems(value: Any, hint: Any, path: str) -> list[str]:
    """Where `value` is not what the library's annotation says; empty when it is."""
    origin = get_origin(hint)
    if hint is Any or hint is None:
        return []
    if origin is Union:
        choices = [problems(value, each, path) for each in get_args(hint)]
        return min(choices, key=len)
    if hint is type(None):
        return [] if value is None else [f"{path} is not null"]
    if origin is Literal:
        return [] if value in get_args(hint) else [f"{path} is {value!r}"]
    if origin is list or origin is typing.List:  # noqa: UP006 - what the library writes
        return (
            [p for each in value for p in problems(each, get_args(hint)[0], path)]
            if isinstance(value, list)
            else [path]
        )
    if isinstance(origin, type) and issubclass(origin, StripeObject):
        return [] if isinstance(value, dict) else [path]
    if isinstance(hint, type) and issubclass(hint, StripeObject):
        return object_problems(value, hint, path) if isinstance(value, dict) else [f"{path} is no object"]
    if isinstance(hint, type) and hint.__name__ == "Decimal":
        return [] if isinstance(value, str) else [f"{path} is not a decimal"]
    return [] if type(value) is hint else [f"{path} is {type(value).__name__}, not {hint}"]


def object_problems(value: dict[str, Any], cls: type, path: str) -> list[str]:
    hints = {name: hint for name, hint in hints_of(cls).items() if get_origin(hint) is not typing.ClassVar}
    found = [f"{path}.{name} is unknown" for name in value if name not in hints]
    for name, hint in hints.items():
        if name.startswith("_") or name == "deleted":
            continue
        if name in value:
            found += problems(value[name], hint, f"{path}.{name}")
        elif name in vars(cls)["__annotations__"] and type(None) not in get_args(hint) and path.count(".") == 0:
            found.append(f"{path}.{name} is missing")
    return found


def a_month(state: Stripe) -> None:
    """Something of everything."""
    customer = state.create_customer("Robot Lab", None, {"customer_id": "cus_1"})["id"]

    def session() -> dict[str, Any]:
        price = {"currency": "usd", "unit_amount": 2500, "product_data": {"name": "credits"}}
        return state.create_session(
            {
                "mode": "payment",
                "customer": customer,
                "line_items": [{"quantity": 1, "price_data": price}],
                "payment_intent_data": {"metadata": {"topup_id": "t"}, "setup_future_usage": "off_session"},
            }
        )

    state.expire_session(session()["id"])
    paid = state.pay_session(session()["id"], SUSPICIOUS)["payment_intent"]
    state.fail_refund(state.create_refund({"payment_intent": paid, "amount": 100})["id"])
    dispute = state.open_dispute(paid)["id"]
    state.withdraw_dispute(dispute)
    state.close_dispute(dispute, won=True)
    for succeeds in (True, False):
        bank = session()["id"]
        state.pay_session(bank, BANK)
        state.settle_bank(bank, succeeds)
    with pytest.raises(Refused):
        state.pay_session(session()["id"], INSUFFICIENT)
    method = state._new_method(DECLINED_LATER, customer)["id"]
    with pytest.raises(Refused):
        state.create_intent(
            {"amount": 500, "currency": "usd", "customer": customer, "payment_method": method, "confirm": True}
        )
    state.detach_method(method)
    for card in (GOOD, None):
        invoice = state.create_invoice({"customer": customer, "days_until_due": 14})["id"]
        state.create_invoice_item({"customer": customer, "invoice": invoice, "amount": 700})
        state.finalize_invoice(invoice)
        if card:
            state.pay_invoice(invoice, card)
        else:
            state.void_invoice(invoice)
    state.delete_customer(customer)


def test_every_object_has_the_shape_that_the_library_declares() -> None:
    state = Stripe(TestClock(1_800_000_000.0))
    a_month(state)
    state.objects["event"] = {event["id"]: event for event in state.events}
    state.objects["customer"].popitem()[1].pop("deleted")
    seen = set()
    for kind, cls in CLASSES.items():
        for each in state.objects.get(kind, {}).values():
            seen.add(kind)
            assert object_problems(each, cls, kind) == []
    assert seen | {"customer"} == set(CLASSES)


@pytest.fixture
async def fake() -> AsyncIterator[FakeStripe]:
    async with running() as fake:
        yield fake


@contextlib.asynccontextmanager
async def library(fake: FakeStripe, timeout_s: float = 2.0) -> AsyncIterator[StripeClient]:
    http = HTTPXClient(timeout=timeout_s)
    yield StripeClient(SECRET_KEY, base_addresses={"api": fake.url}, max_network_retries=0, http_client=http)
    await http.close_async()


@pytest.fixture
async def client(fake: FakeStripe) -> AsyncIterator[StripeClient]:
    async with library(fake) as client:
        yield client


async def test_the_same_key_replays_also_a_500_and_refuses_other_parameters(
    fake: FakeStripe, client: StripeClient
) -> None:
    first = await client.v1.customers.create_async({"name": "a"}, {"idempotency_key": "one"})
    again = await client.v1.customers.create_async({"name": "a"}, {"idempotency_key": "one"})
    assert first.id == again.id
    with pytest.raises(stripe.IdempotencyError):
        await client.v1.customers.create_async({"name": "b"}, {"idempotency_key": "one"})
    fake.faults.fail("500_after", "POST /v1/customers")
    for _ in range(2):
        with pytest.raises(stripe.APIError):
            await client.v1.customers.create_async({"name": "c"}, {"idempotency_key": "two"})
    assert len(list(fake.state.all("customer"))) == 2  # the second exists although it was answered 500
    for fault, error in (("409", stripe.APIError), ("429", stripe.RateLimitError)):
        fake.faults.fail(fault, "POST /v1/customers")  # type: ignore[arg-type]
        with pytest.raises(error):
            await client.v1.customers.create_async({"name": "d"}, {"idempotency_key": fault})
        await client.v1.customers.create_async({"name": "d"}, {"idempotency_key": fault})
    fake.faults.fail("timeout", "POST /v1/customers")
    async with library(fake, timeout_s=0.2) as impatient:
        with pytest.raises(stripe.APIConnectionError):
            await impatient.v1.customers.create_async({"name": "e"}, {"idempotency_key": "late"})
    assert (await client.v1.customers.create_async({"name": "e"}, {"idempotency_key": "late"})).name == "e"


async def test_parameters_that_the_library_does_not_know_are_refused(fake: FakeStripe) -> None:
    async with httpx.AsyncClient(base_url=fake.url, headers={"Authorization": f"Bearer {SECRET_KEY}"}) as http:
        refused = await http.post("/v1/customers", data={"nmae": "a"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "parameter_unknown")
        assert (await http.post("/v1/customers", data={"name": "a"})).status_code == 200
        assert (await http.get("/v1/events", headers={"Authorization": "Bearer sk_other"})).status_code == 401


async def test_events_page_in_both_directions_and_filter_by_type_and_time(
    fake: FakeStripe, client: StripeClient
) -> None:
    for name in range(25):
        fake.state.create_customer(str(name), None, {})
    page = await client.v1.events.list_async({"limit": 10, "types": ["customer.created"]})
    seen = [event.id async for event in page.auto_paging_iter()]
    assert seen == [event["id"] for event in reversed(fake.state.events)]
    middle = await client.v1.events.list_async({"limit": 10, "ending_before": seen[10]})
    assert [event.id for event in middle.data] == seen[:10]
    future = await client.v1.events.list_async({"created": {"gt": fake.state.now() + 10}})
    assert future.data == []
