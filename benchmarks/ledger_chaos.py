"""Real writers killed with `kill -9`: nothing acknowledged is lost, nothing happens twice.

    python -m benchmarks.ledger_chaos [--kills 1000] [--seed N] [--databases sqlite postgresql]

Each round forks a writer that takes over, sends again what its predecessor may or may not have done, and goes on:
batches of reserves, then their settlements, an acknowledgement through a pipe after each. It dies at a random moment,
or at a point with a name: at some statement inside the transaction, just before COMMIT, after COMMIT before the answer.
In some rounds it is frozen after a commit instead, its successor takes over, and when it wakes up it must find itself
fenced. In a few it is frozen inside a transaction, holding the fence while its successor tries to take over: PostgreSQL
ends it after 5 s and the successor goes on; SQLite's lock is its process's, so that is killed.

After each death all that was acknowledged is looked up; the audits run every 100 rounds and at the end, when the
balance must be what the acknowledged settlements leave. Prints one JSON line per database; on failure the seed.
"""

import argparse
import json
import os
import random
import secrets
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from sqlalchemy import Engine

from benchmarks.ledger import database, make_wallets, version
from billing.commands import CustomerId, KeyId, RequestId, Reserve, Reserved, Settle, Settled
from billing.database import open_database
from billing.errors import Fenced, LedgerUnavailable
from billing.invariants import audit
from billing.ledger import Ledger
from billing.money import Mils
from billing.reader import LedgerReader
from billing.store import WriterConnection

BATCH = 8
FRAMES, RATE = 49, Mils(5)
POINTS = {"any moment": 10, "statement": 10, "before commit": 10, "after commit": 10, "frozen": 10, "frozen inside": 1}
"""And how often each is chosen."""
FENCED, ENDED = 3, 4
AUDIT_EVERY = 100


@dataclass(frozen=True)
class Progress:
    """How far the history is acknowledged: batches are numbered through all writers."""

    reserved: int = -1
    settled: int = -1


def request(batch: int, index: int) -> RequestId:
    return RequestId(f"req_{batch:08}_{index}")


def delivered(index: int) -> int:
    return index * 7 % (FRAMES + 1)


def write_until_killed(url: str, key_id: KeyId, done: Progress, point: str, countdown: int, pipe: int) -> NoReturn:
    """In the child: go on from what is acknowledged, and die or freeze at the `countdown`th `point`."""
    engine = open_database(url)
    ledger = Ledger(engine, time.time)
    ledger.take_over()
    arm(engine, point, countdown)
    batch = done.settled + 1
    try:
        while True:
            names = [request(batch, index) for index in range(BATCH)]
            outcomes = ledger.apply([Reserve(name, key_id, FRAMES, RATE, "chaos", 3600.0) for name in names])
            assert all(isinstance(outcome, Reserved) for outcome in outcomes), outcomes
            os.write(pipe, b"r%d\n" % batch)
            outcomes = ledger.apply([Settle(name, delivered(index), "") for index, name in enumerate(names)])
            assert all(isinstance(outcome, Settled) for outcome in outcomes), outcomes
            os.write(pipe, b"s%d\n" % batch)
            batch += 1
    except Fenced:
        os._exit(FENCED)
    except LedgerUnavailable:  # the database has ended its transaction
        os._exit(ENDED)


def arm(engine: Engine, point: str, countdown: int) -> None:
    def strike(kind: signal.Signals = signal.SIGKILL) -> None:
        nonlocal countdown
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), kind)

    commit: Callable[[Any], None] = engine.dialect.do_commit

    def around(connection: Any) -> None:
        if point == "before commit":
            strike()
        commit(connection)
        if point == "after commit":
            strike()
        if point == "frozen":
            strike(signal.SIGSTOP)

    if point in ("statement", "frozen inside"):
        kind = signal.SIGKILL if point == "statement" else signal.SIGSTOP
        execute = WriterConnection.execute

        def execute_and_strike(connection: WriterConnection, statement: str, parameters: Any = ()) -> Any:
            answer = execute(connection, statement, parameters)
            strike(kind)
            return answer

        WriterConnection.execute = execute_and_strike  # type: ignore[method-assign]
    else:
        engine.dialect.do_commit = around  # type: ignore[method-assign]


