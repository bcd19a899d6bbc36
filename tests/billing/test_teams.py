"""Teams: money given to members, or a parent's money up to a cap, both sides in one commit."""

import math
from dataclasses import replace
from typing import Any

import pytest

from billing.commands import (
    BudgetExceeded,
    Credit,
    InsufficientCredits,
    MemberSet,
    Rejected,
    Reserved,
    Reverse,
    SetCreditLine,
    SetMember,
    Settled,
    Transfer,
    Transferred,
    UnknownCustomer,
)
from billing.money import Mils
from tests.billing.conftest import Account, Desk

DAY_S = 86_400


def member_of(desk: Desk, parent: Account, cap: int | None = None, period: Any = "month", name: str = "kid") -> Account:
    kid = desk.account(name=name)
    terms = (None, None) if cap is None else (Mils(cap), period)
    command = SetMember(kid.customer_id, name, parent.customer_id, *terms)
    assert desk.do(command) == MemberSet(kid.customer_id, parent.customer_id)
    assert desk.do(command) == MemberSet(kid.customer_id, parent.customer_id)
    return kid


def moved(source: Account, target: Account, amount: int = 300, transfer_id: str = "tra_1") -> Transfer:
    return Transfer(transfer_id, source.customer_id, target.customer_id, Mils(amount), "for the kid")


class TestAllocations:
    def test_money_moves_once_and_shows_on_both_sides(self, desk: Desk):
        parent = desk.account(1000)
        kid = member_of(desk, parent)
        answer = desk.do(moved(parent, kid))
        assert answer == Transferred("tra_1", Mils(300), Mils(700), Mils(300))
        desk.ledger = desk.new_ledger()
        assert desk.ledger.apply([moved(parent, kid), moved(parent, kid)]) == [answer, answer]
        assert desk.rows(parent)[1:] == [("debit", -300, "tra_1")]
        assert desk.rows(kid) == [("credit", 300, "tra_1")]

    def test_a_member_spends_what_it_was_given_and_no_more(self, desk: Desk):
        parent = desk.account(1000)
        kid = member_of(desk, parent)
        desk.do(moved(parent, kid))
        desk.reserved(kid, 60)
        assert desk.do(desk.reserve(kid, 1)) == InsufficientCredits(Mils(0), Mils(5))
        assert desk.balance(parent) == 700

    def test_money_goes_back_and_never_below_what_there_is(self, desk: Desk):
        parent = desk.account(1000)
        kid = member_of(desk, parent)
        desk.do(moved(parent, kid))
        assert desk.do(moved(kid, parent, 301, "tra_2")) == InsufficientCredits(Mils(300), Mils(301))
        assert desk.do(moved(kid, parent, 300, "tra_2")) == Transferred("tra_2", Mils(300), Mils(0), Mils(1000))
        assert desk.do(moved(parent, kid, 1001, "tra_3")) == InsufficientCredits(Mils(1000), Mils(1001))

    @pytest.mark.parametrize("change", [{"amount_mils": Mils(301)}, {"to_id": "cus_x"}])
    def test_one_id_moves_one_thing(self, desk: Desk, change: dict[str, Any]):
        parent = desk.account(1000)
        kid = member_of(desk, parent)
        desk.do(moved(parent, kid))
        assert isinstance(desk.do(replace(moved(parent, kid), **change)), Rejected)

    def test_only_a_parent_and_its_member_exchange_money(self, desk: Desk):
        parent, stranger = desk.account(1000), desk.account(1000)
        kid, other = member_of(desk, parent), member_of(desk, parent, name="other")
        for source, target in ((parent, stranger), (stranger, parent), (kid, other), (parent, parent)):
            assert isinstance(desk.do(moved(source, target)), Rejected)
        nobody = replace(stranger, customer_id="cus_x")
        assert desk.do(moved(parent, nobody)) == UnknownCustomer("cus_x")

    def test_what_arrives_repays_a_debt_first(self, desk: Desk):
        parent = desk.account(1000)
        kid = member_of(desk, parent)
        desk.do(Credit(kid.customer_id, Mils(100), "stripe:1", "evt_1", ""))
        desk.settle(desk.reserved(kid, 20), 20)
        desk.do(Reverse("stripe:1", Mils(100), "evt_2", ""))
        assert desk.do(moved(parent, kid)) == Transferred("tra_1", Mils(300), Mils(700), Mils(300))
        assert desk.balance(kid) == 200


