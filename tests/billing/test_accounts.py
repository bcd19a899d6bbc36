"""Who pays later: credit lines, and months that are closed."""

from dataclasses import replace
from typing import Any

import pytest

from billing.commands import (
    CloseStatement,
    Credit,
    CreditLineSet,
    InsufficientCredits,
    Rejected,
    Reserved,
    Reverse,
    SetCreditLine,
    StatementClosed,
    UnknownCustomer,
)
from billing.money import Mils
from tests.billing.conftest import Account, Desk

MONTH_S = 31 * 86_400
JANUARY = "2027-01"


def line(account: Account, limit: int, overdue: bool = False) -> SetCreditLine:
    return SetCreditLine(account.customer_id, Mils(limit), overdue)


def close(desk: Desk, account: Account, period: str = JANUARY) -> StatementClosed:
    closed = desk.do(CloseStatement(account.customer_id, period))
    assert isinstance(closed, StatementClosed), closed
    return closed


class TestCreditLines:
    def test_the_balance_goes_to_the_floor_and_not_below(self, desk: Desk):
        account = desk.account(100)
        answer = CreditLineSet(account.customer_id, Mils(400), Mils(-400))
        assert [desk.do(line(account, 400)), desk.do(line(account, 400))] == [answer, answer]
        desk.reserved(account, 100)
        assert desk.balance(account) == -400
        assert desk.do(desk.reserve(account, 1)) == InsufficientCredits(Mils(-400), Mils(5))
        desk.ledger = desk.new_ledger()
        assert desk.do(desk.reserve(account, 1)) == InsufficientCredits(Mils(-400), Mils(5))

    def test_a_line_and_what_is_spent_on_it_may_come_in_one_batch(self, desk: Desk):
        account = desk.account()
        answers = desk.ledger.apply([line(account, 245), desk.reserve(account, 49), line(account, 245, overdue=True)])
        assert isinstance(answers[1], Reserved)
        assert answers[2] == CreditLineSet(account.customer_id, Mils(245), Mils(0))
        assert desk.balance(account) == -245

    def test_overdue_ends_spending_until_it_is_paid_or_lifted(self, desk: Desk):
        account = desk.account()
        desk.do(line(account, 500))
        open_work = desk.reserved(account, 20)
        assert desk.do(line(account, 500, overdue=True)) == CreditLineSet(account.customer_id, Mils(500), Mils(0))
        assert desk.do(desk.reserve(account, 1)) == InsufficientCredits(Mils(-100), Mils(5))
        desk.settle(open_work, 10)
        assert desk.balance(account) == -50
        desk.do(Credit(account.customer_id, Mils(55), "stripe:in_1", "evt_1", "Invoice paid"))
        assert isinstance(desk.do(desk.reserve(account, 1)), Reserved)
        assert isinstance(desk.do(desk.reserve(account, 1)), InsufficientCredits)
        desk.do(line(account, 500))
        assert isinstance(desk.do(desk.reserve(account, 100)), Reserved)

    def test_a_line_is_not_drawn_above_what_is_owed(self, desk: Desk):
        account = desk.account()
        desk.do(line(account, 500))
        desk.reserved(account, 50)
        assert isinstance(desk.do(line(account, 249)), Rejected)
        assert desk.do(line(account, 250)) == CreditLineSet(account.customer_id, Mils(250), Mils(-250))

    def test_a_reversal_takes_down_to_the_floor_and_the_rest_is_owed(self, desk: Desk):
        account = desk.account()
        desk.do(line(account, 100))
        desk.do(Credit(account.customer_id, Mils(300), "stripe:1", "evt_1", ""))
        desk.settle(desk.reserved(account, 60), 60)
        desk.do(Reverse("stripe:1", Mils(300), "evt_2", ""))
        customer = desk.reader.customer(account.customer_id)
        assert customer is not None
        assert (customer.balance_mils, customer.debt_mils, customer.floor_mils) == (-100, 200, -100)
        desk.do(line(account, 250))  # a longer line carries more of the debt
        customer = desk.reader.customer(account.customer_id)
        assert customer is not None
        assert (customer.balance_mils, customer.debt_mils) == (-250, 50)

    def test_a_line_for_nobody_is_refused(self, desk: Desk):
        assert desk.do(SetCreditLine("cus_x", Mils(5))) == UnknownCustomer("cus_x")

    @pytest.mark.parametrize("change", [{"limit_mils": -1}, {"limit_mils": 1.5}, {"overdue": 1}])
    def test_a_malformed_line_is_rejected(self, desk: Desk, change: dict[str, Any]):
        assert isinstance(desk.do(replace(line(desk.account(), 5), **change)), Rejected)


