"""Work outlives its request: queued rollouts, and the webhooks that tell of them."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
SECONDS: sa.types.TypeEngine[float] = sa.Double().with_variant(sa.REAL(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "rollout_job",
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("seed", INT64, nullable=False),
        sa.Column("num_steps", INT64, nullable=False),
        sa.Column("guidance", SECONDS, nullable=False),
        sa.Column("frames", INT64, nullable=False),
        sa.Column("amount", INT64, nullable=False),
        sa.Column("payload_sha256", sa.Text(), nullable=False),
        sa.Column("start_frame_resized", INT64, nullable=False),
        sa.Column("score", INT64, nullable=False),
        sa.Column("base_url", sa.Text(), nullable=False),
        sa.Column("webhook_url", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("owned_until", SECONDS, nullable=False),
        sa.Column("attempts", INT64, nullable=False),
        sa.Column("not_before", SECONDS, nullable=False),
        sa.Column("created_at", SECONDS, nullable=False),
        sa.Column("delivered", INT64, nullable=False),
        sa.Column("captured", INT64, nullable=False),
        sa.Column("infer_ms", SECONDS, nullable=False),
        sa.Column("psnr_db", SECONDS, nullable=True),
        sa.Column("ssim", SECONDS, nullable=True),
        sa.Column("lpips", SECONDS, nullable=True),
        sa.Column("error_code", sa.Text(), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("cancel_requested_at", SECONDS, nullable=True),
        sa.Column("started_at", SECONDS, nullable=True),
        sa.Column("finished_at", SECONDS, nullable=True),
        sa.PrimaryKeyConstraint("request_id", name="pk_rollout_job"),
        sa.ForeignKeyConstraint(
            ["request_id", "customer_id", "amount"],
            ["reservation.request_id", "reservation.customer_id", "reservation.amount"],
            name="fk_rollout_job_reservation",
        ),
        sa.CheckConstraint(
            "state IN ('queued', 'running', 'succeeded', 'failed', 'canceled')", name="ck_rollout_job_state"
        ),
        sa.CheckConstraint("(state = 'running') = (owner <> '')", name="ck_rollout_job_owner"),
        sa.CheckConstraint("(state IN ('queued', 'running')) = (finished_at IS NULL)", name="ck_rollout_job_finished"),
        sa.CheckConstraint("delivered >= 0 AND delivered <= frames", name="ck_rollout_job_delivered"),
        sa.CheckConstraint("captured >= 0 AND captured <= amount", name="ck_rollout_job_captured"),
        sa.CheckConstraint("(state = 'failed') = (error_code <> '')", name="ck_rollout_job_error"),
        sqlite_strict=True,
    )
    op.create_index("ix_rollout_job_customer", "rollout_job", ["customer_id", "request_id"])
    op.create_index(
        "ix_rollout_job_live",
        "rollout_job",
        ["state", "customer_id", "request_id"],
        sqlite_where=sa.text("finished_at IS NULL"),
        postgresql_where=sa.text("finished_at IS NULL"),
    )
    op.create_index(
        "ix_rollout_job_finished",
        "rollout_job",
        ["finished_at"],
        sqlite_where=sa.text("finished_at IS NOT NULL"),
        postgresql_where=sa.text("finished_at IS NOT NULL"),
    )
    op.create_table(
        "webhook_delivery",
        sa.Column("delivery_id", sa.Text(), nullable=False),
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempts", INT64, nullable=False),
        sa.Column("next_attempt_at", SECONDS, nullable=False),
        sa.Column("created_at", SECONDS, nullable=False),
        sa.Column("finished_at", SECONDS, nullable=True),
        sa.PrimaryKeyConstraint("delivery_id", name="pk_webhook_delivery"),
        sa.ForeignKeyConstraint(["request_id"], ["rollout_job.request_id"], name="fk_webhook_delivery_job"),
        sa.CheckConstraint("state IN ('pending', 'delivered', 'failed')", name="ck_webhook_delivery_state"),
        sa.CheckConstraint("(state = 'pending') = (finished_at IS NULL)", name="ck_webhook_delivery_finished"),
        sqlite_strict=True,
    )
    op.create_index("ix_webhook_delivery_job", "webhook_delivery", ["request_id"])
    op.create_index(
        "ix_webhook_delivery_due",
        "webhook_delivery",
        ["customer_id", "next_attempt_at"],
        sqlite_where=sa.text("state = 'pending'"),
        postgresql_where=sa.text("state = 'pending'"),
    )
    op.create_table(
        "webhook_attempt",
        sa.Column("delivery_id", sa.Text(), nullable=False),
        sa.Column("attempt", INT64, nullable=False, autoincrement=False),
        sa.Column("at", SECONDS, nullable=False),
        sa.Column("took_ms", SECONDS, nullable=False),
        sa.Column("problem", sa.Text(), nullable=False),
        sa.Column("status", INT64, nullable=True),
        sa.PrimaryKeyConstraint("delivery_id", "attempt", name="pk_webhook_attempt"),
        sa.ForeignKeyConstraint(["delivery_id"], ["webhook_delivery.delivery_id"], name="fk_webhook_attempt_delivery"),
        sqlite_strict=True,
    )
    op.create_table(
        "webhook_secret",
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("version", INT64, nullable=False, autoincrement=False),
        sa.Column("secret", sa.Text(), nullable=False),
        sa.Column("created_at", SECONDS, nullable=False),
        sa.PrimaryKeyConstraint("customer_id", "version", name="pk_webhook_secret"),
        sa.ForeignKeyConstraint(["customer_id"], ["wallet.customer_id"], name="fk_webhook_secret_wallet"),
        sa.CheckConstraint("version > 0", name="ck_webhook_secret_version"),
        sqlite_strict=True,
    )
    for statement in SQLITE_TRIGGERS if op.get_context().dialect.name == "sqlite" else POSTGRESQL_TRIGGERS:
        op.execute(statement)


SQLITE_TRIGGERS = (
    """
CREATE TRIGGER tr_rollout_job_update BEFORE UPDATE ON rollout_job
WHEN OLD.finished_at IS NOT NULL OR NEW.request_id <> OLD.request_id OR NEW.customer_id <> OLD.customer_id
  OR NEW.amount <> OLD.amount OR NEW.frames <> OLD.frames
BEGIN SELECT RAISE(ABORT, 'tr_rollout_job_update: a job ends once and never becomes another'); END
""",
)

POSTGRESQL_TRIGGERS = (
    """
CREATE TRIGGER tr_rollout_job_update BEFORE UPDATE ON rollout_job FOR EACH ROW
WHEN (OLD.finished_at IS NOT NULL OR NEW.request_id <> OLD.request_id OR NEW.customer_id <> OLD.customer_id
  OR NEW.amount <> OLD.amount OR NEW.frames <> OLD.frames)
EXECUTE FUNCTION billing_refuse('a job ends once and never becomes another')
""",
)
