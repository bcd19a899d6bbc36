"""What the ledger tells of a commit is what it wrote, once, whoever counts it."""

import pytest

from billing.commands import CustomerId, ExpireLeases, KeyId, Settle
from billing.core.book import Key, Wallet
from billing.ledger import Commit
from billing.money import Mils
from tests.billing.conftest import Clock, Desk


@pytest.fixture
def commits(desk: Desk) -> list[Commit]:
    told: list[Commit] = []
    desk.ledger._on_commit = told.append
    return told


def test_a_settlement_is_told_once_however_often_it_is_asked_for(desk: Desk, commits: list[Commit]):
    account = desk.account(1000)
    request_id = desk.reserved(account)
    commits.clear()
    for _ in range(2):
        desk.settle(request_id, 40, "client left")
    assert [each.settled for each in commits] == [(("", 40, 200, 45),), ()]
    assert [each.entries for each in commits] == [("refund",), ()]


def test_what_one_batch_reserves_and_settles_is_told_with_it(desk: Desk, commits: list[Commit]):
    command = desk.reserve(desk.account(1000))
    commits.clear()
    desk.ledger.apply([command, Settle(command.request_id, 49, ""), Settle(command.request_id, 49, "")])
    (commit,) = commits
    assert (commit.num_commands, commit.entries, commit.settled) == (3, ("debit",), (("", 49, 245, 0),))
    assert commit.took_s > 0


def test_an_expired_lease_is_told_as_a_refund(desk: Desk, clock: Clock, commits: list[Commit]):
    desk.reserved(desk.account(1000), lease_s=60.0)
    clock.advance(61.0)
    commits.clear()
    desk.do(ExpireLeases())
    assert [each.settled for each in commits] == [(("", 0, 0, 245),)]


class Counted(str):
    """An id that tells how often one of its kind was looked at."""

    looked_at = 0

    def __hash__(self) -> int:
        Counted.looked_at += 1
        return super().__hash__()


def test_a_batch_looks_at_no_customer_but_its_own_however_many_the_writer_remembers(desk: Desk):
    account = desk.account(1000)
    desk.reserved(account)
    book = desk.ledger._book
    for number in range(10):
        customer_id, key_id = CustomerId(Counted(f"cus_{number}")), KeyId(Counted(f"key_{number}"))
        book.add_wallet(Wallet(customer_id, Counted(f"name_{number}"), 0, Mils(0), 0.0))
        book.add_key(Key(key_id, Counted(f"{number:064x}"), "0000", customer_id, 1.0, 1, 0.0, 0, Mils(0)))
    assert Counted.looked_at > 0
    Counted.looked_at = 0
    desk.settle(desk.reserved(account), 40)
    assert Counted.looked_at == 0
