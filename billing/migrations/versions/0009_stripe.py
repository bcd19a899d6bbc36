"""Payments: what was asked of the provider, what it said, and how its books compare with ours."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
SECONDS: sa.types.TypeEngine[float] = sa.Double().with_variant(sa.REAL(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "stripe_customer",
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("provider_customer", sa.Text(), nullable=False),
        sa.Column("payment_method", sa.Text(), nullable=False),
        sa.Column("created_at", SECONDS, nullable=False),
        sa.PrimaryKeyConstraint("customer_id", name="pk_stripe_customer"),
        sa.UniqueConstraint("provider_customer", name="uq_stripe_customer"),
        sa.ForeignKeyConstraint(["customer_id"], ["wallet.customer_id"], name="fk_stripe_customer_wallet"),
        sqlite_strict=True,
    )
    op.create_table(
        "topup",
        sa.Column("topup_id", sa.Text(), nullable=False),
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("amount_cents", INT64, nullable=False),
        sa.Column("idempotency_key", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempt", INT64, nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("payment_intent", sa.Text(), nullable=False),
        sa.Column("payment_method", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("expires_at", SECONDS, nullable=False),
        sa.Column("revision", INT64, nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("problem", sa.Text(), nullable=False),
        sa.Column("created_at", SECONDS, nullable=False),
        sa.Column("updated_at", SECONDS, nullable=False),
        sa.PrimaryKeyConstraint("topup_id", name="pk_topup"),
        sa.CheckConstraint("amount_cents BETWEEN 500 AND 1000000", name="ck_topup_amount"),
        sa.CheckConstraint("attempt >= 0 AND revision >= 0", name="ck_topup_counts"),
        sa.CheckConstraint("kind IN ('checkout', 'auto')", name="ck_topup_kind"),
        sa.CheckConstraint(
            "state IN ('new', 'open', 'charging', 'processing', 'paid', 'failed', 'expired', 'refused')",
            name="ck_topup_state",
        ),
        sa.ForeignKeyConstraint(["customer_id"], ["wallet.customer_id"], name="fk_topup_wallet"),
        sqlite_strict=True,
    )
    op.create_index("ix_topup_customer", "topup", ["customer_id", "created_at"])
    op.create_index(
        "ix_topup_unfinished",
        "topup",
        ["updated_at"],
        sqlite_where=sa.text("state IN ('new', 'open', 'charging', 'processing')"),
        postgresql_where=sa.text("state IN ('new', 'open', 'charging', 'processing')"),
    )
    op.create_index(
        "uq_topup_charging",
        "topup",
        ["customer_id"],
        unique=True,
        sqlite_where=sa.text("state = 'charging'"),
        postgresql_where=sa.text("state = 'charging'"),
    )
    op.create_index(
        "uq_topup_idempotency_key",
        "topup",
        ["customer_id", "idempotency_key"],
        unique=True,
        sqlite_where=sa.text("idempotency_key <> ''"),
        postgresql_where=sa.text("idempotency_key <> ''"),
    )
    op.create_index(
        "uq_topup_payment_intent",
        "topup",
        ["payment_intent"],
        unique=True,
        sqlite_where=sa.text("payment_intent <> ''"),
        postgresql_where=sa.text("payment_intent <> ''"),
    )
    op.create_index(
        "uq_topup_session_id",
        "topup",
        ["session_id"],
        unique=True,
        sqlite_where=sa.text("session_id <> ''"),
        postgresql_where=sa.text("session_id <> ''"),
    )
    op.create_table(
        "stripe_event",
        sa.Column("event_id", sa.Text(), nullable=False),
        sa.Column("type", sa.Text(), nullable=False),
        sa.Column("created", SECONDS, nullable=False),
        sa.Column("object_id", sa.Text(), nullable=False),
        sa.Column("topup_id", sa.Text(), nullable=False),
        sa.Column("session_id", sa.Text(), nullable=False),
        sa.Column("payment_intent", sa.Text(), nullable=False),
        sa.Column("invoice_id", sa.Text(), nullable=False),
        sa.Column("provider_customer", sa.Text(), nullable=False),
        sa.Column("via", sa.Text(), nullable=False),
        sa.Column("received_at", SECONDS, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempts", INT64, nullable=False),
        sa.Column("due_at", SECONDS, nullable=False),
        sa.Column("problem", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("event_id", name="pk_stripe_event"),
        sa.CheckConstraint("state IN ('pending', 'applied', 'ignored', 'unmatched')", name="ck_stripe_event_state"),
        sa.CheckConstraint("via IN ('webhook', 'sweep')", name="ck_stripe_event_via"),
        sqlite_strict=True,
    )
    op.create_index(
        "ix_stripe_event_pending",
        "stripe_event",
        ["due_at"],
        sqlite_where=sa.text("state = 'pending'"),
        postgresql_where=sa.text("state = 'pending'"),
    )
    op.create_table(
        "auto_topup",
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("enabled", INT64, nullable=False),
        sa.Column("threshold_mils", INT64, nullable=False),
        sa.Column("amount_cents", INT64, nullable=False),
        sa.Column("daily_cap_cents", INT64, nullable=False),
        sa.Column("monthly_cap_cents", INT64, nullable=False),
        sa.Column("consent", sa.Text(), nullable=False),
        sa.Column("consent_at", SECONDS, nullable=True),
        sa.Column("declines", INT64, nullable=False),
        sa.Column("retry_at", SECONDS, nullable=False),
        sa.Column("problem", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("customer_id", name="pk_auto_topup"),
        sa.CheckConstraint("amount_cents BETWEEN 500 AND 1000000", name="ck_auto_topup_amount"),
        sa.CheckConstraint(
            "threshold_mils >= 0 AND daily_cap_cents >= amount_cents AND monthly_cap_cents >= daily_cap_cents",
            name="ck_auto_topup_caps",
        ),
        sa.CheckConstraint("enabled = 0 OR (consent <> '' AND consent_at IS NOT NULL)", name="ck_auto_topup_consent"),
        sa.CheckConstraint("enabled IN (0, 1)", name="ck_auto_topup_enabled"),
        sa.ForeignKeyConstraint(["customer_id"], ["wallet.customer_id"], name="fk_auto_topup_wallet"),
        sqlite_strict=True,
    )
    op.create_table(
        "stripe_movement",
        sa.Column("movement_id", sa.Text(), nullable=False),
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("amount_cents", INT64, nullable=False),
        sa.Column("created", SECONDS, nullable=False),
        sa.PrimaryKeyConstraint("movement_id", name="pk_stripe_movement"),
        sa.ForeignKeyConstraint(["customer_id"], ["wallet.customer_id"], name="fk_stripe_movement_wallet"),
        sqlite_strict=True,
    )
    op.create_index("ix_stripe_movement_created", "stripe_movement", ["created"])
    op.create_index("ix_stripe_movement_source", "stripe_movement", ["source"])
    op.create_table(
        "stripe_cursor",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", SECONDS, nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_stripe_cursor"),
        sqlite_strict=True,
    )
    op.create_table(
        "stripe_report",
        sa.Column("day", INT64, nullable=False, autoincrement=False),
        sa.Column("body", sa.Text(), nullable=False),
        sa.Column("signature", sa.Text(), nullable=False),
        sa.Column("difference_cents", INT64, nullable=False),
        sa.Column("filed_at", SECONDS, nullable=False),
        sa.PrimaryKeyConstraint("day", name="pk_stripe_report"),
        sqlite_strict=True,
    )
