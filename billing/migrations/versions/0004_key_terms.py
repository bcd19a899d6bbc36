"""Keys have terms: a label, a scope, models, an expiry, budgets per day and month."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
SECONDS: sa.types.TypeEngine[float] = sa.Double().with_variant(sa.REAL(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "key_terms",
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("budget_id", sa.Text(), nullable=False),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("scope", sa.Text(), nullable=False),
        sa.Column("models", sa.Text(), nullable=False),
        sa.Column("expires_at", SECONDS, nullable=True),
        sa.Column("daily_budget_mils", INT64, nullable=True),
        sa.Column("monthly_budget_mils", INT64, nullable=True),
        sa.PrimaryKeyConstraint("key_id", name="pk_key_terms"),
        sa.CheckConstraint("scope IN ('spend', 'read')", name="ck_key_terms_scope"),
        sa.CheckConstraint("daily_budget_mils >= 0 AND monthly_budget_mils >= 0", name="ck_key_terms_budgets"),
        sa.ForeignKeyConstraint(["key_id"], ["api_key.key_id"], name="fk_key_terms_key"),
        sa.ForeignKeyConstraint(["budget_id"], ["api_key.key_id"], name="fk_key_terms_budget"),
        sqlite_strict=True,
    )
    op.create_table(
        "budget_use",
        sa.Column("request_id", sa.Text(), nullable=False),
        sa.Column("budget_id", sa.Text(), nullable=False),
        sa.Column("day", INT64, nullable=False),
        sa.PrimaryKeyConstraint("request_id", name="pk_budget_use"),
        sa.ForeignKeyConstraint(["request_id"], ["reservation.request_id"], name="fk_budget_use_reservation"),
        sa.ForeignKeyConstraint(["budget_id"], ["api_key.key_id"], name="fk_budget_use_budget"),
        sqlite_strict=True,
    )
    op.create_index("ix_budget_use_day", "budget_use", ["budget_id", "day"])
    for statement in SQLITE_TRIGGERS if op.get_context().dialect.name == "sqlite" else POSTGRESQL_TRIGGERS:
        op.execute(statement)


SQLITE_TRIGGERS = (
    """
CREATE TRIGGER tr_key_terms_update BEFORE UPDATE ON key_terms
WHEN NEW.key_id <> OLD.key_id OR NEW.budget_id <> OLD.budget_id
BEGIN SELECT RAISE(ABORT, 'tr_key_terms_update: a key keeps what it has spent'); END
""",
    """
CREATE TRIGGER tr_budget_use_update BEFORE UPDATE ON budget_use
BEGIN SELECT RAISE(ABORT, 'tr_budget_use_update: what was spent is never edited'); END
""",
    """
CREATE TRIGGER tr_budget_use_delete BEFORE DELETE ON budget_use
BEGIN SELECT RAISE(ABORT, 'tr_budget_use_delete: what was spent is never forgotten'); END
""",
)

POSTGRESQL_TRIGGERS = (
    """
CREATE TRIGGER tr_key_terms_update BEFORE UPDATE ON key_terms FOR EACH ROW
WHEN (NEW.key_id <> OLD.key_id OR NEW.budget_id <> OLD.budget_id)
EXECUTE FUNCTION billing_refuse('a key keeps what it has spent')
""",
    """
CREATE TRIGGER tr_budget_use_update BEFORE UPDATE ON budget_use
FOR EACH ROW EXECUTE FUNCTION billing_refuse('what was spent is never edited')
""",
    """
CREATE TRIGGER tr_budget_use_delete BEFORE DELETE ON budget_use
FOR EACH ROW EXECUTE FUNCTION billing_refuse('what was spent is never forgotten')
""",
)
