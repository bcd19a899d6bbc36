"""The commands of payments on both databases: what they answer, again and again, and what the reader then sees."""

import pytest
from sqlalchemy import Engine

from billing.commands import CloseStatement, Credit, Rejected, Reverse, SetCreditLine
from billing.invariants import audit
from billing.money import Mils
from billing.payments.commands import (
    ApplyInvoice,
    ApplyPayment,
    AutoTopup,
    AutoTopupHeld,
    DisarmAutoTopup,
    EventHint,
    EventsReceived,
    FileReport,
    InvoiceOpened,
    LinkCustomer,
    MarkEvents,
    Movement,
    NoteSession,
    OpenInvoice,
    OpenTopup,
    PaymentApplied,
    PaymentStale,
    ReceiveEvents,
    SetAutoTopup,
    SetCursor,
    StartAutoTopup,
    TooManyTopups,
    TopupConflict,
    TopupOpened,
)
from billing.payments.reader import PaymentsReader
from tests.billing.conftest import Clock, Desk


@pytest.fixture
def desk(engine: Engine, clock: Clock) -> Desk:
    return Desk(engine, clock)


def paid(desk: Desk, topup_id: str, customer: object, revision: int, reversed_mils: int = 0) -> ApplyPayment:
    source = f"stripe:pi_{topup_id}"
    return ApplyPayment(
        topup_id,
        revision,
        "paid",
        "",
        payment_intent=f"pi_{topup_id}",
        payment_method="pm_1",
        event_ids=("evt_1",),
        movements=(Movement(f"txn_{topup_id}", desk.clock.now, "charge", 2_500),),
        effects=(
            Credit(customer, Mils(250_000), source, f"evt_{topup_id}", "top-up"),  # type: ignore[arg-type]
            Reverse(source, Mils(reversed_mils), "evt_2", "reversal"),
        ),
    )


def test_a_payment_is_applied_once_with_its_marks_and_a_stale_one_not_at_all(desk: Desk) -> None:
    reader = PaymentsReader(desk.engine)
    customer = desk.account().customer_id
    hint = EventHint("evt_1", "payment_intent.succeeded", 1.0, "pi_1", payment_intent="pi_top_1")
    assert desk.do(ReceiveEvents((hint, hint), "webhook")) == EventsReceived(1)
    assert desk.do(ReceiveEvents((hint,), "sweep")) == EventsReceived(0)
    assert [each.hint for each in reader.pending_events(desk.clock.now, 10)] == [hint]
    opened = desk.do(OpenTopup("top_1", customer, 2_500))
    assert isinstance(opened, TopupOpened)
    desk.do(NoteSession("top_1", "cs_1", "https://pay", desk.clock.now + 3_600))
    desk.do(LinkCustomer(customer, "cus_stripe"))
    assert desk.do(paid(desk, "top_1", customer, revision=7)) == PaymentStale(0)
    assert desk.reader.balance(customer) == 0
    for command in (paid(desk, "top_1", customer, 0), paid(desk, "top_1", customer, 1, reversed_mils=50_000)):
        assert isinstance(desk.do(command), PaymentApplied)
    assert desk.reader.balance(customer) == 200_000
    assert reader.event_states(["evt_1"]) == {"evt_1": "applied"}
    assert (reader.inbox().pending, reader.inbox().unmatched) == (0, 0)
    assert len(reader.movements(0.0, desk.clock.now + 1)) == 1
    [mismatch] = reader.ledger_mismatches()  # the reversal came without its movement
    assert mismatch["difference_cents"] == 500
    assert reader.held_of_payments() == {customer: 200_000}
    found = reader.topup_by_payment("pi_top_1", "")
    assert found is not None
    assert (found.state, found.session_id, reader.owners_of_payments(["pi_top_1"])) == (
        "paid",
        "cs_1",
        {"pi_top_1": customer},
    )
    assert audit(desk.engine) == []


def test_money_that_the_ledger_refuses_takes_its_marks_with_it_and_spares_its_neighbours(desk: Desk) -> None:
    reader = PaymentsReader(desk.engine)
    customer, other = desk.account().customer_id, desk.account().customer_id
    desk.do(OpenTopup("top_1", customer, 2_500))
    desk.do(Credit(other, Mils(7), "stripe:pi_top_1", "evt_other", "a mistake"))
    refused, cursor = desk.ledger.apply([paid(desk, "top_1", customer, 0), SetCursor("events", 5.0)])
    assert isinstance(refused, Rejected)
    assert (reader.cursor("events"), desk.reader.balance(customer)) == (5.0, 0)
    found = reader.topup("top_1")
    assert found is not None
    assert (found.state, found.revision) == ("new", 0)
    assert cursor is not None


