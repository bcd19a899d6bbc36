"""Paying over HTTP: the page, the webhook, and what is refused."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from billing.commands import AddPrice, PriceAdded
from billing.price_terms import terms_of
from billing.prices import NANO_PER_USD, PriceVersion, Rate
from deployments.ingress import JOIN_RETRY_S
from serve_app.routes import payments as payment_routes
from tests.fakestripe.server import WEBHOOK_SECRET
from tests.fakestripe.state import BANK, DECLINED
from tests.fakestripe.webhooks import sign
from tests.support.app import App
from tests.support.payloads import actions, npy, png
from tests.support.payments import Shop, open_shop


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    async with open_shop(tmp_path) as shop:
        yield shop


async def topup(shop: Shop, headers: dict[str, str], cents: int = 2_500, **extra: str) -> dict[str, Any]:
    answer = await shop.app.http.post("/v1/billing/topup", json={"amount_cents": cents}, headers=headers | extra)
    assert answer.status_code == 200, answer.text
    body: dict[str, Any] = answer.json()
    return body


async def balance(shop: Shop, headers: dict[str, str]) -> int:
    mils: int = (await shop.app.http.get("/v1/billing/balance", headers=headers)).json()["balance_mils"]
    return mils


async def test_a_payment_on_the_page_is_credited_once_whatever_is_delivered_twice(shop: Shop) -> None:
    headers, customer = shop.app.key(credits_mils=0)
    page = await topup(shop, headers)
    assert page["customer_id"] == customer
    declined = await shop.pay(page["url"], DECLINED)
    assert (declined.status_code, "declined" in declined.text) == (402, True)
    back = await shop.pay(page["url"])
    assert back.status_code == 303
    for event in shop.fake.state.events:
        shop.fake.webhooks.enqueue(event)
    await shop.settled()
    assert await balance(shop, headers) == 250_000
    done = await shop.app.http.get(back.headers["location"])
    assert "$25.00 of credit is in your balance" in done.text
    assert shop.app.ledger.rows(customer) == [("credit", 250_000)]
    [row] = (await shop.app.http.get("/v1/billing/transactions", headers=headers)).json()["transactions"]
    assert row["id"] in {event["id"] for event in shop.fake.state.events}
    assert row["detail"] == "Stripe Checkout top-up · $25.00"


async def test_coming_back_from_the_page_credits_though_no_webhook_ever_comes(shop: Shop) -> None:
    headers, customer = shop.app.key(credits_mils=0)
    page = await topup(shop, headers)
    back = await shop.pay(page["url"])
    shop.fake.webhooks.waiting.clear()
    done = await shop.app.http.get(back.headers["location"])
    assert "is in your balance" in done.text
    assert shop.app.ledger.rows(customer) == [("credit", 250_000)]


async def test_canceling_charges_nothing_and_the_same_page_is_handed_out_again(shop: Shop) -> None:
    headers, _ = shop.app.key(credits_mils=0)
    page = await topup(shop, headers)
    left = await shop.pay(page["url"], action="cancel")
    assert "Nothing was charged" in (await shop.app.http.get(left.headers["location"])).text
    assert (await topup(shop, headers))["session_id"] == page["session_id"]
    assert (await topup(shop, headers, 3_000))["session_id"] != page["session_id"]


async def test_pages_are_capped(shop: Shop) -> None:
    headers, _ = shop.app.key(credits_mils=0)
    for cents in (500, 600, 700, 800, 900):
        await topup(shop, headers, cents)
    refused = await shop.app.http.post("/v1/billing/topup", json={"amount_cents": 1_000}, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "RATE_LIMITED")
    assert int(refused.headers["Retry-After"]) > 0
    assert len(list(shop.fake.state.all("checkout.session"))) == 5


async def test_an_idempotency_key_names_one_page_also_at_once_and_no_other_amount(shop: Shop) -> None:
    headers, _ = shop.app.key(credits_mils=0)
    key = {"Idempotency-Key": "order-7"}
    pages = await asyncio.gather(*(topup(shop, headers, **key) for _ in range(5)))
    assert len({page["session_id"] for page in pages}) == 1
    other = await shop.app.http.post("/v1/billing/topup", json={"amount_cents": 900}, headers=headers | key)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "IDEMPOTENCY_CONFLICT")


async def test_amounts_from_500_to_a_million_cents_are_taken_and_nothing_else_reaches_stripe(shop: Shop) -> None:
    headers, _ = shop.app.key(credits_mils=0)
    for amount in (499, 1_000_001, 500.0, "500", True, None, -500, 10**30):
        refused = await shop.app.http.post("/v1/billing/topup", json={"amount_cents": amount}, headers=headers)
        assert refused.status_code == 422, amount
    assert shop.fake.api.calls == []
    for cents in (500, 1_000_000):
        assert (await topup(shop, headers, cents))["amount_cents"] == cents


async def test_without_a_secret_payments_are_off_and_say_so(app: App) -> None:
    headers, _ = app.key()
    refused = await app.http.post("/v1/billing/topup", json={"amount_cents": 500}, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "PAYMENTS_DISABLED")
    assert "STRIPE_SECRET_KEY" in refused.json()["detail"]
    assert (await app.http.post("/v1/billing/webhook", content=b"{}")).status_code == 503
    assert (await app.http.get("/v1/billing/auto-topup", headers=headers)).json()["enabled"] is False


async def test_a_500_that_is_stored_under_its_key_opens_one_page_all_the_same(shop: Shop) -> None:
    headers, _ = shop.app.key(credits_mils=0)
    for fault in ("500_after", "500_before", "409", "429", "timeout"):
        shop.fake.faults.fail(fault, "POST /v1/checkout/sessions")  # type: ignore[arg-type]
        cents = 500 + len(list(shop.fake.state.all("checkout.session")))
        page = await topup(shop, headers, cents)
        sessions = [each for each in shop.fake.state.all("checkout.session") if each["amount_total"] == cents]
        assert [each["id"] for each in sessions] == [page["session_id"]], fault


async def test_stripe_away_is_a_503_that_loses_nothing(shop: Shop) -> None:
    headers, _ = shop.app.key(credits_mils=0)
    shop.fake.faults.fail("429", "POST /v1/customers", times=4)
    refused = await shop.app.http.post("/v1/billing/topup", json={"amount_cents": 500}, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "PAYMENTS_UNAVAILABLE")
    assert (await topup(shop, headers, 500))["amount_cents"] == 500


def event(shop: Shop) -> dict[str, Any]:
    return shop.fake.state.emit("customer.created", shop.fake.state.create_customer("a", None, {}))


BODIES: dict[str, tuple[bytes, int]] = {
    "bad UTF-8": (b"\xff\xfe", 400),
    "signed non-JSON": (b"hello", 400),
    "signed list": (b"[]", 400),
    "signed thin event": (b'{"object": "v2.core.event", "id": "evt_1"}', 400),
    "signed event without an object": (b'{"id": "evt_1", "type": "a", "created": 1, "data": {}}', 400),
    "signed event with an id of control characters": (
        b'{"id": "\\u0000", "type": "a", "created": 1, "data": {"object": {"id": "x", "object": "charge"}}}',
        400,
    ),
    "deep nesting": (b"[" * 100_000, 400),
    "10 MB": (b"x" * 10_000_000, 413),
}


async def test_garbage_is_refused_and_nothing_is_written(shop: Shop) -> None:
    for name, (body, status) in BODIES.items():
        answer = await shop.post_webhook(body, sign(body, [WEBHOOK_SECRET], int(shop.fake.clock())))
        assert answer.status_code == status, (name, answer.text)
    body = json.dumps(event(shop)).encode()
    for header in ("", "t=1", "v1=a", "t=x,v1=a", "t=1,v1=", "t=99999999999999999999,v1=a", "é"):
        answer = await shop.app.http.post(
            "/v1/billing/webhook", content=body, headers={"Stripe-Signature": header.encode()}
        )
        assert answer.status_code == 400, header
    assert shop.reader.inbox().newest_received_at is None


SIGNATURES = {
    "right": ([WEBHOOK_SECRET], 0, 200),
    "of a secret that is being rolled": (["whsec_new", WEBHOOK_SECRET], 0, 200),
    "forged": (["whsec_other"], 0, 400),
    "stale": ([WEBHOOK_SECRET], -302, 400),
    "just in time": ([WEBHOOK_SECRET], -295, 200),
    "from the future": ([WEBHOOK_SECRET], 305, 400),
    "slightly ahead": ([WEBHOOK_SECRET], 295, 200),
}


async def test_a_signature_is_taken_only_if_it_is_ours_and_of_now(shop: Shop) -> None:
    for what, (secrets, skew_s, status) in SIGNATURES.items():
        sent = event(shop)
        body = json.dumps(sent).encode()
        answer = await shop.post_webhook(body, sign(body, secrets, int(shop.fake.clock()) + skew_s))
        assert answer.status_code == status, (what, answer.text)
        assert (sent["id"] in shop.reader.event_states([sent["id"]])) == (status == 200), what


async def test_eight_parallel_deliveries_of_each_event_credit_once(shop: Shop) -> None:
    headers, customer = shop.app.key(credits_mils=0)
    await shop.pay((await topup(shop, headers))["url"])
    shop.fake.webhooks.waiting *= 8
    await shop.settled()
    assert shop.fake.webhooks.failed == set()
    assert shop.app.ledger.rows(customer) == [("credit", 250_000)]


async def test_a_bank_debit_is_credited_when_it_has_succeeded_and_not_before(shop: Shop) -> None:
    headers, _ = shop.app.key(credits_mils=0)
    page = await topup(shop, headers)
    back = await shop.pay(page["url"], BANK)
    await shop.settled()
    assert await balance(shop, headers) == 0
    assert "Your bank is working on it" in (await shop.app.http.get(back.headers["location"])).text
    shop.fake.state.settle_bank(page["session_id"], succeeds=True)
    await shop.settled()
    assert await balance(shop, headers) == 250_000


async def test_an_old_api_version_and_two_signatures_change_nothing(shop: Shop) -> None:
    headers, _ = shop.app.key(credits_mils=0)
    page = await topup(shop, headers)
    shop.fake.faults.next_webhook = ["old_version", "two_signatures", "old_version", "two_signatures"]
    await shop.pay(page["url"])
    await shop.settled()
    assert await balance(shop, headers) == 250_000


async def test_a_foreign_payment_is_kept_unmatched_and_moves_nothing(shop: Shop) -> None:
    _, customer = shop.app.key(credits_mils=0)
    state = shop.fake.state
    stranger = state.create_customer("stranger", None, {})["id"]
    method = state._new_method("4242424242424242", stranger)["id"]
    state.create_intent(
        {
            "amount": 900,
            "currency": "usd",
            "customer": stranger,
            "payment_method": method,
            "confirm": True,
            "metadata": {"topup_id": "top_of_another_system", "customer_id": customer},
        }
    )
    await shop.settled()
    assert shop.app.ledger.rows(customer) == []
    assert (shop.reader.inbox().pending, shop.reader.inbox().unmatched) == (0, 1)


async def test_automatic_top_ups_need_consent_and_show_their_terms(shop: Shop) -> None:
    headers, _ = shop.app.key(credits_mils=0)
    refused = await shop.app.http.put("/v1/billing/auto-topup", json={"enabled": True}, headers=headers)
    assert (refused.status_code, refused.json()["detail"][:8]) == (422, "consent:")
    agreed = await shop.app.http.put("/v1/billing/auto-topup", json={"enabled": True, "consent": True}, headers=headers)
    assert agreed.status_code == 200, agreed.text
    terms = agreed.json()
    assert (terms["enabled"], terms["has_card"], terms["threshold_cents"]) == (True, False, 1_000)
    assert "at most $100.00 a day" in terms["consent"]
    caps = {"enabled": True, "consent": True, "amount_cents": 2_000, "daily_cap_cents": 1_999}
    assert (await shop.app.http.put("/v1/billing/auto-topup", json=caps, headers=headers)).status_code == 422
    off = await shop.app.http.put("/v1/billing/auto-topup", json={"enabled": False}, headers=headers)
    assert (off.json()["enabled"], off.json()["consent"]) == (False, "")


async def test_two_hundred_refusals_at_once_are_one_charge(shop: Shop) -> None:
    dear = PriceVersion("tiny-pusher", 1, time.time(), (Rate("frame", NANO_PER_USD // 10),), "")
    added = shop.app.ledger.apply(AddPrice(dear.model, "", dear.version, dear.effective_from, terms_of(dear)))
    assert isinstance(added, PriceAdded)
    headers, customer = shop.app.key(credits_mils=0)
    agree = {"enabled": True, "consent": True, "threshold_cents": 0, "amount_cents": 500}
    await shop.app.http.put("/v1/billing/auto-topup", json=agree, headers=headers)
    await shop.pay((await topup(shop, headers, 500))["url"])
    await shop.settled()
    files = {"frame": png(), "actions": npy(actions(60))}  # 61,000 mils, and there are 50,000
    answers = await asyncio.gather(
        *(shop.app.http.post("/v1/predict/batch", files=files, headers=headers) for _ in range(200))
    )
    statuses = {answer.status_code for answer in answers}
    # The charge may be there before the last of them is decided; then some run as one, and so many may wait for that.
    assert {402} <= statuses <= {402, 200, 503}
    busy = [answer for answer in answers if answer.status_code == 503]
    assert {answer.json()["error"]["code"] for answer in busy} <= {"OVERLOADED"}
    assert {answer.headers["Retry-After"] for answer in busy} <= {str(JOIN_RETRY_S)}
    while shop.app.services.payments._background:
        await asyncio.gather(*shop.app.services.payments._background)
    added = [row for row in shop.app.ledger.rows(customer) if row[0] == "credit"]
    assert added == [("credit", 50_000), ("credit", 50_000)]
    assert shop.fake.api.calls.count("POST /v1/payment_intents") == 1
    last = (await shop.app.http.get("/v1/billing/auto-topup", headers=headers)).json()["last"]
    assert last["reason"].startswith("the balance of $5.00 is below the $")


async def test_who_sends_forgeries_is_told_to_wait_and_does_not_hold_up_stripe(shop: Shop) -> None:
    body = json.dumps({"id": "evt_1", "object": "event"}).encode()
    for _ in range(payment_routes.FORGERY_BURST):
        assert (await shop.post_webhook(body, "t=1,v1=00")).status_code == 400
    refused = await shop.post_webhook(body, "t=1,v1=00")
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "1")
    headers, customer = shop.app.key(credits_mils=0)
    page = await topup(shop, headers)
    await shop.pay(page["url"])
    await shop.settled()
    assert shop.app.ledger.rows(customer) == [("credit", 250_000)]


async def test_the_key_of_a_page_that_expired_says_so(shop: Shop) -> None:
    headers, _ = shop.app.key(credits_mils=0)
    page = await topup(shop, headers, **{"Idempotency-Key": "mine"})
    assert (await topup(shop, headers, **{"Idempotency-Key": "mine"}))["session_id"] == page["session_id"]
    shop.fake.clock.advance(25 * 3_600)
    shop.fake.state.tick()
    await shop.app.http.get(f"/v1/billing/topup/{page['topup_id']}/done")
    refused = await shop.app.http.post(
        "/v1/billing/topup", json={"amount_cents": 2_500}, headers=headers | {"Idempotency-Key": "mine"}
    )
    assert (refused.status_code, refused.json()["error"]["code"]) == (422, "IDEMPOTENCY_CONFLICT")
    assert "its payment page is over (expired)" in refused.text
