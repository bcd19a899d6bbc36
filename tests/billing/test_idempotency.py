"""A request that comes again is recognised: by its key, or for a while by its payload. It is charged once."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from sqlalchemy import func, select

from billing.commands import (
    ExpireLeases,
    Grant,
    IdempotencyConflict,
    InsufficientCredits,
    KeyCreated,
    KeyRefused,
    Rejected,
    Repeated,
    Reserve,
    Reserved,
    RevokeKey,
    Settle,
)
from billing.core import Book, reservations
from billing.errors import Fenced
from billing.keys import mint_request_id
from billing.money import Mils
from billing.store import WriterConnection, load
from billing.store.load import MAX_EXAMINED_PER_PAYLOAD
from billing.tables import submission
from tests.billing.conftest import Account, Clock, Desk

WORK, OTHER_WORK = "a" * 64, "b" * 64
WINDOW_S = 60.0
KEY_MEMORY_S = 24 * 3600.0
"""What customers are promised, said again: the ledger must not forget earlier."""


def keyed(desk: Desk, account: Account, key: str = "key-1", payload: str = WORK, frames: int = 49) -> Reserve:
    return replace(desk.reserve(account, frames), idempotency_key=key, payload_sha256=payload)


def unkeyed(desk: Desk, account: Account, payload: str = WORK, window_s: float = WINDOW_S) -> Reserve:
    return replace(desk.reserve(account), payload_sha256=payload, dedupe_window_s=window_s)


def again(command: Reserve) -> Reserve:
    """The same request as another ingress would send it: under an id of its own."""
    return replace(command, request_id=mint_request_id())


def num_submissions(desk: Desk) -> int:
    with desk.engine.connect() as connection:
        return connection.execute(select(func.count()).select_from(submission)).scalar_one()


class TestKeys:
    def test_the_same_key_and_payload_is_the_first_request_and_not_charged_again(self, desk: Desk):
        account = desk.account(1000)
        first = keyed(desk, account)
        assert isinstance(desk.do(first), Reserved)
        created_at = desk.clock.now
        desk.clock.advance(5)
        assert desk.do(again(first)) == Repeated(first.request_id, "open", Mils(0), created_at)
        desk.settle(first.request_id, 49)
        assert desk.do(again(first)) == Repeated(first.request_id, "settled", Mils(245), created_at)
        assert desk.rows(account)[1:] == [("debit", -245, first.request_id)]

    def test_another_payload_under_the_key_is_a_conflict_and_the_first_is_untouched(self, desk: Desk):
        account = desk.account(1000)
        first = keyed(desk, account)
        desk.do(first)
        assert desk.do(keyed(desk, account, payload=OTHER_WORK)) == IdempotencyConflict(first.request_id)
        desk.settle(first.request_id, 49)
        assert desk.do(keyed(desk, account, payload=OTHER_WORK)) == IdempotencyConflict(first.request_id)
        assert desk.balance(account) == 755

    def test_the_payload_decides_not_the_number_of_frames(self, desk: Desk):
        account = desk.account(1000)
        first = keyed(desk, account, frames=49)
        desk.do(first)
        assert isinstance(desk.do(keyed(desk, account, frames=48)), Repeated)

    def test_keys_are_each_customers_own_whichever_api_key_sends_them(self, desk: Desk):
        ann, also_ann, bob = desk.account(1000, name="ann"), desk.account(0, name="ann"), desk.account(1000)
        first = keyed(desk, ann)
        desk.do(first)
        assert isinstance(desk.do(keyed(desk, also_ann)), Repeated)
        assert isinstance(desk.do(keyed(desk, bob)), Reserved)

    def test_other_keys_are_other_requests_though_the_payload_is_the_same(self, desk: Desk):
        account = desk.account(1000)
        assert isinstance(desk.do(keyed(desk, account, "key-1")), Reserved)
        assert isinstance(desk.do(keyed(desk, account, "key-2")), Reserved)
        assert desk.balance(account) == 510

    def test_a_first_attempt_that_was_refunded_in_full_gives_the_key_back(self, desk: Desk):
        account = desk.account(1000)
        attempts = [keyed(desk, account)]
        for _ in range(3):
            assert isinstance(desk.do(attempts[-1]), Reserved)
            desk.settle(attempts[-1].request_id, 0, "engine failed")
            attempts.append(again(attempts[-1]))
        assert isinstance(desk.do(attempts[-1]), Reserved)
        desk.settle(attempts[-1].request_id, 49)
        last = desk.do(again(attempts[-1]))
        assert isinstance(last, Repeated)
        assert last.request_id == attempts[-1].request_id
        assert num_submissions(desk) == 4
        assert desk.balance(account) == 755

    def test_a_part_that_was_delivered_keeps_the_key(self, desk: Desk):
        account = desk.account(1000)
        first = keyed(desk, account)
        desk.do(first)
        desk.settle(first.request_id, 1, "engine failed")
        assert desk.do(again(first)) == Repeated(first.request_id, "settled", Mils(5), desk.clock.now)

    def test_a_refunded_attempt_still_reserves_the_key_for_its_payload(self, desk: Desk):
        account = desk.account(1000)
        first = keyed(desk, account)
        desk.do(first)
        desk.settle(first.request_id, 0)
        assert desk.do(keyed(desk, account, payload=OTHER_WORK)) == IdempotencyConflict(first.request_id)

    def test_a_retry_that_cannot_be_paid_leaves_the_key_where_it_was(self, desk: Desk):
        account = desk.account(245)
        first = keyed(desk, account)
        desk.do(first)
        desk.settle(first.request_id, 0)
        desk.do(desk.reserve(account, frames=1))
        second = again(first)
        assert isinstance(desk.do(second), InsufficientCredits)
        desk.do(Grant(account.customer_id, Mils(5), "adm_5", ""))
        assert isinstance(desk.do(second), Reserved)

    def test_a_repetition_costs_nothing_and_needs_no_balance(self, desk: Desk):
        account = desk.account(245)
        first = keyed(desk, account)
        desk.do(first)
        assert isinstance(desk.do(again(first)), Repeated)

    def test_a_refused_request_takes_no_key(self, desk: Desk):
        account = desk.account(0)
        assert isinstance(desk.do(keyed(desk, account)), InsufficientCredits)
        assert num_submissions(desk) == 0

    def test_a_revoked_api_key_is_refused_even_a_repetition(self, desk: Desk):
        account = desk.account(1000)
        first = keyed(desk, account)
        desk.do(first)
        desk.do(RevokeKey(account.key.key_id))
        assert desk.do(again(first)) == KeyRefused()

    def test_the_same_command_again_is_not_a_repetition_but_its_own_answer(self, desk: Desk):
        account = desk.account(1000)
        first = keyed(desk, account)
        reserved = desk.do(first)
        assert desk.do(first) == reserved
        assert desk.ledger.apply([first, again(first), first])[::2] == [reserved, reserved]

    def test_the_same_id_under_another_key_is_rejected(self, desk: Desk):
        account = desk.account(1000)
        first = keyed(desk, account)
        desk.do(first)
        assert isinstance(desk.do(replace(first, idempotency_key="key-2")), Rejected)
        assert isinstance(desk.do(replace(first, payload_sha256=OTHER_WORK)), Rejected)

    def test_one_batch_decides_as_several_would(self, desk: Desk):
        account = desk.account(1000)
        first = keyed(desk, account)
        second, third = again(first), again(first)
        answers = desk.ledger.apply(
            [
                first,
                second,
                keyed(desk, account, payload=OTHER_WORK),
                Settle(first.request_id, 0, "engine failed"),
                second,
                third,
            ]
        )
        assert [type(answer) for answer in answers[:3]] == [Reserved, Repeated, IdempotencyConflict]
        assert isinstance(answers[4], Reserved)
        assert answers[5] == Repeated(second.request_id, "open", Mils(0), desk.clock.now)
        assert isinstance(desk.do(third), Repeated)

    def test_an_api_key_made_in_the_same_batch_sees_its_customers_keys(self, desk: Desk):
        account = desk.account(1000, name="ann")
        by_key, by_payload = keyed(desk, account), unkeyed(desk, account, OTHER_WORK)
        desk.ledger.apply([by_key, by_payload])
        new_key, _ = desk.key("ann")
        answers = desk.ledger.apply(
            [
                new_key,
                replace(again(by_key), key_id=new_key.key_id),
                replace(again(by_payload), key_id=new_key.key_id),
            ]
        )
        assert [type(answer) for answer in answers] == [KeyCreated, Repeated, Repeated]

    def test_50_threads_with_one_key_reserve_once(self, desk: Desk):
        account = desk.account(100_000)
        first = keyed(desk, account)
        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(desk.do, [again(first) for _ in range(50)]))
        [reserved] = [answer for answer in answers if isinstance(answer, Reserved)]
        assert {answer.request_id for answer in answers if isinstance(answer, Repeated)} == {reserved.request_id}
        assert desk.balance(account) == 100_000 - 245

    def test_writers_that_keep_taking_over_reserve_once(self, desk: Desk):
        account = desk.account(100_000)
        first = keyed(desk, account)

        def persist(command: Reserve) -> object:
            ledger = desk.new_ledger()
            while True:
                try:
                    return ledger.apply([command])[0]
                except Fenced:
                    ledger.take_over()

        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(persist, [again(first) for _ in range(8)]))
        assert sorted(type(answer).__name__ for answer in answers) == ["Repeated"] * 7 + ["Reserved"]
        desk.ledger = desk.new_ledger()
        assert isinstance(desk.do(again(first)), Repeated)


class TestPayloads:
    def test_the_same_payload_within_the_window_is_the_first_request(self, desk: Desk):
        account = desk.account(1000)
        first = unkeyed(desk, account)
        desk.do(first)
        created_at = desk.clock.now
        desk.clock.advance(WINDOW_S)
        assert desk.do(again(first)) == Repeated(first.request_id, "open", Mils(0), created_at)

    def test_the_first_request_is_joined_for_as_long_as_it_is_open(self, desk: Desk):
        account = desk.account(1000)
        first = replace(unkeyed(desk, account), lease_s=3 * KEY_MEMORY_S)
        desk.do(first)
        created_at = desk.clock.now
        desk.clock.advance(2 * KEY_MEMORY_S)
        desk.do(ExpireLeases())
        assert desk.do(again(first)) == Repeated(first.request_id, "open", Mils(0), created_at)
        desk.ledger = desk.new_ledger()
        assert desk.do(again(first)) == Repeated(first.request_id, "open", Mils(0), created_at)

    def test_the_window_begins_with_the_settlement(self, desk: Desk):
        account = desk.account(1000)
        first = replace(unkeyed(desk, account), lease_s=KEY_MEMORY_S)
        desk.do(first)
        created_at = desk.clock.now
        desk.clock.advance(10 * WINDOW_S)
        desk.settle(first.request_id, 49)
        desk.clock.advance(WINDOW_S)
        assert desk.do(again(first)) == Repeated(first.request_id, "settled", Mils(245), created_at)
        desk.clock.advance(0.001)
        assert isinstance(desk.do(again(first)), Reserved)

    def test_a_moment_after_the_window_it_is_new_work(self, desk: Desk):
        account = desk.account(1000)
        first = unkeyed(desk, account)
        desk.do(first)
        desk.settle(first.request_id, 49)
        desk.clock.advance(WINDOW_S + 0.001)
        assert isinstance(desk.do(again(first)), Reserved)

    def test_each_command_of_a_batch_has_its_own_window(self, desk: Desk):
        account = desk.account(10_000)
        first = unkeyed(desk, account)
        desk.ledger.apply([first, Settle(first.request_id, 49, "")])
        desk.clock.advance(WINDOW_S / 2)
        short = unkeyed(desk, account, window_s=WINDOW_S / 4)
        answers = desk.ledger.apply([short, unkeyed(desk, account)])
        assert [type(answer) for answer in answers] == [Reserved, Repeated]

    def test_without_a_window_it_is_new_work(self, desk: Desk):
        account = desk.account(1000)
        desk.do(unkeyed(desk, account))
        assert isinstance(desk.do(unkeyed(desk, account, window_s=0.0)), Reserved)

    @pytest.mark.parametrize("delivered", [49, 1])
    def test_settled_work_that_was_paid_is_found(self, desk: Desk, delivered: int):
        account = desk.account(1000)
        first = unkeyed(desk, account)
        desk.do(first)
        desk.settle(first.request_id, delivered)
        assert desk.do(again(first)) == Repeated(first.request_id, "settled", Mils(delivered * 5), desk.clock.now)

    def test_refunded_work_does_not_stand_in_the_way(self, desk: Desk):
        account = desk.account(1000)
        first = unkeyed(desk, account)
        desk.do(first)
        desk.settle(first.request_id, 0)
        second = again(first)
        assert isinstance(desk.do(second), Reserved)
        answer = desk.do(again(first))
        assert isinstance(answer, Repeated)
        assert answer.request_id == second.request_id

    def test_a_keyed_request_that_comes_again_without_its_key_is_found(self, desk: Desk):
        """The public client sends a broken rollout again by another route, without the key."""
        account = desk.account(1000)
        first = keyed(desk, account)
        desk.do(first)
        answer = desk.do(unkeyed(desk, account))
        assert isinstance(answer, Repeated)
        assert answer.request_id == first.request_id

    def test_a_new_key_is_new_work_though_the_payload_was_sent_just_now(self, desk: Desk):
        account = desk.account(1000)
        desk.do(unkeyed(desk, account))
        assert isinstance(desk.do(replace(keyed(desk, account), dedupe_window_s=WINDOW_S)), Reserved)

    def test_other_payloads_and_other_customers_are_other_work(self, desk: Desk):
        ann, bob = desk.account(1000), desk.account(1000)
        desk.do(unkeyed(desk, ann))
        assert isinstance(desk.do(unkeyed(desk, ann, OTHER_WORK)), Reserved)
        assert isinstance(desk.do(unkeyed(desk, bob)), Reserved)

    def test_the_newest_request_that_stands_is_found_whatever_it_was_sent_under(self, desk: Desk):
        account = desk.account(10_000)
        older, newer, refunded = (keyed(desk, account, f"key-{number}") for number in range(3))
        desk.ledger.apply([older, newer, refunded, Settle(refunded.request_id, 0, "")])
        desk.ledger.apply([Settle(newer.request_id, 49, "")])
        answer = desk.do(unkeyed(desk, account))
        assert isinstance(answer, Repeated)
        assert answer.request_id == newer.request_id
        desk.clock.advance(WINDOW_S + 1)
        answer = desk.do(unkeyed(desk, account))
        assert isinstance(answer, Repeated)
        assert answer.request_id == older.request_id

    def test_however_many_keys_had_the_payload_one_request_is_read(self, desk: Desk, clock: Clock):
        account = desk.account(100_000)
        desk.ledger.apply([keyed(desk, account, f"key-{number}") for number in range(50)])
        book = Book()
        book.begin(clock.now, clock.now, 1)
        connection = WriterConnection(desk.engine)
        with connection.transaction():
            load(connection, [unkeyed(desk, account)], book)
        assert len(book.submissions) == len(book.reservations) == 1

    def test_only_the_newest_of_a_payload_are_compared(self, desk: Desk):
        account = desk.account(10_000)
        first = unkeyed(desk, account)
        desk.do(first)
        desk.clock.advance(1)
        refunded = [keyed(desk, account, f"key-{number}") for number in range(MAX_EXAMINED_PER_PAYLOAD)]
        for some, found in ((refunded[:-1], Repeated), (refunded[-1:], Reserved)):
            desk.ledger.apply([step for each in some for step in (each, Settle(each.request_id, 0, ""))])
            assert isinstance(desk.do(again(first)), found)

    def test_50_threads_with_one_payload_reserve_once(self, desk: Desk):
        account = desk.account(100_000)
        first = unkeyed(desk, account)
        with ThreadPoolExecutor(50) as pool:
            answers = list(pool.map(desk.do, [again(first) for _ in range(50)]))
        assert sorted(type(answer).__name__ for answer in answers) == ["Repeated"] * 49 + ["Reserved"]


class TestForgetting:
    def test_a_key_is_remembered_for_a_day_and_then_forgotten(self, desk: Desk):
        account = desk.account(1000)
        first = keyed(desk, account)
        desk.do(first)
        desk.settle(first.request_id, 49)
        desk.clock.advance(KEY_MEMORY_S - 1)
        desk.do(ExpireLeases())
        assert isinstance(desk.do(again(first)), Repeated)
        desk.clock.advance(1)
        desk.do(ExpireLeases())
        assert num_submissions(desk) == 0
        assert isinstance(desk.do(again(first)), Reserved)

    def test_work_that_is_open_is_never_forgotten(self, desk: Desk):
        account = desk.account(1000)
        first = replace(keyed(desk, account), lease_s=3 * KEY_MEMORY_S)
        desk.do(first)
        desk.clock.advance(2 * KEY_MEMORY_S)
        desk.do(ExpireLeases())
        assert isinstance(desk.do(again(first)), Repeated)

    def test_a_sweep_forgets_a_bounded_number_the_oldest_first(self, desk: Desk, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(reservations, "MAX_FORGOTTEN_PER_SWEEP", 2)
        account = desk.account(1000)
        commands = [keyed(desk, account, f"key-{n}", frames=1) for n in range(5)]
        for command in commands:
            desk.do(command)
            desk.settle(command.request_id, 1)
            desk.clock.advance(1)
        desk.clock.advance(KEY_MEMORY_S)
        for left in (3, 1, 0, 0):
            desk.do(ExpireLeases())
            assert num_submissions(desk) == left
            if left:
                assert isinstance(desk.do(again(commands[-1])), Repeated)

    def test_a_key_that_is_forgotten_can_be_taken_in_the_same_batch(self, desk: Desk):
        account = desk.account(1000)
        first = keyed(desk, account)
        desk.do(first)
        desk.settle(first.request_id, 49)
        desk.clock.advance(KEY_MEMORY_S)
        answers = desk.ledger.apply([again(first), ExpireLeases(), again(first)])
        assert isinstance(answers[0], Repeated)
        assert isinstance(answers[2], Reserved)

    def test_the_command_itself_is_answered_the_same_when_its_key_is_forgotten(self, desk: Desk):
        account = desk.account(1000)
        first = keyed(desk, account)
        reserved = desk.do(first)
        desk.settle(first.request_id, 49)
        desk.clock.advance(KEY_MEMORY_S)
        desk.do(ExpireLeases())
        assert desk.do(first) == reserved
