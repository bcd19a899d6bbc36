"""Money that was paid outside: credited once, and taken back as far as the provider says, in any order."""

import itertools
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from billing.commands import (
    Credit,
    Credited,
    InsufficientCredits,
    Rejected,
    Reserved,
    Reverse,
    Reversed,
    UnknownCustomer,
    UnknownPayment,
)
from billing.invariants import audit
from billing.money import Mils
from tests.billing.conftest import Account, Clock, Desk
from tests.support.databases import Databases


def paid(account: Account, amount: int = 1000, source: str = "stripe:cs_1", public_id: str = "evt_1") -> Credit:
    return Credit(account.customer_id, Mils(amount), source, public_id, "Stripe Checkout top-up · $0.10", (public_id,))


def back(target: int, source: str = "stripe:cs_1", public_id: str = "evt_refund") -> Reverse:
    return Reverse(source, Mils(target), public_id, "Refund of a top-up", (public_id,))


def standing(desk: Desk, account: Account) -> tuple[int, int]:
    customer = desk.reader.customer(account.customer_id)
    assert customer is not None
    return customer.balance_mils, customer.debt_mils


class TestCredit:
    def test_a_payment_is_credited_once_whatever_event_names_it(self, desk: Desk):
        account = desk.account()
        first = desk.do(paid(account))
        assert first == Credited("stripe:cs_1", "evt_1", Mils(1000), Mils(1000))
        for public_id in ("evt_1", "evt_2", "rec_cs_1"):
            assert desk.do(paid(account, public_id=public_id)) == first
        assert desk.ledger.apply([paid(account), paid(account, public_id="evt_3")]) == [first, first]
        assert desk.rows(account) == [("credit", 1000, "evt_1")]

    def test_the_answer_is_the_same_after_a_take_over(self, desk: Desk):
        account = desk.account()
        first = desk.do(paid(account))
        desk.do(back(400))
        desk.ledger = desk.new_ledger()
        assert desk.do(paid(account)) == first

    @pytest.mark.parametrize("change", [{"amount_mils": Mils(999)}, {"customer_id": "cus_other"}])
    def test_another_amount_or_customer_for_the_same_source_is_rejected(self, desk: Desk, change: dict[str, Any]):
        account = desk.account()
        desk.do(paid(account))
        assert isinstance(desk.do(replace(paid(account), **change)), Rejected)
        assert desk.balance(account) == 1000

    def test_one_id_cannot_credit_two_payments(self, desk: Desk):
        account = desk.account()
        both = [paid(account), paid(account, source="stripe:cs_2")]
        for commands in (both, both[1:]):
            assert isinstance(desk.ledger.apply(commands)[-1], Rejected)
        assert desk.balance(account) == 1000

    def test_an_unknown_customer_is_said_so(self, desk: Desk):
        account = replace(desk.account(), customer_id="cus_nobody")
        assert desk.do(paid(account)) == UnknownCustomer("cus_nobody")

    @pytest.mark.parametrize(
        "change",
        [
            {"amount_mils": 0},
            {"amount_mils": 1.0},
            {"source": ""},
            {"public_id": " x"},
            {"events": ["evt"]},
            {"events": ("",)},
            {"events": ("evt",) * 101},
            {"detail": None},
        ],
    )
    def test_a_malformed_payment_is_rejected(self, desk: Desk, change: dict[str, Any]):
        account = desk.account()
        assert isinstance(desk.do(replace(paid(account), **change)), Rejected)

    def test_events_are_marked_in_the_commit_of_their_effect_and_only_then(self, desk: Desk):
        account = desk.account()
        asked = ["evt_1", "evt_refund", "evt_other"]
        desk.do(back(10))
        assert desk.reader.applied_events(asked) == set()
        desk.ledger.apply([paid(account), paid(account), back(10), back(10)])
        assert desk.reader.applied_events(asked) == {"evt_1", "evt_refund"}
        desk.do(replace(back(10), events=("evt_other", "evt_1")))
        assert desk.reader.applied_events(asked) == set(asked)


