"""What a key may do: label, scope, models, expiry, budgets, and a new secret in its place."""

import math
from dataclasses import replace
from typing import Any

import pytest

from billing.commands import (
    BudgetExceeded,
    CreateKey,
    InsufficientCredits,
    KeyRefused,
    KeyRevoked,
    KeyRotated,
    KeyTerms,
    KeyTermsSet,
    Rejected,
    Repeated,
    Reserved,
    RevokeKey,
    RotateKey,
    ScopeRefused,
    SetKeyTerms,
    UnknownKey,
)
from billing.keys import mint_key_id, mint_request_id, mint_token, token_sha256
from billing.money import Mils
from tests.billing.conftest import Account, Desk

DAY_S = 86_400
NOON = 1_800_000_000.0 - 1_800_000_000.0 % DAY_S + DAY_S / 2
"""Of 15 January 2027."""


def with_terms(desk: Desk, credits_mils: int = 100_000, **terms: Any) -> Account:
    account = desk.account(credits_mils)
    assert desk.do(SetKeyTerms(account.key.key_id, KeyTerms(**terms))) == KeyTermsSet(account.key.key_id)
    return account


def rotation(account: Account) -> tuple[RotateKey, Account]:
    token = mint_token()
    command = RotateKey(account.key.key_id, mint_key_id(), token_sha256(token), token[-4:])
    return command, replace(account, key=replace(account.key, key_id=command.new_key_id), token=token)


class TestTerms:
    def test_a_key_is_made_with_terms_and_everybody_can_read_them(self, desk: Desk):
        terms = KeyTerms("robot 7", "spend", ("tiny-pusher", "dreamdojo-2b"), 2e9, Mils(5), Mils(50))
        command = replace(desk.key("ann", 100)[0], terms=terms)
        desk.do(command)
        desk.ledger = desk.new_ledger()
        record = desk.reader.key_by_token_hash(command.sha256)
        assert record is not None
        assert record.terms == terms
        [summary] = desk.reader.keys()
        assert (summary.key_id, summary.customer_name, summary.balance_mils) == (command.key_id, "ann", 100)
        assert summary.terms == terms

    def test_terms_can_be_replaced(self, desk: Desk):
        account = with_terms(desk, scope="read")
        assert isinstance(desk.do(desk.reserve(account)), ScopeRefused)
        assert desk.do(SetKeyTerms(account.key.key_id, KeyTerms())) == KeyTermsSet(account.key.key_id)
        assert isinstance(desk.do(desk.reserve(account)), Reserved)

    def test_a_key_without_terms_may_do_everything(self, desk: Desk):
        account = desk.account(1000)
        record = desk.reader.key_by_token_hash(account.key.sha256)
        assert record is not None
        assert record.terms == KeyTerms()
        assert isinstance(desk.do(replace(desk.reserve(account), model="anything")), Reserved)

    def test_an_unknown_key_has_no_terms(self, desk: Desk):
        assert desk.do(SetKeyTerms("key_unknown", KeyTerms())) == UnknownKey("key_unknown")


class TestScope:
    def test_a_reading_key_spends_nothing(self, desk: Desk):
        account = with_terms(desk, scope="read")
        assert desk.do(desk.reserve(account)) == ScopeRefused("this key may read and not spend")
        assert desk.balance(account) == 100_000

    def test_a_key_for_some_models_runs_those(self, desk: Desk):
        account = with_terms(desk, models=("tiny-pusher",))
        assert isinstance(desk.do(replace(desk.reserve(account), model="tiny-pusher")), Reserved)
        refused = desk.do(replace(desk.reserve(account), model="dreamdojo-2b"))
        assert refused == ScopeRefused("this key may not use dreamdojo-2b")

    def test_a_key_for_some_models_refuses_work_that_does_not_say_which(self, desk: Desk):
        account = with_terms(desk, models=("tiny-pusher",))
        assert desk.do(desk.reserve(account)) == ScopeRefused("this key may not use an unnamed model")

    def test_a_model_whose_name_is_part_of_another_is_another(self, desk: Desk):
        account = with_terms(desk, models=("tiny-pusher",))
        assert isinstance(desk.do(replace(desk.reserve(account), model="tiny")), ScopeRefused)


class TestExpiry:
    def test_a_key_spends_until_it_expires(self, desk: Desk):
        account = with_terms(desk, expires_at=desk.clock.now + 10)
        desk.clock.advance(9.999)
        assert isinstance(desk.do(desk.reserve(account)), Reserved)
        desk.clock.advance(0.001)
        assert desk.do(desk.reserve(account)) == KeyRefused()

    def test_a_clock_that_steps_back_does_not_bring_it_back(self, desk: Desk):
        account = with_terms(desk, expires_at=desk.clock.now + 10)
        desk.clock.advance(10)
        desk.do(desk.reserve(account))
        desk.clock.advance(-5)
        assert desk.do(desk.reserve(account)) == KeyRefused()

    def test_work_that_was_reserved_before_settles_after(self, desk: Desk):
        account = with_terms(desk, expires_at=desk.clock.now + 10)
        request_id = desk.reserved(account)
        desk.clock.advance(20)
        desk.settle(request_id, 48)
        assert desk.balance(account) == 100_000 - 240


