"""The first ledger: wallets, chained entries, reservations, keys and the writer's fence."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
SECONDS: sa.types.TypeEngine[float] = sa.Double().with_variant(sa.REAL(), "sqlite")
AT_COMMIT: dict[str, Any] = {"deferrable": True, "initially": "DEFERRED", "use_alter": True}


def upgrade() -> None:
    op.create_table(
        "writer_fence",
        sa.Column("fence_id", INT64, nullable=False, autoincrement=False),
        sa.Column("epoch", INT64, nullable=False),
        sa.Column("taken_at", SECONDS, nullable=False),
        sa.PrimaryKeyConstraint("fence_id", name="pk_writer_fence"),
        sa.CheckConstraint("fence_id = 1", name="ck_writer_fence_single"),
        sa.CheckConstraint("epoch >= 0", name="ck_writer_fence_epoch"),
        sqlite_strict=True,
    )
    op.create_table(
        "wallet",
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("seq", INT64, nullable=False),
        sa.Column("balance_mils", INT64, nullable=False),
        sa.Column("created_at", SECONDS, nullable=False),
        sa.PrimaryKeyConstraint("customer_id", name="pk_wallet"),
        sa.UniqueConstraint("name", name="uq_wallet_name"),
        sa.CheckConstraint("balance_mils >= 0", name="ck_wallet_balance"),
        sa.ForeignKeyConstraint(
            ["customer_id", "seq", "balance_mils"],
            ["entry.customer_id", "entry.seq", "entry.balance_after"],
            name="fk_wallet_tail",
            **AT_COMMIT,
        ),
        sqlite_strict=True,
    )
    op.create_table(
        "api_key",
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("last4", sa.Text(), nullable=False),
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("refill_per_s", SECONDS, nullable=False),
        sa.Column("burst", INT64, nullable=False),
        sa.Column("created_at", SECONDS, nullable=False),
        sa.Column("created_seq", INT64, nullable=False),
        sa.Column("revoked_at", SECONDS, nullable=True),
        sa.Column("revoked_seq", INT64, nullable=True),
        sa.PrimaryKeyConstraint("key_id", name="pk_api_key"),
        sa.UniqueConstraint("sha256", name="uq_api_key_sha256"),
        sa.UniqueConstraint("key_id", "customer_id", name="uq_api_key_customer"),
        sa.CheckConstraint("length(sha256) = 64", name="ck_api_key_sha256"),
        sa.CheckConstraint("length(last4) = 4", name="ck_api_key_last4"),
        sa.CheckConstraint("refill_per_s > 0 AND burst > 0", name="ck_api_key_limits"),
        sa.CheckConstraint("(revoked_at IS NULL) = (revoked_seq IS NULL)", name="ck_api_key_revoked"),
        sa.ForeignKeyConstraint(["customer_id"], ["wallet.customer_id"], name="fk_api_key_wallet"),
        sa.ForeignKeyConstraint(
            ["customer_id", "created_seq"], ["entry.customer_id", "entry.seq"], name="fk_api_key_created", **AT_COMMIT
        ),
        sa.ForeignKeyConstraint(
            ["customer_id", "revoked_seq"], ["entry.customer_id", "entry.seq"], name="fk_api_key_revoked", **AT_COMMIT
        ),
        sqlite_strict=True,
    )
    op.create_table(
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
        sa.PrimaryKeyConstraint("request_id", name="pk_reservation"),
        sa.UniqueConstraint("request_id", "customer_id", "amount", name="uq_reservation_amount"),
        sa.CheckConstraint("frames > 0 AND mils_per_frame > 0", name="ck_reservation_price"),
        sa.CheckConstraint("amount = frames * mils_per_frame", name="ck_reservation_amount"),
        sa.CheckConstraint(
            "(state = 'open' AND captured = 0 AND refunded = 0 AND settled_seq IS NULL"
            " AND settled_at IS NULL)"
            " OR (state = 'settled' AND captured >= 0 AND refunded >= 0 AND captured + refunded = amount"
            " AND settled_seq IS NOT NULL AND settled_at IS NOT NULL)",
            name="ck_reservation_state",
        ),
        sa.CheckConstraint("captured % mils_per_frame = 0", name="ck_reservation_whole_frames"),
        sa.ForeignKeyConstraint(
            ["key_id", "customer_id"], ["api_key.key_id", "api_key.customer_id"], name="fk_reservation_key"
        ),
        sqlite_strict=True,
    )
    op.create_table(
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
        sa.CheckConstraint("balance_after >= 0", name="ck_entry_balance"),
        sa.CheckConstraint(
            "(kind = 'opening' AND seq = 0 AND prev_seq IS NULL AND prev_balance = 0)"
            " OR (kind <> 'opening' AND seq > 0 AND prev_seq IS NOT NULL AND prev_seq = seq - 1)",
            name="ck_entry_chain",
        ),
        sa.CheckConstraint(
            "(kind = 'opening' AND amount = 0 AND reserved IS NULL)"
            " OR (kind = 'credit' AND amount > 0 AND reserved IS NULL)"
            " OR (kind = 'debit' AND amount < 0 AND reserved IS NOT NULL AND amount = -reserved)"
            " OR (kind = 'refund' AND amount > 0 AND reserved IS NOT NULL AND amount <= reserved)",
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
        sqlite_strict=True,
    )
    op.create_index(
        "ix_reservation_open_lease",
        "reservation",
        ["lease_until"],
        unique=False,
        sqlite_where=sa.text("state = 'open'"),
        postgresql_where=sa.text("state = 'open'"),
    )
    op.create_index(
        "uq_entry_credit",
        "entry",
        ["public_id"],
        unique=True,
        sqlite_where=sa.text("kind = 'credit'"),
        postgresql_where=sa.text("kind = 'credit'"),
    )
    op.create_index(
        "uq_entry_debit",
        "entry",
        ["public_id"],
        unique=True,
        sqlite_where=sa.text("kind = 'debit'"),
        postgresql_where=sa.text("kind = 'debit'"),
    )
    op.create_index(
        "uq_entry_refund",
        "entry",
        ["public_id"],
        unique=True,
        sqlite_where=sa.text("kind = 'refund'"),
        postgresql_where=sa.text("kind = 'refund'"),
    )
    if op.get_context().dialect.name == "postgresql":
        # SQLite took these with their tables; PostgreSQL can only add them once both tables exist.
        op.create_foreign_key(
            "fk_wallet_tail",
            "wallet",
            "entry",
            ["customer_id", "seq", "balance_mils"],
            ["customer_id", "seq", "balance_after"],
            deferrable=True,
            initially="DEFERRED",
        )
        op.create_foreign_key(
            "fk_api_key_created",
            "api_key",
            "entry",
            ["customer_id", "created_seq"],
            ["customer_id", "seq"],
            deferrable=True,
            initially="DEFERRED",
        )
        op.create_foreign_key(
            "fk_api_key_revoked",
            "api_key",
            "entry",
            ["customer_id", "revoked_seq"],
            ["customer_id", "seq"],
            deferrable=True,
            initially="DEFERRED",
        )
    for statement in SQLITE_TRIGGERS if op.get_context().dialect.name == "sqlite" else POSTGRESQL_TRIGGERS:
        op.execute(statement)
    op.execute("INSERT INTO writer_fence (fence_id, epoch, taken_at) VALUES (1, 0, 0)")


SQLITE_TRIGGERS = (
    """