class TestCaps:
    def test_a_member_spends_its_parents_money_up_to_the_cap(self, desk: Desk):
        parent = desk.account(1000)
        kid = member_of(desk, parent, cap=500)
        for _ in range(2):
            request_id = desk.reserved(kid, 49)
            assert desk.settle(request_id, 49) == Settled(request_id, Mils(245), Mils(0), Mils(0))
        refused = desk.do(desk.reserve(kid, 3))
        assert isinstance(refused, BudgetExceeded)
        assert (refused.limit_mils, refused.spent_mils, refused.period) == (500, 490, "month")
        assert refused.requested_mils == 15
        assert isinstance(desk.do(desk.reserve(kid, 2)), Reserved)
        assert (desk.balance(parent), desk.balance(kid)) == (500, 0)

    def test_a_refund_goes_back_to_the_parent_and_into_the_cap(self, desk: Desk):
        parent = desk.account(1000)
        kid = member_of(desk, parent, cap=500)
        request_id = desk.reserved(kid, 49)
        settled = desk.settle(request_id, 9)
        assert settled == Settled(request_id, Mils(45), Mils(200), Mils(0))
        assert (desk.balance(parent), desk.balance(kid)) == (955, 0)
        desk.ledger = desk.new_ledger()
        assert desk.settle(request_id, 9) == settled
        assert isinstance(desk.do(desk.reserve(kid, 92)), BudgetExceeded)
        assert isinstance(desk.do(desk.reserve(kid, 91)), Reserved)

    def test_its_own_money_is_spent_first_and_refunded_last(self, desk: Desk):
        parent = desk.account(1000)
        kid = member_of(desk, parent, cap=500)
        desk.do(moved(parent, kid, 100))
        request_id = desk.reserved(kid, 49)
        assert (desk.balance(parent), desk.balance(kid)) == (755, 0)
        desk.settle(request_id, 29)  # 100 of 245 come back
        assert (desk.balance(parent), desk.balance(kid)) == (855, 0)
        other = desk.reserved(kid, 49)
        desk.settle(other, 0)
        assert (desk.balance(parent), desk.balance(kid)) == (855, 0)

    def test_the_parents_balance_bounds_it_too(self, desk: Desk):
        parent = desk.account(100)
        kid = member_of(desk, parent, cap=500)
        assert desk.do(desk.reserve(kid, 21)) == InsufficientCredits(Mils(100), Mils(105))
        assert isinstance(desk.do(desk.reserve(kid, 20)), Reserved)
        assert desk.do(desk.reserve(kid, 1)) == InsufficientCredits(Mils(0), Mils(5))

    @pytest.mark.parametrize(("period", "seconds"), [("day", DAY_S), ("month", 31 * DAY_S)])
    def test_the_cap_begins_anew_with_its_period(self, desk: Desk, period: str, seconds: float):
        parent = desk.account(1000)
        kid = member_of(desk, parent, 245, period)
        late = desk.reserved(kid, 49, lease_s=7 * DAY_S)
        assert isinstance(desk.do(desk.reserve(kid, 1)), BudgetExceeded)
        desk.clock.advance(seconds)
        assert isinstance(desk.do(desk.reserve(kid, 49)), Reserved)
        desk.settle(late, 0)  # of the period before
        assert isinstance(desk.do(desk.reserve(kid, 1)), BudgetExceeded)
        desk.ledger = desk.new_ledger()
        assert isinstance(desk.do(desk.reserve(kid, 1)), BudgetExceeded)

    def test_a_months_last_instant_is_in_it(self, desk: Desk):
        kid = member_of(desk, desk.account(1000), 245)
        february = desk.clock.now - desk.clock.now % DAY_S + 17 * DAY_S
        desk.clock.now = math.nextafter(february, 0.0)
        desk.reserved(kid)
        refused = BudgetExceeded(Mils(245), Mils(245), "month", february, Mils(245), "team")
        assert desk.do(desk.reserve(kid)) == refused

    def test_two_members_race_for_the_last_of_the_parents_money(self, desk: Desk):
        parent = desk.account(245)
        kids = [member_of(desk, parent, cap=1000, name=f"kid {n}") for n in range(2)]
        answers = desk.ledger.apply([desk.reserve(kid, 49) for kid in kids])
        assert [type(answer) for answer in answers] == [Reserved, InsufficientCredits]

    def test_a_member_and_its_key_made_in_one_batch_have_the_cap(self, desk: Desk):
        parent = desk.account(1000)
        member_of(desk, parent, cap=245, name="kid")
        first = desk.do(desk.reserve(member_of(desk, parent, cap=245, name="kid"), 49))
        assert isinstance(first, Reserved)
        desk.ledger = desk.new_ledger()
        key, _ = desk.key("kid")
        kid = Account(first.customer_id, key, "")
        answers = desk.ledger.apply([key, desk.reserve(kid, 1)])
        assert isinstance(answers[1], BudgetExceeded)

    def test_a_lower_cap_counts_what_was_drawn_already(self, desk: Desk):
        parent = desk.account(1000)
        kid = member_of(desk, parent, cap=500)
        desk.reserved(kid, 49)
        desk.do(SetMember(kid.customer_id, "kid", parent.customer_id, Mils(244), "month"))
        assert isinstance(desk.do(desk.reserve(kid, 1)), BudgetExceeded)
        desk.do(SetMember(kid.customer_id, "kid", parent.customer_id))
        assert desk.do(desk.reserve(kid, 1)) == InsufficientCredits(Mils(0), Mils(5))

    def test_a_postpaid_parent_lets_its_members_spend_on_its_line(self, desk: Desk):
        parent = desk.account()
        kid = member_of(desk, parent, cap=500)
        desk.do(SetCreditLine(parent.customer_id, Mils(245)))
        desk.reserved(kid, 49)
        assert (desk.balance(parent), desk.balance(kid)) == (-245, 0)


