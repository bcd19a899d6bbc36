"""The writer finds a request by its id: a batch costs the same however many requests its customer has or had."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, text

from billing.commands import Heartbeat, Settle
from billing.store import WriterConnection, ask_fence
from tests.billing.conftest import Desk, told_of_statements
from tests.support.databases import Databases

FOREIGN_KEYS = """
    SELECT conname,
      ARRAY(SELECT attname FROM unnest(confkey) WITH ORDINALITY AS key (number, place)
        JOIN pg_attribute ON attrelid = confrelid AND attnum = number ORDER BY place),
      ARRAY(SELECT format_type(atttypid, NULL) FROM unnest(confkey) WITH ORDINALITY AS key (number, place)
        JOIN pg_attribute ON attrelid = confrelid AND attnum = number ORDER BY place)
    FROM pg_constraint WHERE contype = 'f' AND confrelid = 'reservation'::regclass
    """


@pytest.fixture
def engine(databases: Databases) -> Iterator[Engine]:
    with databases.migrated(unused=True) as engine:
        yield engine


@pytest.fixture(params=["young", "settled", "analysed"])
def desk(request: pytest.FixtureRequest, desk: Desk) -> Desk:
    """A ledger with no request yet; with some, all settled; and with statistics that say so."""
    if request.param != "young":
        account = desk.account(credits_mils=1_000_000)
        requests = [desk.reserve(account) for _ in range(500)]
        desk.ledger.apply(requests)
        desk.ledger.apply([Settle(each.request_id, 20, "") for each in requests])
    if request.param == "analysed":
        with desk.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("ANALYZE"))
    return desk


def test_a_batch_finds_its_requests_by_their_ids(desk: Desk) -> None:
    account = desk.account(credits_mils=1_000_000)
    before, now = ([desk.reserve(account) for _ in range(100)] for _ in range(2))
    desk.ledger.apply(before)
    commands = [
        Heartbeat(tuple(each.request_id for each in before), 3_600.0),
        *(Settle(each.request_id, 20, "") for each in before),
        *now,
    ]
    asked: list[tuple[str, Any]] = []

    def tell(statement: str, parameters: Any) -> None:
        if "reservation" in statement:
            asked.append((statement, parameters))

    successor = desk.new_ledger()  # it has everything yet to read
    with told_of_statements(tell):
        successor.apply(commands)
    wanted = ("SELECT", "INSERT INTO reservation", "UPDATE reservation SET lease", "UPDATE reservation SET captured")
    for kind in wanted:
        assert any(statement.startswith(kind) for statement, _ in asked), kind
    explain = "EXPLAIN QUERY PLAN " if desk.engine.dialect.name == "sqlite" else "EXPLAIN "
    connection = WriterConnection(desk.engine)
    with connection.transaction():
        ask_fence(connection)
        for statement, parameters in asked:
            plan = "\n".join(str(row[-1]) for row in connection.execute(explain + statement, parameters))
            assert "ix_reservation" not in plan, f"{statement}\n{plan}"


def test_a_statement_is_planned_once_and_not_for_its_parameters(desk: Desk) -> None:
    if desk.engine.dialect.name == "sqlite":  # it knows no other plans
        return
    command = desk.reserve(desk.account(credits_mils=1_000_000))
    successor = desk.new_ledger()
    successor.apply([command])
    with successor._connection.transaction(runs_ahead=False):
        prepared = successor._connection.execute(
            "SELECT statement, custom_plans FROM pg_prepared_statements"
        ).fetchall()
    plans = {statement: custom for statement, custom in prepared if statement.startswith("INSERT")}
    assert {statement.split()[2] for statement in plans} >= {"reservation", "entry"}
    assert set(plans.values()) == {0}


def test_a_foreign_key_finds_its_request_by_the_id(desk: Desk) -> None:
    """SQLite uses the key's own index and no other; PostgreSQL plans the query that is put here."""
    if desk.engine.dialect.name == "sqlite":
        return
    connection = WriterConnection(desk.engine)
    with connection.transaction(runs_ahead=False):
        keys = connection.execute(FOREIGN_KEYS).fetchall()
        assert "fk_entry_reservation" in {key[0] for key in keys}
        ask_fence(connection)
        connection.execute("SET LOCAL plan_cache_mode = force_generic_plan")
        for name, columns, types in keys:
            found = " AND ".join(f"{column} = ${place}" for place, column in enumerate(columns, 1))
            look_up = f"SELECT 1 FROM ONLY reservation x WHERE {found} FOR KEY SHARE OF x"
            connection.execute(f"PREPARE {name} ({', '.join(types)}) AS {look_up}")
            nothing = ", ".join(["NULL"] * len(types))
            plan = "\n".join(row[0] for row in connection.execute(f"EXPLAIN EXECUTE {name} ({nothing})"))
            assert "ix_reservation" not in plan, f"{look_up}\n{plan}"
