"""Real processes and `kill -9`: what was acknowledged is there, once, and what was not can be asked for again."""

import subprocess
import sys

import pytest
from sqlalchemy import Engine

from billing.commands import Reserved, Settle, Settled
from tests.billing.conftest import Desk

BATCH = 8

WRITER = """
import itertools, sys, time
from billing.commands import Reserve, Settle
from billing.database import open_database
from billing.ledger import Ledger

url, key_id, batch = sys.argv[1:]
ledger = Ledger(open_database(url), time.time)
ledger.take_over()
for n in itertools.count():
    requests = [f"req_{n}_{i}" for i in range(int(batch))]
    ledger.apply([Reserve(request, key_id, 49, 5, "", 60.0) for request in requests])
    print("reserved", n, flush=True)
    ledger.apply([Settle(request, i * 7 % 50, "") for i, request in enumerate(requests)])
    print("settled", n, flush=True)
"""


@pytest.mark.parametrize("kill_after", [1, 6, 41])
def test_a_killed_writer_loses_nothing_that_it_acknowledged(desk: Desk, engine: Engine, kill_after: int):
    account = desk.account(100_000_000)
    url = engine.url.render_as_string(hide_password=False)
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, url, account.key.key_id, str(BATCH)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout:
        for _ in range(kill_after):
            acknowledged = process.stdout.readline()
        process.kill()
        acknowledged = (process.stdout.read().splitlines() or [acknowledged])[-1]
        process.wait()
    stage, n = acknowledged.split()
    num_settled = int(n) + (stage == "settled")
    num_reserved = int(n) + 1

    for batch in range(num_reserved):
        for i in range(BATCH):
            record = desk.reader.reservation(f"req_{batch}_{i}")
            assert record is not None
            if batch < num_settled:
                assert (record.state, record.captured_mils) == ("settled", i * 7 % 50 * 5)

    # Its successor sends again all that may or may not have happened, and one batch more.
    desk.ledger = desk.new_ledger()
    spent = 0
    for batch in range(num_reserved + 1):
        for i in range(BATCH):
            command = desk.reserve(account, frames=49, request_id=f"req_{batch}_{i}")
            delivered = i * 7 % 50
            answers = desk.ledger.apply([command, Settle(command.request_id, delivered, "")])
            assert isinstance(answers[0], Reserved)
            assert isinstance(answers[1], Settled)
            assert answers[1].captured_mils == delivered * 5
            spent += delivered * 5
    assert desk.balance(account) == 100_000_000 - spent
