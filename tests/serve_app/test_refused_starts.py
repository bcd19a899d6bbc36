"""What `dream-admin serve` refuses to start on: one clear line each, and no secret in it."""

import socket
from pathlib import Path

import pytest

from tests.support.cluster import refused


def test_a_port_in_use_is_one_clear_line_and_exit_code_2(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in refused(tmp_path / "data", port)


def test_a_data_directory_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    assert "cannot be written" in refused(tmp_path / "file" / "data")


def test_a_broken_database_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_text("this is not a database, however long it is" * 100)
    assert "ledger.db" in refused(tmp_path)


def test_a_database_that_is_not_there_is_one_clear_line_without_its_password(tmp_path: Path) -> None:
    line = refused(tmp_path, DATABASE_URL="postgresql+psycopg://u:secret@127.0.0.1:1/x")
    assert "postgresql" in line.lower()
    assert "secret" not in line


@pytest.mark.parametrize(("name", "value"), [("PORT", "eighty"), ("PORT", "0"), ("DEFAULT_MODEL", "unknown")])
def test_a_setting_that_cannot_be_is_one_clear_line(tmp_path: Path, name: str, value: str) -> None:
    assert name.replace("_", " ").lower() in refused(tmp_path, **{name: value}).replace("_", " ").lower()
