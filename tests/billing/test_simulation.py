"""A modest share of what `python -m benchmarks.ledger_simulation` runs; a failure names the seed that reproduces it."""

import pytest

from benchmarks.ledger_simulation import simulate

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
