"""A little of what `python -m benchmarks.ledger_outages` does for minutes, on any server that tests may use."""

import random
import time

from sqlalchemy import Engine, create_engine, text

from benchmarks.ledger_outages import endure, locking


def test_a_database_that_goes_away_under_load_costs_nothing_and_doubles_nothing(engine: Engine):
    def locked(draw: random.Random) -> str:
        return locking(engine, (0.2,))(draw)

    def refusing(_: random.Random) -> str:
        """As a server that restarts: no connection survives, and none is made for a while."""
        name = engine.url.database
        admin = create_engine(engine.url.set(database="postgres"), isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.exec_driver_sql(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS false')
            connection.execute(
                text("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"), {"name": name}
            )
            time.sleep(0.2)
            connection.exec_driver_sql(f'ALTER DATABASE "{name}" ALLOW_CONNECTIONS true')
        admin.dispose()
        return "refused"

    outage = locked if engine.dialect.name == "sqlite" else refusing
    result = endure(engine, outage, outages=3, seed=1)
    assert result["acknowledged_rollouts"] > 0
    assert sum(result["outages"].values()) == 3
    if engine.dialect.name == "postgresql":
        assert result["writers_that_died"] >= 1
