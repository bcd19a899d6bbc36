"""Opening and migrating: what works, and one clear line without secrets for what does not."""

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
from alembic import command as alembic
from alembic.config import Config
from sqlalchemy import Engine, text

from billing import database
from billing.database import migrate, open_database, writer
from billing.errors import DatabaseUnusable
from billing.job_tables import billing_metadata
from billing.migrations import versions
from billing.payments.tables import payments_metadata
from billing.triggers import POSTGRESQL, SQLITE
from tests.billing.conftest import Clock, Desk
from tests.support.databases import Databases


def schema(engine: Engine) -> dict[str, str]:
    """Every table, column, constraint, index, trigger and function, by what it is called."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            rows = connection.execute(text("SELECT type || ' ' || name, COALESCE(sql, '') FROM sqlite_master"))
        else:
            rows = connection.execute(
                text(
                    """
                    SELECT 'column ' || table_name || '.' || ordinal_position,
                      concat_ws(' ', column_name, data_type, is_nullable, column_default)
                    FROM information_schema.columns WHERE table_schema = 'public'
                    UNION ALL SELECT 'constraint ' || conname, conrelid::regclass || ' ' || pg_get_constraintdef(oid)
                    FROM pg_constraint WHERE connamespace = 'public'::regnamespace
                    UNION ALL SELECT 'index ' || indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'
                    UNION ALL SELECT 'trigger ' || tgname, pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
                    UNION ALL SELECT 'function ' || proname, pg_get_functiondef(oid)
                    FROM pg_proc WHERE pronamespace = 'public'::regnamespace
                    """
                )
            )
        return {name: _normal(definition) for name, definition in rows if "alembic_version" not in name}


def _normal(definition: str) -> str:
    """SQLite keeps a table's text, in which a column that was added later stands behind the constraints."""
    if not definition.startswith("CREATE TABLE"):
        return definition
    head, _, rest = definition.partition("(")
    body, _, options = rest.rpartition(")")
    parts = re.split(r",\s*(?![^()]*\))", body)
    return f"{head}({', '.join(sorted(part.strip() for part in parts))}){options}"


class TestMigrations:
    def test_the_migrated_schema_is_the_declared_one(self, engine: Engine, empty_url: str):
        declared = open_database(empty_url)
        with writer(declared).begin() as connection:
            billing_metadata.create_all(connection)
            payments_metadata.create_all(connection)
            for statement in SQLITE if connection.dialect.name == "sqlite" else POSTGRESQL:
                connection.execute(text(statement))
        assert schema(engine) == schema(declared)
        assert len(schema(engine)) > 20
        declared.dispose()

    @pytest.mark.parametrize("databases", ["postgresql"], indirect=True)
    @pytest.mark.parametrize(
        "change",
        [
            "ALTER TABLE entry DROP CONSTRAINT ck_entry_sum",
            "DROP TRIGGER tr_entry_update ON entry",
            "DROP INDEX uq_entry_debit; CREATE UNIQUE INDEX uq_entry_debit ON entry (public_id)",
            "ALTER TABLE entry ALTER COLUMN detail DROP NOT NULL",
        ],
    )
    def test_drift_would_be_seen(self, engine: Engine, change: str):
        before = schema(engine)
        with writer(engine).begin() as connection:
            for statement in change.split(";"):
                connection.execute(text(statement))
        assert schema(engine) != before

    def test_everything_in_the_schema_has_a_name(self):
        for table in (*billing_metadata.sorted_tables, *payments_metadata.sorted_tables):
            for constraint in table.constraints:
                assert constraint.name, constraint

    def test_migrating_again_changes_nothing(self, engine: Engine, clock: Clock):
        desk = Desk(engine, clock)
        account = desk.account(1000)
        before = schema(engine)
        migrate(engine)
        assert schema(engine) == before
        assert desk.balance(account) == 1000

    def test_processes_that_start_together_migrate_once(self, empty_url: str, clock: Clock):
        engines = [open_database(empty_url) for _ in range(4)]
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(migrate, engines))
        assert Desk(engines[0], clock).account(5)
        for engine in engines:
            engine.dispose()

    def test_a_newer_schema_is_refused_by_every_entrance(self, databases: Databases):
        with databases.migrated() as engine:
            with writer(engine).begin() as connection:
                connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
            with pytest.raises(DatabaseUnusable, match=r"newer version \(schema 9999\); upgrade this installation"):
                migrate(engine)
            with pytest.raises(DatabaseUnusable, match="newer version"):
                open_database(engine.url.render_as_string(hide_password=False))

    def test_revisions_are_numbered_in_order(self):
        files = sorted(file.name for file in Path(versions.__path__[0]).glob("[0-9]*.py"))
        assert [int(name[:4]) for name in files] == list(range(1, len(files) + 1))


