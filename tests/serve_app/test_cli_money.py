"""`dream-admin` on a data directory without a cluster: prices, teams, credit limits and closed months."""

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from deployments.payments.sweeps import Report
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


def test_a_team_moves_money_and_a_month_is_closed(admin: Any):
    for name, funds in (("lab", "10"), ("kid", "0")):
        admin("keys", "create", "--customer", name, "--initial-credits", funds)
    made = admin("teams", "set", "--parent", "lab", "--member", "kid", "--cap", "5", "--period", "day")
    moved = admin("teams", "transfer", "--from", "lab", "--to", made["customer_id"], "--amount", "3")
    assert (moved["from_balance_usd"], moved["to_balance_usd"]) == (7.0, 3.0)
    month = datetime.now(UTC).strftime("%Y-%m")
    closed = admin("credits", "close", "--customer", "lab", "--month", month)
    assert (closed["payments_usd"], closed["transfers_usd"], closed["closing_usd"]) == (10.0, -3.0, 7.0)
    assert admin("credits", "close", "--customer", "lab", "--month", month) == closed
    code, complaint = admin("teams", "transfer", "--from", "lab", "--to", "kid", "--amount", "8")
    assert code == 2
    assert "too little" in complaint


def test_a_credit_limit_is_set_and_stopped_while_overdue(admin: Any):
    admin("keys", "create", "--customer", "lab")
    assert admin("credits", "limit", "--customer", "lab", "--limit", "50")["spends_down_to_usd"] == -50.0
    stopped = admin("credits", "limit", "--customer", "lab", "--limit", "50", "--overdue")
    assert (stopped["limit_usd"], stopped["spends_down_to_usd"]) == (50.0, 0.0)


def test_units_are_sold_charged_at_once_and_shown(admin: Any):
    admin("keys", "create", "--customer", "lab", "--initial-credits", "1000")
    sold = ("prices", "set-units", "lab", "tiny-pusher", "--units", "2", "--usd-per-unit", "400")
    sold += ("--frames-per-unit", "1000000", "--units-per-replica", "4")
    first = admin(*sold)
    assert (first["version"], first["charged_now"], first["replicas_promised"]) == (1, True, 1)
    again = admin(*sold)
    assert (again["version"], again["charged_now"], again["waits_for_credit"]) == (1, False, False)
    [row] = admin("prices", "units")
    assert (row["units"], row["unit_usd"], row["unit_frames"], row["units_per_replica"]) == (2, 400.0, 1_000_000, 4)
    code, complaint = admin(*sold[:5], "3", *sold[6:])
    assert code == 2
    assert "another version begins later" in complaint
    code, complaint = admin("prices", "set-units", "nobody", *sold[3:])
    assert code == 2
    assert "no customer 'nobody'" in complaint


def test_units_wait_for_credit(admin: Any):
    admin("keys", "create", "--customer", "lab")
    terms = ("--units", "1", "--usd-per-unit", "1", "--frames-per-unit", "10")
    sold = admin("prices", "set-units", "lab", "tiny-pusher", *terms)
    assert (sold["charged_now"], sold["waits_for_credit"], sold["replicas_promised"]) == (False, True, 0)


@pytest.mark.parametrize(
    ("difference", "unknown", "unseen", "code"),
    [(0, [], [], 0), (5, [], [], 1), (0, ["pi_1"], [], 1), (0, [], ["pi_2"], 1)],
)
def test_comparing_the_books_ends_with_1_when_they_differ_or_a_payment_was_not_seen(
    monkeypatch: pytest.MonkeyPatch, difference: int, unknown: list[str], unseen: list[str], code: int
):
    body = json.dumps({"customers": {}, "unknown_payments": unknown, "unseen_payments": unseen})
    monkeypatch.setattr("serve_app.reconcile.reconcile", lambda *_: Report(1, body, "signed", difference))
    result = CliRunner().invoke(app, ["stripe", "reconcile", "--json"])
    assert result.exit_code == code, result.stderr
    assert json.loads(result.stdout) == json.loads(body) | {"signature": "signed"}
