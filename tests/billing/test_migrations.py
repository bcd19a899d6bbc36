"""A database that an older version made, with money in it, becomes this version's."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from alembic import command as alembic
from sqlalchemy import Engine, text

from billing import database
from billing.commands import CustomerId, KeyId, RequestId, Settled
from billing.database import MIGRATION_IDLE_TIMEOUT_S, migrate, open_database, writer
from billing.invariants import audit
from billing.migrations import versions
from billing.money import Mils
from tests.billing.conftest import Account, Clock, Desk
from tests.billing.test_database import schema

REVISIONS = sorted(file.name[:4] for file in Path(versions.__path__[0]).glob("[0-9]*.py"))

# Written as the first version wrote it: ann paid $0.10; one request was delivered in part, one is open.
HISTORY = (
    "UPDATE writer_fence SET epoch = 1, taken_at = 1",
    "INSERT INTO wallet (customer_id, name, seq, balance_mils, created_at) VALUES ('cus_ann', 'ann', 4, 890, 1)",
    """
    INSERT INTO api_key (key_id, sha256, last4, customer_id, refill_per_s, burst, created_at, created_seq, revoked_at,
      revoked_seq) VALUES ('key_ann', '{sha256}', 'abcd', 'cus_ann', 50, 200, 1, 1, NULL, NULL)
    """,
    """
    INSERT INTO reservation (request_id, customer_id, key_id, frames, mils_per_frame, amount, captured, refunded, state,
      lease_until, reason, created_at, debit_seq, settled_at, settled_seq) VALUES
      ('req_part', 'cus_ann', 'key_ann', 49, 5, 245, 60, 185, 'settled', 60, 'engine failed', 2, 2, 3, 3),
      ('req_open', 'cus_ann', 'key_ann', 10, 5, 50, 0, 0, 'open', 9000000000, '', 4, 4, NULL, NULL)
    """,
    *(
        f"""
        INSERT INTO entry (customer_id, seq, prev_seq, prev_balance, amount, balance_after, kind, public_id, reserved,
          ts, detail, epoch) VALUES ('cus_ann', {entry}, 'predict', 1)
        """
        for entry in (
            "0, NULL, 0, 0, 0, 'opening', 'cus_ann', NULL, 1",
            "1, 0, 0, 1000, 1000, 'credit', 'adm_1', NULL, 1",
            "2, 1, 1000, -245, 755, 'debit', 'req_part', 245, 2",
            "3, 2, 755, 185, 940, 'refund', 'req_part', 245, 3",
            "4, 3, 940, -50, 890, 'debit', 'req_open', 50, 4",
        )
    ),
)


@pytest.fixture(params=REVISIONS)
def old(request: pytest.FixtureRequest, empty_url: str) -> Iterator[Engine]:
    """A database of each revision that was ever released, with the first one's history in it."""
    engine = open_database(empty_url)
    with writer(engine).begin() as connection:
        if engine.dialect.name == "postgresql":
            timeout_ms = 1_000 * MIGRATION_IDLE_TIMEOUT_S
            connection.execute(text(f"SET LOCAL idle_in_transaction_session_timeout = {timeout_ms}"))
        config = database._alembic_config()
        config.attributes["connection"] = connection
        alembic.upgrade(config, "0001")
        for statement in HISTORY:
            connection.execute(text(statement.format(sha256="0" * 64)))
        alembic.upgrade(config, request.param)
    yield engine
    engine.dispose()


def test_an_old_database_with_money_in_it_becomes_a_new_one(old: Engine, engine: Engine, clock: Clock):
    migrate(old)
    assert schema(old) == schema(engine)
    assert audit(old) == []
    desk = Desk(old, clock)
    account = Account(CustomerId("cus_ann"), replace(desk.key()[0], key_id=KeyId("key_ann")), "")
    assert desk.rows(account) == [
        ("credit", 1000, "adm_1"),
        ("debit", -245, "req_part"),
        ("refund", 185, "req_part"),
        ("debit", -50, "req_open"),
    ]
    assert desk.settle(RequestId("req_open"), 4) == Settled("req_open", Mils(20), Mils(30), Mils(920))
    assert desk.settle(desk.reserved(account, 2), 2)
    assert desk.balance(account) == 910
    assert audit(old) == []
