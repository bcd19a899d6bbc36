"""The gateway against Stripe's own test mode: run when STRIPE_TEST_SECRET_KEY holds a test key (`sk_test_...`)."""

import os
import secrets
import time
from collections.abc import AsyncIterator

import pytest

from deployments.payments.config import PaymentsConfig
from deployments.payments.gateway import InvoiceLine, StripeGateway

KEY = os.environ.get("STRIPE_TEST_SECRET_KEY", "")
API_BASE = os.environ.get("STRIPE_TEST_API_BASE", "")

pytestmark = pytest.mark.skipif(not KEY, reason="STRIPE_TEST_SECRET_KEY is not set")


@pytest.fixture
async def gateway() -> AsyncIterator[StripeGateway]:
    gateway = StripeGateway(PaymentsConfig(KEY, ("whsec_unused",), API_BASE))
    yield gateway
    await gateway.close()


async def test_a_page_is_opened_once_found_again_and_seen_unpaid(gateway: StripeGateway) -> None:
    topup_id = f"top_{secrets.token_hex(16)}"
    customer = await gateway.create_customer("cus_of_a_test", f"cus:{topup_id}")
    now = time.time()

    async def page() -> str:
        opened = await gateway.open_page(
            topup_id=topup_id,
            customer_id="cus_of_a_test",
            provider_customer=customer,
            amount_cents=2_500,
            expires_at=int(now) + 3_600,
            success_url="https://example.com/done",
            cancel_url="https://example.com/canceled",
            save_card=True,
            idempotency_key=f"topup:{topup_id}:0",
        )
        return opened.session_id

    session_id = await page()
    assert await page() == session_id
    found = await gateway.find_page(topup_id, customer, now)
    assert found is not None
    assert found.session_id == session_id
    seen = await gateway.see(session_id, "")
    assert (seen.session_status, seen.payment_status, seen.subtotal) == ("open", "unpaid", 2_500)


async def test_a_draft_adds_up_to_its_lines_and_is_deleted(gateway: StripeGateway) -> None:
    name = secrets.token_hex(8)
    customer = await gateway.create_customer(name, f"cus:{name}")
    lines = [InvoiceLine("rollouts", 700), InvoiceLine("brought forward", -50)]
    draft = await gateway.draft_invoice(
        customer_id=name, provider_customer=customer, period="2027-01", lines=lines, idempotency_key=f"inv:{name}"
    )
    assert (draft.total, draft.status) == (650, "draft")
    await gateway.delete_invoice(draft.invoice_id)
    assert await gateway.find_invoice("2027-01", customer, time.time()) is None


async def test_events_and_balance_transactions_are_listed(gateway: StripeGateway) -> None:
    since = time.time() - 86_400
    async for event in gateway.events(("customer.deleted", "checkout.session.completed"), since):
        assert event["object"] == "event"
    async for booked in gateway.movements(since, time.time()):
        assert booked.movement.movement_id.startswith("txn_")
