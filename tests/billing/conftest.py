"""A desk that works a ledger on a fresh database, of each kind."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import pytest
from sqlalchemy import Engine

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
from billing.invariants import audit
from billing.keys import mint_customer_id, mint_key_id, mint_request_id, mint_token, token_sha256
from billing.ledger import Ledger
from billing.money import Mils
from billing.reader import LedgerReader
from billing.store import WriterConnection
from tests.support.databases import Databases, ledgers

GRACE_S = 30.0

_serial = itertools.count()


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
        ledgers.add(ledger)
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