class TestWhoMayBeInATeam:
    def test_a_member_is_made_if_there_is_none_of_that_name(self, desk: Desk):
        parent = desk.account()
        assert desk.do(SetMember("cus_new", "new", parent.customer_id)) == MemberSet("cus_new", parent.customer_id)
        customer = desk.reader.customer("new")
        assert customer is not None

    def test_teams_have_two_levels_and_members_one_team(self, desk: Desk):
        parent, other = desk.account(name="parent"), desk.account(name="other")
        kid = member_of(desk, parent)
        for name, customer, of in (
            ("grandkid", "cus_grandkid", kid),
            ("parent", parent.customer_id, other),
            ("parent", parent.customer_id, parent),
            ("kid", kid.customer_id, other),
        ):
            assert isinstance(desk.do(SetMember(customer, name, of.customer_id)), Rejected)
        assert desk.do(SetMember("cus_x", "x", "cus_nobody")) == UnknownCustomer("cus_nobody")

    def test_a_member_has_no_credit_line(self, desk: Desk):
        parent, debtor = desk.account(), desk.account(name="debtor")
        desk.do(SetCreditLine(debtor.customer_id, Mils(100)))
        assert isinstance(desk.do(SetMember(debtor.customer_id, "debtor", parent.customer_id)), Rejected)
        kid = member_of(desk, parent)
        assert isinstance(desk.do(SetCreditLine(kid.customer_id, Mils(100))), Rejected)

    @pytest.mark.parametrize(
        "change", [{"cap_mils": 5}, {"cap_period": "month"}, {"cap_mils": -1, "cap_period": "day"}, {"name": ""}]
    )
    def test_malformed_terms_are_rejected(self, desk: Desk, change: dict[str, Any]):
        parent = desk.account()
        assert isinstance(desk.do(replace(SetMember("cus_new", "new", parent.customer_id), **change)), Rejected)


class TestWhatAMemberCanSpend:
    def test_its_own_and_what_its_cap_and_its_parent_leave(self, desk: Desk):
        parent = desk.account(1000)
        kid = member_of(desk, parent, cap=300)
        now = desk.clock.now

        def spendable(account: Account) -> int:
            return desk.reader.spendable(account.customer_id, now)

        assert (spendable(kid), spendable(parent)) == (300, 1000)
        desk.do(moved(parent, kid, 50))
        assert spendable(kid) == 350
        drawn = desk.reserved(kid, 20)
        assert spendable(kid) == 250
        desk.settle(drawn, 0)
        assert spendable(kid) == 350
        desk.do(moved(parent, kid, 850, "tra_2"))
        assert spendable(kid) == 900 + 100
        assert isinstance(desk.do(desk.reserve(kid, 201)), InsufficientCredits)
        assert isinstance(desk.do(desk.reserve(kid, 200)), Reserved)
        assert (spendable(kid), spendable(parent)) == (0, 0)

    def test_without_a_cap_or_beside_a_debt_only_its_own(self, desk: Desk):
        parent = desk.account(1000)
        plain, debtor = member_of(desk, parent), member_of(desk, parent, cap=300, name="debtor")
        desk.do(Credit(debtor.customer_id, Mils(100), "stripe:1", "evt_1", ""))
        desk.settle(desk.reserved(debtor, 20), 20)
        desk.do(Reverse("stripe:1", Mils(100), "evt_2", ""))
        for member in (plain, debtor):
            assert desk.reader.spendable(member.customer_id, desk.clock.now) == 0

    def test_the_refusal_says_that_it_is_the_teams_cap(self, desk: Desk):
        kid = member_of(desk, desk.account(1000), cap=100)
        refused = desk.do(desk.reserve(kid, 21))
        assert isinstance(refused, BudgetExceeded)
        assert (refused.source, refused.limit_mils, refused.spent_mils) == ("team", 100, 0)
