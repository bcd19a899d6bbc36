"""Payments against faults: lost answers, overtaken looks, crashes, debts, and cards that are charged unasked."""

import asyncio
import hashlib
import hmac
import itertools
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import IntegrityError

from billing.commands import Credit, Reserve, Reserved, Settle
from billing.keys import mint_request_id
from billing.money import Mils
from billing.payments.commands import (
    MAX_TOPUP_CENTS,
    ApplyPayment,
    AutoTopupHeld,
    PaymentApplied,
    StartAutoTopup,
    Topup,
    TopupOpened,
)
from billing.payments.verdict import PaymentSeen, judge
from deployments.payments import gateway, sweeps
from deployments.payments.config import PaymentsConfig
from deployments.payments.errors import CardDeclined, StripeRefused, StripeUnavailable
from deployments.payments.service import mint_topup_id
from tests.fakestripe.state import DECLINED_LATER, GOOD, SUSPICIOUS
from tests.support.cuts import Moment, left_at
from tests.support.payments import BASE_URL, START, Till, open_till

DAY_S = 86_400
SECRET = b"s" * 32


@pytest.fixture
async def till(tmp_path: Path) -> AsyncIterator[Till]:
    async with open_till(tmp_path) as till:
        yield till


async def ready_to_charge(till: Till, card: str = GOOD, cents: int = 500, **terms: Any) -> Any:
    """A customer who agreed, and whose first top-up of `cents` saved its card."""
    customer = till.customer()
    await till.agree(customer, **terms)
    topup = await till.payments.topup(customer, cents, BASE_URL)
    till.fake.state.pay_session(topup.session_id, GOOD)
    intent = till.fake.state.get(
        "payment_intent", till.fake.state.get("checkout.session", topup.session_id)["payment_intent"]
    )
    till.fake.state.cards[intent["payment_method"]] = card
    await till.payments.look(topup.topup_id)
    return customer


def charges(till: Till) -> list[dict[str, Any]]:
    return [each for each in till.fake.state.all("payment_intent") if "Automatic" in (each["description"] or "")]


async def test_a_look_that_another_has_overtaken_is_refused_and_looks_again(
    till: Till, monkeypatch: pytest.MonkeyPatch
) -> None:
    customer = till.customer()
    topup = await till.topped_up(customer)
    see, held, seen = till.payments.gateway.see, asyncio.Event(), asyncio.Event()

    async def slow(session_id: str, payment_intent: str) -> PaymentSeen:
        answer = await see(session_id, payment_intent)
        if not seen.is_set():
            seen.set()
            await held.wait()
        return answer

    refund = till.fake.state.create_refund({"payment_intent": till.intent_of(topup), "amount": 1_000})
    monkeypatch.setattr(till.payments.gateway, "see", slow)
    old = asyncio.create_task(till.payments.look(topup.topup_id))
    await seen.wait()  # it has seen the refund
    till.fake.state.fail_refund(refund["id"])
    await till.payments.look(topup.topup_id)
    held.set()
    await old
    assert till.balance(customer) == 250_000


async def test_the_credit_the_state_and_the_marks_are_one_commit(till: Till) -> None:
    """The ledger refuses the money, as it would at a crash: then nothing of the event is marked either."""
    customer = till.customer()
    topup = await till.paid(customer)
    intent = till.fake.state.get("checkout.session", topup.session_id)["payment_intent"]
    other = till.customer()  # whose credit holds the payment's name
    till.ledger.apply(Credit(other, Mils(7), f"stripe:{intent}", "evt_other", "a mistake"))
    await till.receive(*till.fake.state.events)
    await till.payments.drain()
    known = till.payments.reader.topup(topup.topup_id)
    assert known is not None
    assert (known.state, known.revision) == ("open", 0)
    states = till.payments.reader.event_states([event["id"] for event in till.fake.state.events])
    assert "applied" not in states.values()
    assert till.payments.reader.inbox().pending >= 1
    assert till.balance(customer) == 0


async def test_a_crash_after_the_inbox_and_before_the_effect_loses_nothing(till: Till) -> None:
    customer = till.customer()
    await till.paid(customer)
    await till.receive(*till.fake.state.events)  # and the process that would have drained them is gone
    assert till.balance(customer) == 0
    await till.payments.drain()
    assert till.balance(customer) == 250_000


