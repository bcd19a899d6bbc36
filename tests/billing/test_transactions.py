"""One transaction per batch, one writer at a time, and nothing half done."""

import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from sqlalchemy import Engine
from sqlalchemy.exc import DBAPIError, OperationalError

from billing import database, store
from billing.commands import (
    Command,
    Grant,
    Granted,
    InsufficientCredits,
    KeyCreated,
    KeyRefused,
    Rejected,
    Reserved,
    RevokeKey,
    Settle,
    Settled,
)
from billing.core import book as books
from billing.database import writer
from billing.errors import Fenced, LedgerUnavailable
from billing.invariants import audit
from billing.ledger import Ledger
from billing.money import Mils
from billing.store import connection
from tests.billing.conftest import Clock, Desk, told_of_statements
from tests.support.databases import Databases


class TestBatches:
    def test_no_commands_are_no_transaction(self, desk: Desk):
        Ledger(desk.engine, desk.clock).take_over()  # the desk's ledger is fenced, and does not notice
        assert desk.ledger.apply([]) == []

    def test_answers_come_in_the_order_of_the_commands(self, desk: Desk):
        account = desk.account(1000)
        first, second = desk.reserve(account, frames=49), desk.reserve(account, frames=200)
        answers = desk.ledger.apply(
            [first, second, Settle(first.request_id, 0, ""), Grant(account.customer_id, Mils(5), "adm_1", "")]
        )
        assert answers == [
            Reserved(first.request_id, account.customer_id, Mils(245), Mils(755)),
            InsufficientCredits(Mils(755), Mils(1000)),
            Settled(first.request_id, Mils(0), Mils(245), Mils(1000)),
            Granted("adm_1", Mils(5), Mils(1005)),
        ]

    def test_a_key_can_be_made_used_and_revoked_in_one_batch(self, desk: Desk):
        command, _ = desk.key("ann", 245)
        request = desk.reserve(desk.account(name="bob"))
        request = type(request)(request.request_id, command.key_id, 49, Mils(5), "", 60)
        answers = desk.ledger.apply([command, command, request, RevokeKey(command.key_id)])
        assert answers[:3] == [
            KeyCreated(command.key_id, command.customer_id, Mils(245)),
            KeyCreated(command.key_id, command.customer_id, Mils(245)),
            Reserved(request.request_id, command.customer_id, Mils(245), Mils(0)),
        ]
        record = desk.reader.key_by_token_hash(command.sha256)
        assert record is not None
        assert record.revoked

    def test_the_same_command_twice_in_a_batch_has_one_effect(self, desk: Desk):
        account = desk.account(1000)
        command = desk.reserve(account)
        settle = Settle(command.request_id, 12, "engine_failed")
        first, second, settled, settled_again = desk.ledger.apply([command, command, settle, settle])
        assert (first, settled) == (second, settled_again)
        assert desk.balance(account) == 940

    def test_two_new_keys_of_one_new_name_in_a_batch_share_one_wallet(self, desk: Desk):
        first, second = desk.key("ann", 10)[0], desk.key("ann", 5)[0]
        answers = desk.ledger.apply([first, second])
        assert answers[1] == KeyCreated(second.key_id, first.customer_id, Mils(15))

    def test_a_batch_longer_than_one_query_can_ask_for(self, desk: Desk):
        account = desk.account(1200 * 5)
        commands = [desk.reserve(account, frames=1) for _ in range(1200)]
        answers = desk.ledger.apply(commands)
        assert all(isinstance(answer, Reserved) for answer in answers)
        assert desk.ledger.apply(commands) == answers

    def test_what_the_database_refuses_is_rejected_alone(self, desk: Desk, monkeypatch: pytest.MonkeyPatch):
        """The ledger forgets one reservation and would debit it again; the schema does not let it."""
        account = desk.account(1000)
        forgotten = desk.reserve(account)
        desk.do(forgotten)
        load = store.load

        def forgetful(connection: Any, commands: Any, book: books.Book) -> None:
            load(connection, commands, book)
            book.reservations.pop(forgotten.request_id, None)

        monkeypatch.setattr(store, "load", forgetful)
        neighbours = [desk.reserve(account, frames=1) for _ in range(80)]  # more than one statement holds
        answers = desk.ledger.apply([*neighbours[:70], forgotten, *neighbours[70:]])
        rejected = answers.pop(70)
        assert type(rejected) is Rejected
        assert {type(answer) for answer in answers} == {Reserved}
        assert desk.balance(account) == 755 - 80 * 5
        assert desk.ledger.apply(neighbours) == answers


