"""Payments from outside, what was taken back of them, and the debt of who had already spent it.

Balances may go down to a floor, which is zero until somebody is given a credit limit.
"""

from typing import Any

import sqlalchemy as sa
from alembic import op

from billing.migrations import redeclare as redeclaring

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
SECONDS: sa.types.TypeEngine[float] = sa.Double().with_variant(sa.REAL(), "sqlite")
DEFERRED: dict[str, Any] = {"deferrable": True, "initially": "DEFERRED"}
AT_COMMIT: dict[str, Any] = DEFERRED | {"use_alter": True}


def upgrade() -> None:
    op.create_table(
        "debt",
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("seq", INT64, nullable=False, autoincrement=False),
        sa.Column("prev_seq", INT64, nullable=True),
        sa.Column("prev_debt", INT64, nullable=False),
        sa.Column("amount", INT64, nullable=False),
        sa.Column("debt_after", INT64, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("entry_seq", INT64, nullable=False),
        sa.Column("public_id", sa.Text(), nullable=False),
        sa.Column("ts", SECONDS, nullable=False),
        sa.PrimaryKeyConstraint("customer_id", "seq", name="pk_debt"),
        sa.UniqueConstraint("customer_id", "seq", "debt_after", name="uq_debt_after"),
        sa.CheckConstraint("debt_after >= 0 AND debt_after = prev_debt + amount", name="ck_debt_sum"),
        sa.CheckConstraint(
            (
                "(seq = 1 AND prev_seq IS NULL AND prev_debt = 0)"
                " OR (seq > 1 AND prev_seq IS NOT NULL AND prev_seq = seq - 1)"
            ),
            name="ck_debt_chain",
        ),
        sa.CheckConstraint(
            "(kind = 'shortage' AND amount > 0) OR (kind = 'repayment' AND amount < 0)", name="ck_debt_kind"
        ),
        sa.ForeignKeyConstraint(
            ["customer_id", "prev_seq", "prev_debt"],
            ["debt.customer_id", "debt.seq", "debt.debt_after"],
            name="fk_debt_previous",
        ),
        sa.ForeignKeyConstraint(
            ["customer_id", "entry_seq"], ["entry.customer_id", "entry.seq"], name="fk_debt_entry", **AT_COMMIT
        ),
        sqlite_strict=True,
    )
    op.create_index("ix_debt_entry", "debt", ["customer_id", "entry_seq"])
    op.create_table(
        "reversal",
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("seq", INT64, nullable=False, autoincrement=False),
        sa.Column("prev_seq", INT64, nullable=True),
        sa.Column("prev_mils", INT64, nullable=False),
        sa.Column("to_mils", INT64, nullable=False),
        sa.Column("taken", INT64, nullable=False),
        sa.Column("owed", INT64, nullable=False),
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("entry_seq", INT64, nullable=False),
        sa.Column("public_id", sa.Text(), nullable=False),
        sa.Column("ts", SECONDS, nullable=False),
        sa.PrimaryKeyConstraint("source", "seq", name="pk_reversal"),
        sa.UniqueConstraint("source", "seq", "to_mils", name="uq_reversal_to"),
        sa.CheckConstraint(
            (
                "(seq = 1 AND prev_seq IS NULL AND prev_mils = 0)"
                " OR (seq > 1 AND prev_seq IS NOT NULL AND prev_seq = seq - 1)"
            ),
            name="ck_reversal_chain",
        ),
        sa.CheckConstraint("to_mils >= 0 AND to_mils - prev_mils = taken + owed", name="ck_reversal_sum"),
        sa.CheckConstraint(
            "owed >= 0 AND ((to_mils > prev_mils AND taken >= 0) OR (to_mils < prev_mils AND owed = 0))",
            name="ck_reversal_parts",
        ),
        sa.ForeignKeyConstraint(
            ["source", "customer_id"],
            ["payment.source", "payment.customer_id"],
            name="fk_reversal_payment",
            **AT_COMMIT,
        ),
        sa.ForeignKeyConstraint(
            ["source", "prev_seq", "prev_mils"],
            ["reversal.source", "reversal.seq", "reversal.to_mils"],
            name="fk_reversal_previous",
        ),
        sa.ForeignKeyConstraint(
            ["customer_id", "entry_seq"], ["entry.customer_id", "entry.seq"], name="fk_reversal_entry", **AT_COMMIT
        ),
        sqlite_strict=True,
    )
    op.create_index("ix_reversal_entry", "reversal", ["customer_id", "entry_seq"])
    op.create_table(
        "payment",
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("public_id", sa.Text(), nullable=False),
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("granted", INT64, nullable=False),
        sa.Column("credit_seq", INT64, nullable=False),
        sa.Column("reversed", INT64, nullable=False),
        sa.Column("reversal_seq", INT64, nullable=True),
        sa.Column("created_at", SECONDS, nullable=False),
        sa.PrimaryKeyConstraint("source", name="pk_payment"),
        sa.UniqueConstraint("public_id", name="uq_payment_public_id"),
        sa.UniqueConstraint("source", "customer_id", name="uq_payment_customer"),
        sa.CheckConstraint("granted > 0 AND reversed >= 0 AND reversed <= granted", name="ck_payment_reversed"),
        sa.CheckConstraint("reversal_seq IS NOT NULL OR reversed = 0", name="ck_payment_untouched"),
        sa.ForeignKeyConstraint(
            ["source", "reversal_seq", "reversed"],
            ["reversal.source", "reversal.seq", "reversal.to_mils"],
            name="fk_payment_reversal",
            **AT_COMMIT,
        ),
        sqlite_strict=True,
    )
    op.create_table(
        "payment_event",
        sa.Column("event_id", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("applied_at", SECONDS, nullable=False),
        sa.PrimaryKeyConstraint("event_id", name="pk_payment_event"),
        sa.ForeignKeyConstraint(["source"], ["payment.source"], name="fk_payment_event_payment"),
        sqlite_strict=True,
    )
    if op.get_context().dialect.name == "sqlite":
        _redeclare()
        statements = SQLITE_TRIGGERS
    else:
        _alter()
        statements = POSTGRESQL_TRIGGERS
    for statement in statements:
        op.execute(statement)


def _redeclare() -> None:
    redeclaring.redeclare(
        "wallet",
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("seq", INT64, nullable=False),
        sa.Column("balance_mils", INT64, nullable=False),
        sa.Column("created_at", SECONDS, nullable=False),
        sa.Column("credit_limit_mils", INT64, nullable=False, server_default=sa.text("0")),
        sa.Column("floor_mils", INT64, nullable=False, server_default=sa.text("0")),
        sa.Column("debt_mils", INT64, nullable=False, server_default=sa.text("0")),
        sa.Column("debt_seq", INT64, nullable=True),
        sa.PrimaryKeyConstraint("customer_id", name="pk_wallet"),
        sa.UniqueConstraint("name", name="uq_wallet_name"),
        sa.CheckConstraint("balance_mils >= -credit_limit_mils", name="ck_wallet_balance"),
        sa.CheckConstraint("credit_limit_mils >= 0 AND floor_mils IN (0, -credit_limit_mils)", name="ck_wallet_floor"),
        sa.CheckConstraint(
            "debt_mils >= 0 AND (debt_mils = 0 OR (debt_seq IS NOT NULL AND balance_mils <= 0))", name="ck_wallet_debt"
        ),
        sa.ForeignKeyConstraint(
            ["customer_id", "seq", "balance_mils"],
            ["entry.customer_id", "entry.seq", "entry.balance_after"],
            name="fk_wallet_tail",
            **AT_COMMIT,
        ),
        sa.ForeignKeyConstraint(
            ["customer_id", "debt_seq", "debt_mils"],
            ["debt.customer_id", "debt.seq", "debt.debt_after"],
            name="fk_wallet_debt",
            **AT_COMMIT,
        ),
    )
    redeclaring.redeclare(
        "entry",
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("seq", INT64, nullable=False, autoincrement=False),
        sa.Column("prev_seq", INT64, nullable=True),
        sa.Column("prev_balance", INT64, nullable=False),
        sa.Column("amount", INT64, nullable=False),
        sa.Column("balance_after", INT64, nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("public_id", sa.Text(), nullable=False),
        sa.Column("reserved", INT64, nullable=True),
        sa.Column("ts", SECONDS, nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("epoch", INT64, nullable=False),
        sa.PrimaryKeyConstraint("customer_id", "seq", name="pk_entry"),
        sa.UniqueConstraint("customer_id", "seq", "balance_after", name="uq_entry_balance"),
        sa.CheckConstraint("balance_after = prev_balance + amount", name="ck_entry_sum"),
        sa.CheckConstraint(
            (
                "(kind = 'opening' AND seq = 0 AND prev_seq IS NULL AND prev_balance = 0)"
                " OR (kind <> 'opening' AND seq > 0 AND prev_seq IS NOT NULL AND prev_seq = seq - 1)"
            ),
            name="ck_entry_chain",
        ),
        sa.CheckConstraint(
            (
                "(kind = 'opening' AND amount = 0 AND reserved IS NULL)"
                " OR (kind IN ('credit', 'reinstatement') AND amount > 0 AND reserved IS NULL)"
                " OR (kind IN ('reversal', 'repayment') AND amount < 0 AND reserved IS NULL)"
                " OR (kind = 'debit' AND amount < 0 AND reserved IS NOT NULL AND amount = -reserved)"
                " OR (kind = 'refund' AND amount > 0 AND reserved IS NOT NULL AND amount <= reserved)"
            ),
            name="ck_entry_kind",
        ),
        sa.ForeignKeyConstraint(["customer_id"], ["wallet.customer_id"], name="fk_entry_wallet"),
        sa.ForeignKeyConstraint(
            ["customer_id", "prev_seq", "prev_balance"],
            ["entry.customer_id", "entry.seq", "entry.balance_after"],
            name="fk_entry_previous",
        ),
        sa.ForeignKeyConstraint(
            ["public_id", "customer_id", "reserved"],
            ["reservation.request_id", "reservation.customer_id", "reservation.amount"],
            name="fk_entry_reservation",
        ),
    )


def _alter() -> None:
    op.execute("SET CONSTRAINTS ALL IMMEDIATE")  # PostgreSQL alters no table that still has rows to check
    op.add_column("wallet", sa.Column("credit_limit_mils", INT64, nullable=False, server_default=sa.text("0")))
    op.add_column("wallet", sa.Column("floor_mils", INT64, nullable=False, server_default=sa.text("0")))
    op.add_column("wallet", sa.Column("debt_mils", INT64, nullable=False, server_default=sa.text("0")))
    op.add_column("wallet", sa.Column("debt_seq", INT64, nullable=True))
    op.drop_constraint("ck_wallet_balance", "wallet")
    op.create_check_constraint("ck_wallet_balance", "wallet", "balance_mils >= -credit_limit_mils")
    op.create_check_constraint(
        "ck_wallet_floor", "wallet", "credit_limit_mils >= 0 AND floor_mils IN (0, -credit_limit_mils)"
    )
    op.create_check_constraint(
        "ck_wallet_debt", "wallet", "debt_mils >= 0 AND (debt_mils = 0 OR (debt_seq IS NOT NULL AND balance_mils <= 0))"
    )
    op.drop_constraint("ck_entry_balance", "entry")
    op.drop_constraint("ck_entry_kind", "entry")
    op.create_check_constraint(
        "ck_entry_kind",
        "entry",
        (
            "(kind = 'opening' AND amount = 0 AND reserved IS NULL)"
            " OR (kind IN ('credit', 'reinstatement') AND amount > 0 AND reserved IS NULL)"
            " OR (kind IN ('reversal', 'repayment') AND amount < 0 AND reserved IS NULL)"
            " OR (kind = 'debit' AND amount < 0 AND reserved IS NOT NULL AND amount = -reserved)"
            " OR (kind = 'refund' AND amount > 0 AND reserved IS NOT NULL AND amount <= reserved)"
        ),
    )
    op.create_foreign_key(
        "fk_debt_entry", "debt", "entry", ["customer_id", "entry_seq"], ["customer_id", "seq"], **DEFERRED
    )
    op.create_foreign_key(
        "fk_reversal_payment", "reversal", "payment", ["source", "customer_id"], ["source", "customer_id"], **DEFERRED
    )
    op.create_foreign_key(
        "fk_reversal_entry", "reversal", "entry", ["customer_id", "entry_seq"], ["customer_id", "seq"], **DEFERRED
    )
    op.create_foreign_key(
        "fk_payment_reversal",
        "payment",
        "reversal",
        ["source", "reversal_seq", "reversed"],
        ["source", "seq", "to_mils"],
        **DEFERRED,
    )
    op.create_foreign_key(
        "fk_wallet_debt",
        "wallet",
        "debt",
        ["customer_id", "debt_seq", "debt_mils"],
        ["customer_id", "seq", "debt_after"],
        **DEFERRED,
    )


SQLITE_TRIGGERS = (
    """
CREATE TRIGGER tr_entry_floor BEFORE INSERT ON entry
WHEN NEW.balance_after < 0 AND NEW.amount < 0
  AND NEW.balance_after < (SELECT floor_mils FROM wallet WHERE customer_id = NEW.customer_id)
BEGIN SELECT RAISE(ABORT, 'tr_entry_floor: nothing is spent below the floor'); END
""",
    """
CREATE TRIGGER tr_entry_reversal BEFORE INSERT ON entry
WHEN NEW.kind IN ('reversal', 'reinstatement') AND NOT EXISTS (SELECT 1 FROM reversal
  WHERE customer_id = NEW.customer_id AND entry_seq = NEW.seq AND taken = -NEW.amount)
BEGIN SELECT RAISE(ABORT, 'tr_entry_reversal: no payment is taken back by this'); END
""",
    """
CREATE TRIGGER tr_entry_repayment BEFORE INSERT ON entry
WHEN NEW.kind = 'repayment' AND NOT EXISTS (SELECT 1 FROM debt
  WHERE customer_id = NEW.customer_id AND entry_seq = NEW.seq AND kind = 'repayment' AND amount = NEW.amount)
BEGIN SELECT RAISE(ABORT, 'tr_entry_repayment: no debt is repaid by this'); END
""",
    """
CREATE TRIGGER tr_payment_insert BEFORE INSERT ON payment
WHEN NOT EXISTS (SELECT 1 FROM entry WHERE customer_id = NEW.customer_id AND seq = NEW.credit_seq AND kind = 'credit'
  AND public_id = NEW.public_id AND amount = NEW.granted)
BEGIN SELECT RAISE(ABORT, 'tr_payment_insert: a payment is its credit'); END
""",
    """
CREATE TRIGGER tr_payment_update BEFORE UPDATE ON payment
WHEN NEW.source <> OLD.source OR NEW.public_id <> OLD.public_id OR NEW.customer_id <> OLD.customer_id
  OR NEW.granted <> OLD.granted OR NEW.credit_seq <> OLD.credit_seq OR NEW.created_at <> OLD.created_at
  OR NEW.reversal_seq IS NULL OR NEW.reversal_seq <= COALESCE(OLD.reversal_seq, 0)
BEGIN SELECT RAISE(ABORT, 'tr_payment_update: of a payment only what was taken back changes, by a reversal'); END
""",
    """
CREATE TRIGGER tr_payment_delete BEFORE DELETE ON payment
BEGIN SELECT RAISE(ABORT, 'tr_payment_delete: payments are never deleted'); END
""",
    """
CREATE TRIGGER tr_reversal_update BEFORE UPDATE ON reversal
BEGIN SELECT RAISE(ABORT, 'tr_reversal_update: reversals are never edited'); END
""",
    """
CREATE TRIGGER tr_reversal_delete BEFORE DELETE ON reversal
BEGIN SELECT RAISE(ABORT, 'tr_reversal_delete: reversals are never deleted'); END
""",
    """
CREATE TRIGGER tr_debt_insert BEFORE INSERT ON debt
WHEN NEW.kind = 'shortage' AND NOT EXISTS (SELECT 1 FROM reversal
  WHERE customer_id = NEW.customer_id AND entry_seq = NEW.entry_seq AND owed = NEW.amount)
BEGIN SELECT RAISE(ABORT, 'tr_debt_insert: nothing is owed but what a reversal could not take'); END
""",
    """
CREATE TRIGGER tr_debt_update BEFORE UPDATE ON debt
BEGIN SELECT RAISE(ABORT, 'tr_debt_update: debts are never edited'); END
""",
    """
CREATE TRIGGER tr_debt_delete BEFORE DELETE ON debt
BEGIN SELECT RAISE(ABORT, 'tr_debt_delete: debts are never deleted'); END
""",
    """
CREATE TRIGGER tr_payment_event_update BEFORE UPDATE ON payment_event
BEGIN SELECT RAISE(ABORT, 'tr_payment_event_update: what was taken into account stays so'); END
""",
    """
CREATE TRIGGER tr_payment_event_delete BEFORE DELETE ON payment_event
BEGIN SELECT RAISE(ABORT, 'tr_payment_event_delete: what was taken into account stays so'); END
""",
)

POSTGRESQL_TRIGGERS = (
    """
CREATE OR REPLACE FUNCTION billing_check_entries() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF EXISTS (SELECT 1 FROM new_entry WHERE epoch IS DISTINCT FROM (SELECT epoch FROM writer_fence)) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_entry_epoch: this writer is fenced',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  IF EXISTS (SELECT 1 FROM new_entry WHERE kind = 'refund' AND NOT EXISTS (
    SELECT 1 FROM entry AS debit JOIN reservation ON reservation.request_id = debit.public_id
    WHERE debit.kind = 'debit' AND debit.public_id = new_entry.public_id
      AND debit.customer_id = new_entry.customer_id AND debit.seq < new_entry.seq
      AND reservation.state = 'settled' AND reservation.refunded = new_entry.amount)) THEN
    RAISE EXCEPTION USING
      MESSAGE = 'tr_entry_refund: no earlier debit, or not what its settlement gives back',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  IF EXISTS (SELECT 1 FROM new_entry WHERE balance_after < 0 AND amount < 0 AND balance_after < (
    SELECT floor_mils FROM wallet WHERE wallet.customer_id = new_entry.customer_id)) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_entry_floor: nothing is spent below the floor',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  IF EXISTS (SELECT 1 FROM new_entry WHERE kind IN ('reversal', 'reinstatement') AND NOT EXISTS (
    SELECT 1 FROM reversal WHERE reversal.customer_id = new_entry.customer_id
      AND reversal.entry_seq = new_entry.seq AND reversal.taken = -new_entry.amount)) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_entry_reversal: no payment is taken back by this',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  IF EXISTS (SELECT 1 FROM new_entry WHERE kind = 'repayment' AND NOT EXISTS (
    SELECT 1 FROM debt WHERE debt.customer_id = new_entry.customer_id AND debt.entry_seq = new_entry.seq
      AND debt.kind = 'repayment' AND debt.amount = new_entry.amount)) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_entry_repayment: no debt is repaid by this',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NULL;
END $$
""",
    """
CREATE FUNCTION billing_check_payment() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NOT EXISTS (SELECT 1 FROM entry WHERE customer_id = NEW.customer_id AND seq = NEW.credit_seq AND kind = 'credit'
    AND public_id = NEW.public_id AND amount = NEW.granted) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_payment_insert: a payment is its credit',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NEW;
END $$
""",
    """
CREATE TRIGGER tr_payment_insert BEFORE INSERT ON payment
FOR EACH ROW EXECUTE FUNCTION billing_check_payment()
""",
    """
CREATE TRIGGER tr_payment_update BEFORE UPDATE ON payment FOR EACH ROW
WHEN (NEW.source <> OLD.source OR NEW.public_id <> OLD.public_id OR NEW.customer_id <> OLD.customer_id
  OR NEW.granted <> OLD.granted OR NEW.credit_seq <> OLD.credit_seq OR NEW.created_at <> OLD.created_at
  OR NEW.reversal_seq IS NULL OR NEW.reversal_seq <= COALESCE(OLD.reversal_seq, 0))
EXECUTE FUNCTION billing_refuse('of a payment only what was taken back changes, by a reversal')
""",
    """
CREATE TRIGGER tr_payment_delete BEFORE DELETE ON payment
FOR EACH ROW EXECUTE FUNCTION billing_refuse('payments are never deleted')
""",
    """
CREATE TRIGGER tr_reversal_update BEFORE UPDATE ON reversal
FOR EACH ROW EXECUTE FUNCTION billing_refuse('reversals are never edited')
""",
    """
CREATE TRIGGER tr_reversal_delete BEFORE DELETE ON reversal
FOR EACH ROW EXECUTE FUNCTION billing_refuse('reversals are never deleted')
""",
    """
CREATE FUNCTION billing_check_debt() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.kind = 'shortage' AND NOT EXISTS (SELECT 1 FROM reversal
    WHERE customer_id = NEW.customer_id AND entry_seq = NEW.entry_seq AND owed = NEW.amount) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_debt_insert: nothing is owed but what a reversal could not take',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NEW;
END $$
""",
    """
CREATE TRIGGER tr_debt_insert BEFORE INSERT ON debt
FOR EACH ROW EXECUTE FUNCTION billing_check_debt()
""",
    """
CREATE TRIGGER tr_debt_update BEFORE UPDATE ON debt
FOR EACH ROW EXECUTE FUNCTION billing_refuse('debts are never edited')
""",
    """
CREATE TRIGGER tr_debt_delete BEFORE DELETE ON debt
FOR EACH ROW EXECUTE FUNCTION billing_refuse('debts are never deleted')
""",
    """
CREATE TRIGGER tr_payment_event_update BEFORE UPDATE ON payment_event
FOR EACH ROW EXECUTE FUNCTION billing_refuse('what was taken into account stays so')
""",
    """
CREATE TRIGGER tr_payment_event_delete BEFORE DELETE ON payment_event
FOR EACH ROW EXECUTE FUNCTION billing_refuse('what was taken into account stays so')
""",
)