@pytest.mark.parametrize("sweep", ["events", "objects"])
async def test_a_webhook_that_never_comes_is_healed_by_one_sweep(till: Till, sweep: str) -> None:
    customer = till.customer()
    await till.paid(customer)
    if sweep == "events":
        assert await sweeps.sweep_events(till.payments) > 0
        assert await sweeps.sweep_events(till.payments) == 0
    else:
        till.clock.advance(601)
        assert await sweeps.sweep_objects(till.payments) == 1
    assert till.balance(customer) == 250_000


async def test_a_sweep_lists_every_event_however_many_there_are(till: Till, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gateway, "MAX_LISTED", gateway.PAGE)
    customer, other = till.customer(), till.customer()
    await till.paid(customer)
    intent = till.fake.state.get("checkout.session", (await till.paid(other)).session_id)["payment_intent"]
    for _ in range(gateway.PAGE):
        till.fake.state.emit("payment_intent.processing", till.fake.state.get("payment_intent", intent))
    await sweeps.sweep_events(till.payments)
    assert (till.balance(customer), till.balance(other)) == (250_000, 250_000)


async def test_an_event_is_kept_while_stripe_is_away_and_applied_when_it_is_back(till: Till) -> None:
    customer = till.customer()
    await till.paid(customer)
    till.fake.faults.fail("429", "GET /v1/checkout", times=4)
    await till.receive(*till.fake.state.events)
    await till.payments.drain()
    assert (till.balance(customer), till.payments.reader.inbox().pending) == (0, 2)
    till.clock.advance(6)
    await till.payments.drain()
    assert (till.balance(customer), till.payments.reader.inbox().pending) == (250_000, 0)


async def test_what_was_spent_before_the_charge_back_is_owed_and_repaid_first(till: Till) -> None:
    customer = till.customer()
    topup = await till.topped_up(customer)
    spend(till, customer, 240_000)
    dispute = till.fake.state.open_dispute(till.intent_of(topup))
    till.fake.state.withdraw_dispute(dispute["id"])
    await till.payments.look(topup.topup_id)
    assert till.balance(customer) == 0
    second = await till.topped_up(customer, 3_000)
    assert second.state == "paid"
    assert till.balance(customer) == 300_000 - 240_000
    till.fake.state.close_dispute(dispute["id"], won=True)
    await till.payments.look(topup.topup_id)
    assert till.balance(customer) == 310_000


