"""A modest share of what `python -m benchmarks.ledger_simulation` runs; a failure names the seed that reproduces it."""

import pytest

from benchmarks.ledger_simulation import simulate

OPERATIONS = 15_000
FAULTS = {"before commit", "after commit", "Fenced"}
OUTCOMES = {"Reserved", "Repeated", "IdempotencyConflict", "Settled", "InsufficientCredits", "KeyRefused", "Granted"}


@pytest.mark.parametrize("seed", [1, 20, 300])
def test_a_simulated_history_with_faults_keeps_every_promise(seed: int):
    simulation = simulate(seed, OPERATIONS)
    assert simulation.operations >= OPERATIONS
    assert set(simulation.seen) >= FAULTS | OUTCOMES


def test_a_seed_is_a_whole_history():
    first, second = simulate(7, 2_000), simulate(7, 2_000)
    assert first.seen == second.seen
    assert first.database.entries == second.database.entries
