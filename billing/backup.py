"""A copy of the ledger's database, taken while it is in use, that can be put in its place.

A copy is one moment of the ledger: money, keys and open reservations belong together. What was acknowledged after that
moment is not in it.
"""

import os
import sqlite3
import subprocess
from pathlib import Path
from typing import Any, cast

from sqlalchemy import Engine

from billing.errors import DatabaseUnusable

PAGES_PER_STEP = 1_000
"""Between steps the writer gets its turn."""


def back_up(engine: Engine, destination: Path) -> None:
    """Write the copy to `destination`: a SQLite file, or PostgreSQL's archive for `pg_restore`.

    The file appears whole or not at all, readable by its owner only: it holds hashes of keys and every customer's name.

    Raises:
        FileExistsError: `destination` is there already; a backup never replaces another.
        DatabaseUnusable: PostgreSQL's `pg_dump` is not installed, or failed.
    """
    partial = destination.with_name(destination.name + ".partial")
    if destination.exists():
        raise FileExistsError(f"{destination} is there already")
    partial.unlink(missing_ok=True)
    os.close(os.open(partial, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    try:
        if engine.dialect.name == "sqlite":
            _copy_sqlite(engine, partial)
        else:
            _dump_postgresql(engine, partial)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.link(partial, destination)  # unlike rename, refuses to replace
    finally:
        partial.unlink(missing_ok=True)


def _copy_sqlite(engine: Engine, file: Path) -> None:
    source = engine.raw_connection()
    try:
        with sqlite3.connect(file) as copy:
            cast(Any, source.driver_connection).backup(copy, pages=PAGES_PER_STEP)
        copy.close()
    finally:
        source.close()


def _dump_postgresql(engine: Engine, file: Path) -> None:
    url = engine.url.set(drivername="postgresql")
    environment = {**os.environ, **({"PGPASSWORD": str(url.password)} if url.password else {})}
    target = url.set(password=None).render_as_string(hide_password=False)
    command = ["pg_dump", "--format=custom", "--no-owner", f"--file={file}", f"--dbname={target}"]
    try:
        # Fixed words and the operator's own URL.
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    except FileNotFoundError:
        raise DatabaseUnusable("pg_dump is not installed; it comes with PostgreSQL's client package") from None
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[0]
        raise DatabaseUnusable(f"pg_dump failed: {reason}")
