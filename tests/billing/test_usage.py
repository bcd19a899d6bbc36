"""How much a customer used, by day, model and key; and each warning of a budget once."""

import pytest

from billing import usage
from billing.commands import KeyTerms, RotateKey, SetKeyTerms
from billing.errors import TooManyRows, UnknownCursor
from billing.money import Mils
from billing.usage import UsageReader, UsageRow
from tests.billing.conftest import Account, Desk

DAY_S = 86_400
NOON = 1_800_000_000.0 - 1_800_000_000.0 % DAY_S + DAY_S / 2
"""Of 15 January 2027."""


class TestUsage:
    def test_it_is_counted_by_day_model_and_key(self, desk: Desk):
        desk.clock.now = NOON
        account, other = desk.account(10_000, name="ann"), desk.account(0, name="ann")
        today = int(NOON // DAY_S)
        desk.ran(account, 10, "a")
        desk.ran(account, 10, "a", delivered=4)
        desk.ran(other, 2, "a")
        desk.ran(account, 1, "b")
        desk.clock.now = NOON + DAY_S / 2  # midnight
        desk.ran(account, 3, "a")
        read = UsageReader(desk.engine).usage
        since, until = NOON - DAY_S, NOON + DAY_S
        rows = read(account.customer_id, since, until)
        key, other_key = account.key.key_id, other.key.key_id
        assert sorted(rows, key=str) == sorted(
            [
                UsageRow(today, "a", key, 2, 20, 14, Mils(100), Mils(30)),
                UsageRow(today, "a", other_key, 1, 2, 2, Mils(10), Mils(0)),
                UsageRow(today, "b", key, 1, 1, 1, Mils(5), Mils(0)),
                UsageRow(today + 1, "a", key, 1, 3, 3, Mils(15), Mils(0)),
            ],
            key=str,
        )
        assert read(account.customer_id, since, until, ["day"]) == [
            UsageRow(today, None, None, 4, 23, 17, Mils(115), Mils(30)),
            UsageRow(today + 1, None, None, 1, 3, 3, Mils(15), Mils(0)),
        ]
        assert [(row.model, row.cost_mils) for row in read(account.customer_id, since, until, ["model"])] == [
            ("a", 95),
            ("b", 5),
        ]
        spent = sum(row.cost_mils for row in rows)
        assert desk.balance(account) == 10_000 - spent

    def test_its_time_includes_the_first_moment_and_not_the_last(self, desk: Desk):
        desk.clock.now = NOON
        account = desk.account(10_000)
        desk.ran(account)
        read = UsageReader(desk.engine).usage
        assert len(read(account.customer_id, NOON, NOON + 1)) == 1
        assert read(account.customer_id, NOON - 1, NOON) == []

    def test_an_answer_without_bound_is_refused(self, desk: Desk, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(usage, "MAX_USAGE_ROWS", 2)
        account = desk.account(10_000)
        read = UsageReader(desk.engine).usage
        for model in ("a", "b"):
            desk.ran(account, model=model)
        assert len(read(account.customer_id, 0, 2e9)) == 2
        desk.ran(account, model="c")
        with pytest.raises(TooManyRows):
            read(account.customer_id, 0, 2e9)

    def test_what_was_spent_lately_counts_refunds(self, desk: Desk):
        desk.clock.now = NOON
        account = desk.account(10_000)
        desk.ran(account, 10, delivered=4)
        desk.clock.advance(60)
        desk.ran(account, 1)
        reader = UsageReader(desk.engine)
        assert reader.spent_since(account.customer_id, NOON) == 25
        assert reader.spent_since(account.customer_id, NOON + 1) == 5
        assert reader.spent_since(account.customer_id, NOON + 61) == 0


class TestBudgetWarnings:
    def warnings(self, desk: Desk, account: Account) -> list[tuple[str, int, int, int]]:
        found = UsageReader(desk.engine).warnings(account.customer_id, 100)
        return sorted((each.period, each.level, each.limit_mils, each.spent_mils) for each in found)

    def test_there_is_one_at_exactly_each_level_and_none_before(self, desk: Desk):
        account = desk.account(10_000)
        desk.do(SetKeyTerms(account.key.key_id, KeyTerms(daily_budget_mils=Mils(500))))
        desk.ran(account, 74)
        assert self.warnings(desk, account) == []
        desk.ran(account, 1)
        assert self.warnings(desk, account) == [("day", 75, 500, 375)]
        desk.ran(account, 14)
        assert len(self.warnings(desk, account)) == 1
        desk.ran(account, 1)
        desk.ran(account, 10)
        assert self.warnings(desk, account) == [("day", 75, 500, 375), ("day", 90, 500, 450)]

    def test_a_refund_and_the_same_spending_again_warn_once_also_by_a_successor(self, desk: Desk):
        account = desk.account(10_000)
        desk.do(SetKeyTerms(account.key.key_id, KeyTerms(daily_budget_mils=Mils(500))))
        for _ in range(2):
            desk.ran(account, 80, delivered=0)
        desk.ledger = desk.new_ledger()
        desk.ran(account, 80)
        assert self.warnings(desk, account) == [("day", 75, 500, 400)]

    def test_one_request_may_come_to_every_level_of_both_budgets(self, desk: Desk):
        account = desk.account(10_000)
        desk.do(SetKeyTerms(account.key.key_id, KeyTerms(daily_budget_mils=Mils(500), monthly_budget_mils=Mils(600))))
        desk.ran(account, 100)
        assert self.warnings(desk, account) == [
            ("day", 75, 500, 500),
            ("day", 90, 500, 500),
            ("month", 75, 600, 500),
        ]

    def test_another_day_and_another_limit_warn_anew(self, desk: Desk):
        desk.clock.now = NOON
        account = desk.account(10_000)
        desk.do(SetKeyTerms(account.key.key_id, KeyTerms(daily_budget_mils=Mils(100))))
        desk.ran(account, 16)
        desk.clock.advance(DAY_S)
        desk.ran(account, 16)
        desk.do(SetKeyTerms(account.key.key_id, KeyTerms(daily_budget_mils=Mils(110))))
        desk.clock.advance(1)
        desk.ran(account, 1)
        assert self.warnings(desk, account) == [("day", 75, 100, 80), ("day", 75, 100, 80), ("day", 75, 110, 85)]

    def test_a_rotated_key_goes_on_with_its_budget_and_is_not_warned_of_twice(self, desk: Desk):
        account = desk.account(10_000)
        desk.do(SetKeyTerms(account.key.key_id, KeyTerms(daily_budget_mils=Mils(100))))
        desk.ran(account, 16)
        key, token = desk.key()
        desk.do(RotateKey(account.key.key_id, key.key_id, key.sha256, key.last4))
        rotated = Account(account.customer_id, key, token)
        desk.ran(rotated, 1)
        assert len(self.warnings(desk, account)) == 1
        desk.clock.advance(1)
        desk.ran(rotated, 2)
        (newest, _) = UsageReader(desk.engine).warnings(account.customer_id, 100)
        assert (newest.level, newest.key_id) == (90, key.key_id)

    def test_a_page_goes_on_after_its_last_and_only_after_ones_own(self, desk: Desk):
        ann, bob = desk.account(10_000), desk.account(10_000)
        desk.do(SetKeyTerms(ann.key.key_id, KeyTerms(daily_budget_mils=Mils(500), monthly_budget_mils=Mils(500))))
        desk.ran(ann, 100)
        reader = UsageReader(desk.engine)
        every = reader.warnings(ann.customer_id, 10)
        first = reader.warnings(ann.customer_id, 3)
        assert first + reader.warnings(ann.customer_id, 3, after=first[-1].event_id) == every
        assert len({each.event_id for each in every}) == 4
        with pytest.raises(UnknownCursor):
            reader.warnings(bob.customer_id, 3, after=every[0].event_id)
        assert reader.warnings(bob.customer_id, 3) == []
