"""Postpaid customers: months that are asked for to the cent, paid once, and stop spending while they are overdue."""

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from billing.commands import (
    ChargeUnits,
    CloseStatement,
    CreditLineSet,
    CustomerId,
    InsufficientCredits,
    Reserve,
    Reserved,
    SetCreditLine,
    Settle,
    SetUnits,
    StatementClosed,
)
from billing.keys import mint_request_id
from billing.money import Mils
from billing.payments.commands import EventHint, Invoice
from deployments.payments import invoices, sweeps
from tests.fakestripe.faults import ApiFault
from tests.fakestripe.state import Refused
from tests.support.payments import START, Till, open_till

DAY_S = 86_400
PERIOD = datetime.fromtimestamp(START, UTC).strftime("%Y-%m")


@pytest.fixture
async def till(tmp_path: Path) -> AsyncIterator[Till]:
    async with open_till(tmp_path) as till:
        yield till


def postpaid(till: Till, limit_mils: int = 1_000_000) -> CustomerId:
    customer = till.customer()
    assert isinstance(till.ledger.apply(SetCreditLine(customer, Mils(limit_mils))), CreditLineSet)
    return customer


def use(till: Till, customer: CustomerId, frames: int, model: str = "tiny-pusher", mils: int = 5, per: int = 1) -> Any:
    with till.ledger.database.connect() as connection:
        key = connection.exec_driver_sql(f"SELECT key_id FROM api_key WHERE customer_id = '{customer}'").scalar_one()
    command = Reserve(mint_request_id(), key, frames, Mils(mils), "work", 60.0, model=model, per_frames=per)
    outcome = till.ledger.apply(command)
    if isinstance(outcome, Reserved):
        till.ledger.apply(Settle(outcome.request_id, frames, ""))
    return outcome


def next_month(till: Till) -> None:
    till.clock.advance(32 * DAY_S)
    till.fake.state.tick()


def invoice_of(till: Till, customer: CustomerId) -> Invoice:
    [*_, invoice] = till.payments.reader.invoices(customer)
    return invoice


async def test_a_month_is_asked_for_to_the_cent_line_by_line_and_the_fraction_is_carried(till: Till) -> None:
    customer = postpaid(till)
    use(till, customer, 2_001, "tiny-pusher")  # 10,005 mils
    use(till, customer, 1_003, "other-model")  # 5,015 mils
    next_month(till)
    await invoices.bill_last_month(till.payments)
    ours = invoice_of(till, customer)
    assert (ours.period, ours.amount_cents, ours.carry_mils, ours.state) == (PERIOD, 150, 20, "open")
    theirs = till.fake.state.get("invoice", ours.invoice_id)
    assert (theirs["total"], theirs["status"]) == (150, "open")
    assert {line["description"]: line["amount"] for line in theirs["lines"]["data"]} == {
        f"other-model · {PERIOD} · $0.0005 a frame": 50,
        f"tiny-pusher · {PERIOD} · $0.0005 a frame": 100,
    }
    till.fake.state.pay_invoice(ours.invoice_id)
    await till.receive(*till.fake.state.events)
    await till.receive(*till.fake.state.events)
    await till.payments.drain()
    assert invoice_of(till, customer).state == "paid"
    assert till.balance(customer) == -20
    assert till.ledger.rows(customer).count(("credit", 15_000)) == 1
    assert till.payments.reader.inbox().unmatched == 0
    use(till, customer, 16)  # 80 mils: with the 20 that were carried, one whole cent
    next_month(till)
    await invoices.bill_last_month(till.payments)
    assert (invoice_of(till, customer).amount_cents, invoice_of(till, customer).carry_mils) == (1, 0)


async def test_what_an_unpaid_invoice_asks_for_is_not_asked_for_again(till: Till) -> None:
    customer = postpaid(till)
    use(till, customer, 2_000)
    next_month(till)
    await invoices.bill_last_month(till.payments)
    use(till, customer, 400)
    next_month(till)
    await invoices.bill_last_month(till.payments)
    assert [each.amount_cents for each in till.payments.reader.invoices(customer)] == [100, 20]
    assert len(list(till.fake.state.all("invoice"))) == 2


