"""`dream-admin` on a data directory without a cluster: prices."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from serve_app.cli import app

PRICES = """
[[price]]
model = "tiny-pusher"
rates = [{ metric = "frame", usd = "0.0005" }]
"""


@pytest.fixture
def admin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("DATA_DIR", str(tmp_path))
    monkeypatch.delenv("DATABASE_URL", raising=False)
    runner = CliRunner()

    def run(*arguments: str) -> Any:
        result: Result = runner.invoke(app, [*arguments, "--json"])
        return json.loads(result.stdout) if result.exit_code == 0 else (result.exit_code, result.stderr)

    return run


def test_prices_are_loaded_once_and_shown_by_version(admin: Any, tmp_path: Path):
    file = tmp_path / "prices.toml"
    file.write_text(PRICES)
    assert [row["added"] for row in admin("prices", "load", str(file))] == [True]
    assert [row["added"] for row in admin("prices", "load", str(file))] == [False]
    file.write_text(PRICES.replace("0.0005", "0.0004") + "effective_from = 2030-01-01T00:00:00Z\n")
    assert [row["version"] for row in admin("prices", "load", str(file))] == [2]
    first, second = admin("prices", "show")
    assert (first["in_force"], second["in_force"], second["effective"]) == (True, False, "2030-01-01T00:00:00+00:00")
    assert json.loads(second["terms"])["rates"] == [["frame", 400_000, 1]]


def test_a_price_may_be_one_customers_own(admin: Any, tmp_path: Path):
    file = tmp_path / "prices.toml"
    file.write_text(PRICES + 'customer = "ann"\n')
    code, complaint = admin("prices", "load", str(file))
    assert code == 2
    assert "no customer 'ann'" in complaint
    ann = admin("keys", "create", "--customer", "ann")
    assert admin("prices", "load", str(file))[0]["customer_id"] == ann["customer_id"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [("x", "not TOML"), ("", "nothing else"), ("[[price]]\nmodel = 'm'", "'rates' is missing")],
)
def test_a_file_that_cannot_be_read_says_why_in_one_line(admin: Any, tmp_path: Path, content: str, complaint: str):
    file = tmp_path / "prices.toml"
    file.write_text(content)
    code, line = admin("prices", "load", str(file))
    assert code == 2
    assert complaint in line
    assert line.count("\n") == 1