class TestStatements:
    def test_months_tile_and_add_up(self, desk: Desk):
        account = desk.account(1000)
        desk.settle(desk.reserved(account, 49), 40)
        first = close(desk, account)
        assert (first.number, first.from_seq, first.to_seq) == (1, 0, 3)
        assert (first.opening_mils, first.usage_mils, first.payments_mils) == (0, -200, 1000)
        assert (first.transfers_mils, first.closing_mils) == (0, 800)
        desk.clock.advance(MONTH_S)
        desk.do(Credit(account.customer_id, Mils(300), "stripe:1", "evt_1", ""))
        desk.do(Reverse("stripe:1", Mils(100), "evt_2", ""))
        desk.settle(desk.reserved(account, 10), 10)
        desk.ledger = desk.new_ledger()
        second = close(desk, account, "2027-02")
        assert (second.number, second.from_seq, second.to_seq) == (2, 3, 6)
        assert (second.opening_mils, second.usage_mils, second.payments_mils) == (800, -50, 200)
        assert second.closing_mils == desk.balance(account) == 950

    def test_a_month_is_closed_once(self, desk: Desk):
        account = desk.account(1000)
        first = close(desk, account)
        desk.reserved(account, 1)
        assert close(desk, account) == first
        desk.ledger = desk.new_ledger()
        assert desk.ledger.apply([CloseStatement(account.customer_id, JANUARY)] * 2) == [first, first]

    def test_a_month_without_entries_is_a_statement_too(self, desk: Desk):
        account = desk.account(1000)
        close(desk, account)
        desk.clock.advance(2 * MONTH_S)
        empty = [close(desk, account, period) for period in ("2027-02", "2027-03")]
        assert [(each.from_seq, each.to_seq, each.closing_mils) for each in empty] == [(1, 1, 1000), (1, 1, 1000)]

    def test_what_one_batch_did_is_in_the_statement_that_it_closes(self, desk: Desk):
        account = desk.account(1000)
        desk.clock.advance(MONTH_S)
        answers = desk.ledger.apply(
            [
                desk.reserve(account, 10),
                CloseStatement(account.customer_id, JANUARY),
                desk.reserve(account, 20),
                CloseStatement(account.customer_id, "2027-02"),
            ]
        )
        first, second = answers[1], answers[3]
        assert isinstance(first, StatementClosed)
        assert isinstance(second, StatementClosed)
        assert (first.usage_mils, first.payments_mils, first.closing_mils) == (-50, 1000, 950)
        assert (second.usage_mils, second.from_seq, second.closing_mils) == (-100, first.to_seq, 850)

    @pytest.mark.parametrize("period", ["2026-12", "2027-02", "2027-1", "2027-13", "january", 202701])
    def test_months_are_closed_in_their_order_and_not_before_they_begin(self, desk: Desk, period: Any):
        account = desk.account(1000)
        close(desk, account)
        assert isinstance(desk.do(CloseStatement(account.customer_id, period)), Rejected)

    def test_a_statement_of_nobody_is_refused(self, desk: Desk):
        assert desk.do(CloseStatement("cus_x", JANUARY)) == UnknownCustomer("cus_x")