class TestBudgets:
    def test_a_budget_that_is_exactly_enough_is_enough_and_one_mil_less_is_not(self, desk: Desk):
        desk.clock.now = NOON
        account = with_terms(desk, daily_budget_mils=Mils(490))
        desk.reserved(account, 49)
        desk.do(SetKeyTerms(account.key.key_id, KeyTerms(daily_budget_mils=Mils(489))))
        midnight = NOON + DAY_S / 2
        assert desk.do(desk.reserve(account)) == BudgetExceeded(Mils(489), Mils(245), "day", midnight, Mils(245))
        desk.do(SetKeyTerms(account.key.key_id, KeyTerms(daily_budget_mils=Mils(490))))
        assert isinstance(desk.do(desk.reserve(account)), Reserved)
        assert desk.balance(account) == 100_000 - 490

    def test_a_day_ends_at_midnight_utc(self, desk: Desk):
        desk.clock.now = NOON
        account = with_terms(desk, daily_budget_mils=Mils(245))
        desk.reserved(account)
        desk.clock.advance(DAY_S / 2 - 0.001)
        assert isinstance(desk.do(desk.reserve(account)), BudgetExceeded)
        desk.clock.advance(0.001)
        assert isinstance(desk.do(desk.reserve(account)), Reserved)

    def test_a_month_ends_with_its_last_day(self, desk: Desk):
        desk.clock.now = NOON
        account = with_terms(desk, monthly_budget_mils=Mils(490))
        desk.reserved(account)
        desk.clock.advance(16 * DAY_S)  # 31 January
        desk.reserved(account)
        february = NOON + 16.5 * DAY_S
        assert desk.do(desk.reserve(account)) == BudgetExceeded(Mils(490), Mils(490), "month", february, Mils(245))
        desk.clock.advance(DAY_S / 2)
        assert isinstance(desk.do(desk.reserve(account)), Reserved)

    def test_a_months_last_instant_is_in_it(self, desk: Desk):
        account = with_terms(desk, monthly_budget_mils=Mils(245))
        february = NOON + 16.5 * DAY_S
        desk.clock.now = math.nextafter(february, 0.0)
        desk.reserved(account)
        assert desk.do(desk.reserve(account)) == BudgetExceeded(Mils(245), Mils(245), "month", february, Mils(245))

    def test_what_was_refunded_can_be_spent_again(self, desk: Desk):
        account = with_terms(desk, daily_budget_mils=Mils(245))
        request_id = desk.reserved(account, 49)
        desk.settle(request_id, 40)
        assert isinstance(desk.do(desk.reserve(account, 10)), BudgetExceeded)
        assert isinstance(desk.do(desk.reserve(account, 9)), Reserved)

    def test_each_key_has_its_own_budget_on_the_same_wallet(self, desk: Desk):
        first, second = desk.account(100_000, name="ann"), desk.account(0, name="ann")
        desk.do(SetKeyTerms(first.key.key_id, KeyTerms(daily_budget_mils=Mils(0))))
        assert isinstance(desk.do(desk.reserve(first)), BudgetExceeded)
        assert isinstance(desk.do(desk.reserve(second)), Reserved)

    def test_the_wallet_still_has_the_last_word(self, desk: Desk):
        account = with_terms(desk, credits_mils=244, daily_budget_mils=Mils(10_000))
        assert desk.do(desk.reserve(account)) == InsufficientCredits(Mils(244), Mils(245))
        assert isinstance(desk.do(desk.reserve(account, 48)), Reserved)

    def test_one_batch_spends_no_more_than_the_budget(self, desk: Desk):
        account = with_terms(desk, daily_budget_mils=Mils(3 * 245))
        answers = desk.ledger.apply([desk.reserve(account) for _ in range(10)])
        assert [type(answer) for answer in answers] == [Reserved] * 3 + [BudgetExceeded] * 7

    def test_a_key_made_with_a_budget_and_used_in_one_batch(self, desk: Desk):
        account = desk.account(100_000, name="ann")
        key: CreateKey = replace(desk.key("ann")[0], terms=KeyTerms(daily_budget_mils=Mils(245)))
        reserve = replace(desk.reserve(account), key_id=key.key_id)
        answers = desk.ledger.apply([key, reserve, replace(reserve, request_id=mint_request_id())])
        assert [type(answer) for answer in answers[1:]] == [Reserved, BudgetExceeded]

    def test_a_successor_counts_on(self, desk: Desk):
        account = with_terms(desk, daily_budget_mils=Mils(490))
        desk.settle(desk.reserved(account), 20)
        desk.ledger = desk.new_ledger()
        assert isinstance(desk.do(desk.reserve(account, 79)), BudgetExceeded)
        assert isinstance(desk.do(desk.reserve(account, 78)), Reserved)

    def test_a_refund_by_a_successor_counts_too(self, desk: Desk):
        account = with_terms(desk, daily_budget_mils=Mils(245))
        request_id = desk.reserved(account)
        desk.ledger = desk.new_ledger()
        desk.settle(request_id, 0)
        assert isinstance(desk.do(desk.reserve(account)), Reserved)
        assert isinstance(desk.do(desk.reserve(account, 1)), BudgetExceeded)

    def test_a_repetition_is_recognised_though_the_budget_is_spent(self, desk: Desk):
        account = with_terms(desk, daily_budget_mils=Mils(245))
        first = replace(desk.reserve(account), idempotency_key="k", payload_sha256="0" * 64)
        desk.do(first)
        assert isinstance(desk.do(replace(first, request_id=mint_request_id())), Repeated)


