"""What a customer's questions about its use cost on a ledger of a million requests.

    python -m benchmarks.usage [--requests 1000000] [--rounds 15] [--databases sqlite postgresql]

Requests of 60 days are written by the ledger itself, half of them by one hot customer and half by a thousand others;
some are refunded, one in ten thousand ran another model. Each question is then asked of the hot customer and of an
ordinary one, in turn, and its median is told. The baseline of a deep page is the same page by OFFSET.

Prints one JSON line per database.
"""

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

from sqlalchemy import Engine, text

from benchmarks.ledger import database, make_wallets, version
from billing.commands import Command, CustomerId, KeyId, Reserve, Settle
from billing.keys import mint_request_id
from billing.ledger import Ledger
from billing.money import Mils
from billing.request_log import DETAILS, RequestFilter, RequestLog
from billing.statements import Month, StatementReader
from billing.tables import reservation
from billing.usage import UsageReader

DAY_S = 86_400.0
DAYS = 60
BEGIN = 1_780_000_000.0
BATCH = 512
OTHERS = 1_000
RARE_EVERY = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"], choices=["sqlite", "postgresql"])
    arguments = parser.parse_args()
    for kind in arguments.databases:
        with database(kind) as (engine, _):
            print(json.dumps(measure(engine, arguments.requests, arguments.rounds)), flush=True)


def measure(engine: Engine, num_requests: int, rounds: int) -> dict[str, Any]:
    hot, ordinary, middle = fill(engine, num_requests)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("ANALYZE"))
    asked = questions(engine, hot, middle) | {
        f"ordinary: {name}": question for name, question in questions(engine, ordinary, None).items()
    }
    taken: dict[str, list[float]] = {name: [] for name in asked}
    for _ in range(rounds):
        for name, question in asked.items():
            started = time.perf_counter()
            question()
            taken[name].append((time.perf_counter() - started) * 1e3)
    medians = {name: round(statistics.median(times), 2) for name, times in taken.items()}
    return {
        "benchmark": "usage",
        "database": version(engine),
        "cores": os.cpu_count(),
        "load_1m": round(os.getloadavg()[0], 1),
        "requests": num_requests,
        "of_the_hot_customer": num_requests // 2,
        "ms_p50": medians,
        "deep_page_offset_over_cursor": round(medians["deep page by OFFSET"] / medians["deep page"], 1),
    }


def fill(engine: Engine, num_requests: int) -> tuple[CustomerId, CustomerId, str]:
    """The hot customer, an ordinary one, and the hot one's request in the middle of its log."""
    now = BEGIN
    ledger = Ledger(engine, lambda: now)
    ledger.take_over()
    ((hot_key, hot),) = make_wallets(ledger, 1)
    others = make_wallets(ledger, OTHERS)
    draw = random.Random(0)
    middle = ""
    for first in range(0, num_requests, BATCH):
        now = BEGIN + DAYS * DAY_S * first / num_requests
        batch: list[Command] = []
        for index in range(first, min(first + BATCH, num_requests)):
            request = reserve(hot_key if index % 2 else draw.choice(others)[0], index)
            batch += [request, Settle(request.request_id, draw.choice((49, 49, 49, 0)), "")]
            if index % 2 and not middle and index > num_requests // 2:
                middle = request.request_id
        ledger.apply(batch)
    return hot, others[0][1], middle


def reserve(key_id: KeyId, index: int) -> Reserve:
    model = "rare" if index % RARE_EVERY == 1 else "tiny-pusher"
    return Reserve(mint_request_id(), key_id, 49, Mils(5), f"predict · {model} · 49 frames", 60.0, model=model)


def questions(engine: Engine, customer: CustomerId, middle: str | None) -> dict[str, Callable[[], Any]]:
    log, usage, statements = RequestLog(engine), UsageReader(engine), StatementReader(engine)
    end = BEGIN + DAYS * DAY_S

    def page(middle: str | None = None, **chosen: Any) -> Callable[[], Any]:
        return lambda: log.page(customer, RequestFilter(**chosen), 50, after=middle)

    def used(days: float) -> Callable[[], Any]:
        return lambda: usage.usage(customer, end - days * DAY_S, end)

    asked: dict[str, Callable[[], Any]] = {
        "first page": page(),
        "page of the refunded": page(state="refunded"),
        "page of a rare model": page(model="rare"),
        "usage of a day": used(1),
        "usage of 30 days": used(30),
        "statements of 3 months": lambda: statements.statements(customer, Month.of(end), 3),
        "spent in a minute": lambda: usage.spent_since(customer, end - 60),
        "warnings": lambda: usage.warnings(customer, 50),
    }
    if middle is not None:
        asked["deep page"] = page(middle)
        asked["deep page by OFFSET"] = lambda: by_offset(engine, customer, middle)
    return asked


def by_offset(engine: Engine, customer: CustomerId, middle: str) -> list[Any]:
    """As a log without cursors would do it; counting the rows before is not on its bill."""
    if middle not in _offsets:
        newer = (
            "SELECT COUNT(*) FROM reservation WHERE customer_id = :customer AND (created_at, debit_seq) >="
            " (SELECT created_at, debit_seq FROM reservation WHERE request_id = :middle)"
        )
        with engine.connect() as connection:
            values = {"customer": customer, "middle": middle}
            _offsets[middle] = connection.execute(text(newer), values).scalar_one()
    rows = (
        "SELECT request_id FROM reservation WHERE customer_id = :customer"
        " ORDER BY created_at DESC, debit_seq DESC LIMIT 50 OFFSET :offset"
    )
    with engine.connect() as connection:
        found = connection.execute(text(rows), {"customer": customer, "offset": _offsets[middle]})
        return list(connection.execute(DETAILS.where(reservation.c.request_id.in_(found.scalars().all()))))


_offsets: dict[str, int] = {}

if __name__ == "__main__":
    main()
