"""A database that a test is given holds nothing of the tests before it, though PostgreSQL's are used again."""

import pytest
from sqlalchemy import Engine, text

from billing.database import writer
from tests.billing.conftest import Clock, Desk
from tests.support.databases import MOST_ROWS, Databases

CHANGES = (
    "ALTER TABLE entry DISABLE TRIGGER USER",
    "DROP TRIGGER tr_entry_update ON entry",
    "DROP INDEX uq_entry_debit",
    "CREATE TABLE another (id int)",
    "ANALYZE alembic_version",
)


def contents(engine: Engine) -> dict[str, list[str]]:
    with engine.connect() as connection:
        tables = connection.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")).all()
        held = {table: connection.scalars(text(f"SELECT {table}::text FROM {table}")).all() for table in tables}
        held["sequences"] = connection.scalars(text("SELECT pg_sequences::text FROM pg_sequences")).all()
    return {table: sorted(rows) for table, rows in held.items()}


def name_after(databases: Databases, *statements: str) -> str | None:
    """Of a database in which that was done."""
    with databases.migrated() as engine:
        with writer(engine).begin() as connection:
            for statement in statements:
                connection.exec_driver_sql(statement)
        return engine.url.database


def test_a_used_database_is_used_again_and_holds_what_a_new_one_does(postgresql_databases: Databases) -> None:
    with postgresql_databases.migrated() as used:
        desk = Desk(used, Clock())
        desk.ran(desk.account(credits_mils=1_000))
        assert contents(used)["entry"]
    with postgresql_databases.migrated() as again, postgresql_databases.migrated(unused=True) as new:
        assert again.url.database == used.url.database != new.url.database
        assert contents(again) == contents(new)
        Desk(again, Clock()).account(credits_mils=1_000)


@pytest.mark.parametrize("change", CHANGES)
def test_a_database_whose_schema_was_changed_is_not_used_again(postgresql_databases: Databases, change: str) -> None:
    changed = name_after(postgresql_databases, change)
    with postgresql_databases.migrated() as other:
        assert other.url.database != changed


def test_a_database_that_held_many_rows_is_not_used_again(postgresql_databases: Databases) -> None:
    columns = "(customer_id, name, seq, balance_mils, created_at)"
    wallets = f"INSERT INTO wallet {columns} SELECT n, n, 0, 0, 0 FROM generate_series(0, {MOST_ROWS}) AS n"
    crowded = name_after(postgresql_databases, "SET session_replication_role = replica", wallets)
    with postgresql_databases.migrated() as other:
        assert other.url.database != crowded