@pytest.mark.parametrize("databases", ["sqlite"], indirect=True)
class TestSqlite:
    def test_a_connection_is_durable_and_checks_foreign_keys(self, engine: Engine):
        with engine.connect() as connection:
            pragmas = {
                name: connection.exec_driver_sql(f"PRAGMA {name}").scalar_one()
                for name in ("journal_mode", "synchronous", "foreign_keys", "recursive_triggers", "busy_timeout")
            }
        assert pragmas == {
            "journal_mode": "wal",
            "synchronous": 2,  # FULL
            "foreign_keys": 1,
            "recursive_triggers": 1,
            "busy_timeout": database.BUSY_TIMEOUT_S * 1000,
        }

    def test_every_table_is_strict(self, engine: Engine):
        with engine.connect() as connection:
            rows = connection.exec_driver_sql("PRAGMA table_list").mappings().all()
        strict = {row["name"] for row in rows if row["strict"]}
        assert strict >= {*billing_metadata.tables, *payments_metadata.tables}

    def test_a_file_is_made_and_found_again(self, tmp_path: Path, databases: Databases):
        for expected in (1, 2):
            engine = open_database(f"sqlite:///{tmp_path}/ledger.db")
            migrate(engine)
            assert Desk(engine, Clock()).ledger.take_over() == 2 * expected
            engine.dispose()

    def test_a_missing_directory(self, tmp_path: Path, databases: Databases):
        with pytest.raises(DatabaseUnusable, match="missing is not a directory"):
            open_database(f"sqlite:///{tmp_path}/missing/ledger.db")

    def test_an_unwritable_directory(self, tmp_path: Path, databases: Databases, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(database.os, "access", lambda path, mode: False)  # root may write everywhere
        with pytest.raises(DatabaseUnusable, match="not writable"):
            open_database(f"sqlite:///{tmp_path}/ledger.db")

    def test_a_file_that_is_not_a_database(self, tmp_path: Path, databases: Databases):
        file = tmp_path / "ledger.db"
        file.write_text("this is a diary, not a database\n" * 100)
        with pytest.raises(DatabaseUnusable, match=r"ledger\.db: file is not a database"):
            open_database(f"sqlite:///{file}")
        assert file.read_text().startswith("this is a diary")

    def test_a_directory_in_the_files_place(self, tmp_path: Path, databases: Databases):
        with pytest.raises(DatabaseUnusable, match="unable to open database file"):
            open_database(f"sqlite:///{tmp_path}")

    @pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
    def test_memory_is_refused_because_it_forgets(self, url: str, databases: Databases):
        with pytest.raises(DatabaseUnusable, match="in-memory"):
            open_database(url)


@pytest.mark.parametrize("databases", ["postgresql"], indirect=True)
class TestPostgresql:
    def test_a_connection_waits_for_the_disk_and_not_forever_for_a_lock(self, engine: Engine):
        with engine.connect() as connection:
            settings = {
                name: connection.exec_driver_sql(f"SHOW {name}").scalar_one()
                for name in ("synchronous_commit", "lock_timeout", "idle_in_transaction_session_timeout")
            }
        assert settings == {
            "synchronous_commit": "on",
            "lock_timeout": "10s",
            "idle_in_transaction_session_timeout": "5s",
        }

    def test_a_migration_may_compute_for_longer_than_a_writer(self, empty_url: str, monkeypatch: pytest.MonkeyPatch):
        def show(config: Config, _: str) -> None:
            connection = config.attributes["connection"]
            shown.append(connection.exec_driver_sql("SHOW idle_in_transaction_session_timeout").scalar_one())

        shown: list[str] = []
        monkeypatch.setattr(alembic, "upgrade", show)
        engine = open_database(empty_url)
        migrate(engine)
        engine.dispose()
        assert shown == ["1min"]

    def test_the_plain_scheme_works_too(self, engine: Engine):
        plain = engine.url.set(drivername="postgresql").render_as_string(hide_password=False)
        open_database(plain).dispose()

    def test_an_unknown_database_is_one_line(self, engine: Engine):
        url = engine.url.set(database="no_such_database").render_as_string(hide_password=False)
        with pytest.raises(DatabaseUnusable, match='"no_such_database" does not exist') as refusal:
            open_database(url)
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("scheme", ["postgresql", "postgresql+psycopg", "postgres"])
@pytest.mark.parametrize("where", ["ann:hunter2@127.0.0.1:1/money", "ann@127.0.0.1:1/money?password=hunter2"])
def test_an_unreachable_server_is_one_line_without_the_password(scheme: str, where: str):
    with pytest.raises(DatabaseUnusable, match=r"^cannot use PostgreSQL money at 127\.0\.0\.1:1: ") as refusal:
        open_database(f"{scheme}://{where}")
    assert "\n" not in str(refusal.value)
    assert "hunter2" not in str(refusal.value)
    assert refusal.value.__cause__ is None


def test_a_driver_that_repeats_the_password_is_not_repeated(monkeypatch: pytest.MonkeyPatch):
    def connect(*_: object, **__: object) -> None:
        raise psycopg.OperationalError("cannot connect with user=ann password=hunter2\nand more\nlines")

    monkeypatch.setattr(psycopg, "connect", connect)
    with pytest.raises(DatabaseUnusable, match=r"password=\*\*\*$"):
        open_database("postgresql://ann:hunter2@db/money")


@pytest.mark.parametrize("url", ["", "money", "mysql://ann:hunter2@db/money", "postgresql://ann:hunter2@db:x/money"])
def test_a_wrong_url_says_what_a_right_one_looks_like(url: str):
    with pytest.raises(DatabaseUnusable, match="sqlite:///") as refusal:
        open_database(url)
    assert "hunter2" not in str(refusal.value)
