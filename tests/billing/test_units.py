"""Provisioned units: charged once a month, paying for frames up to their allotment, each frame once."""

from dataclasses import replace

import pytest
from sqlalchemy import Engine

from billing.commands import (
    ChargeUnits,
    CloseStatement,
    Credit,
    ExpireLeases,
    Grant,
    InsufficientCredits,
    Outcome,
    Rejected,
    Repeated,
    Reserve,
    Reserved,
    Reverse,
    SetCreditLine,
    Settle,
    Settled,
    SetUnits,
    StatementClosed,
    UnitsCharged,
    UnitsSet,
    UnknownCustomer,
)
from billing.keys import unit_charge_id
from billing.money import Mils
from billing.statements import Month, StatementReader
from billing.units import UnitsReader
from tests.billing.conftest import Account, Clock, Desk

JANUARY, FEBRUARY = "2027-01", "2027-02"
TO_FEBRUARY_S = 18 * 86_400.0


def units(account: Account, units: int = 2, version: int = 1, since: str = JANUARY, model: str = "m") -> SetUnits:
    """100 mils and 60 frames each."""
    return SetUnits(account.customer_id, model, version, since, units, Mils(100), 60, 4)


def work(desk: Desk, account: Account, frames: int = 49, model: str = "m") -> Reserve:
    return replace(desk.reserve(account, frames), model=model)


def amount(outcome: Outcome) -> int:
    assert isinstance(outcome, Reserved), outcome
    return outcome.amount_mils


def charge_of(account: Account, period: str = JANUARY) -> str:
    return unit_charge_id(account.customer_id, "m", period)


@pytest.fixture
def lab(desk: Desk) -> Account:
    """Has 800 mils, and 120 frames of m paid for."""
    account = desk.account(1000)
    assert desk.do(units(account)) == UnitsSet(account.customer_id, "m", 1)
    assert desk.do(ChargeUnits()) == UnitsCharged((charge_of(account),), ())
    return account


class TestTheCharge:
    def test_a_month_is_charged_once_whoever_asks_however_often(self, desk: Desk, lab: Account):
        assert desk.ledger.apply([ChargeUnits(), ChargeUnits()]) == [UnitsCharged((), ())] * 2
        desk.ledger = desk.new_ledger()
        assert desk.do(ChargeUnits()) == UnitsCharged((), ())
        assert desk.rows(lab)[1:] == [("debit", -200, charge_of(lab))]

    def test_the_next_month_is_charged_when_it_begins(self, desk: Desk, lab: Account):
        desk.clock.advance(TO_FEBRUARY_S)
        assert desk.do(ChargeUnits()) == UnitsCharged((charge_of(lab, FEBRUARY),), ())
        assert desk.balance(lab) == 600

    def test_a_month_in_which_nothing_ran_is_not_charged_later(self, desk: Desk, lab: Account):
        desk.clock.advance(TO_FEBRUARY_S + 35 * 86_400.0)
        assert desk.do(ChargeUnits()) == UnitsCharged((charge_of(lab, "2027-03"),), ())

    def test_without_credit_units_wait_and_pay_for_nothing(self, desk: Desk):
        poor = desk.account(199)
        desk.do(units(poor))
        assert desk.do(ChargeUnits()) == UnitsCharged((), (poor.customer_id,))
        assert amount(desk.do(work(desk, poor, 2))) == 10
        desk.do(Grant(poor.customer_id, Mils(11), "adm_1", ""))
        assert desk.do(ChargeUnits()) == UnitsCharged((charge_of(poor),), ())
        assert amount(desk.do(work(desk, poor))) == 0

    def test_who_pays_later_is_charged_down_to_its_limit(self, desk: Desk):
        postpaid = desk.account()
        desk.do(SetCreditLine(postpaid.customer_id, Mils(200)))
        desk.do(units(postpaid))
        assert desk.do(ChargeUnits()) == UnitsCharged((charge_of(postpaid),), ())
        assert desk.balance(postpaid) == -200

    def test_a_statement_counts_it_as_use(self, desk: Desk, lab: Account):
        closed = desk.do(CloseStatement(lab.customer_id, JANUARY))
        assert isinstance(closed, StatementClosed)
        assert (closed.usage_mils, closed.closing_mils) == (-200, 800)
        [month] = StatementReader(desk.engine).statements(lab.customer_id, Month(2027, 1), 1)
        assert (month.debits_mils, month.closing_mils) == (-200, 800)

    @pytest.mark.parametrize(("more", "fewer"), [(3, 1), (1, 3)])
    def test_other_terms_begin_with_a_later_month(self, desk: Desk, lab: Account, more: int, fewer: int):
        refused = desk.do(units(lab, more, 2))
        assert isinstance(refused, Rejected)
        assert refused.reason.startswith("the units of 2027-01 are set already")
        assert desk.do(units(lab, more, 2, FEBRUARY)) == UnitsSet(lab.customer_id, "m", 2)
        assert desk.do(units(lab, more, 2, FEBRUARY)) == UnitsSet(lab.customer_id, "m", 2)
        assert isinstance(desk.do(units(lab, fewer, 2, FEBRUARY)), Rejected)
        assert desk.do(ChargeUnits()) == UnitsCharged((), ())
        desk.clock.advance(TO_FEBRUARY_S)
        desk.do(ChargeUnits())
        assert desk.rows(lab)[-1][1] == -100 * more

    def test_a_month_that_was_charged_keeps_its_terms(self, desk: Desk, lab: Account):
        desk.clock.advance(TO_FEBRUARY_S)
        desk.do(ChargeUnits())
        refused = desk.do(units(lab, 3, 2, FEBRUARY))
        assert isinstance(refused, Rejected)
        assert refused.reason.startswith("2027-02 is charged already")

    def test_of_two_models_one_is_charged_and_the_other_waits(self, desk: Desk):
        account = desk.account(450)
        desk.do(units(account))
        desk.do(units(account, 5, model="other"))
        assert desk.do(ChargeUnits()) == UnitsCharged((charge_of(account),), (account.customer_id,))
        assert desk.do(ChargeUnits()) == UnitsCharged((), (account.customer_id,))
        assert desk.balance(account) == 250

    def test_no_units_end_it(self, desk: Desk, lab: Account):
        desk.do(units(lab, 0, 2, FEBRUARY))
        desk.clock.advance(TO_FEBRUARY_S)
        assert desk.do(ChargeUnits()) == UnitsCharged((), ())
        assert amount(desk.do(work(desk, lab, 2))) == 10

    def test_terms_are_refused_for_the_past_out_of_order_or_for_nobody(self, desk: Desk, lab: Account):
        assert isinstance(desk.do(units(lab, model="other", since="2026-12")), Rejected)
        assert isinstance(desk.do(units(lab, 2, 3, FEBRUARY)), Rejected)
        assert desk.do(replace(units(lab), customer_id="cus_x")) == UnknownCustomer("cus_x")  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "wrong",
        [
            {"units": -1},
            {"units": 1.5},
            {"unit_mils": 0},
            {"unit_frames": -1},
            {"unit_frames": 0, "units_per_replica": 0},
            {"from_period": "2027-13"},
            {"units": 2**40, "unit_mils": 2**40},
            {"version": 0},
            {"model": ""},
        ],
    )
    def test_malformed_terms_are_rejected(self, desk: Desk, wrong: dict[str, object]):
        assert isinstance(desk.do(replace(units(desk.account()), **wrong)), Rejected)  # type: ignore[arg-type]