async def test_an_invoice_that_was_paid_outside_stripe_is_not_taken_off_the_next_one(till: Till) -> None:
    customer = postpaid(till)
    use(till, customer, 2_000)
    next_month(till)
    await invoices.bill_last_month(till.payments)
    theirs = till.fake.state.get("invoice", invoice_of(till, customer).invoice_id)
    theirs.update(status="paid", amount_remaining=0)
    till.fake.state.emit("invoice.paid", theirs)
    await sweeps.sweep_events(till.payments)
    assert (invoice_of(till, customer).state, till.balance(customer)) == ("paid", 0)
    assert till.payments.reader.ledger_mismatches() == []
    use(till, customer, 2_400)
    next_month(till)
    await invoices.bill_last_month(till.payments)
    assert [each.amount_cents for each in till.payments.reader.invoices(customer)] == [100, 120]


async def test_an_invoices_payment_is_the_one_that_paid_it(till: Till) -> None:
    customer = postpaid(till)
    use(till, customer, 2_000)
    next_month(till)
    await invoices.bill_last_month(till.payments)
    invoice_id = invoice_of(till, customer).invoice_id
    given_up = {"type": "payment_intent", "payment_intent": "pi_given_up"}
    till.fake.state.pay_invoice(invoice_id)
    till.fake.state._new("invoice_payment", "inpay", invoice=invoice_id, payment=given_up, status="canceled")
    await sweeps.sweep_events(till.payments)
    [paid] = [each for each in till.fake.state.all("invoice_payment") if each["status"] == "paid"]
    assert invoice_of(till, customer).payment_intent == paid["payment"]["payment_intent"]


async def test_a_month_that_cannot_be_closed_holds_up_no_other_customer(till: Till) -> None:
    first, second = sorted((postpaid(till), postpaid(till)))
    use(till, first, 2_000)
    use(till, second, 2_000)
    next_month(till)
    this_month = datetime.fromtimestamp(till.clock(), UTC).strftime("%Y-%m")
    assert isinstance(till.ledger.apply(CloseStatement(first, this_month)), StatementClosed)
    await invoices.bill_last_month(till.payments)
    assert invoice_of(till, second).state == "open"
    next_month(till)
    await invoices.bill_last_month(till.payments)
    assert (invoice_of(till, first).period, invoice_of(till, first).amount_cents) == (this_month, 100)


async def test_an_overdue_invoice_stops_spending_until_it_is_paid(till: Till) -> None:
    customer = postpaid(till)
    use(till, customer, 2_000)
    next_month(till)
    await invoices.bill_last_month(till.payments)
    assert isinstance(use(till, customer, 10), Reserved)
    till.clock.advance(15 * DAY_S)
    till.fake.state.tick()
    await till.receive(*till.fake.state.events)
    await till.payments.drain()
    assert invoice_of(till, customer).state == "overdue"
    assert isinstance(use(till, customer, 10), InsufficientCredits)
    till.fake.state.pay_invoice(invoice_of(till, customer).invoice_id)
    await sweeps.sweep_events(till.payments)  # no webhook came
    assert invoice_of(till, customer).state == "paid"
    assert isinstance(use(till, customer, 10), Reserved)


FAULTS: tuple[tuple[ApiFault, str], ...] = (
    ("500_after", "POST /v1/invoices"),
    ("500_before", "POST /v1/invoices"),
    ("429", "POST /v1/invoices"),
    ("timeout", "POST /v1/invoices"),
    ("500_after", "POST /v1/invoiceitems"),
    ("timeout", "POST /v1/invoiceitems"),
    ("500_after", "GET /v1/invoices/"),
)


async def test_an_invoice_whose_making_fails_in_any_way_at_any_step_is_made_once(till: Till) -> None:
    customers = [postpaid(till) for _ in FAULTS]
    for customer in customers:
        use(till, customer, 2_000)
    next_month(till)
    for fault, step in FAULTS:
        till.fake.faults.fail(fault, step)
    for _ in range(4):
        await invoices.bill_last_month(till.payments)
    assert till.fake.faults.next == []
    made = [(each["total"], each["status"]) for each in till.fake.state.all("invoice")]
    assert made == [(100, "open")] * len(customers)
    assert {invoice_of(till, customer).state for customer in customers} == {"open"}


async def test_an_invoice_whose_total_is_not_ours_is_never_finalised(
    till: Till, monkeypatch: pytest.MonkeyPatch
) -> None:
    customer = postpaid(till)
    use(till, customer, 2_000)
    next_month(till)
    honest = till.fake.state.create_invoice_item
    monkeypatch.setattr(
        till.fake.state, "create_invoice_item", lambda params: honest(params | {"amount": params["amount"] + 1})
    )
    await invoices.bill_last_month(till.payments)
    assert list(till.fake.state.all("invoice")) == []
    assert invoice_of(till, customer).problem == "Stripe made it 101 cents"
    monkeypatch.undo()
    await invoices.bill_last_month(till.payments)
    assert invoice_of(till, customer).state == "open"


