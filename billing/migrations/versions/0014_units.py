"""Provisioned units: what is promised, charged once a month and used, and requests whose frames they pay for."""

from typing import Any

import sqlalchemy as sa
from alembic import op

from billing.migrations import redeclare as redeclaring

revision = "0014"
down_revision = "0013"
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
        "provision",
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("version", INT64, nullable=False, autoincrement=False),
        sa.Column("prev_version", INT64, nullable=True),
        sa.Column("prev_period", sa.Text(), nullable=True),
        sa.Column("from_period", sa.Text(), nullable=False),
        sa.Column("units", INT64, nullable=False),
        sa.Column("unit_mils", INT64, nullable=False),
        sa.Column("unit_frames", INT64, nullable=False),
        sa.Column("units_per_replica", INT64, nullable=False),
        sa.Column("created_at", SECONDS, nullable=False),
        sa.PrimaryKeyConstraint("customer_id", "model", "version", name="pk_provision"),
        sa.UniqueConstraint("customer_id", "model", "version", "from_period", name="uq_provision_period"),
        sa.UniqueConstraint(
            "customer_id", "model", "version", "units", "unit_mils", "unit_frames", name="uq_provision_terms"
        ),
        sa.CheckConstraint(
            "(version = 1 AND prev_version IS NULL AND prev_period IS NULL) OR (version > 1 AND "
            "prev_version IS NOT NULL AND prev_version = version - 1 AND prev_period IS NOT NULL AND "
            "prev_period < from_period)",
            name="ck_provision_chain",
        ),
        sa.CheckConstraint(
            "units >= 0 AND unit_mils > 0 AND unit_frames >= 0 AND units_per_replica >= 0 AND "
            "unit_frames + units_per_replica > 0 AND length(from_period) = 7",
            name="ck_provision_terms",
        ),
        sa.ForeignKeyConstraint(["customer_id"], ["wallet.customer_id"], name="fk_provision_wallet"),
        sa.ForeignKeyConstraint(
            ["customer_id", "model", "prev_version", "prev_period"],
            ["provision.customer_id", "provision.model", "provision.version", "provision.from_period"],
            name="fk_provision_previous",
        ),
        sqlite_strict=True,
    )
    op.create_table(
        "unit_charge",
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("period", sa.Text(), nullable=False),
        sa.Column("version", INT64, nullable=False),
        sa.Column("units", INT64, nullable=False),
        sa.Column("unit_mils", INT64, nullable=False),
        sa.Column("unit_frames", INT64, nullable=False),
        sa.Column("amount", INT64, nullable=False),
        sa.Column("frames", INT64, nullable=False),
        sa.Column("entry_seq", INT64, nullable=False),
        sa.Column("charged_at", SECONDS, nullable=False),
        sa.PrimaryKeyConstraint("customer_id", "model", "period", name="pk_unit_charge"),
        sa.UniqueConstraint("customer_id", "model", "period", "frames", name="uq_unit_charge_frames"),
        sa.CheckConstraint(
            "units > 0 AND amount = units * unit_mils AND frames = units * unit_frames", name="ck_unit_charge_amount"
        ),
        sa.ForeignKeyConstraint(
            ["customer_id", "model", "version", "units", "unit_mils", "unit_frames"],
            [
                "provision.customer_id",
                "provision.model",
                "provision.version",
                "provision.units",
                "provision.unit_mils",
                "provision.unit_frames",
            ],
            name="fk_unit_charge_provision",
        ),
        sa.ForeignKeyConstraint(
            ["customer_id", "entry_seq"], ["entry.customer_id", "entry.seq"], name="fk_unit_charge_entry", **AT_COMMIT
        ),
        sqlite_strict=True,
    )
    op.create_table(
        "unit_use",
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("period", sa.Text(), nullable=False),
        sa.Column("seq", INT64, nullable=False, autoincrement=False),
        sa.Column("prev_seq", INT64, nullable=True),
        sa.Column("used_before", INT64, nullable=False),
        sa.Column("frames", INT64, nullable=False),
        sa.Column("used_after", INT64, nullable=False),
        sa.Column("allotment", INT64, nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("customer_id", "model", "period", "seq", name="pk_unit_use"),
        sa.UniqueConstraint("customer_id", "model", "period", "seq", "used_after", name="uq_unit_use_after"),
        sa.UniqueConstraint("request_id", "frames", name="uq_unit_use_request"),
        sa.CheckConstraint(
            "(seq = 1 AND prev_seq IS NULL AND used_before = 0) OR (seq > 1 AND prev_seq IS NOT NULL "
            "AND prev_seq = seq - 1)",
            name="ck_unit_use_chain",
        ),
        sa.CheckConstraint(
            "frames <> 0 AND used_after = used_before + frames AND used_after >= 0 AND used_after <= allotment",
            name="ck_unit_use_sum",
        ),
        sa.ForeignKeyConstraint(
            ["customer_id", "model", "period", "allotment"],
            ["unit_charge.customer_id", "unit_charge.model", "unit_charge.period", "unit_charge.frames"],
            name="fk_unit_use_charge",
        ),
        sa.ForeignKeyConstraint(
            ["customer_id", "model", "period", "prev_seq", "used_before"],
            ["unit_use.customer_id", "unit_use.model", "unit_use.period", "unit_use.seq", "unit_use.used_after"],
            name="fk_unit_use_previous",
        ),
        sqlite_strict=True,
    )
    op.create_index("ix_unit_charge_entry", "unit_charge", ["customer_id", "entry_seq"])
    op.add_column("reservation", sa.Column("covered", INT64, nullable=True))
    op.execute("DROP TRIGGER tr_reservation_update" + ("" if is_sqlite else " ON reservation"))
    if is_sqlite:
        op.execute("DROP TRIGGER tr_submission_update")
        _redeclare()
    else:
        _alter()
    for statement in SQLITE_TRIGGERS if is_sqlite else POSTGRESQL_TRIGGERS:
        op.execute(statement)


def _redeclare() -> None:
    redeclaring.redeclare(
        "reservation",
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("frames", INT64, nullable=False),
        sa.Column("mils_per_frame", INT64, nullable=False),
        sa.Column("amount", INT64, nullable=False),
        sa.Column("captured", INT64, nullable=False),
        sa.Column("refunded", INT64, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("lease_until", SECONDS, nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("created_at", SECONDS, nullable=False),
        sa.Column("debit_seq", INT64, nullable=False),
        sa.Column("settled_at", SECONDS, nullable=True),
        sa.Column("settled_seq", INT64, nullable=True),
        sa.Column("model", sa.Text(), nullable=False, server_default=""),
        sa.Column("per_frames", INT64, nullable=False, server_default=sa.text("1")),
        sa.Column("frames_delivered", INT64, nullable=True),
        sa.Column("covered", INT64, nullable=True),
        sa.PrimaryKeyConstraint("request_id", name="pk_reservation"),
        sa.UniqueConstraint("request_id", "customer_id", "amount", name="uq_reservation_amount"),
        sa.CheckConstraint("frames > 0 AND mils_per_frame > 0 AND per_frames > 0", name="ck_reservation_price"),
        sa.CheckConstraint("covered > 0 AND covered <= frames", name="ck_reservation_covered"),
        sa.CheckConstraint(
            "amount = ((frames - COALESCE(covered, 0)) * mils_per_frame + per_frames - 1) / per_frames",
            name="ck_reservation_amount",
        ),
        sa.CheckConstraint(
            "(state = 'open' AND captured = 0 AND refunded = 0 AND settled_seq IS NULL AND settled_at "
            "IS NULL AND frames_delivered IS NULL) OR (state = 'settled' AND captured >= 0 AND "
            "refunded >= 0 AND captured + refunded = amount AND settled_seq IS NOT NULL AND "
            "settled_at IS NOT NULL AND frames_delivered IS NOT NULL)",
            name="ck_reservation_state",
        ),
        sa.CheckConstraint(
            "frames_delivered IS NULL OR (frames_delivered >= 0 AND frames_delivered <= frames AND "
            "captured = ((CASE WHEN frames_delivered > COALESCE(covered, 0) THEN frames_delivered - "
            "COALESCE(covered, 0) ELSE 0 END) * mils_per_frame + per_frames - 1) / per_frames)",
            name="ck_reservation_delivered",
        ),
        sa.ForeignKeyConstraint(
            ["request_id", "covered"],
            ["unit_use.request_id", "unit_use.frames"],
            name="fk_reservation_covered",
            **AT_COMMIT,
        ),
        sa.ForeignKeyConstraint(
            ["key_id", "customer_id"], ["api_key.key_id", "api_key.customer_id"], name="fk_reservation_key"
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
            "(kind = 'opening' AND seq = 0 AND prev_seq IS NULL AND prev_balance = 0) OR (kind <> "
            "'opening' AND seq > 0 AND prev_seq IS NOT NULL AND prev_seq = seq - 1)",
            name="ck_entry_chain",
        ),
        sa.CheckConstraint(
            "(kind = 'opening' AND amount = 0 AND reserved IS NULL) OR (kind IN ('credit', "
            "'reinstatement', 'transfer_in') AND amount > 0 AND reserved IS NULL) OR (kind IN "
            "('reversal', 'repayment', 'transfer_out', 'fee') AND amount < 0 AND reserved IS NULL) OR "
            "(kind = 'debit' AND amount <= 0 AND reserved IS NOT NULL AND amount = -reserved) OR "
            "(kind = 'refund' AND amount > 0 AND reserved IS NOT NULL AND amount <= reserved)",
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
    op.create_check_constraint("ck_reservation_covered", "reservation", "covered > 0 AND covered <= frames")
    op.drop_constraint("ck_reservation_amount", "reservation")
    op.create_check_constraint(
        "ck_reservation_amount",
        "reservation",
        "amount = ((frames - COALESCE(covered, 0)) * mils_per_frame + per_frames - 1) / per_frames",
    )
    op.drop_constraint("ck_reservation_delivered", "reservation")
    op.create_check_constraint(
        "ck_reservation_delivered",
        "reservation",
        "frames_delivered IS NULL OR (frames_delivered >= 0 AND frames_delivered <= frames AND "
        "captured = ((CASE WHEN frames_delivered > COALESCE(covered, 0) THEN frames_delivered - "
        "COALESCE(covered, 0) ELSE 0 END) * mils_per_frame + per_frames - 1) / per_frames)",
    )
    op.drop_constraint("ck_entry_kind", "entry")
    op.create_check_constraint(
        "ck_entry_kind",
        "entry",
        "(kind = 'opening' AND amount = 0 AND reserved IS NULL) OR (kind IN ('credit', "
        "'reinstatement', 'transfer_in') AND amount > 0 AND reserved IS NULL) OR (kind IN "
        "('reversal', 'repayment', 'transfer_out', 'fee') AND amount < 0 AND reserved IS NULL) OR "
        "(kind = 'debit' AND amount <= 0 AND reserved IS NOT NULL AND amount = -reserved) OR "
        "(kind = 'refund' AND amount > 0 AND reserved IS NOT NULL AND amount <= reserved)",
    )
    op.create_foreign_key(
        "fk_reservation_covered",
        "reservation",
        "unit_use",
        ["request_id", "covered"],
        ["request_id", "frames"],
        deferrable=True,
        initially="DEFERRED",
    )
    op.create_foreign_key(
        "fk_unit_charge_entry",
        "unit_charge",
        "entry",
        ["customer_id", "entry_seq"],
        ["customer_id", "seq"],
        deferrable=True,
        initially="DEFERRED",
    )


SQLITE_TRIGGERS = (
    """
CREATE TRIGGER tr_reservation_update BEFORE UPDATE ON reservation
WHEN OLD.state = 'settled' OR NEW.request_id <> OLD.request_id OR NEW.customer_id <> OLD.customer_id
  OR NEW.key_id <> OLD.key_id OR NEW.frames <> OLD.frames OR NEW.mils_per_frame <> OLD.mils_per_frame
  OR NEW.amount <> OLD.amount OR NEW.debit_seq <> OLD.debit_seq OR NEW.created_at <> OLD.created_at
  OR NEW.model <> OLD.model OR NEW.per_frames <> OLD.per_frames OR NEW.covered IS NOT OLD.covered
BEGIN SELECT RAISE(ABORT, 'tr_reservation_update: a reservation settles once and its terms never change'); END
""",
    """
CREATE TRIGGER tr_submission_update BEFORE UPDATE ON submission
WHEN OLD.released_at IS NOT NULL OR NEW.released_at IS NULL OR NEW.request_id <> OLD.request_id
  OR NEW.customer_id <> OLD.customer_id OR NEW.amount <> OLD.amount OR NEW.idempotency_key <> OLD.idempotency_key
  OR NEW.payload_sha256 <> OLD.payload_sha256 OR NEW.created_at <> OLD.created_at
  OR NOT EXISTS (SELECT 1 FROM reservation
    WHERE request_id = OLD.request_id AND state = 'settled' AND frames_delivered = 0)
BEGIN SELECT RAISE(ABORT, 'tr_submission_update: a key is released once, by a request that kept nothing'); END
""",
    """
CREATE TRIGGER tr_entry_fee BEFORE INSERT ON entry
WHEN NEW.kind = 'fee' AND NOT EXISTS (SELECT 1 FROM unit_charge
  WHERE customer_id = NEW.customer_id AND entry_seq = NEW.seq AND amount = -NEW.amount)
BEGIN SELECT RAISE(ABORT, 'tr_entry_fee: no units are charged by this'); END
""",
    """
CREATE TRIGGER tr_provision_insert BEFORE INSERT ON provision
WHEN EXISTS (SELECT 1 FROM unit_charge
  WHERE customer_id = NEW.customer_id AND model = NEW.model AND period >= NEW.from_period)
BEGIN SELECT RAISE(ABORT, 'tr_provision_insert: that month is charged already'); END
""",
    """
CREATE TRIGGER tr_provision_update BEFORE UPDATE ON provision
BEGIN SELECT RAISE(ABORT, 'tr_provision_update: other terms are another version'); END
""",
    """
CREATE TRIGGER tr_provision_delete BEFORE DELETE ON provision
BEGIN SELECT RAISE(ABORT, 'tr_provision_delete: a commitment ends with another version'); END
""",
    """
CREATE TRIGGER tr_unit_charge_insert BEFORE INSERT ON unit_charge
WHEN NEW.version IS NOT (SELECT MAX(version) FROM provision
  WHERE customer_id = NEW.customer_id AND model = NEW.model AND from_period <= NEW.period)
BEGIN SELECT RAISE(ABORT, 'tr_unit_charge_insert: another version is in force'); END
""",
    """
CREATE TRIGGER tr_unit_charge_update BEFORE UPDATE ON unit_charge
BEGIN SELECT RAISE(ABORT, 'tr_unit_charge_update: a month is charged once'); END
""",
    """
CREATE TRIGGER tr_unit_charge_delete BEFORE DELETE ON unit_charge
BEGIN SELECT RAISE(ABORT, 'tr_unit_charge_delete: a month is charged once'); END
""",
    """
CREATE TRIGGER tr_unit_use_insert BEFORE INSERT ON unit_use
WHEN NOT EXISTS (SELECT 1 FROM reservation
  WHERE request_id = NEW.request_id AND customer_id = NEW.customer_id AND model = NEW.model
    AND (covered = NEW.frames OR (NEW.frames < 0 AND state = 'settled' AND frames_delivered - covered = NEW.frames)))
BEGIN SELECT RAISE(ABORT, 'tr_unit_use_insert: no request uses or gives back these frames'); END
""",
    """
CREATE TRIGGER tr_unit_use_update BEFORE UPDATE ON unit_use
BEGIN SELECT RAISE(ABORT, 'tr_unit_use_update: what was used is never edited'); END
""",
    """
CREATE TRIGGER tr_unit_use_delete BEFORE DELETE ON unit_use
BEGIN SELECT RAISE(ABORT, 'tr_unit_use_delete: what was used is never forgotten'); END
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
  IF EXISTS (SELECT 1 FROM new_entry WHERE kind = 'fee' AND NOT EXISTS (
    SELECT 1 FROM unit_charge WHERE unit_charge.customer_id = new_entry.customer_id
      AND unit_charge.entry_seq = new_entry.seq AND unit_charge.amount = -new_entry.amount)) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_entry_fee: no units are charged by this',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NULL;
END $$
""",
    """
CREATE OR REPLACE FUNCTION billing_check_submission() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF TG_OP = 'DELETE' THEN
    IF EXISTS (SELECT 1 FROM reservation WHERE request_id = OLD.request_id AND state = 'open') THEN
      RAISE EXCEPTION USING
        MESSAGE = 'tr_submission_delete: a request is not forgotten while it is open',
        ERRCODE = 'integrity_constraint_violation';
    END IF;
    RETURN OLD;
  END IF;
  IF OLD.released_at IS NOT NULL OR NEW.released_at IS NULL OR NEW.request_id <> OLD.request_id
    OR NEW.customer_id <> OLD.customer_id OR NEW.amount <> OLD.amount OR NEW.idempotency_key <> OLD.idempotency_key
    OR NEW.payload_sha256 <> OLD.payload_sha256 OR NEW.created_at <> OLD.created_at
    OR NOT EXISTS (SELECT 1 FROM reservation
      WHERE request_id = OLD.request_id AND state = 'settled' AND frames_delivered = 0) THEN
    RAISE EXCEPTION USING
      MESSAGE = 'tr_submission_update: a key is released once, by a request that kept nothing',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NEW;
END $$
""",
    """
CREATE TRIGGER tr_reservation_update BEFORE UPDATE ON reservation FOR EACH ROW
WHEN (OLD.state = 'settled' OR NEW.request_id <> OLD.request_id OR NEW.customer_id <> OLD.customer_id
  OR NEW.key_id <> OLD.key_id OR NEW.frames <> OLD.frames OR NEW.mils_per_frame <> OLD.mils_per_frame
  OR NEW.amount <> OLD.amount OR NEW.debit_seq <> OLD.debit_seq OR NEW.created_at <> OLD.created_at
  OR NEW.model <> OLD.model OR NEW.per_frames <> OLD.per_frames OR NEW.covered IS DISTINCT FROM OLD.covered)
EXECUTE FUNCTION billing_refuse('a reservation settles once and its terms never change')
""",
    """
CREATE FUNCTION billing_check_provision() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF EXISTS (SELECT 1 FROM unit_charge
    WHERE customer_id = NEW.customer_id AND model = NEW.model AND period >= NEW.from_period) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_provision_insert: that month is charged already',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NEW;
END $$
""",
    """
CREATE TRIGGER tr_provision_insert BEFORE INSERT ON provision
FOR EACH ROW EXECUTE FUNCTION billing_check_provision()
""",
    """
CREATE TRIGGER tr_provision_update BEFORE UPDATE ON provision
FOR EACH ROW EXECUTE FUNCTION billing_refuse('other terms are another version')
""",
    """
CREATE TRIGGER tr_provision_delete BEFORE DELETE ON provision
FOR EACH ROW EXECUTE FUNCTION billing_refuse('a commitment ends with another version')
""",
    """
CREATE FUNCTION billing_check_unit_charge() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.version IS DISTINCT FROM (SELECT MAX(version) FROM provision
    WHERE customer_id = NEW.customer_id AND model = NEW.model AND from_period <= NEW.period) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_unit_charge_insert: another version is in force',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NEW;
END $$
""",
    """
CREATE TRIGGER tr_unit_charge_insert BEFORE INSERT ON unit_charge
FOR EACH ROW EXECUTE FUNCTION billing_check_unit_charge()
""",
    """
CREATE TRIGGER tr_unit_charge_update BEFORE UPDATE ON unit_charge
FOR EACH ROW EXECUTE FUNCTION billing_refuse('a month is charged once')
""",
    """
CREATE TRIGGER tr_unit_charge_delete BEFORE DELETE ON unit_charge
FOR EACH ROW EXECUTE FUNCTION billing_refuse('a month is charged once')
""",
    """
CREATE FUNCTION billing_check_unit_use() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NOT EXISTS (SELECT 1 FROM reservation
    WHERE request_id = NEW.request_id AND customer_id = NEW.customer_id AND model = NEW.model
      AND (covered = NEW.frames
        OR (NEW.frames < 0 AND state = 'settled' AND frames_delivered - covered = NEW.frames))) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_unit_use_insert: no request uses or gives back these frames',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NEW;
END $$
""",
    """
CREATE TRIGGER tr_unit_use_insert BEFORE INSERT ON unit_use
FOR EACH ROW EXECUTE FUNCTION billing_check_unit_use()
""",
    """
CREATE TRIGGER tr_unit_use_update BEFORE UPDATE ON unit_use
FOR EACH ROW EXECUTE FUNCTION billing_refuse('what was used is never edited')
""",
    """
CREATE TRIGGER tr_unit_use_delete BEFORE DELETE ON unit_use
FOR EACH ROW EXECUTE FUNCTION billing_refuse('what was used is never forgotten')
""",
)