class TestWhatUnitsPayFor:
    def test_frames_cost_nothing_up_to_the_allotment_and_the_usual_after_it(self, desk: Desk, lab: Account):
        first, second, third, fourth = (work(desk, lab) for _ in range(4))
        desk.ledger = desk.new_ledger()
        assert [amount(each) for each in desk.ledger.apply([first, second, third])] == [0, 0, 27 * 5]
        assert amount(desk.do(fourth)) == 245
        assert amount(desk.do(third)) == 135
        for each in (first, second, third, fourth):
            desk.settle(each.request_id, 49)
        assert desk.balance(lab) == 800 - 135 - 245
        assert desk.rows(lab)[2] == ("debit", 0, first.request_id)

    def test_only_their_own_model_and_customer(self, desk: Desk, lab: Account):
        assert amount(desk.do(work(desk, lab, 2, model="other"))) == 10
        assert amount(desk.do(work(desk, desk.account(1000), 2))) == 10

    @pytest.mark.parametrize(
        ("delivered", "captured", "left"), [(0, 0, 22), (10, 0, 12), (22, 0, 0), (23, 5, 0), (49, 135, 0)]
    )
    def test_what_is_not_delivered_costs_nothing_and_can_be_used_again(
        self, desk: Desk, lab: Account, delivered: int, captured: int, left: int
    ):
        first = work(desk, lab, 98)
        desk.do(first)
        desk.settle(first.request_id, 98)
        partly = work(desk, lab)
        assert amount(desk.do(partly)) == 135
        desk.ledger = desk.new_ledger()
        answer = desk.settle(partly.request_id, delivered)
        assert isinstance(answer, Settled)
        assert (answer.captured_mils, answer.refunded_mils) == (captured, 135 - captured)
        assert desk.settle(partly.request_id, 49) == answer
        [now] = UnitsReader(desk.engine).now(desk.clock.now, lab.customer_id)
        assert now.frames_left == left
        assert amount(desk.do(work(desk, lab, 49))) == (49 - left) * 5

    def test_any_rate_is_exact_and_rounded_up_once(self, desk: Desk, lab: Account):
        desk.do(work(desk, lab, 110))
        odd = replace(work(desk, lab, 20), mils_per_frame=Mils(1), per_frames=3)
        assert amount(desk.do(odd)) == 4
        settled = desk.settle(odd.request_id, 14)
        assert isinstance(settled, Settled)
        assert (settled.captured_mils, settled.refunded_mils) == (2, 2)

    def test_frames_of_a_lease_that_ran_out_after_the_month_go_back_to_their_month(self, desk: Desk, lab: Account):
        desk.do(replace(work(desk, lab), lease_s=60.0))
        desk.clock.advance(TO_FEBRUARY_S)
        desk.ledger = desk.new_ledger()
        desk.do(ChargeUnits())
        desk.clock.advance(120.0)
        desk.do(ExpireLeases())
        [now] = UnitsReader(desk.engine).now(desk.clock.now, lab.customer_id)
        assert (now.period, now.frames_left) == (FEBRUARY, 120)
        assert amount(desk.do(work(desk, lab, 120))) == 0

    def test_work_that_cost_nothing_is_still_recognised_when_it_comes_again(self, desk: Desk, lab: Account):
        first = replace(work(desk, lab), idempotency_key="key", payload_sha256="a" * 64)
        desk.do(first)
        desk.settle(first.request_id, 49)
        again = replace(first, request_id=work(desk, lab).request_id)
        assert isinstance(desk.do(again), Repeated)
        desk.ledger = desk.new_ledger()
        assert desk.do(replace(again, idempotency_key="", dedupe_window_s=60.0)) == desk.do(again)

    def test_a_key_is_free_again_after_covered_work_that_delivered_nothing(self, desk: Desk, lab: Account):
        first = replace(work(desk, lab), idempotency_key="key", payload_sha256="a" * 64)
        desk.do(first)
        desk.settle(first.request_id, 0)
        assert amount(desk.do(replace(first, request_id=work(desk, lab).request_id))) == 0

    def test_whoever_owes_has_to_pay_first(self, desk: Desk):
        debtor, late = desk.account(), desk.account()
        for account in (debtor, late):
            desk.do(units(account))
        desk.do(Credit(debtor.customer_id, Mils(300), "stripe:1", "evt_1", ""))
        desk.do(SetCreditLine(late.customer_id, Mils(300)))
        desk.do(ChargeUnits())
        desk.do(Reverse("stripe:1", Mils(300), "evt_2", ""))
        desk.do(SetCreditLine(late.customer_id, Mils(300), overdue=True))
        for account in (debtor, late):
            assert isinstance(desk.do(work(desk, account, 1)), InsufficientCredits)
        desk.do(SetCreditLine(late.customer_id, Mils(300)))
        assert amount(desk.do(work(desk, late))) == 0

    def test_many_at_once_never_use_more_than_there_is(self, desk: Desk, lab: Account):
        requests = [work(desk, lab, 7) for _ in range(40)]
        answers = desk.ledger.apply([*requests, *(Settle(each.request_id, 3, "") for each in requests[:5])])
        assert sum(map(amount, answers[:40])) == (40 * 7 - 120) * 5
        [now] = UnitsReader(desk.engine).now(desk.clock.now, lab.customer_id)
        assert now.frames_left == 5 * 4