class TestRotation:
    def test_the_new_key_spends_from_the_same_wallet_and_the_old_one_no_more(self, desk: Desk):
        account = with_terms(desk, label="robot 7")
        command, new = rotation(account)
        assert desk.do(command) == KeyRotated(command.new_key_id, account.customer_id, desk.clock.now)
        assert isinstance(desk.do(desk.reserve(new)), Reserved)
        assert desk.do(desk.reserve(account)) == KeyRefused()
        record = desk.reader.key_by_token_hash(command.sha256)
        assert record is not None
        assert (record.terms.label, record.burst, record.revoked) == ("robot 7", account.key.burst, False)

    def test_rotating_does_not_refill_a_budget(self, desk: Desk):
        account = with_terms(desk, daily_budget_mils=Mils(245))
        desk.reserved(account)
        for _ in range(2):
            command, account = rotation(account)
            desk.do(command)
            assert isinstance(desk.do(desk.reserve(account)), BudgetExceeded)
        desk.ledger = desk.new_ledger()
        assert isinstance(desk.do(desk.reserve(account)), BudgetExceeded)

    def test_in_one_batch_too(self, desk: Desk):
        account = with_terms(desk, daily_budget_mils=Mils(245))
        desk.reserved(account)
        desk.ledger = desk.new_ledger()
        command, new = rotation(account)
        answers = desk.ledger.apply([command, desk.reserve(new), desk.reserve(account)])
        assert [type(answer) for answer in answers] == [KeyRotated, BudgetExceeded, KeyRefused]

    def test_a_key_that_is_given_a_budget_again_has_spent_what_it_spent(self, desk: Desk):
        account = with_terms(desk, daily_budget_mils=Mils(245))
        desk.reserved(account)
        desk.do(SetKeyTerms(account.key.key_id, KeyTerms()))
        desk.ledger = desk.new_ledger()
        budget = SetKeyTerms(account.key.key_id, KeyTerms(daily_budget_mils=Mils(245)))
        answers = desk.ledger.apply([budget, desk.reserve(account)])
        assert isinstance(answers[1], BudgetExceeded)

    def test_the_same_rotation_again_gives_the_same_answer(self, desk: Desk):
        account = desk.account(1000)
        command, _ = rotation(account)
        first = desk.do(command)
        desk.clock.advance(5)
        assert desk.do(command) == first
        desk.ledger = desk.new_ledger()
        assert desk.do(command) == first
        assert len(desk.reader.keys()) == 2

    def test_another_secret_under_the_same_id_or_a_known_one_is_rejected(self, desk: Desk):
        account, other = desk.account(1000), desk.account(0)
        command, _ = rotation(account)
        desk.do(command)
        assert isinstance(desk.do(replace(command, sha256="f" * 64)), Rejected)
        third, _ = rotation(other)
        assert isinstance(desk.do(replace(third, sha256=account.key.sha256)), Rejected)

    def test_a_revoked_or_unknown_key_is_not_rotated(self, desk: Desk):
        account = desk.account(1000)
        command, _ = rotation(account)
        assert isinstance(desk.do(RevokeKey(account.key.key_id)), KeyRevoked)
        assert desk.do(command) == KeyRefused()
        assert desk.do(replace(command, key_id="key_unknown")) == UnknownKey("key_unknown")


@pytest.mark.parametrize(
    "terms",
    [
        None,
        KeyTerms(label="x" * 201),
        KeyTerms(label="two\nlines"),
        KeyTerms(scope="admin"),  # type: ignore[arg-type]
        KeyTerms(models=["tiny-pusher"]),  # type: ignore[arg-type]
        KeyTerms(models=("two words",)),
        KeyTerms(models=("",)),
        KeyTerms(models=("m",) * 101),
        KeyTerms(expires_at=float("nan")),
        KeyTerms(expires_at="tomorrow"),  # type: ignore[arg-type]
        KeyTerms(daily_budget_mils=Mils(-1)),
        KeyTerms(monthly_budget_mils=0.5),  # type: ignore[arg-type]
    ],
)
def test_malformed_terms_are_rejected(desk: Desk, terms: Any):
    account = desk.account(0)
    assert isinstance(desk.do(SetKeyTerms(account.key.key_id, terms)), Rejected)
