"""Prices as rows, and reservations at rates below a mil."""

from dataclasses import replace

import pytest

from billing.commands import AddPrice, PriceAdded, Quote, Quoted, Rejected, Reserve, Reserved, Settled, UnknownCustomer
from billing.current_prices import CurrentPrices
from billing.money import MAX_MILS, Mils
from billing.price_terms import terms_of
from billing.prices import PriceBook, PriceVersion, Rate, Work
from tests.billing.conftest import Account, Desk

HALF_A_MIL = PriceVersion("model", 1, 0.0, (Rate("frame", 50_000),))


def priced(desk: Desk, account: Account, frames: int, version: PriceVersion = HALF_A_MIL) -> Reserve:
    """As the service reserves: at the rate that the book froze."""
    price = PriceBook([version]).price("model", Work(frames, 10, 480, 640), 1.0)
    assert price is not None
    command = replace(
        desk.reserve(account, frames), mils_per_frame=price.mils_per_frame, per_frames=price.per_frames, model="model"
    )
    reserved = desk.do(command)
    assert isinstance(reserved, Reserved)
    assert reserved.amount_mils == price.total_mils
    return command


class TestRatesBelowAMil:
    @pytest.mark.parametrize(("delivered", "captured"), [(0, 0), (1, 1), (12, 6), (13, 7), (48, 24), (49, 25)])
    def test_a_part_is_rounded_once_and_the_whole_is_what_was_reserved(self, desk: Desk, delivered: int, captured: int):
        account = desk.account(1000)
        command = priced(desk, account, 49)
        settled = Settled(command.request_id, Mils(captured), Mils(25 - captured), Mils(1000 - captured))
        assert desk.settle(command.request_id, delivered) == settled
        desk.ledger = desk.new_ledger()
        assert desk.settle(command.request_id, delivered) == settled
        assert desk.balance(account) == 1000 - captured

    def test_a_price_of_several_lines_is_settled_in_proportion(self, desk: Desk):
        version = PriceVersion("model", 1, 0.0, (Rate("frame", 50_000), Rate("request", 1_000_000)))
        account = desk.account(1000)
        command = priced(desk, account, 49, version)  # 25 and 10
        assert desk.settle(command.request_id, 7) == Settled(command.request_id, Mils(5), Mils(30), Mils(995))

    def test_another_rate_under_the_same_id_is_rejected(self, desk: Desk):
        account = desk.account(1000)
        command = priced(desk, account, 49)
        assert isinstance(desk.do(replace(command, per_frames=3)), Rejected)

    def test_a_quote_binds_it(self, desk: Desk):
        account = desk.account(1000)
        quote = Quote("quo_1", account.key.key_id, "model", 49, Mils(1), 0, 60.0, per_frames=2)
        assert desk.do(quote) == Quoted("quo_1", Mils(25), Mils(1000), desk.clock.now + 60.0)
        desk.ledger = desk.new_ledger()
        assert desk.do(quote) == Quoted("quo_1", Mils(25), Mils(1000), desk.clock.now + 60.0)
        assert isinstance(desk.do(replace(quote, per_frames=3)), Rejected)
        reserved = desk.do(replace(desk.reserve(account, 49), quote_id="quo_1", model="model"))
        assert isinstance(reserved, Reserved)
        assert reserved.amount_mils == 25

    @pytest.mark.parametrize(
        ("frames", "mils", "per"), [(1, 1, 0), (1, 1, 0.5), (1, 1, MAX_MILS + 1), (2**40, 2**40, 2**40), (1, 0, 1)]
    )
    def test_what_a_database_could_not_compute_is_rejected(self, desk: Desk, frames: int, mils: int, per: int):
        account = desk.account(1000)
        command = replace(desk.reserve(account, frames), mils_per_frame=Mils(mils), per_frames=per)
        assert isinstance(desk.do(command), Rejected)


def added(version: int, since: float, nano: int = 500_000, customer_id: str = "") -> AddPrice:
    price = PriceVersion("model", version, since, (Rate("frame", nano),), customer_id)
    return AddPrice("model", customer_id, version, since, terms_of(price))


class TestVersions:
    def test_what_was_added_is_the_book_that_readers_see(self, desk: Desk):
        account = desk.account()
        commands = [added(1, 10.0), added(2, 20.0, 400_000), added(1, 15.0, 300_000, account.customer_id)]
        answers = [PriceAdded("model", "", 1), PriceAdded("model", "", 2), PriceAdded("model", account.customer_id, 1)]
        assert desk.ledger.apply(commands) == answers
        assert desk.ledger.apply(commands) == answers
        book = PriceBook(desk.reader.prices())
        totals = [
            book.price("model", Work(10, 10, 480, 640), ts, account.customer_id) for ts in (10.0, 14.0, 15.0, 25.0)
        ]
        assert [price.total_mils for price in totals if price] == [50, 50, 30, 30]

    @pytest.mark.parametrize("wrong", [added(3, 30.0), added(2, 10.0), added(1, 11.0), added(1, 10.0, 1)])
    def test_a_version_that_does_not_follow_is_rejected(self, desk: Desk, wrong: AddPrice):
        desk.do(added(1, 10.0))
        assert isinstance(desk.do(wrong), Rejected)
        assert len(desk.reader.prices()) == 1

    def test_a_price_for_nobody_is_refused(self, desk: Desk):
        assert desk.do(added(1, 10.0, customer_id="cus_x")) == UnknownCustomer("cus_x")

    @pytest.mark.parametrize(
        "change",
        [{"terms": "{}"}, {"terms": 5}, {"terms": "x" * 20_001}, {"version": 0}, {"model": ""}, {"effective_from": 1}],
    )
    def test_what_is_no_price_is_rejected(self, desk: Desk, change: dict[str, object]):
        assert isinstance(desk.do(replace(added(1, 10.0), **change)), Rejected)


def test_the_current_book_is_read_now_and_then(desk: Desk):
    now = 0.0
    current = CurrentPrices(desk.reader, (Rate("frame", 100_000),), refresh_s=10.0, clock=lambda: now)
    work = Work(10, 10, 480, 640)

    def total() -> int:
        price = current.book().price("model", work, 100.0)
        assert price is not None
        return price.total_mils

    assert total() == 10
    desk.do(added(1, 10.0))
    now = 9.9
    assert total() == 10
    now = 10.0
    assert total() == 50