def test_pages_are_reused_named_and_capped(desk: Desk) -> None:
    customer = desk.account().customer_id
    first = desk.do(OpenTopup("top_0", customer, 500))
    assert desk.do(OpenTopup("top_x", customer, 500)) == first
    named = desk.do(OpenTopup("top_1", customer, 500, "key"))
    assert isinstance(named, TopupOpened)
    assert named != first
    assert desk.do(OpenTopup("top_y", customer, 500, "key")) == named
    assert desk.do(OpenTopup("top_y", customer, 600, "key")) == TopupConflict("top_1", 500)
    for number in range(2, 5):
        assert isinstance(desk.do(OpenTopup(f"top_{number}", customer, 500 + number)), TopupOpened)
    assert isinstance(desk.do(OpenTopup("top_5", customer, 900)), TooManyTopups)
    assert isinstance(desk.do(OpenTopup("top_6", customer, 499)), Rejected)


def test_an_automatic_charge_is_one_at_a_time(desk: Desk) -> None:
    reader = PaymentsReader(desk.engine)
    customer = desk.account().customer_id
    terms = AutoTopup(True, Mils(10_000), 1_000, 5_000, 5_000, "yes")
    assert isinstance(desk.do(SetAutoTopup(customer, AutoTopup(True, Mils(0), 1_000, 5_000, 5_000))), Rejected)
    desk.do(SetAutoTopup(customer, terms))
    assert isinstance(desk.do(StartAutoTopup("top_1", customer, Mils(0))), AutoTopupHeld)  # no card
    desk.do(LinkCustomer(customer, "cus_stripe"))
    desk.do(OpenTopup("top_0", customer, 2_500))
    desk.do(paid(desk, "top_0", customer, 0, reversed_mils=250_000))
    assert reader.below_threshold(desk.clock.now, 10) == [customer]
    started = desk.do(StartAutoTopup("top_1", customer, Mils(0)))
    assert isinstance(started, TopupOpened)
    assert desk.do(StartAutoTopup("top_1", customer, Mils(0))) == started
    assert isinstance(desk.do(StartAutoTopup("top_2", customer, Mils(0))), AutoTopupHeld)
    assert reader.below_threshold(desk.clock.now, 10) == []
    assert [each.topup_id for each in reader.unfinished(desk.clock.now, 10)] == ["top_1"]
    desk.do(DisarmAutoTopup(customer, "gone", forget_method=True))
    known = reader.customer(customer)
    assert known is not None
    assert known.payment_method == ""


def test_invoices_events_and_reports_are_kept(desk: Desk) -> None:
    reader = PaymentsReader(desk.engine)
    account = desk.account()
    desk.do(SetCreditLine(account.customer_id, Mils(100_000)))
    desk.settle(desk.reserved(account, 49), 49)
    assert isinstance(desk.do(OpenInvoice(account.customer_id, "2027-01")), Rejected)
    desk.do(CloseStatement(account.customer_id, "2027-01"))
    opened = desk.do(OpenInvoice(account.customer_id, "2027-01"))
    assert isinstance(opened, InvoiceOpened)
    assert opened.invoice is not None
    assert (opened.invoice.amount_cents, opened.invoice.carry_mils) == (2, 45)
    assert [each.mils for each in reader.usage_by_rate(account.customer_id, "2027-01")] == [245]
    overdue = SetCreditLine(account.customer_id, Mils(100_000), overdue=True)
    apply = ApplyInvoice(account.customer_id, "2027-01", 0, "overdue", "in_1", effects=(overdue,))
    assert isinstance(desk.do(apply), InvoiceOpened)
    assert isinstance(desk.do(apply), PaymentStale)
    assert reader.postpaid() == [(account.customer_id, 100_000, 0)]
    assert [each.invoice_id for each in reader.unpaid_invoices(desk.clock.now)] == ["in_1"]
    desk.do(ReceiveEvents((EventHint("evt_9", "charge.succeeded", 1.0, "ch_1"),), "sweep"))
    desk.do(MarkEvents(("evt_9",), "pending", "later", desk.clock.now + 60))
    assert reader.pending_events(desk.clock.now, 10) == []
    for difference in (5, 0):
        desk.do(FileReport(20_000, "{}", "signature", difference))
    report = reader.report(20_000)
    assert report is not None
    assert report.difference_cents == 0
    assert audit(desk.engine) == []
