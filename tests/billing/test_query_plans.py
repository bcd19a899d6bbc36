"""No question of a customer reads another customer's rows: each is answered from an index, on both databases."""

from collections.abc import Iterator
from typing import Any

import pytest
from sqlalchemy import Engine, event, text

from billing.commands import CustomerId
from billing.database import writer
from billing.request_log import RequestFilter, RequestLog
from billing.statements import Month, StatementReader
from billing.store import WriterConnection
from billing.store.sql import insert_all
from billing.tables import api_key, entry, reservation, wallet
from billing.usage import UsageReader
from tests.support.databases import Databases

CUSTOMERS, REQUESTS = 50, 200
CUSTOMER, REQUEST = CustomerId("cus_7"), "req_357"


@pytest.fixture(scope="module")
def busy(databases: Databases) -> Iterator[Engine]:
    """Many customers' requests, so that a plan which reads all of them is the worse one."""
    last = REQUESTS - 1
    wallets = [
        {"customer_id": f"cus_{index}", "name": f"{index}", "seq": last, "balance_mils": last, "created_at": 1.0}
        for index in range(CUSTOMERS)
    ]
    keys = [
        (f"key_{index}", f"{index:064d}", "last", f"cus_{index}", 1.0, 1, 1.0, 0, None, None)
        for index in range(CUSTOMERS)
    ]
    chains = [
        (f"cus_{index}", 0, None, 0, 0, 0, "opening", "", None, 0.0, "", 0)
        if seq == 0
        else (f"cus_{index}", seq, seq - 1, seq - 1, 1, seq, "credit", f"{index}.{seq}", None, float(seq), "", 0)
        for index in range(CUSTOMERS)
        for seq in range(REQUESTS)
    ]
    requests = []
    for each in range(CUSTOMERS * REQUESTS):
        work = (f"req_{each}", f"cus_{each % CUSTOMERS}", f"key_{each % CUSTOMERS}", 1, 5, 5, 5, 0, "settled", 0.0, "")
        requests.append((*work, float(each), each // CUSTOMERS, float(each), 0, "m", 1, 1, None))
    with databases.migrated(unused=True) as engine:
        connection = WriterConnection(writer(engine))
        with connection.transaction(runs_ahead=False):
            connection.sqlalchemy.execute(wallet.insert(), wallets)
            insert_all(entry)(connection, chains)
            insert_all(api_key)(connection, keys)
            insert_all(reservation)(connection, requests)
        connection.close()
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as analysing:
            analysing.execute(text("ANALYZE"))
        yield engine


def test_every_question_finds_its_rows_by_an_index(busy: Engine):
    asked: list[tuple[str, Any]] = []

    def listen(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append((statement, parameters))

    log, used, months = RequestLog(busy), UsageReader(busy), StatementReader(busy)
    event.listen(busy, "before_cursor_execute", listen)
    try:
        log.page(CUSTOMER, RequestFilter(), 10)
        log.page(CUSTOMER, RequestFilter(since=3.0, until=9_000.0, model="m"), 10, after=REQUEST)
        log.page(CUSTOMER, RequestFilter(state="open"), 10, before=REQUEST)
        log.request(CUSTOMER, REQUEST)
        used.usage(CUSTOMER, 5_000.0, 6_000.0)
        used.spent_since(CUSTOMER, 9_000.0)
        used.warnings(CUSTOMER, 10)
        months.statements(CUSTOMER, Month(1970, 2), 2)
        months.entries(CUSTOMER, 0, 10, 10)
    finally:
        event.remove(busy, "before_cursor_execute", listen)
    assert len(asked) > 10
    explain = "EXPLAIN QUERY PLAN " if busy.dialect.name == "sqlite" else "EXPLAIN "
    with busy.connect() as connection:
        for statement, parameters in asked:
            rows = connection.exec_driver_sql(explain + statement, parameters)
            plan = "\n".join(str(row[-1]) for row in rows)
            assert not _whole_tables(plan), f"{statement}\n{plan}"


def _whole_tables(plan: str) -> list[str]:
    tables = ("reservation", "entry")
    return [
        line
        for line in plan.splitlines()
        if any(f"Seq Scan on {table}" in line or line.startswith(f"SCAN {table}") for table in tables)
    ]
