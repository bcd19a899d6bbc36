"""A few of the kills that `python -m benchmarks.ledger_chaos` does by the thousand."""

from sqlalchemy import Engine

from benchmarks.ledger_chaos import wreak

KILLS = 12


def test_killed_and_frozen_writers_lose_and_double_nothing(engine: Engine):
    assert wreak(engine, KILLS, seed=5)["kills"] == KILLS
