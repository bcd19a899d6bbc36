"""Opens and migrates the ledger's database, SQLite or PostgreSQL, and says in one line why it cannot.

Knows connections and revisions; the tables themselves are in `billing.tables`.
"""

import os
import sqlite3
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnectionFree

from billing.errors import DatabaseUnusable

if TYPE_CHECKING:
    from alembic.config import Config

BUSY_TIMEOUT_S = 10
"""How long a SQLite connection waits for another process's write before it fails."""
WRITER_CACHE_KIB = 64 * 1024
"""Of a SQLite file's pages that the ledger's writer keeps at most: the indexes that every rollout touches fit."""
READER_CACHE_KIB = 8 * 1024
"""That any other connection keeps, of which a process may have fifteen."""
CHECKPOINT_PAGES = 4_096
"""SQLite's log is copied into its file by the commit that makes it this long, 16 MiB: rarer is faster, and each stalls
for longer."""
CONNECT_TIMEOUT_S = 5
LOCK_TIMEOUT_S = 10
"""How long a PostgreSQL statement waits for a lock, such as a predecessor's fence."""
IDLE_IN_TRANSACTION_TIMEOUT_S = 5
"""PostgreSQL ends a writer that froze inside its transaction, or its successor could never take over."""
MIGRATION_IDLE_TIMEOUT_S = 60
"""A migration computes between its statements: seconds, where others keep all processors busy."""
MIGRATION_LOCK = 0x0D2EA3
"""PostgreSQL advisory lock: two processes that start together migrate one after the other."""

_REVISIONS = frozenset(file.name[:4] for file in (Path(__file__).parent / "migrations/versions").glob("[0-9]*.py"))
"""Each file is named after its revision; they are one chain."""

POSTGRESQL_SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")

DATABASE_FAILURES = (DBAPIError, NoConnectionFree)
"""What a question raises when the database fails, or is so slow that others hold all connections of the pool."""


def open_database(url: str) -> Engine:
    """Connect to `sqlite:///path` or `postgresql+psycopg://...` and check that it can be used.

    A SQLite file is made if there is none; its directory is not. Nothing is migrated: see `migrate`.

    Raises:
        DatabaseUnusable: wrong URL, unreachable or refused, not a database, not writable, or made by a newer version.
    """
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise DatabaseUnusable(
            "the database URL cannot be read; use sqlite:///path/to/file or postgresql+psycopg://user@host/name"
        ) from None
    if parsed.drivername in ("sqlite", "sqlite+pysqlite"):
        engine = _sqlite_engine(parsed)
    elif parsed.drivername in POSTGRESQL_SCHEMES:
        engine = _postgresql_engine(parsed)
    else:
        raise DatabaseUnusable(f"{parsed.drivername} is not supported; use sqlite:///path or postgresql+psycopg://...")
    try:
        with engine.connect() as connection:
            _refuse_newer_schema(connection)
    except DBAPIError as error:
        engine.dispose()
        raise DatabaseUnusable(f"cannot use {_place(parsed)}: {_first_line(error, parsed)}") from None
    except DatabaseUnusable:
        engine.dispose()
        raise
    return engine


def migrate(engine: Engine) -> None:
    """Bring the schema to this version's, from an empty database or any older version. Safe to call at every start.

    Raises:
        DatabaseUnusable: the schema is newer than this version, or the database refused to change.
    """
    try:
        with engine.connect() as connection:
            if _revision(connection) == max(_REVISIONS):
                return
        # Only now: a ledger's successor has to be there within a second, and this costs it a tenth of one.
        from alembic import command as alembic

        with writer(engine).begin() as connection:
            if connection.dialect.name == "postgresql":
                connection.execute(
                    text(f"SET LOCAL idle_in_transaction_session_timeout = {MIGRATION_IDLE_TIMEOUT_S * 1000}")
                )
                connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": MIGRATION_LOCK})
            _refuse_newer_schema(connection)
            config = _alembic_config()
            config.attributes["connection"] = connection
            alembic.upgrade(config, "head")
    except DBAPIError as error:
        raise DatabaseUnusable(f"cannot migrate {_place(engine.url)}: {_first_line(error, engine.url)}") from None


def writer(engine: Engine) -> Engine:
    """The same pool, whose transactions take SQLite's write lock at once instead of when they first write."""
    return engine.execution_options(billing_writer=True)


def _sqlite_engine(url: URL) -> Engine:
    if url.database in (None, "", ":memory:"):
        raise DatabaseUnusable("an in-memory database would lose all money; use sqlite:///path/to/file")
    file = Path(str(url.database)).absolute()
    if not file.parent.is_dir():
        raise DatabaseUnusable(f"cannot use {_place(url)}: {file.parent} is not a directory")
    if not os.access(file.parent, os.W_OK) or (file.exists() and not os.access(file, os.W_OK)):
        raise DatabaseUnusable(f"cannot use {_place(url)}: it is not writable")
    engine = create_engine(url, connect_args={"timeout": BUSY_TIMEOUT_S}, hide_parameters=True)

    @event.listens_for(engine, "connect")
    def configure(connection: sqlite3.Connection, _record: object) -> None:
        connection.isolation_level = None  # this module says BEGIN; the driver would say it too late
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # NORMAL may lose acknowledged commits when the power fails
        connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT_PAGES}")
        connection.execute(f"PRAGMA cache_size = -{READER_CACHE_KIB}")
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA recursive_triggers = ON")  # or REPLACE would delete rows behind the triggers' back

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        is_writer = connection.get_execution_options().get("billing_writer", False)
        driver: Any = connection.connection.driver_connection
        driver.execute("BEGIN IMMEDIATE" if is_writer else "BEGIN")

    return engine


def _postgresql_engine(url: URL) -> Engine:
    options = (
        f"-c lock_timeout={LOCK_TIMEOUT_S}s"
        f" -c idle_in_transaction_session_timeout={IDLE_IN_TRANSACTION_TIMEOUT_S}s"
        " -c synchronous_commit=on"
    )
    given = url.query.get("options")
    arguments: dict[str, Any] = {
        "options": f"{options} {given}" if isinstance(given, str) else options,
        "connect_timeout": CONNECT_TIMEOUT_S,
        "keepalives_idle": 5,
        "keepalives_interval": 2,
        "keepalives_count": 3,
    }
    return create_engine(
        url.set(drivername="postgresql+psycopg").difference_update_query(["options"]),
        connect_args=arguments,
        pool_pre_ping=True,
        hide_parameters=True,
    )


def _alembic_config() -> "Config":
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations").replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    return config


def _revision(connection: Connection) -> str | None:
    """The schema's; None for a database without any."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar_one_or_none()


def _refuse_newer_schema(connection: Connection) -> None:
    revision = _revision(connection)
    if revision is not None and revision not in _REVISIONS:
        raise DatabaseUnusable(
            f"{_place(connection.engine.url)} was written by a newer version (schema {revision});"
            " upgrade this installation"
        )


def _place(url: URL) -> str:
    """Where the database is, without user or password."""
    if url.drivername.startswith("sqlite"):
        return f"SQLite file {url.database}"
    host = url.host or url.query.get("host") or "the local socket"
    return f"PostgreSQL {url.database or ''} at {host}{f':{url.port}' if url.port else ''}"


def _first_line(error: DBAPIError, url: URL) -> str:
    lines = str(error.orig).strip().splitlines() or [type(error.orig).__name__]
    line = lines[0]
    for secret in (url.password, url.query.get("password")):
        if secret:
            line = line.replace(str(secret), "***")
    return line