async def test_a_prepaid_customer_and_an_idle_one_get_no_invoice(till: Till) -> None:
    prepaid, idle = till.customer(10_000), postpaid(till)
    use(till, prepaid, 100)
    next_month(till)
    await invoices.bill_last_month(till.payments)
    assert till.payments.reader.invoices(prepaid) == till.payments.reader.invoices(idle) == []


async def test_the_books_agree_over_invoices_their_refunds_and_cards_that_are_declined(till: Till) -> None:
    customer = postpaid(till)
    use(till, customer, 2_000)
    next_month(till)
    await invoices.bill_last_month(till.payments)
    invoice_id = invoice_of(till, customer).invoice_id
    with pytest.raises(Refused):
        till.fake.state.pay_invoice(invoice_id, "4000000000000002")
    till.fake.state.pay_invoice(invoice_id)
    await sweeps.sweep_events(till.payments)
    till.fake.state.create_refund({"payment_intent": invoice_of(till, customer).payment_intent, "amount": 30})
    await sweeps.sweep_events(till.payments)
    dispute = till.fake.state.open_dispute(invoice_of(till, customer).payment_intent, 20)
    till.fake.state.withdraw_dispute(dispute["id"])
    await sweeps.sweep_events(till.payments)
    report = await sweeps.reconcile(till.payments, int(till.clock() // DAY_S), b"s" * 32)
    assert report.difference_cents == 0
    assert till.payments.reader.held_of_payments() == {customer: 5_000}


async def test_each_volume_discount_and_each_models_units_have_a_line_of_their_own(till: Till) -> None:
    customer = postpaid(till)
    till.ledger.apply(SetUnits(customer, "tiny-pusher", 1, PERIOD, 2, Mils(5_000), 100, 0))
    till.ledger.apply(ChargeUnits())
    use(till, customer, 2_100)  # 100 too many for the units of 200 frames
    use(till, customer, 1_000, mils=9, per=2)  # 10% off
    next_month(till)
    await invoices.bill_last_month(till.payments)
    theirs = till.fake.state.get("invoice", invoice_of(till, customer).invoice_id)
    assert {line["description"]: line["amount"] for line in theirs["lines"]["data"]} == {
        f"2 provisioned units · tiny-pusher · {PERIOD}": 100,
        f"tiny-pusher · {PERIOD} · $0.0005 a frame": 95,
        f"tiny-pusher · {PERIOD} · $0.00045 a frame": 45,
    }


async def test_many_rates_share_a_line(till: Till) -> None:
    customer = postpaid(till)
    for odd in range(invoices.MAX_RATES + 5):
        use(till, customer, 1_000, mils=500 - odd, per=100)
    next_month(till)
    await invoices.bill_last_month(till.payments)
    theirs = till.fake.state.get("invoice", invoice_of(till, customer).invoice_id)
    lines = {line["description"]: line["amount"] for line in theirs["lines"]["data"]}
    assert len(lines) in (invoices.MAX_RATES + 1, invoices.MAX_RATES + 2)
    assert f"tiny-pusher · {PERIOD} · other rates" in lines
    assert sum(lines.values()) == invoice_of(till, customer).amount_cents


async def test_an_event_about_something_unknown_is_not_taken_for_an_unpaid_invoice(till: Till) -> None:
    customer = postpaid(till)
    use(till, customer, 2_000)
    next_month(till)
    await invoices.bill_last_month(till.payments)
    before = invoice_of(till, customer)
    known = till.payments.reader.customer(customer)
    assert known is not None
    for unknown in ({"invoice_id": "in_unknown"}, {"payment_intent": "pi_unknown"}, {}):
        hint = EventHint(
            "evt_x", "invoice.paid", 0.0, "in_unknown", provider_customer=known.provider_customer, **unknown
        )
        assert await invoices.invoice_of(till.payments, hint, customer) is None
    assert invoice_of(till, customer) == before
    hint = EventHint("evt_y", "invoice.paid", 0.0, before.invoice_id, invoice_id=before.invoice_id)
    assert await invoices.invoice_of(till.payments, hint, customer) == before
