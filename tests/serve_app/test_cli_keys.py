"""`dream-admin` on a data directory without a cluster: keys and grants."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from serve_app.cli import app
from tests.support.cluster import environment

Admin = Callable[..., Result]


@pytest.fixture
def admin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Admin:
    """In this process: one of its own takes seconds to start."""
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.delenv("DATABASE_URL", raising=False)
    runner = CliRunner()
    return lambda *arguments: runner.invoke(app, list(arguments))


def process(data_dir: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(Path(sys.executable).with_name("dream-admin")), *arguments],
        env=environment(data_dir, port=1),
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )


def test_without_a_cluster_the_tool_is_the_writer(admin: Admin, tmp_path: Path) -> None:
    made = json.loads(process(tmp_path, "keys", "create", "--customer", "a", "--initial-credits", "1", "--json").stdout)
    assert made["balance_usd"] == 1.0
    granted = process(tmp_path, "credits", "grant", "--customer", made["customer_id"], "--amount", "0.0001")
    assert granted.returncode == 0, granted.stderr
    (listed,) = json.loads(admin("keys", "list", "--json").stdout)
    assert (listed["balance_usd"], listed["ends_in"], listed["revoked"]) == (1.0001, made["key"][-4:], None)
    assert admin("keys", "revoke", made["key_id"]).exit_code == 0
    assert json.loads(admin("keys", "list", "--json").stdout)[0]["revoked"] is not None
    assert json.loads(admin("ledger", "audit", "--json").stdout)["violations"] == []


def test_a_key_is_shown_whole_once_and_never_again(admin: Admin, tmp_path: Path) -> None:
    shown = admin("keys", "create", "--customer", "a").stdout
    (key,) = [word for word in shown.split() if word.startswith("dre_")]
    assert len(key) == 47
    assert key not in admin("keys", "list").stdout
    assert not any(key.encode() in path.read_bytes() for path in tmp_path.iterdir())


def test_what_cannot_be_done_is_one_line_and_exit_code_2(admin: Admin, tmp_path: Path) -> None:
    for arguments, problem in (
        (("keys", "revoke", "key_unknown"), "no key key_unknown"),
        (("credits", "grant", "--customer", "nobody", "--amount", "1"), "no customer 'nobody'"),
        (("credits", "grant", "--customer", "nobody", "--amount", "0.00001"), "no customer"),
        (("keys", "create", "--customer", "a", "--initial-credits", "-1"), "too little"),
        (("keys", "create", "--customer", "a", "--initial-credits", "NaN"), "not an amount"),
        (("keys", "create", "--customer", " "), "name"),
    ):
        done = admin(*arguments)
        assert done.exit_code == 2, done
        assert problem in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    as_process = process(tmp_path, "keys", "revoke", "key_unknown")
    assert (as_process.returncode, as_process.stderr) == (2, admin("keys", "revoke", "key_unknown").stderr)


def test_a_key_is_limited_and_rotated_without_a_cluster(admin: Admin) -> None:
    made = json.loads(admin("keys", "create", "--customer", "a", "--initial-credits", "1", "--json").stdout)
    limits = ("--label", "planner", "--model", "tiny-pusher", "--daily-budget", "0.5", "--expires-in-days", "30")
    terms = json.loads(admin("keys", "terms", made["key_id"], *limits, "--json").stdout)
    assert (terms["label"], terms["models"], terms["daily_budget_usd"]) == ("planner", "tiny-pusher", 0.5)
    rotated = json.loads(admin("keys", "rotate", made["key_id"], "--json").stdout)
    assert rotated["key"] != made["key"]
    old, new = json.loads(admin("keys", "list", "--json").stdout)
    assert old["revoked"] is not None
    assert (new["revoked"], new["label"], new["ends_in"]) == (None, "planner", rotated["key"][-4:])