class Chaos:
    def __init__(self, engine: Engine, seed: int) -> None:
        self.engine = engine
        self.url = engine.url.render_as_string(hide_password=False)
        self.draw = random.Random(seed)
        ledger = Ledger(engine, time.time)
        ledger.take_over()
        [(self.key_id, self.customer_id)] = make_wallets(ledger, 1)
        self.credits = LedgerReader(engine).balance(CustomerId(self.customer_id))
        self.done = Progress()
        self.killed: Counter[str] = Counter()

    def round(self) -> None:
        (point,) = self.draw.choices(list(POINTS), list(POINTS.values()))
        child, pipe = self.start(point)
        if point == "any moment":
            time.sleep(self.draw.random() * 0.15)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            successor, its_pipe = self.start("after commit")
            holds_lock = point == "frozen inside" and self.engine.dialect.name == "sqlite"
            if holds_lock:
                time.sleep(0.2)
                assert os.waitpid(successor, os.WNOHANG) == (0, 0), "the successor did not wait for the lock"
                os.kill(child, signal.SIGKILL)
            os.waitpid(successor, 0)
            os.kill(child, signal.SIGCONT)
            _, status = os.waitpid(child, 0)
            if holds_lock:
                assert os.WIFSIGNALED(status), status
            else:
                assert os.WIFEXITED(status), status
                assert os.WEXITSTATUS(status) == (FENCED if point == "frozen" else ENDED), status
            self.collect(its_pipe)
        else:
            assert os.WIFSIGNALED(status), status
            assert os.WTERMSIG(status) == signal.SIGKILL, status
        self.collect(pipe)
        self.killed[point] += 1

    def start(self, point: str) -> tuple[int, int]:
        reading, writing = os.pipe()
        countdown = self.draw.randint(1, 40 if point in ("statement", "frozen inside") else 12)
        self.engine.dispose()  # a child must not share connections
        child = os.fork()
        if child == 0:
            try:
                os.close(reading)
                write_until_killed(self.url, self.key_id, self.done, point, countdown, writing)
            except BaseException as error:
                print(f"the writer failed: {error!r}", file=sys.stderr, flush=True)
                os._exit(1)
        os.close(writing)
        return child, reading

    def collect(self, pipe: int) -> None:
        """What the dead writer had acknowledged must be there."""
        with os.fdopen(pipe, "rb") as stream:
            lines = [(line[:1], int(line[1:])) for line in stream.read().split()]
        reserved = max([self.done.reserved, *(batch for kind, batch in lines if kind == b"r")])
        settled = max([self.done.settled, *(batch for kind, batch in lines if kind == b"s")])
        reader = LedgerReader(self.engine)
        for batch in range(self.done.settled + 1, reserved + 1):
            for index in range(BATCH):
                record = reader.reservation(request(batch, index))
                assert record is not None, f"lost: {request(batch, index)}"
                if batch <= settled:
                    assert (record.state, record.captured_mils) == ("settled", delivered(index) * RATE), record
        self.done = Progress(reserved, settled)

    def finish(self) -> None:
        """One writer that nobody kills settles what was left; then every mil is accounted for."""
        ledger = Ledger(self.engine, time.time)
        ledger.take_over()
        for batch in range(self.done.settled + 1, self.done.reserved + 2):
            names = [request(batch, index) for index in range(BATCH)]
            ledger.apply([Reserve(name, self.key_id, FRAMES, RATE, "chaos", 3600.0) for name in names])
            ledger.apply([Settle(name, delivered(index), "") for index, name in enumerate(names)])
        batches = self.done.reserved + 2
        spent = batches * sum(delivered(index) * RATE for index in range(BATCH))
        balance = LedgerReader(self.engine).balance(CustomerId(self.customer_id))
        assert balance == self.credits - spent, f"{balance} is left, {self.credits - spent} should be"
        self.audit()

    def audit(self) -> None:
        violations = audit(self.engine)
        assert violations == [], violations


def wreak(engine: Engine, kills: int, seed: int) -> dict[str, Any]:
    chaos = Chaos(engine, seed)
    started = time.perf_counter()
    try:
        for number in range(1, kills + 1):
            chaos.round()
            if number % AUDIT_EVERY == 0:
                chaos.audit()
        chaos.finish()
    except AssertionError as failure:
        failure.add_note(f"seed {seed}, after {sum(chaos.killed.values())} rounds")
        raise
    return {
        "chaos": "ledger",
        "database": version(engine),
        "seed": seed,
        "kills": sum(chaos.killed.values()),
        "at": dict(chaos.killed),
        "acknowledged_rollouts": (chaos.done.settled + 1) * BATCH,
        "lost": 0,
        "doubled": 0,
        "seconds": round(time.perf_counter() - started, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"], choices=["sqlite", "postgresql"])
    arguments = parser.parse_args()
    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    for kind in arguments.databases:
        with database(kind) as (engine, _):
            print(json.dumps(wreak(engine, arguments.kills, seed)), flush=True)


if __name__ == "__main__":
    main()
