"""A modest share of what `python -m benchmarks.ledger_simulation` runs; a failure names the seed that reproduces it."""

from typing import Any

import pytest

from benchmarks.ledger_oracle import Oracle
from benchmarks.ledger_simulation import Database, Writer, simulate
from billing.commands import Command, Outcome
from billing.core import Book
from billing.invariants import audit
from tests.billing.conftest import Clock, Desk
from tests.support.databases import Databases

OPERATIONS = 15_000
FAULTS = {"before commit", "after commit", "Fenced"}
OUTCOMES = {"Reserved", "Repeated", "IdempotencyConflict", "Settled", "InsufficientCredits", "KeyRefused", "Granted"}
ACCOUNTS = {"Quoted", "QuoteRefused", "Credited", "Reversed", "Transferred", "CreditLineSet", "StatementClosed"}
ACCOUNTS |= {"MemberSet", "BudgetExceeded", "PriceAdded", "Rejected"}


@pytest.mark.parametrize("seed", [1, 20, 300])
def test_a_simulated_history_with_faults_keeps_every_promise(seed: int):
    simulation = simulate(seed, OPERATIONS)
    assert simulation.operations >= OPERATIONS
    assert set(simulation.seen) >= FAULTS | OUTCOMES | ACCOUNTS
    assert any(simulation.database.drawn.values())
    assert simulation.database.moved["debt: shortage"] >= -simulation.database.moved["debt: repayment"] > 0


def test_a_seed_is_a_whole_history():
    first, second = simulate(7, 2_000), simulate(7, 2_000)
    assert first.seen == second.seen
    assert first.database.entries == second.database.entries


def test_a_simulated_history_is_answered_alike_by_a_real_database(databases: Databases, monkeypatch: Any):
    """So the simulated database loads and refuses what the real ones do."""
    history: list[tuple[float, list[tuple[Command, Outcome]] | None]] = []
    commit, disputes, take_over = Database.commit, Oracle.disputes, Writer.take_over

    def recorded_commit(database: Database, book: Book, epoch: int) -> None:
        history.append((book.now, []))
        commit(database, book, epoch)

    def recorded_answer(oracle: Oracle, command: Command, outcome: Outcome, ts: float) -> Outcome | None:
        answers = history[-1][1]
        assert answers is not None
        answers.append((command, outcome))
        return disputes(oracle, command, outcome, ts)

    def recorded_take_over(writer: Writer, now: float) -> None:
        history.append((now, None))
        take_over(writer, now)

    monkeypatch.setattr(Database, "commit", recorded_commit)
    monkeypatch.setattr(Oracle, "disputes", recorded_answer)
    monkeypatch.setattr(Writer, "take_over", recorded_take_over)
    simulation = simulate(5, 4_000 if databases.kind == "sqlite" else 1_500)

    clock = Clock()
    with databases.migrated() as engine:
        desk = Desk(engine, clock)
        for now, answers in history:
            clock.now = now
            if answers is None:
                desk.ledger = desk.new_ledger()
                continue
            outcomes = desk.ledger.apply([command for command, _ in answers])
            assert outcomes == [outcome for _, outcome in answers]
        assert audit(engine) == []
        balances = {each: desk.reader.balance(each) for each in simulation.database.wallets}
        assert balances == {each: wallet.balance for each, wallet in simulation.database.wallets.items()}
