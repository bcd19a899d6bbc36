"""What readers see of committed state."""

import pytest

from billing.commands import Grant, RevokeKey
from billing.errors import UnknownWallet
from billing.keys import token_sha256
from billing.money import Mils
from billing.reader import MAX_TRANSACTIONS, CustomerRecord, KeyRecord
from tests.billing.conftest import Desk


class TestKeys:
    def test_a_key_is_found_by_its_tokens_hash(self, desk: Desk):
        account = desk.account(1000)
        assert desk.reader.key_by_token_hash(token_sha256(account.token)) == KeyRecord(
            key_id=account.key.key_id,
            customer_id=account.customer_id,
            refill_per_s=50.0,
            burst=200,
            revoked=False,
        )

    def test_a_revoked_key_is_found_and_says_so(self, desk: Desk):
        account = desk.account()
        desk.do(RevokeKey(account.key.key_id))
        record = desk.reader.key_by_token_hash(account.key.sha256)
        assert record is not None
        assert record.revoked

    def test_an_unknown_hash_is_none(self, desk: Desk):
        desk.account()
        assert desk.reader.key_by_token_hash(token_sha256("dre_other")) is None
        assert desk.reader.key_by_token_hash("") is None

    def test_the_list_has_every_key_in_the_order_of_making_with_its_customers_balance(self, desk: Desk):
        first = desk.account(1000, name="ann")
        desk.clock.advance(1)
        second = desk.account(0, name="bob")
        desk.clock.advance(1)
        third = desk.account(5, name="ann")
        desk.do(RevokeKey(second.key.key_id))
        summaries = desk.reader.keys()
        assert [(row.key_id, row.customer_name, row.balance_mils, row.last4) for row in summaries] == [
            (first.key.key_id, "ann", 1005, first.token[-4:]),
            (second.key.key_id, "bob", 0, second.token[-4:]),
            (third.key.key_id, "ann", 1005, third.token[-4:]),
        ]
        assert [row.revoked_at for row in summaries] == [None, desk.clock.now, None]

    def test_the_token_is_nowhere_in_the_database(self, desk: Desk):
        account = desk.account(1000)
        with desk.engine.connect() as connection:
            for table in ("api_key", "wallet", "entry"):
                assert account.token not in str(connection.exec_driver_sql(f"SELECT * FROM {table}").all())


class TestBalance:
    def test_the_balance_is_the_sum_of_the_rows(self, desk: Desk):
        account = desk.account(1000)
        desk.settle(desk.reserved(account, frames=49), 12)
        desk.reserved(account, frames=3)
        assert desk.balance(account) == sum(amount for _, amount, _ in desk.rows(account)) == 1000 - 60 - 15

    def test_an_unknown_customer_is_an_error(self, desk: Desk):
        with pytest.raises(UnknownWallet, match="cus_never"):
            desk.reader.balance("cus_never")


class TestTransactions:
    def test_the_newest_comes_first_and_balances_chain(self, desk: Desk):
        account = desk.account(1000)
        request_id = desk.reserved(account, frames=49)
        desk.settle(request_id, 12, "engine_failed")
        rows = desk.reader.transactions(account.customer_id, 10)
        assert [(row.seq, row.kind, row.amount_mils, row.balance_after_mils) for row in rows] == [
            (3, "refund", 185, 940),
            (2, "debit", -245, 755),
            (1, "credit", 1000, 1000),
        ]
        assert rows[1].detail == "predict · tiny-pusher · 49 frames"
        assert rows[0].public_id == rows[1].public_id == request_id

    @pytest.mark.parametrize(("limit", "num_rows"), [(-5, 1), (0, 1), (1, 1), (2, 2), (3, 3), (4, 3), (10**9, 3)])
    def test_the_limit_is_bounded_on_both_sides(self, desk: Desk, limit: int, num_rows: int):
        account = desk.account(1000)
        desk.settle(desk.reserved(account), 0)
        assert len(desk.reader.transactions(account.customer_id, limit)) == num_rows

    def test_no_list_is_longer_than_the_bound(self, desk: Desk):
        account = desk.account()
        desk.ledger.apply([Grant(account.customer_id, Mils(1), f"adm_{i}", "") for i in range(MAX_TRANSACTIONS + 1)])
        rows = desk.reader.transactions(account.customer_id, MAX_TRANSACTIONS + 1)
        assert [row.seq for row in rows] == list(range(MAX_TRANSACTIONS + 1, 1, -1))

    def test_a_customer_sees_only_its_own(self, desk: Desk):
        ann, bob = desk.account(1000), desk.account(500)
        assert [row.amount_mils for row in desk.reader.transactions(ann.customer_id, 10)] == [1000]
        assert [row.amount_mils for row in desk.reader.transactions(bob.customer_id, 10)] == [500]

    def test_an_unknown_customer_has_none(self, desk: Desk):
        assert desk.reader.transactions("cus_never", 10) == []


class TestReservations:
    def test_an_open_one_shows_what_it_holds_and_until_when(self, desk: Desk):
        account = desk.account(1000)
        request_id = desk.reserved(account, frames=49, lease_s=60)
        record = desk.reader.reservation(request_id)
        assert record is not None
        assert (record.state, record.amount_mils, record.captured_mils, record.refunded_mils) == ("open", 245, 0, 0)
        assert (record.lease_until, record.settled_at) == (desk.clock.now + 60, None)
        assert (record.customer_id, record.key_id) == (account.customer_id, account.key.key_id)

    def test_an_unknown_one_is_none(self, desk: Desk):
        assert desk.reader.reservation("req_never") is None


class TestCustomers:
    def test_a_customer_is_found_by_name_and_by_id(self, desk: Desk):
        account = desk.account(1000, name="ann")
        record = CustomerRecord(account.customer_id, "ann", Mils(1000), 1, desk.clock.now, Mils(0), Mils(0), Mils(0))
        assert desk.reader.customer("ann") == record
        assert desk.reader.customer(account.customer_id) == record
        assert desk.reader.customer("bob") is None

    def test_a_customer_named_like_anothers_id_does_not_shadow_it(self, desk: Desk):
        ann = desk.account(1000, name="ann")
        desk.account(5, name=ann.customer_id)
        record = desk.reader.customer(ann.customer_id)
        assert record is not None
        assert record.name == "ann"
