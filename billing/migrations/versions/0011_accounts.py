"""Teams, credit limits and closed statements."""

from typing import Any

import sqlalchemy as sa
from alembic import op

from billing.migrations import redeclare as redeclaring

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
SECONDS: sa.types.TypeEngine[float] = sa.Double().with_variant(sa.REAL(), "sqlite")
AT_COMMIT: dict[str, Any] = {"deferrable": True, "initially": "DEFERRED", "use_alter": True}


def upgrade() -> None:
    is_sqlite = op.get_context().dialect.name == "sqlite"
    if not is_sqlite:
        op.execute("SET CONSTRAINTS ALL IMMEDIATE")  # PostgreSQL alters no table that still has rows to check
    op.create_table(
        "credit_line",
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("seq", INT64, nullable=False, autoincrement=False),
        sa.Column("limit_mils", INT64, nullable=False),
        sa.Column("floor_mils", INT64, nullable=False),
        sa.Column("entry_seq", INT64, nullable=False),
        sa.Column("ts", SECONDS, nullable=False),
        sa.PrimaryKeyConstraint("customer_id", "seq", name="pk_credit_line"),
        sa.CheckConstraint("limit_mils >= 0 AND floor_mils IN (0, -limit_mils)", name="ck_credit_line_floor"),
        sa.ForeignKeyConstraint(
            ["customer_id", "entry_seq"], ["entry.customer_id", "entry.seq"], name="fk_credit_line_entry", **AT_COMMIT
        ),
        sqlite_strict=True,
    )
    op.create_index("ix_credit_line_entry", "credit_line", ["customer_id", "entry_seq"])
    op.create_table(
        "statement",
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("number", INT64, nullable=False, autoincrement=False),
        sa.Column("prev_number", INT64, nullable=True),
        sa.Column("period", sa.Text(), nullable=False),
        sa.Column("from_seq", INT64, nullable=False),
        sa.Column("to_seq", INT64, nullable=False),
        sa.Column("opening_mils", INT64, nullable=False),
        sa.Column("usage_mils", INT64, nullable=False),
        sa.Column("payments_mils", INT64, nullable=False),
        sa.Column("transfers_mils", INT64, nullable=False),
        sa.Column("closing_mils", INT64, nullable=False),
        sa.Column("closed_at", SECONDS, nullable=False),
        sa.PrimaryKeyConstraint("customer_id", "number", name="pk_statement"),
        sa.UniqueConstraint("customer_id", "period", name="uq_statement_period"),
        sa.UniqueConstraint("customer_id", "number", "to_seq", "closing_mils", name="uq_statement_end"),
        sa.CheckConstraint(
            "(number = 1 AND prev_number IS NULL AND from_seq = 0 AND opening_mils = 0)"
            " OR (number > 1 AND prev_number IS NOT NULL AND prev_number = number - 1)",
            name="ck_statement_chain",
        ),
        sa.CheckConstraint(
            "to_seq >= from_seq AND closing_mils = opening_mils + usage_mils + payments_mils + transfers_mils",
            name="ck_statement_sum",
        ),
        sa.ForeignKeyConstraint(
            ["customer_id", "prev_number", "from_seq", "opening_mils"],
            ["statement.customer_id", "statement.number", "statement.to_seq", "statement.closing_mils"],
            name="fk_statement_previous",
        ),
        sa.ForeignKeyConstraint(
            ["customer_id", "to_seq", "closing_mils"],
            ["entry.customer_id", "entry.seq", "entry.balance_after"],
            name="fk_statement_entry",
        ),
        sqlite_strict=True,
    )
    op.create_table(
        "membership",
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("parent_id", sa.Text(), nullable=False),
        sa.Column("cap_mils", INT64, nullable=True),
        sa.Column("cap_period", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("customer_id", name="pk_membership"),
        sa.CheckConstraint("customer_id <> parent_id", name="ck_membership_parent"),
        sa.CheckConstraint(
            "(cap_mils IS NULL AND cap_period IS NULL) OR (cap_mils IS NOT NULL"
            " AND cap_mils >= 0 AND cap_period IS NOT NULL"
            " AND cap_period IN ('day', 'month'))",
            name="ck_membership_cap",
        ),
        sa.ForeignKeyConstraint(["customer_id"], ["wallet.customer_id"], name="fk_membership_customer"),
        sa.ForeignKeyConstraint(["parent_id"], ["wallet.customer_id"], name="fk_membership_parent"),
        sqlite_strict=True,
    )
    op.create_index("ix_membership_parent", "membership", ["parent_id"])
    op.create_table(
        "transfer",
        sa.Column("transfer_id", sa.Text(), nullable=False),
        sa.Column("from_id", sa.Text(), nullable=False),
        sa.Column("to_id", sa.Text(), nullable=False),
        sa.Column("amount", INT64, nullable=False),
        sa.Column("from_seq", INT64, nullable=False),
        sa.Column("to_seq", INT64, nullable=False),
        sa.PrimaryKeyConstraint("transfer_id", name="pk_transfer"),
        sa.CheckConstraint("amount > 0", name="ck_transfer_amount"),
        sa.ForeignKeyConstraint(
            ["from_id", "from_seq"], ["entry.customer_id", "entry.seq"], name="fk_transfer_from", **AT_COMMIT
        ),
        sa.ForeignKeyConstraint(
            ["to_id", "to_seq"], ["entry.customer_id", "entry.seq"], name="fk_transfer_to", **AT_COMMIT
        ),
        sqlite_strict=True,
    )
    op.create_index("ix_transfer_from", "transfer", ["from_id", "from_seq"])
    op.create_index("ix_transfer_to", "transfer", ["to_id", "to_seq"])
    op.create_table(
        "draw",
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("day", INT64, nullable=False),
        sa.Column("drawn", INT64, nullable=False),
        sa.PrimaryKeyConstraint("request_id", name="pk_draw"),
        sa.CheckConstraint("drawn > 0", name="ck_draw_drawn"),
        sa.ForeignKeyConstraint(["request_id"], ["reservation.request_id"], name="fk_draw_reservation"),
        sa.ForeignKeyConstraint(["customer_id"], ["membership.customer_id"], name="fk_draw_member"),
        sqlite_strict=True,
    )
    op.create_index("ix_draw_day", "draw", ["customer_id", "day"])
    if is_sqlite:
        _redeclare()
    else:
        op.drop_constraint("ck_entry_kind", "entry")
        op.create_check_constraint(
            "ck_entry_kind",
            "entry",
            "(kind = 'opening' AND amount = 0 AND reserved IS NULL)"
            " OR (kind IN ('credit', 'reinstatement', 'transfer_in') AND amount > 0"
            " AND reserved IS NULL) OR (kind IN ('reversal', 'repayment', 'transfer_out')"
            " AND amount < 0 AND reserved IS NULL) OR (kind = 'debit' AND amount < 0"
            " AND reserved IS NOT NULL AND amount = -reserved) OR (kind = 'refund'"
            " AND amount > 0 AND reserved IS NOT NULL AND amount <= reserved)",
        )
        op.create_foreign_key(
            "fk_credit_line_entry",
            "credit_line",
            "entry",
            ["customer_id", "entry_seq"],
            ["customer_id", "seq"],
            deferrable=True,
            initially="DEFERRED",
        )
        op.create_foreign_key(
            "fk_transfer_from",
            "transfer",
            "entry",
            ["from_id", "from_seq"],
            ["customer_id", "seq"],
            deferrable=True,
            initially="DEFERRED",
        )
        op.create_foreign_key(
            "fk_transfer_to",
            "transfer",
            "entry",
            ["to_id", "to_seq"],
            ["customer_id", "seq"],
            deferrable=True,
            initially="DEFERRED",
        )
    for statement in SQLITE_TRIGGERS if is_sqlite else POSTGRESQL_TRIGGERS:
        op.execute(statement)


def _redeclare() -> None:
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
            "(kind = 'opening' AND seq = 0 AND prev_seq IS NULL AND prev_balance = 0)"
            " OR (kind <> 'opening' AND seq > 0 AND prev_seq IS NOT NULL"
            " AND prev_seq = seq - 1)",
            name="ck_entry_chain",
        ),
        sa.CheckConstraint(
            "(kind = 'opening' AND amount = 0 AND reserved IS NULL)"
            " OR (kind IN ('credit', 'reinstatement', 'transfer_in') AND amount > 0"
            " AND reserved IS NULL) OR (kind IN ('reversal', 'repayment', 'transfer_out')"
            " AND amount < 0 AND reserved IS NULL) OR (kind = 'debit' AND amount < 0"
            " AND reserved IS NOT NULL AND amount = -reserved) OR (kind = 'refund'"
            " AND amount > 0 AND reserved IS NOT NULL AND amount <= reserved)",
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


SQLITE_TRIGGERS = (
    """
CREATE TRIGGER tr_entry_transfer BEFORE INSERT ON entry
WHEN NEW.kind IN ('transfer_out', 'transfer_in') AND NOT EXISTS (SELECT 1 FROM transfer
  WHERE transfer_id = NEW.public_id AND amount = ABS(NEW.amount)
    AND ((NEW.kind = 'transfer_out' AND from_id = NEW.customer_id AND from_seq = NEW.seq)
      OR (NEW.kind = 'transfer_in' AND to_id = NEW.customer_id AND to_seq = NEW.seq)))
BEGIN SELECT RAISE(ABORT, 'tr_entry_transfer: nothing was transferred by this'); END
""",
    """
CREATE TRIGGER tr_wallet_insert BEFORE INSERT ON wallet
WHEN NEW.credit_limit_mils <> 0 OR NEW.floor_mils <> 0
BEGIN SELECT RAISE(ABORT, 'tr_wallet_insert: a wallet begins prepaid'); END
""",
    """
CREATE TRIGGER tr_wallet_line BEFORE UPDATE ON wallet
WHEN (NEW.credit_limit_mils <> OLD.credit_limit_mils OR NEW.floor_mils <> OLD.floor_mils) AND NOT EXISTS (
  SELECT 1 FROM credit_line WHERE customer_id = NEW.customer_id AND limit_mils = NEW.credit_limit_mils
    AND floor_mils = NEW.floor_mils
    AND seq = (SELECT MAX(seq) FROM credit_line WHERE customer_id = NEW.customer_id))
BEGIN SELECT RAISE(ABORT, 'tr_wallet_line: the newest credit line says otherwise'); END
""",
    """
CREATE TRIGGER tr_membership_insert BEFORE INSERT ON membership
WHEN EXISTS (SELECT 1 FROM membership WHERE customer_id = NEW.parent_id OR parent_id = NEW.customer_id)
BEGIN SELECT RAISE(ABORT, 'tr_membership_insert: teams have two levels'); END
""",
    """
CREATE TRIGGER tr_membership_update BEFORE UPDATE ON membership
WHEN NEW.customer_id <> OLD.customer_id OR NEW.parent_id <> OLD.parent_id
BEGIN SELECT RAISE(ABORT, 'tr_membership_update: a member stays with its team'); END
""",
    """
CREATE TRIGGER tr_transfer_insert BEFORE INSERT ON transfer
WHEN NOT EXISTS (SELECT 1 FROM membership WHERE (customer_id = NEW.from_id AND parent_id = NEW.to_id)
  OR (customer_id = NEW.to_id AND parent_id = NEW.from_id))
BEGIN SELECT RAISE(ABORT, 'tr_transfer_insert: money moves within a team only'); END
""",
    """
CREATE TRIGGER tr_credit_line_update BEFORE UPDATE ON credit_line
BEGIN SELECT RAISE(ABORT, 'tr_credit_line_update: another limit is another line'); END
""",
    """
CREATE TRIGGER tr_credit_line_delete BEFORE DELETE ON credit_line
BEGIN SELECT RAISE(ABORT, 'tr_credit_line_delete: another limit is another line'); END
""",
    """
CREATE TRIGGER tr_statement_update BEFORE UPDATE ON statement
BEGIN SELECT RAISE(ABORT, 'tr_statement_update: a closed statement stands'); END
""",
    """
CREATE TRIGGER tr_statement_delete BEFORE DELETE ON statement
BEGIN SELECT RAISE(ABORT, 'tr_statement_delete: a closed statement stands'); END
""",
    """
CREATE TRIGGER tr_membership_delete BEFORE DELETE ON membership
BEGIN SELECT RAISE(ABORT, 'tr_membership_delete: a member stays with its team'); END
""",
    """
CREATE TRIGGER tr_transfer_update BEFORE UPDATE ON transfer
BEGIN SELECT RAISE(ABORT, 'tr_transfer_update: what moved has moved'); END
""",
    """
CREATE TRIGGER tr_transfer_delete BEFORE DELETE ON transfer
BEGIN SELECT RAISE(ABORT, 'tr_transfer_delete: what moved has moved'); END
""",
    """
CREATE TRIGGER tr_draw_update BEFORE UPDATE ON draw
BEGIN SELECT RAISE(ABORT, 'tr_draw_update: what was drawn is never edited'); END
""",
    """
CREATE TRIGGER tr_draw_delete BEFORE DELETE ON draw
BEGIN SELECT RAISE(ABORT, 'tr_draw_delete: what was drawn is never forgotten'); END
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
  IF EXISTS (SELECT 1 FROM new_entry WHERE kind IN ('transfer_out', 'transfer_in') AND NOT EXISTS (
    SELECT 1 FROM transfer WHERE transfer.transfer_id = new_entry.public_id
      AND transfer.amount = ABS(new_entry.amount)
      AND ((new_entry.kind = 'transfer_out' AND transfer.from_id = new_entry.customer_id
          AND transfer.from_seq = new_entry.seq)
        OR (new_entry.kind = 'transfer_in' AND transfer.to_id = new_entry.customer_id
          AND transfer.to_seq = new_entry.seq)))) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_entry_transfer: nothing was transferred by this',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NULL;
END $$
""",
    """
CREATE TRIGGER tr_wallet_insert BEFORE INSERT ON wallet FOR EACH ROW
WHEN (NEW.credit_limit_mils <> 0 OR NEW.floor_mils <> 0)
EXECUTE FUNCTION billing_refuse('a wallet begins prepaid')
""",
    """
CREATE FUNCTION billing_check_line() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NOT EXISTS (SELECT 1 FROM credit_line WHERE customer_id = NEW.customer_id
    AND limit_mils = NEW.credit_limit_mils AND floor_mils = NEW.floor_mils
    AND seq = (SELECT MAX(seq) FROM credit_line WHERE customer_id = NEW.customer_id)) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_wallet_line: the newest credit line says otherwise',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NEW;
END $$
""",
    """
CREATE TRIGGER tr_wallet_line BEFORE UPDATE ON wallet FOR EACH ROW
WHEN (NEW.credit_limit_mils <> OLD.credit_limit_mils OR NEW.floor_mils <> OLD.floor_mils)
EXECUTE FUNCTION billing_check_line()
""",
    """
CREATE FUNCTION billing_check_membership() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF EXISTS (SELECT 1 FROM membership WHERE customer_id = NEW.parent_id OR parent_id = NEW.customer_id) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_membership_insert: teams have two levels',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NEW;
END $$
""",
    """
CREATE TRIGGER tr_membership_insert BEFORE INSERT ON membership
FOR EACH ROW EXECUTE FUNCTION billing_check_membership()
""",
    """
CREATE TRIGGER tr_membership_update BEFORE UPDATE ON membership FOR EACH ROW
WHEN (NEW.customer_id <> OLD.customer_id OR NEW.parent_id <> OLD.parent_id)
EXECUTE FUNCTION billing_refuse('a member stays with its team')
""",
    """
CREATE FUNCTION billing_check_transfer() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NOT EXISTS (SELECT 1 FROM membership WHERE (customer_id = NEW.from_id AND parent_id = NEW.to_id)
    OR (customer_id = NEW.to_id AND parent_id = NEW.from_id)) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_transfer_insert: money moves within a team only',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NEW;
END $$
""",
    """
CREATE TRIGGER tr_transfer_insert BEFORE INSERT ON transfer
FOR EACH ROW EXECUTE FUNCTION billing_check_transfer()
""",
    """
CREATE TRIGGER tr_credit_line_update BEFORE UPDATE ON credit_line
FOR EACH ROW EXECUTE FUNCTION billing_refuse('another limit is another line')
""",
    """
CREATE TRIGGER tr_credit_line_delete BEFORE DELETE ON credit_line
FOR EACH ROW EXECUTE FUNCTION billing_refuse('another limit is another line')
""",
    """
CREATE TRIGGER tr_statement_update BEFORE UPDATE ON statement
FOR EACH ROW EXECUTE FUNCTION billing_refuse('a closed statement stands')
""",
    """
CREATE TRIGGER tr_statement_delete BEFORE DELETE ON statement
FOR EACH ROW EXECUTE FUNCTION billing_refuse('a closed statement stands')
""",
    """
CREATE TRIGGER tr_membership_delete BEFORE DELETE ON membership
FOR EACH ROW EXECUTE FUNCTION billing_refuse('a member stays with its team')
""",
    """
CREATE TRIGGER tr_transfer_update BEFORE UPDATE ON transfer
FOR EACH ROW EXECUTE FUNCTION billing_refuse('what moved has moved')
""",
    """
CREATE TRIGGER tr_transfer_delete BEFORE DELETE ON transfer
FOR EACH ROW EXECUTE FUNCTION billing_refuse('what moved has moved')
""",
    """
CREATE TRIGGER tr_draw_update BEFORE UPDATE ON draw
FOR EACH ROW EXECUTE FUNCTION billing_refuse('what was drawn is never edited')
""",
    """
CREATE TRIGGER tr_draw_delete BEFORE DELETE ON draw
FOR EACH ROW EXECUTE FUNCTION billing_refuse('what was drawn is never forgotten')
""",
)
