"""Prices are promised: quotes that bind until they expire."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
SECONDS: sa.types.TypeEngine[float] = sa.Double().with_variant(sa.REAL(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "quote",
        sa.Column("quote_id", sa.Text(), nullable=False),
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("frames", INT64, nullable=False),
        sa.Column("mils_per_frame", INT64, nullable=False),
        sa.Column("price_version", INT64, nullable=False),
        sa.Column("balance_mils", INT64, nullable=False),
        sa.Column("created_at", SECONDS, nullable=False),
        sa.Column("expires_at", SECONDS, nullable=False),
        sa.PrimaryKeyConstraint("quote_id", name="pk_quote"),
        sa.CheckConstraint("frames > 0 AND mils_per_frame > 0 AND price_version > 0", name="ck_quote_price"),
        sa.CheckConstraint("expires_at > created_at", name="ck_quote_expiry"),
        sa.ForeignKeyConstraint(["customer_id"], ["wallet.customer_id"], name="fk_quote_wallet"),
        sqlite_strict=True,
    )
    for statement in SQLITE_TRIGGERS if op.get_context().dialect.name == "sqlite" else POSTGRESQL_TRIGGERS:
        op.execute(statement)


SQLITE_TRIGGERS = (
    """
CREATE TRIGGER tr_quote_update BEFORE UPDATE ON quote
BEGIN SELECT RAISE(ABORT, 'tr_quote_update: a quote stands as it was given'); END
""",
    """
CREATE TRIGGER tr_quote_delete BEFORE DELETE ON quote
BEGIN SELECT RAISE(ABORT, 'tr_quote_delete: a quote stands as it was given'); END
""",
)

POSTGRESQL_TRIGGERS = (
    """
CREATE TRIGGER tr_quote_update BEFORE UPDATE ON quote
FOR EACH ROW EXECUTE FUNCTION billing_refuse('a quote stands as it was given')
""",
    """
CREATE TRIGGER tr_quote_delete BEFORE DELETE ON quote
FOR EACH ROW EXECUTE FUNCTION billing_refuse('a quote stands as it was given')
""",
)
