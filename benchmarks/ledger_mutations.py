"""Switches off one rule of the ledger at a time and requires that a test notices.

    python -m benchmarks.ledger_mutations [--only NAME ...] [--list]

Rules of the schema are left out while the migrations run: each named constraint, unique index and trigger, against the
refusal suite. Rules of the code are edited while their module is imported: the fence, the payload's hash, both kinds of
de-duplication, the memory that dies with its commit and others, against the tests named beside them. Nothing on disk is
touched. A mutant that survives is a rule that nobody tests.

Prints one JSON line; exits with 1 if a mutant survived. The same file is the pytest plugin that makes the mutant.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import Any

CHOICE = "LEDGER_MUTATION"
"""Tells the plugin which rule to switch off."""
REFUSALS = "tests/billing/test_refusals.py"


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
        "billing.core.reservations", 'if each.state == "open" or each.captured > 0]', "]", "test_idempotency.py"
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
    "malformed commands": Edit("billing.ledger", "malformed(command) for", "None for", "test_ledger.py"),
    "durable SQLite": Edit("billing.database", "synchronous = FULL", "synchronous = NORMAL", "test_database.py"),
    "SQLite's foreign keys": Edit("billing.database", "foreign_keys = ON", "foreign_keys = OFF", "test_database.py"),
}


ENTRY_CHECKS = {
    "tr_entry_epoch": "epoch",
    "tr_entry_refund": "kind = 'refund'",
    "tr_entry_floor": "balance_after < 0",
    "tr_entry_reversal": "kind IN ('reversal'",
    "tr_entry_repayment": "kind = 'repayment'",
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
    names = arguments.only or [*schema_rules(), *EDITS]
    if arguments.list:
        print("\n".join(names))
        return
    started = time.perf_counter()
    survivors = [name for name in names if not is_noticed(name)]
    result = {
        "mutations": "ledger",
        "rules": len(names),
        "survivors": survivors,
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(result))
    sys.exit(1 if survivors else 0)


def is_noticed(name: str) -> bool:
    """Whether some test goes red without this rule."""
    tests = f"tests/billing/{EDITS[name].tests}" if name in EDITS else REFUSALS
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "benchmarks.ledger_mutations", tests]
    run = subprocess.run(command, env=os.environ | {CHOICE: name}, capture_output=True, text=True, check=False)
    red = run.returncode == 1
    if run.returncode > 1:
        raise SystemExit(f"{name}: the tests did not run\n{run.stdout}{run.stderr}")
    print(f"{'noticed ' if red else 'SURVIVED'} {name}", file=sys.stderr, flush=True)
    return red


def edit_module(edit: Edit) -> None:
    spec = importlib.util.find_spec(edit.module)
    assert spec is not None
    assert spec.loader is not None
    source = spec.loader.get_source(edit.module)  # type: ignore[attr-defined]
    assert edit.old in source, f"{edit.module} no longer says {edit.old!r}"
    module = importlib.util.module_from_spec(spec)
    sys.modules[edit.module] = module
    exec(compile(source.replace(edit.old, edit.new), str(spec.origin), "exec"), module.__dict__)
    parent, _, child = edit.module.rpartition(".")
    setattr(sys.modules[parent], child, module)


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
elif os.environ.get(CHOICE):  # this is the plugin: make the mutant before any test imports it
    if os.environ[CHOICE] in EDITS:
        edit_module(EDITS[os.environ[CHOICE]])
    else:
        leave_out(os.environ[CHOICE])
