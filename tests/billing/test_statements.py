"""A customer's months: every entry is in exactly one, and each adds up."""

import pytest

from billing.commands import Credit, Grant, Reverse
from billing.errors import UnknownWallet
from billing.keys import initial_grant_id, mint_grant_id
from billing.money import Mils
from billing.reader import SHOWN_AS
from billing.statements import Month, Statement, StatementReader
from tests.billing.conftest import Desk

NOON = 1_800_000_000.0
"""Of 15 January 2027, about."""
JANUARY, FEBRUARY, MARCH = Month(2027, 1), Month(2027, 2), Month(2027, 3)


def adds_up(each: Statement) -> bool:
    spent = each.debits_mils + each.refunds_mils
    moved = each.credits_mils + spent + each.reversals_mils + each.transfers_mils
    return each.opening_mils + moved == each.closing_mils


def test_every_kind_of_entry_is_in_one_of_a_statements_sums():
    """A kind that is new must be told from the others, or months would not add up."""
    told = {"credit", "reinstatement", "debit", "refund", "fee", "reversal", "repayment"}
    assert set(SHOWN_AS) == told | {"transfer_in", "transfer_out"}


class TestStatements:
    def test_months_tile_and_each_adds_up(self, desk: Desk):
        desk.clock.now = NOON
        account = desk.account(1000)
        desk.ran(account, 10)
        desk.clock.now = FEBRUARY.starts_at - 0.001
        late = desk.reserved(account, 10)
        desk.clock.now = FEBRUARY.starts_at
        desk.settle(late, 4, "why")
        desk.do(Grant(account.customer_id, Mils(500), mint_grant_id(), ""))
        months = StatementReader(desk.engine).statements(account.customer_id, MARCH, 12)
        assert [each.month for each in months] == [MARCH, FEBRUARY, JANUARY]
        assert [(each.from_seq, each.to_seq, each.num_entries) for each in months] == [(5, 5, 0), (3, 5, 2), (0, 3, 3)]
        march, february, january = months
        assert (january.opening_mils, january.credits_mils, january.debits_mils, january.closing_mils) == (
            0,
            1000,
            -100,
            900,
        )
        assert (february.opening_mils, february.credits_mils, february.refunds_mils, february.closing_mils) == (
            900,
            500,
            30,
            1430,
        )
        assert march.opening_mils == march.closing_mils == desk.balance(account)
        for each in months:
            assert adds_up(each)

    def test_a_clock_that_steps_back_over_the_end_of_a_month_puts_no_entry_into_two(self, desk: Desk):
        desk.clock.now = FEBRUARY.starts_at
        account = desk.account(1000)
        desk.ran(account)
        desk.clock.advance(-5)
        desk.ran(account)
        (february,) = StatementReader(desk.engine).statements(account.customer_id, FEBRUARY, 2)
        assert (february.month, february.from_seq, february.to_seq) == (FEBRUARY, 0, 3)

    def test_what_was_paid_and_taken_back_is_told_from_what_was_spent(self, desk: Desk):
        desk.clock.now = NOON
        account = desk.account(100)
        desk.do(Credit(account.customer_id, Mils(1000), "stripe:cs_1", "evt_1", "Top-up"))
        desk.ran(account, 10)
        desk.do(Reverse("stripe:cs_1", Mils(400), "evt_2", "Refunded"))
        (month,) = StatementReader(desk.engine).statements(account.customer_id, JANUARY, 1)
        assert (month.credits_mils, month.debits_mils, month.reversals_mils) == (1100, -50, -400)
        assert month.closing_mils == desk.balance(account) == 650
        assert adds_up(month)
        kinds = [each.kind for each in StatementReader(desk.engine).entries(account.customer_id, 0, 9, 9)]
        assert kinds == ["credit", "credit", "debit", "debit"]

    def test_the_limit_and_the_newest_month_are_kept_to(self, desk: Desk):
        desk.clock.now = NOON
        account = desk.account(1000)
        reader = StatementReader(desk.engine)
        assert [each.month for each in reader.statements(account.customer_id, MARCH, 2)] == [MARCH, FEBRUARY]
        assert [each.month for each in reader.statements(account.customer_id, JANUARY, 5)] == [JANUARY]
        assert reader.statements(account.customer_id, Month(2026, 12), 5) == []

    def test_its_entries_are_those_of_its_range_oldest_first(self, desk: Desk):
        account = desk.account(1000)
        ids = [desk.ran(account) for _ in range(3)]
        reader = StatementReader(desk.engine)
        credit = initial_grant_id(account.key.key_id)
        assert [each.public_id for each in reader.entries(account.customer_id, 0, 4, 10)] == [credit, *ids]
        assert [each.seq for each in reader.entries(account.customer_id, 1, 3, 10)] == [2, 3]
        assert [each.seq for each in reader.entries(account.customer_id, 1, 4, 1)] == [2]

    def test_an_unknown_customer_is_an_error(self, desk: Desk):
        with pytest.raises(UnknownWallet):
            StatementReader(desk.engine).statements("cus_never", JANUARY, 1)  # type: ignore[arg-type]

    @pytest.mark.parametrize("month", [Month(2026, 12), Month(2027, 1)])
    def test_a_month_ends_where_the_next_begins(self, month: Month):
        assert month.following.previous == month
        assert Month.of(month.following.starts_at) == month.following
        assert Month.of(month.following.starts_at - 0.001) == month
