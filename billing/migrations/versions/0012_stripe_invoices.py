"""Invoices for postpaid customers."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
SECONDS: sa.types.TypeEngine[float] = sa.Double().with_variant(sa.REAL(), "sqlite")


def only(condition: str) -> dict[str, Any]:
    """Of a partial index."""
    return {"sqlite_where": sa.text(condition), "postgresql_where": sa.text(condition)}


def upgrade() -> None:
    op.create_table(
        "stripe_invoice",
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("period", sa.Text(), nullable=False),
        sa.Column("amount_cents", INT64, nullable=False),
        sa.Column("carry_mils", INT64, nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempt", INT64, nullable=False),
        sa.Column("invoice_id", sa.Text(), nullable=False),
        sa.Column("payment_intent", sa.Text(), nullable=False),
        sa.Column("url", sa.Text(), nullable=False),
        sa.Column("revision", INT64, nullable=False),
        sa.Column("problem", sa.Text(), nullable=False),
        sa.Column("created_at", SECONDS, nullable=False),
        sa.Column("updated_at", SECONDS, nullable=False),
        sa.PrimaryKeyConstraint("customer_id", "period", name="pk_stripe_invoice"),
        sa.CheckConstraint(
            "amount_cents > 0 AND carry_mils >= 0 AND carry_mils < 100", name="ck_stripe_invoice_amount"
        ),
        sa.CheckConstraint(
            "state IN ('new', 'open', 'paid', 'overdue', 'void', 'uncollectible')", name="ck_stripe_invoice_state"
        ),
        sa.CheckConstraint("attempt >= 0 AND revision >= 0", name="ck_stripe_invoice_counts"),
        sa.ForeignKeyConstraint(["customer_id"], ["wallet.customer_id"], name="fk_stripe_invoice_wallet"),
        sqlite_strict=True,
    )
    for column in ("invoice_id", "payment_intent"):
        op.create_index(
            f"uq_stripe_invoice_{column}", "stripe_invoice", [column], unique=True, **only(f"{column} <> ''")
        )
