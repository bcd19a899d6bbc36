"""Requests are recognised when they come again: idempotency keys and payloads."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
SECONDS: sa.types.TypeEngine[float] = sa.Double().with_variant(sa.REAL(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "submission",
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("amount", INT64, nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=False),
        sa.Column("payload_sha256", sa.Text(), nullable=False),
        sa.Column("created_at", SECONDS, nullable=False),
        sa.Column("released_at", SECONDS, nullable=True),
        sa.PrimaryKeyConstraint("request_id", name="pk_submission"),
        sa.CheckConstraint("length(payload_sha256) = 64", name="ck_submission_payload"),
        sa.CheckConstraint("length(idempotency_key) <= 256", name="ck_submission_key"),
        sa.ForeignKeyConstraint(
            ["request_id", "customer_id", "amount"],
            ["reservation.request_id", "reservation.customer_id", "reservation.amount"],
            name="fk_submission_reservation",
        ),
        sqlite_strict=True,
    )
    held = sa.text("released_at IS NULL AND idempotency_key <> ''")
    op.create_index(
        "uq_submission_key",
        "submission",
        ["customer_id", "idempotency_key"],
        unique=True,
        sqlite_where=held,
        postgresql_where=held,
    )
    op.create_index("ix_submission_payload", "submission", ["customer_id", "payload_sha256", "created_at"])
    op.create_index("ix_submission_age", "submission", ["created_at"])
    for statement in SQLITE_TRIGGERS if op.get_context().dialect.name == "sqlite" else POSTGRESQL_TRIGGERS:
        op.execute(statement)


SQLITE_TRIGGERS = (
    """
CREATE TRIGGER tr_submission_update BEFORE UPDATE ON submission
WHEN OLD.released_at IS NOT NULL OR NEW.released_at IS NULL OR NEW.request_id <> OLD.request_id
  OR NEW.customer_id <> OLD.customer_id OR NEW.amount <> OLD.amount OR NEW.idempotency_key <> OLD.idempotency_key
  OR NEW.payload_sha256 <> OLD.payload_sha256 OR NEW.created_at <> OLD.created_at
  OR NOT EXISTS (SELECT 1 FROM reservation
    WHERE request_id = OLD.request_id AND state = 'settled' AND captured = 0)
BEGIN SELECT RAISE(ABORT, 'tr_submission_update: a key is released once, by a request that kept nothing'); END
""",
    """
CREATE TRIGGER tr_submission_delete BEFORE DELETE ON submission
WHEN EXISTS (SELECT 1 FROM reservation WHERE request_id = OLD.request_id AND state = 'open')
BEGIN SELECT RAISE(ABORT, 'tr_submission_delete: a request is not forgotten while it is open'); END
""",
)

POSTGRESQL_TRIGGERS = (
    """
CREATE FUNCTION billing_check_submission() RETURNS trigger LANGUAGE plpgsql AS $$
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
      WHERE request_id = OLD.request_id AND state = 'settled' AND captured = 0) THEN
    RAISE EXCEPTION USING
      MESSAGE = 'tr_submission_update: a key is released once, by a request that kept nothing',
      ERRCODE = 'integrity_constraint_violation';
  END IF;
  RETURN NEW;
END $$
""",
    """
CREATE TRIGGER tr_submission_update BEFORE UPDATE ON submission
FOR EACH ROW EXECUTE FUNCTION billing_check_submission()
""",
    """
CREATE TRIGGER tr_submission_delete BEFORE DELETE ON submission
FOR EACH ROW EXECUTE FUNCTION billing_check_submission()
""",
)