CREATE TRIGGER tr_entry_epoch BEFORE INSERT ON entry
WHEN NEW.epoch IS NOT (SELECT epoch FROM writer_fence)
BEGIN SELECT RAISE(ABORT, 'tr_entry_epoch: this writer is fenced'); END
""",
    """
CREATE TRIGGER tr_entry_refund BEFORE INSERT ON entry
WHEN NEW.kind = 'refund' AND NOT EXISTS (
  SELECT 1 FROM entry AS debit JOIN reservation ON reservation.request_id = debit.public_id
  WHERE debit.kind = 'debit' AND debit.public_id = NEW.public_id AND debit.customer_id = NEW.customer_id
    AND debit.seq < NEW.seq AND reservation.state = 'settled' AND reservation.refunded = NEW.amount)
BEGIN SELECT RAISE(ABORT, 'tr_entry_refund: no earlier debit, or not what its settlement gives back'); END
""",
    """
CREATE TRIGGER tr_entry_update BEFORE UPDATE ON entry
BEGIN SELECT RAISE(ABORT, 'tr_entry_update: entries are never edited'); END
""",
    """
CREATE TRIGGER tr_entry_delete BEFORE DELETE ON entry
BEGIN SELECT RAISE(ABORT, 'tr_entry_delete: entries are never deleted'); END
""",
    """
CREATE TRIGGER tr_wallet_update BEFORE UPDATE ON wallet
WHEN NEW.customer_id <> OLD.customer_id OR NEW.seq < OLD.seq
BEGIN SELECT RAISE(ABORT, 'tr_wallet_update: a wallet never goes back'); END
""",
    """
CREATE TRIGGER tr_reservation_update BEFORE UPDATE ON reservation
WHEN OLD.state = 'settled' OR NEW.request_id <> OLD.request_id OR NEW.customer_id <> OLD.customer_id
  OR NEW.key_id <> OLD.key_id OR NEW.frames <> OLD.frames OR NEW.mils_per_frame <> OLD.mils_per_frame
  OR NEW.amount <> OLD.amount OR NEW.debit_seq <> OLD.debit_seq OR NEW.created_at <> OLD.created_at
BEGIN SELECT RAISE(ABORT, 'tr_reservation_update: a reservation settles once and its terms never change'); END
""",
    """
CREATE TRIGGER tr_reservation_delete BEFORE DELETE ON reservation
BEGIN SELECT RAISE(ABORT, 'tr_reservation_delete: reservations are never deleted'); END
""",
    """
CREATE TRIGGER tr_api_key_update BEFORE UPDATE ON api_key
WHEN OLD.revoked_at IS NOT NULL OR NEW.key_id <> OLD.key_id OR NEW.sha256 <> OLD.sha256
  OR NEW.customer_id <> OLD.customer_id OR NEW.created_seq <> OLD.created_seq