class TestReverse:
    def test_the_target_is_cumulative_and_repeating_it_changes_nothing(self, desk: Desk):
        account = desk.account()
        desk.do(paid(account))
        for target, balance in ((300, 700), (300, 700), (500, 500), (1000, 0), (200, 800), (0, 1000), (0, 1000)):
            answer = desk.do(back(target))
            assert answer == Reversed("stripe:cs_1", account.customer_id, Mils(target), Mils(balance), Mils(0))
            assert standing(desk, account) == (balance, 0)
        assert desk.rows(account) == [
            ("credit", 1000, "evt_1"),
            ("debit", -300, "evt_refund"),
            ("debit", -200, "evt_refund"),
            ("debit", -500, "evt_refund"),
            ("credit", 800, "evt_refund"),
            ("credit", 200, "evt_refund"),
        ]

    def test_more_than_was_granted_counts_as_all_of_it(self, desk: Desk):
        account = desk.account()
        desk.do(paid(account))
        assert desk.do(back(5_000)) == Reversed("stripe:cs_1", account.customer_id, Mils(1000), Mils(0), Mils(0))

    def test_a_payment_that_was_never_credited_is_unknown(self, desk: Desk):
        assert desk.do(back(1)) == UnknownPayment("stripe:cs_1")

    def test_what_was_spent_becomes_a_debt_that_blocks_spending_and_is_repaid_first(self, desk: Desk):
        account = desk.account()
        desk.do(paid(account))
        desk.settle(desk.reserved(account, 160), 160)  # 800 of the 1000
        assert desk.do(back(1000)) == Reversed("stripe:cs_1", account.customer_id, Mils(1000), Mils(0), Mils(800))
        assert desk.do(desk.reserve(account, 1)) == InsufficientCredits(Mils(0), Mils(5), Mils(800))
        desk.do(paid(account, 500, "stripe:cs_2", "evt_2"))
        assert standing(desk, account) == (0, 300)
        desk.do(paid(account, 305, "stripe:cs_3", "evt_3"))
        assert standing(desk, account) == (5, 0)
        assert isinstance(desk.do(desk.reserve(account, 1)), Reserved)
        assert desk.rows(account)[-5:] == [
            ("credit", 500, "evt_2"),
            ("debit", -500, "evt_2"),
            ("credit", 305, "evt_3"),
            ("debit", -300, "evt_3"),
            ("debit", -5, desk.rows(account)[-1][2]),
        ]

    def test_a_won_dispute_gives_back_the_debt_first(self, desk: Desk):
        account = desk.account()
        desk.do(paid(account))
        desk.settle(desk.reserved(account, 160), 160)
        desk.do(back(1000))
        assert standing(desk, account) == (0, 800)
        desk.do(back(0))
        assert standing(desk, account) == (200, 0)

    def test_a_refund_of_running_work_repays_the_debt_and_is_answered_the_same_again(self, desk: Desk):
        account = desk.account()
        desk.do(paid(account))
        request_id = desk.reserved(account, 160)
        desk.do(back(1000))
        settled = desk.settle(request_id, 100)
        assert standing(desk, account) == (0, 500)
        desk.ledger = desk.new_ledger()
        assert desk.settle(request_id, 100) == settled

    def test_a_payment_that_is_made_and_reversed_in_one_batch(self, desk: Desk):
        command, _ = desk.key("newcomer")
        account = Account(command.customer_id, command, "")
        answers = desk.ledger.apply([command, paid(account), back(400), back(100), back(1000)])
        assert answers[-1] == Reversed("stripe:cs_1", account.customer_id, Mils(1000), Mils(0), Mils(0))


STEPS = st.lists(
    st.sampled_from(
        [
            ("refund", 300),
            ("refund", 700),
            ("dispute", 1000),
            ("won", 0),
            ("work", 100),
            ("refused work", 60),
            ("other payment", 250),
        ]
    ),
    min_size=2,
    max_size=6,
)


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
@given(steps=STEPS, final=st.sampled_from([0, 300, 1000]), seed=st.randoms(use_true_random=False))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_order_and_repetition_of_targets_ends_in_the_same_balance(
    databases: Databases, steps: list[tuple[str, int]], final: int, seed: Any
):
    """The last thing known of a payment decides, whatever was known in between and whatever was spent meanwhile."""
    spent = 400
    standings = set()
    for shuffled in (steps, seed.sample(steps, len(steps)), []):
        with databases.migrated() as engine:
            desk = Desk(engine, Clock())
            account = desk.account()
            desk.do(paid(account))
            desk.settle(desk.reserved(account, spent // 5), spent // 5)
            others = itertools.count(2)
            received = 0
            for kind, amount in shuffled:
                match kind:
                    case "other payment":
                        number = next(others)
                        desk.do(paid(account, amount, f"stripe:cs_{number}", f"evt_{number}"))
                        received += amount
                    case "work" | "refused work":
                        outcome = desk.do(command := desk.reserve(account, amount // 5))
                        if isinstance(outcome, Reserved):
                            desk.settle(command.request_id, 0)
                    case _:
                        desk.ledger.apply([back(amount), back(amount)])
            desk.do(back(final))
            assert audit(engine) == []
            balance, debt = standing(desk, account)
            assert balance == 0 or debt == 0
            standings.add(balance - debt - received)
    assert standings == {1000 - spent - final}