class TestReading:
    def test_what_a_customer_has_paid_and_used(self, desk: Desk, lab: Account):
        desk.do(units(lab, 1, model="other"))
        reader = UnitsReader(desk.engine)
        m, other = reader.now(desk.clock.now, lab.customer_id)
        assert (m.frames, m.frames_left, m.charged_at) == (120, 120, desk.clock.now)
        assert (other.terms.model, other.frames, other.charged_at) == ("other", 0, None)
        desk.do(work(desk, lab))
        assert reader.now(desk.clock.now, lab.customer_id)[0].frames_used == 49
        assert [each.model for each in reader.versions()] == ["m", "other"]

    def test_replicas_are_promised_by_what_is_paid(self, desk: Desk, lab: Account):
        """Two and three units of a quarter of a replica each."""
        reader = UnitsReader(desk.engine)
        assert reader.replicas(desk.clock.now) == {"m": 1}
        other = desk.account(300)
        desk.do(units(other, 3))
        assert reader.replicas(desk.clock.now) == {"m": 1}
        desk.do(ChargeUnits())
        assert reader.replicas(desk.clock.now) == {"m": 2}
        desk.clock.advance(TO_FEBRUARY_S)
        assert reader.replicas(desk.clock.now) == {}


def test_the_writer_charges_between_commits(engine: Engine, clock: Clock, desk: Desk, monkeypatch: pytest.MonkeyPatch):
    from billing import writer

    monkeypatch.setattr(writer, "SWEEP_EVERY_S", 0.0)
    account = desk.account(1000)
    running = writer.LedgerWriter(desk.ledger, on_death=lambda error: None)
    running.submit([units(account)]).result(10)
    running.submit([ExpireLeases()]).result(10)
    running.stop()
    assert desk.rows(account)[1:] == [("debit", -200, charge_of(account))]