BEGIN SELECT RAISE(ABORT, 'tr_api_key_update: a key is revoked once and never becomes another'); END
""",
    """
CREATE TRIGGER tr_api_key_delete BEFORE DELETE ON api_key
BEGIN SELECT RAISE(ABORT, 'tr_api_key_delete: keys are revoked, never deleted'); END
""",
    """
CREATE TRIGGER tr_writer_fence_update BEFORE UPDATE ON writer_fence
WHEN NEW.epoch <= OLD.epoch
BEGIN SELECT RAISE(ABORT, 'tr_writer_fence_update: the epoch only grows'); END
""",
    """
CREATE TRIGGER tr_writer_fence_delete BEFORE DELETE ON writer_fence
BEGIN SELECT RAISE(ABORT, 'tr_writer_fence_delete: the fence stays'); END
""",
)

POSTGRESQL_TRIGGERS = (
    """
CREATE FUNCTION billing_refuse() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  RAISE EXCEPTION USING MESSAGE = TG_NAME || ': ' || TG_ARGV[0], ERRCODE = 'integrity_constraint_violation';
END $$
""",
    """
CREATE FUNCTION billing_check_entry() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
  IF NEW.epoch IS DISTINCT FROM (SELECT epoch FROM writer_fence) THEN
    RAISE EXCEPTION USING MESSAGE = 'tr_entry_epoch: this writer is fenced',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  IF NEW.kind = 'refund' AND NOT EXISTS (
    SELECT 1 FROM entry AS debit JOIN reservation ON reservation.request_id = debit.public_id
    WHERE debit.kind = 'debit' AND debit.public_id = NEW.public_id AND debit.customer_id = NEW.customer_id
      AND debit.seq < NEW.seq AND reservation.state = 'settled' AND reservation.refunded = NEW.amount) THEN
    RAISE EXCEPTION USING
      MESSAGE = 'tr_entry_refund: no earlier debit, or not what its settlement gives back',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NEW;
END $$
""",
    """
CREATE TRIGGER tr_entry_insert BEFORE INSERT ON entry
FOR EACH ROW EXECUTE FUNCTION billing_check_entry()
""",
    """
CREATE TRIGGER tr_entry_update BEFORE UPDATE ON entry
FOR EACH ROW EXECUTE FUNCTION billing_refuse('entries are never edited')
""",
    """
CREATE TRIGGER tr_entry_delete BEFORE DELETE ON entry
FOR EACH ROW EXECUTE FUNCTION billing_refuse('entries are never deleted')
""",
    """
CREATE TRIGGER tr_entry_truncate BEFORE TRUNCATE ON entry
FOR EACH STATEMENT EXECUTE FUNCTION billing_refuse('entries are never deleted')
""",
    """
CREATE TRIGGER tr_wallet_update BEFORE UPDATE ON wallet FOR EACH ROW
WHEN (NEW.customer_id <> OLD.customer_id OR NEW.seq < OLD.seq)
EXECUTE FUNCTION billing_refuse('a wallet never goes back')
""",
    """
CREATE TRIGGER tr_reservation_update BEFORE UPDATE ON reservation FOR EACH ROW
WHEN (OLD.state = 'settled' OR NEW.request_id <> OLD.request_id OR NEW.customer_id <> OLD.customer_id
  OR NEW.key_id <> OLD.key_id OR NEW.frames <> OLD.frames OR NEW.mils_per_frame <> OLD.mils_per_frame
  OR NEW.amount <> OLD.amount OR NEW.debit_seq <> OLD.debit_seq OR NEW.created_at <> OLD.created_at)
EXECUTE FUNCTION billing_refuse('a reservation settles once and its terms never change')
""",
    """
CREATE TRIGGER tr_reservation_delete BEFORE DELETE ON reservation
FOR EACH ROW EXECUTE FUNCTION billing_refuse('reservations are never deleted')
""",
    """
CREATE TRIGGER tr_api_key_update BEFORE UPDATE ON api_key FOR EACH ROW
WHEN (OLD.revoked_at IS NOT NULL OR NEW.key_id <> OLD.key_id OR NEW.sha256 <> OLD.sha256
  OR NEW.customer_id <> OLD.customer_id OR NEW.created_seq <> OLD.created_seq)
EXECUTE FUNCTION billing_refuse('a key is revoked once and never becomes another')
""",
    """
CREATE TRIGGER tr_api_key_delete BEFORE DELETE ON api_key
FOR EACH ROW EXECUTE FUNCTION billing_refuse('keys are revoked, never deleted')
""",
    """
CREATE TRIGGER tr_writer_fence_update BEFORE UPDATE ON writer_fence FOR EACH ROW
WHEN (NEW.epoch <= OLD.epoch) EXECUTE FUNCTION billing_refuse('the epoch only grows')
""",
    """
CREATE TRIGGER tr_writer_fence_delete BEFORE DELETE ON writer_fence
FOR EACH ROW EXECUTE FUNCTION billing_refuse('the fence stays')
""",
)
