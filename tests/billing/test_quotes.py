"""A quote binds until it expires: for its customer, its model and its frames, whatever the price has become."""

from dataclasses import replace

import pytest

from billing.commands import (
    KeyRefused,
    KeyTerms,
    Quote,
    Quoted,
    QuoteRefused,
    Rejected,
    Reserve,
    Reserved,
    RevokeKey,
    ScopeRefused,
    SetKeyTerms,
    Settled,
)
from billing.keys import mint_quote_id, mint_request_id
from billing.money import Mils
from tests.billing.conftest import Account, Desk

VALID_S = 600.0


def quoted(desk: Desk, account: Account, rate: int = 5) -> Quote:
    quote = Quote(mint_quote_id(), account.key.key_id, "tiny-pusher", 49, Mils(rate), 1, VALID_S)
    assert isinstance(desk.do(quote), Quoted)
    return quote


def by_quote(desk: Desk, account: Account, quote: Quote, rate: int = 7) -> Reserve:
    """A request whose caller meanwhile knows another price."""
    return replace(desk.reserve(account), model="tiny-pusher", mils_per_frame=Mils(rate), quote_id=quote.quote_id)


def test_a_quote_moves_no_money_and_says_what_it_would(desk: Desk):
    account = desk.account(1000)
    quote = Quote(mint_quote_id(), account.key.key_id, "tiny-pusher", 49, Mils(5), 1, VALID_S)
    answer = Quoted(quote.quote_id, Mils(245), Mils(1000), desk.clock.now + VALID_S)
    assert desk.do(quote) == answer
    desk.reserved(account)
    desk.clock.advance(5)
    desk.ledger = desk.new_ledger()
    assert desk.do(quote) == answer
    assert len(desk.rows(account)) == 2


def test_the_quoted_rate_is_charged_though_the_price_has_risen(desk: Desk):
    account = desk.account(1000)
    request = by_quote(desk, account, quoted(desk, account))
    first = desk.do(request)
    assert first == Reserved(request.request_id, account.customer_id, Mils(245), Mils(755))
    assert desk.do(request) == first
    assert desk.settle(request.request_id, 10) == Settled(request.request_id, Mils(50), Mils(195), Mils(950))


def test_a_quote_binds_until_the_moment_it_expires_and_for_more_than_one_request(desk: Desk):
    account = desk.account(1000)
    quote = quoted(desk, account)
    desk.clock.advance(VALID_S - 0.001)
    request = by_quote(desk, account, quote)
    assert isinstance(desk.do(request), Reserved)
    assert isinstance(desk.do(by_quote(desk, account, quote)), Reserved)
    desk.clock.advance(0.001)
    assert desk.do(by_quote(desk, account, quote)) == QuoteRefused("the quote has expired")
    assert isinstance(desk.do(request), Reserved)  # its own answer again
    assert desk.balance(account) == 510


@pytest.mark.parametrize("change", [{"frames": 48}, {"model": "dreamdojo-2b"}, {"model": ""}])
def test_other_work_is_not_what_was_quoted(desk: Desk, change: dict[str, object]):
    account = desk.account(1000)
    request = replace(by_quote(desk, account, quoted(desk, account)), **change)
    assert desk.do(request) == QuoteRefused("the quote is for 49 frames of tiny-pusher")
    assert desk.balance(account) == 1000


def test_a_quote_is_its_customers_own_and_an_unknown_one_is_refused(desk: Desk):
    ann, bob = desk.account(1000), desk.account(1000)
    quote = quoted(desk, ann)
    assert desk.do(by_quote(desk, bob, quote)) == QuoteRefused("there is no such quote")
    assert desk.do(by_quote(desk, ann, replace(quote, quote_id="quo_x"))) == QuoteRefused("there is no such quote")


def test_a_quote_made_in_the_same_batch_binds(desk: Desk):
    account = desk.account(1000)
    quote = Quote(mint_quote_id(), account.key.key_id, "tiny-pusher", 49, Mils(5), 1, VALID_S)
    answers = desk.ledger.apply([quote, by_quote(desk, account, quote)])
    assert [type(answer) for answer in answers] == [Quoted, Reserved]


def test_the_same_id_for_another_quote_is_rejected(desk: Desk):
    account = desk.account(1000)
    assert isinstance(desk.do(replace(quoted(desk, account), frames=50)), Rejected)


def test_a_reading_key_may_ask_and_a_revoked_one_may_not(desk: Desk):
    account = desk.account(1000)
    desk.do(SetKeyTerms(account.key.key_id, KeyTerms(scope="read")))
    quote = quoted(desk, account)
    assert isinstance(desk.do(by_quote(desk, account, quote)), ScopeRefused)
    desk.do(RevokeKey(account.key.key_id))
    assert desk.do(replace(quote, quote_id=mint_quote_id())) == KeyRefused()


def test_a_repeated_request_is_recognised_though_its_quote_has_expired(desk: Desk):
    account = desk.account(1000)
    request = by_quote(desk, account, quoted(desk, account))
    request = replace(request, idempotency_key="k", payload_sha256="0" * 64)
    desk.do(request)
    desk.clock.advance(VALID_S)
    answer = desk.do(replace(request, request_id=mint_request_id()))
    assert type(answer).__name__ == "Repeated"


@pytest.mark.parametrize(
    "change",
    [{"quote_id": ""}, {"model": ""}, {"frames": 0}, {"mils_per_frame": 0.5}, {"price_version": -1}, {"valid_s": 0}],
)
def test_a_malformed_quote_is_rejected(desk: Desk, change: dict[str, object]):
    account = desk.account(0)
    quote = Quote("quo_1", account.key.key_id, "tiny-pusher", 49, Mils(5), 1, VALID_S)
    assert isinstance(desk.do(replace(quote, **change)), Rejected)