def spend(till: Till, customer: str, mils: int) -> None:
    with till.ledger.database.connect() as connection:
        key = connection.exec_driver_sql(f"SELECT key_id FROM api_key WHERE customer_id = '{customer}'").scalar_one()
    reserved = till.ledger.apply(Reserve(mint_request_id(), key, mils // 5, Mils(5), "work", 60.0))
    assert isinstance(reserved, Reserved), reserved
    till.ledger.apply(Settle(reserved.request_id, mils // 5, ""))


TOPUP = Topup("top_1", "cus_1", "checkout", 2_500, "", "open", 0, "cs_1", "", "", "", 0.0, 0, "", "", 0.0, 0.0)  # type: ignore[arg-type]
GOOD_PAYMENT: dict[str, Any] = {
    "session_status": "complete",
    "payment_status": "paid",
    "payment_intent": "pi_1",
    "intent_status": "succeeded",
    "amount_received": 2_500,
    "subtotal": 2_500,
}


@pytest.mark.parametrize(
    ("change", "state", "granted", "reversed_cents"),
    [
        ({}, "paid", 2_500, 0),
        ({"currency": "eur"}, "refused", 0, 0),
        ({"livemode": True}, "refused", 0, 0),
        ({"amount_received": 2_000}, "refused", 0, 0),
        ({"amount_received": 2_000, "subtotal": 2_000}, "refused", 0, 0),
        ({"amount_received": 2_750}, "paid", 2_500, 0),  # tax on top
        ({"amount_received": 2_750, "subtotal": 2_750}, "refused", 0, 0),
        ({"session_status": "expired"}, "paid", 2_500, 0),  # it came all the same
        ({"refunded": 2_500, "withdrawn": 2_500}, "paid", 2_500, 2_500),
        ({"refunded": 300, "withdrawn": -100}, "paid", 2_500, 300),
        ({"intent_status": "processing"}, "processing", 0, 0),
        ({"intent_status": "requires_payment_method"}, "failed", 0, 0),
        ({"intent_status": "", "payment_status": "no_payment_required"}, "refused", 0, 0),
        ({"intent_status": "", "session_status": "expired", "payment_status": "unpaid"}, "expired", 0, 0),
        ({"intent_status": "requires_payment_method", "session_status": "open"}, "open", 0, 0),
    ],
)
def test_the_verdict_credits_only_what_was_asked_for(
    change: dict[str, Any], state: str, granted: int, reversed_cents: int
) -> None:
    verdict = judge(TOPUP, PaymentSeen(**GOOD_PAYMENT | change), livemode=False)
    assert (verdict.state, verdict.granted_cents, verdict.reversed_cents) == (state, granted, reversed_cents)
    assert bool(verdict.problem) == (state in ("refused", "failed"))


async def test_a_low_balance_is_charged_once_and_says_why_that_amount(till: Till) -> None:
    customer = await ready_to_charge(till, threshold_mils=Mils(300_000))
    assert await asyncio.gather(*(till.payments.top_up_low_balances() for _ in range(5))) != [0] * 5
    [charge] = charges(till)
    assert charge["amount"] == 3_000
    assert till.balance(customer) == 350_000
    last = till.payments.reader.last_auto_topup(customer)
    assert last is not None
    assert (
        last.reason == "the balance of $5.00 is below the threshold of $30.00; 3 x $10.00 is the least that clears it"
    )
    assert await till.payments.top_up_low_balances() == 0


async def test_nothing_is_charged_without_consent_or_without_a_card(till: Till) -> None:
    stranger, agreed = till.customer(), till.customer()
    await till.agree(agreed)
    for customer in (stranger, agreed):
        assert await till.payments.shortage(customer, Mils(10_000)) is None
    assert charges(till) == []


@pytest.mark.parametrize("fault", ["500_after", "500_before", "409", "429", "timeout"])
async def test_a_charge_whose_answer_is_lost_is_made_once(till: Till, fault: Any) -> None:
    customer = await ready_to_charge(till)
    till.fake.faults.fail(fault, "POST /v1/payment_intents")
    await till.payments.shortage(customer, Mils(60_000))
    assert [each["status"] for each in charges(till)] == ["succeeded"]
    assert till.balance(customer) == 150_000


async def test_a_charge_that_stripe_never_answered_is_found_by_the_sweep(till: Till) -> None:
    customer = await ready_to_charge(till)
    till.fake.faults.fail("timeout", "POST /v1/payment_intents")
    till.fake.faults.fail("429", "POST /v1/payment_intents", times=3)
    begun = await till.payments.shortage(customer, Mils(60_000))
    assert begun is not None
    assert begun.state == "charging"
    assert await till.payments.shortage(customer, Mils(60_000)) is None  # one is in flight
    till.clock.advance(601)
    await sweeps.sweep_objects(till.payments)
    assert till.balance(customer) == 150_000
    assert len(charges(till)) == 1


async def test_a_shortage_in_the_commit_that_credits_a_charge_begins_no_other(till: Till) -> None:
    customer = await ready_to_charge(till)
    begun = till.ledger.apply(StartAutoTopup(mint_topup_id(), customer, Mils(60_000)))
    assert isinstance(begun, TopupOpened)
    topup = begun.topup
    credit = Credit(customer, Mils(topup.amount_cents * 100), "stripe:pi_charged", "evt_charged", "Automatic top-up")
    paid = ApplyPayment(topup.topup_id, topup.revision, "paid", "", payment_intent="pi_charged", effects=(credit,))
    again = StartAutoTopup(mint_topup_id(), customer, Mils(60_000))
    applied, held = till.ledger.writer.submit((paid, again)).result(timeout=30)
    assert isinstance(applied, PaymentApplied)
    assert held == AutoTopupHeld("the balance is enough")


async def test_a_decline_that_made_no_payment_is_a_decline_too(till: Till, monkeypatch: pytest.MonkeyPatch) -> None:
    customer = await ready_to_charge(till)

    async def declined(**_: Any) -> str:
        raise CardDeclined("card_declined", "", "")

    monkeypatch.setattr(till.payments.gateway, "charge", declined)
    begun = await till.payments.shortage(customer, Mils(60_000))
    terms = till.payments.reader.auto_topup(customer)
    assert begun is not None
    assert terms is not None
    assert (begun.state, terms.declines) == ("failed", 1)


async def test_declines_back_off_and_the_third_switches_it_off(till: Till) -> None:
    customer = await ready_to_charge(till, DECLINED_LATER)
    await till.payments.shortage(customer, Mils(60_000))
    for declined, wait_s in ((1, 3_600), (2, 86_400)):
        till.clock.advance(wait_s - 1)
        await till.payments.shortage(customer, Mils(60_000))
        assert len(charges(till)) == declined
        till.clock.advance(1)
        await till.payments.shortage(customer, Mils(60_000))
        assert len(charges(till)) == declined + 1
    till.clock.advance(10 * DAY_S)
    assert await till.payments.shortage(customer, Mils(60_000)) is None
    terms = till.payments.reader.auto_topup(customer)
    assert terms is not None
    assert (terms.enabled, terms.problem) == (False, "off after 3 declines: generic_decline")
    await till.agree(customer)  # its owner agrees again
    assert await till.payments.shortage(customer, Mils(60_000)) is not None


async def test_the_caps_of_a_day_and_a_month_hold(till: Till) -> None:
    customer = await ready_to_charge(till, amount_cents=1_000, daily_cap_cents=2_000, monthly_cap_cents=3_000)
    for needed, expected in ((60_000, 1), (160_000, 2), (260_000, 2)):
        await till.payments.shortage(customer, Mils(needed))
        assert len(charges(till)) == expected
    till.clock.advance(DAY_S)
    await till.payments.shortage(customer, Mils(260_000))
    till.clock.advance(DAY_S)
    await till.payments.shortage(customer, Mils(360_000))
    assert len(charges(till)) == 3
    assert await till.payments.shortage(customer, Mils(MAX_TOPUP_CENTS * 200)) is None


@pytest.mark.parametrize("what", ["dispute", "warning", "detached", "deleted"])
async def test_suspicion_and_a_card_that_is_gone_switch_it_off_for_good(till: Till, what: str) -> None:
    customer = await ready_to_charge(till)
    known = till.payments.reader.customer(customer)
    assert known is not None
    payment = next(till.fake.state.all("payment_intent"))
    match what:
        case "dispute":
            till.fake.state.open_dispute(payment["id"])
        case "warning":
            till.fake.state.warn_of_fraud(payment["latest_charge"])
        case "detached":
            till.fake.state.emit(
                "payment_method.detached",
                {"id": "pm_1", "object": "payment_method", "customer": known.provider_customer},
            )
        case "deleted":
            till.fake.state.delete_customer(known.provider_customer)
    await till.receive(*till.fake.state.events)
    await till.payments.drain()
    terms = till.payments.reader.auto_topup(customer)
    assert terms is not None
    assert (terms.enabled, terms.problem != "") == (False, True)
    assert await till.payments.shortage(customer, Mils(60_000)) is None


async def test_a_card_that_saves_itself_without_consent_is_not_kept(till: Till) -> None:
    customer = till.customer()
    await till.paid(customer, card=SUSPICIOUS)
    await sweeps.sweep_events(till.payments)
    known = till.payments.reader.customer(customer)
    assert known is not None
    assert known.payment_method == ""


async def test_the_books_agree_by_day_and_customer_and_the_report_is_signed(till: Till) -> None:
    customers = [till.customer() for _ in range(3)]
    topups = [await till.topped_up(customer, 1_000 * (index + 1)) for index, customer in enumerate(customers)]
    till.fake.state.create_refund({"payment_intent": till.intent_of(topups[0]), "amount": 400})
    till.fake.state.withdraw_dispute(till.fake.state.open_dispute(till.intent_of(topups[1]))["id"])
    await sweeps.sweep_events(till.payments)
    day = int(START // DAY_S)
    report = await sweeps.reconcile(till.payments, day, SECRET)
    body = json.loads(report.body)
    assert report.difference_cents == 0
    assert {owner: row["stripe_cents"] for owner, row in body["customers"].items()} == {
        customers[0]: 600,
        customers[1]: 0,
        customers[2]: 3_000,
    }
    assert report.signature == hmac.new(SECRET, report.body.encode(), hashlib.sha256).hexdigest()
    filed = till.payments.reader.report(day)
    assert filed is not None
    assert (filed.signature, filed.difference_cents) == (report.signature, 0)


async def test_money_that_we_do_not_know_of_is_a_difference(till: Till) -> None:
    customer = till.customer()
    topup = await till.topped_up(customer)
    till.fake.state.create_refund({"payment_intent": till.intent_of(topup), "amount": 700})  # nobody looked
    report = await sweeps.reconcile(till.payments, int(START // DAY_S), SECRET)
    assert json.loads(report.body)["customers"][customer] == {
        "stripe_cents": 1_800,
        "ours_cents": 2_500,
        "difference_cents": -700,
    }
    assert report.difference_cents == 700


async def test_a_payment_that_was_never_heard_of_is_found_by_the_books(till: Till) -> None:
    customer = till.customer()
    await till.paid(customer)
    report = await sweeps.reconcile(till.payments, int(START // DAY_S), SECRET)
    assert (till.balance(customer), report.difference_cents) == (250_000, 0)


async def test_a_payment_that_cannot_be_looked_at_does_not_keep_the_others_from_the_books(
    till: Till, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = [(till.customer(), cents) for cents in (500, 600, 700)]
    topups = [await till.paid(*each) for each in (first, second, third)]
    look = till.payments.look

    async def refused(topup_id: str, **more: Any) -> Topup:
        if topup_id == topups[1].topup_id:
            raise StripeRefused("resource_missing", "no such payment")
        return await look(topup_id, **more)

    monkeypatch.setattr(till.payments, "look", refused)
    report = await sweeps.reconcile(till.payments, int(START // DAY_S), SECRET)
    intent = till.fake.state.get("checkout.session", topups[1].session_id)["payment_intent"]
    assert json.loads(report.body)["unseen_payments"] == [intent]
    assert report.difference_cents == 600
    assert [till.balance(customer) for customer, _ in (first, second, third)] == [50_000, 0, 70_000]


async def test_an_event_that_is_none_does_not_keep_a_sweep_from_the_others(till: Till) -> None:
    before, after = till.customer(), till.customer()
    await till.paid(before)
    till.fake.state.events[-1]["data"] = {"object": None}
    await till.paid(after)
    await sweeps.sweep_events(till.payments)
    assert (till.balance(before), till.balance(after)) == (250_000, 250_000)


async def test_a_page_whose_making_was_never_answered_is_found_or_given_up(till: Till) -> None:
    lost, never = till.customer(), till.customer()
    for customer, first in ((lost, "timeout"), (never, "429")):
        till.fake.faults.fail(first, "POST /v1/checkout/sessions")  # type: ignore[arg-type]
        till.fake.faults.fail("429", "POST /v1/checkout/sessions", times=3)
        with pytest.raises(StripeUnavailable):
            await till.payments.topup(customer, 500, BASE_URL)
    till.clock.advance(3_700)
    till.fake.state.tick()
    await sweeps.sweep_objects(till.payments)
    states = {each.customer_id: each.state for each in till.payments.reader.topups_since(0.0, 10)}
    assert states == {lost: "expired", never: "expired"}


async def test_the_database_keeps_one_charge_in_flight_and_each_payment_to_one_topup(till: Till) -> None:
    customer = till.customer()
    row = (
        "INSERT INTO topup VALUES ('{id}', '{customer}', 'auto', 500, '', '{state}', 0, '', '{intent}', '', '', 0.0, 0,"
        " '', '', 0.0, 0.0)"
    )

    def insert(**values: str) -> None:
        with till.ledger.database.begin() as connection:
            connection.exec_driver_sql(row.format(customer=customer, **values))

    insert(id="top_1", state="charging", intent="")
    with pytest.raises(IntegrityError):
        insert(id="top_2", state="charging", intent="")
    insert(id="top_3", state="paid", intent="pi_1")
    with pytest.raises(IntegrityError):
        insert(id="top_4", state="paid", intent="pi_1")


def test_secrets_are_in_no_repr() -> None:
    shown = repr(PaymentsConfig("sk_live_hidden", ("whsec_hidden",)))
    assert "hidden" not in shown


LOST: Moment = "when what it waits for is there"
"""An answer that is lost. Each HTTP request waits several times, so every second wait is enough."""


async def test_leaving_at_any_wait_opens_one_page_and_credits_it_once(till: Till) -> None:
    for at_wait in itertools.count(1, 2):
        customer, pages = till.customer(), len(list(till.fake.state.all("checkout.session")))
        went_on = await left_at(till.payments.topup(customer, 2_500, BASE_URL, "key"), at_wait, LOST)
        topup = await till.payments.topup(customer, 2_500, BASE_URL, "key")
        assert len(list(till.fake.state.all("checkout.session"))) == pages + 1
        till.fake.state.pay_session(topup.session_id, GOOD)
        went_on |= await left_at(till.payments.look(topup.topup_id), at_wait, LOST)
        assert (await till.payments.look(topup.topup_id)).state == "paid"
        assert till.balance(customer) == 250_000
        if not went_on:
            break
    assert at_wait > 5


async def test_a_charge_that_is_left_at_any_wait_is_made_once(till: Till) -> None:
    for at_wait in itertools.count(1, 2):
        customer, before = await ready_to_charge(till), len(charges(till))
        went_on = await left_at(till.payments.shortage(customer, Mils(60_000)), at_wait, LOST)
        await till.payments.shortage(customer, Mils(60_000))
        till.clock.advance(601)
        await sweeps.sweep_objects(till.payments)
        assert len(charges(till)) == before + 1
        assert till.balance(customer) == 150_000
        if not went_on:
            break
    assert at_wait > 5