class TestMemory:
    """What the writer keeps between commits: wallets, keys and open reservations."""

    def statements(self, desk: Desk, commands: list[Command]) -> list[str]:
        seen: list[str] = []
        with told_of_statements(lambda statement, _: seen.append(statement.split()[0])):
            desk.ledger.apply(commands)
        return seen

    def test_a_batch_over_what_it_knows_is_two_questions_and_few_statements_per_kind_of_row(self, desk: Desk):
        accounts = [desk.account(100_000) for _ in range(10)]
        reserves = [desk.reserve(account) for account in accounts * 20]
        desk.ledger.apply(reserves[:10])
        settles = [Settle(command.request_id, 49, "") for command in reserves[:10]]
        # SQLite takes 190 rows as 2 blocks of 64, 3 of 16, and 14 rows in one prepared statement.
        inserts = ["INSERT"] * (6 if desk.engine.dialect.name == "sqlite" else 1)
        # The fence, the requests' ids; reservations, settlements, entries, wallets.
        assert self.statements(desk, [*settles, *reserves[10:]]) == [
            *["SELECT", "SELECT"],
            *[*inserts, "UPDATE", *inserts, "UPDATE"],
        ]

    def test_settling_an_open_reservation_asks_for_nothing_but_the_fence(self, desk: Desk):
        request_id = desk.reserved(desk.account(1000))
        assert self.statements(desk, [Settle(request_id, 49, "")]) == ["SELECT", "UPDATE"]

    def test_it_is_bounded_and_what_it_forgot_is_loaded_again(self, desk: Desk, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(books, "MAX_REMEMBERED", 3)
        accounts = [desk.account(1000) for _ in range(5)]
        requests = [desk.reserved(account) for account in accounts]
        for request_id in requests:
            assert isinstance(desk.settle(request_id, 12), Settled)
        assert [desk.balance(account) for account in accounts] == [940] * 5
        assert len(desk.ledger._book.wallets) <= 3

    def test_what_a_failed_commit_decided_is_forgotten(self, desk: Desk, monkeypatch: pytest.MonkeyPatch):
        account = desk.account(1000)
        open_id = desk.reserved(account)
        commands = [desk.reserve(account, 1), Settle(open_id, 0, ""), RevokeKey(account.key.key_id)]

        def fail(_: Any) -> None:
            raise desk.engine.dialect.loaded_dbapi.OperationalError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(desk.engine.dialect, "do_commit", fail)
            with pytest.raises(LedgerUnavailable):
                desk.ledger.apply(commands)
        assert isinstance(desk.do(desk.reserve(account, 1)), Reserved)
        assert desk.settle(open_id, 49) == Settled(open_id, Mils(245), Mils(0), Mils(750))

    def test_what_a_successor_changed_is_read_after_taking_over_again(self, desk: Desk):
        account = desk.account(1000)
        desk.reserved(account, 1)
        other = desk.new_ledger()
        other.apply([RevokeKey(account.key.key_id)])  # moves no money, so nothing but the memory can be wrong
        desk.ledger.take_over()
        assert desk.do(desk.reserve(account, 1)) == KeyRefused()


class TestFencing:
    def test_a_ledger_that_never_took_over_writes_nothing(self, engine: Engine, clock: Clock):
        ledger = Ledger(engine, clock)
        with pytest.raises(Fenced, match="take_over"):
            ledger.apply([RevokeKey("key_1")])

    def test_every_take_over_has_a_higher_epoch(self, engine: Engine, clock: Clock):
        assert [Ledger(engine, clock).take_over() for _ in range(3)] == [1, 2, 3]

    def test_the_same_ledger_may_take_over_again(self, desk: Desk):
        desk.ledger.take_over()
        assert desk.account(5)

    def test_a_stale_writer_is_fenced_and_writes_nothing(self, desk: Desk):
        account = desk.account(1000)
        command = desk.reserve(account)
        stale, desk.ledger = desk.ledger, desk.new_ledger()
        for _ in range(2):
            with pytest.raises(Fenced) as refusal:
                stale.apply([command])
        assert (refusal.value.held_epoch, refusal.value.current_epoch) == (1, 2)
        assert desk.balance(account) == 1000
        assert isinstance(desk.do(command), Reserved)

    def test_what_the_stale_writer_committed_is_answered_by_its_successor(self, desk: Desk):
        account = desk.account(1000)
        command = desk.reserve(account)
        first = desk.do(command)
        desk.ledger = desk.new_ledger()
        assert desk.do(command) == first

    def test_writers_that_keep_taking_over_never_lose_or_double_an_acknowledged_reserve(self, desk: Desk):
        account = desk.account(60 * 5)
        commands = [desk.reserve(account, frames=1) for _ in range(60)]

        def persist(part: int) -> None:
            ledger = desk.new_ledger()
            for command in commands[part::3]:
                for _ in range(1000):
                    try:
                        [answer] = ledger.apply([command])
                        break
                    except Fenced:
                        ledger.take_over()
                assert isinstance(answer, Reserved)

        with ThreadPoolExecutor(3) as pool:
            list(pool.map(persist, range(3)))
        assert desk.balance(account) == 0
        assert len(desk.rows(account)) == 1 + 60

    @pytest.mark.parametrize("runs_ahead", [True, False])
    @pytest.mark.parametrize("databases", ["postgresql"], indirect=True)
    def test_a_writer_that_froze_inside_its_transaction_is_ended_by_the_server(
        self, desk: Desk, runs_ahead: bool, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(connection, "TRANSACTION_TIMEOUT_S", 1)
        account = desk.account(1000)
        frozen = store.WriterConnection(writer(desk.engine))
        lost = (desk.engine.dialect.loaded_dbapi.Error, DBAPIError)
        with contextlib.suppress(*lost), frozen.transaction(runs_ahead=runs_ahead):
            frozen.execute("SET LOCAL idle_in_transaction_session_timeout = '200ms'")
            assert store.ask_fence(frozen)() == 1
            desk.ledger = desk.new_ledger()  # waits for the fence until the server ends the frozen session
            assert isinstance(desk.do(desk.reserve(account)), Reserved)
            frozen.execute("SELECT 1").fetchone()
            pytest.fail("it went on")

    @pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
    def test_a_locked_file_is_reported_and_the_same_commands_work_later(
        self, databases: Databases, clock: Clock, monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(database, "BUSY_TIMEOUT_S", 0.01)
        with databases.migrated() as engine:
            desk = Desk(engine, clock)
            account = desk.account(1000)
            command = desk.reserve(account)
            with writer(engine).begin():
                with pytest.raises(LedgerUnavailable, match="locked"):
                    desk.do(command)
                with pytest.raises(LedgerUnavailable, match="locked"):
                    desk.new_ledger()
                assert desk.balance(account) == 1000  # readers do not wait for writers
            assert isinstance(desk.do(command), Reserved)


class Crash(Exception):
    """Nothing in the ledger knows it, so nothing swallows it."""


class TestCrashes:
    def test_a_crash_after_any_statement_leaves_nothing_behind(self, desk: Desk):
        account = desk.account(1000)
        open_id = desk.reserved(account, frames=49)
        new_key, _ = desk.key("bob", 77)
        request = desk.reserve(account)
        commands = [
            request,
            Settle(open_id, 12, "engine_failed"),
            new_key,
            RevokeKey(account.key.key_id),
            Grant(account.customer_id, Mils(9), "adm_1", ""),
        ]
        before = desk.rows(account)
        survived = 0
        while True:
            statements = 0

            def count(*_: Any, crash_after: int = survived + 1) -> None:
                nonlocal statements
                statements += 1
                if statements == crash_after:
                    raise Crash

            try:
                with told_of_statements(count):
                    answers = desk.ledger.apply(commands)
                break
            except Crash:
                survived += 1
            assert desk.rows(account) == before
            assert desk.reader.reservation(request.request_id) is None
            assert desk.reader.customer("bob") is None
            assert audit(desk.engine) == []
        assert survived > 10
        assert [type(answer) for answer in answers[:3]] == [Reserved, Settled, KeyCreated]
        assert desk.balance(account) == 1000 - 245 - 60 + 9

    def test_a_commit_whose_answer_is_lost_has_happened_once_when_asked_again(
        self, desk: Desk, monkeypatch: pytest.MonkeyPatch
    ):
        account = desk.account(1000)
        command = desk.reserve(account)
        commit = desk.engine.dialect.do_commit

        def lose_the_answer(connection: Any) -> None:
            commit(connection)
            raise desk.engine.dialect.loaded_dbapi.OperationalError("the connection was reset")

        with monkeypatch.context() as patch:
            patch.setattr(desk.engine.dialect, "do_commit", lose_the_answer)
            with pytest.raises(LedgerUnavailable, match="reset"):
                desk.do(command)
        first = desk.do(command)
        assert first == Reserved(command.request_id, account.customer_id, Mils(245), Mils(755))
        assert desk.do(command) == first
        assert len(desk.rows(account)) == 2

    def test_a_commit_that_did_not_happen_is_reported_and_can_be_sent_again(
        self, desk: Desk, monkeypatch: pytest.MonkeyPatch
    ):
        account = desk.account(1000)
        command = desk.reserve(account)

        def fail(_: Any) -> None:
            raise desk.engine.dialect.loaded_dbapi.OperationalError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(desk.engine.dialect, "do_commit", fail)
            with pytest.raises(LedgerUnavailable, match="full") as failure:
                desk.do(command)
        assert isinstance(failure.value.__cause__, OperationalError)
        assert desk.balance(account) == 1000
        assert isinstance(desk.do(command), Reserved)
