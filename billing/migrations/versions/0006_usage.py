"""What was used can be read: a request names its model, is found by its customer and time, and budgets warn."""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
SECONDS: sa.types.TypeEngine[float] = sa.Double().with_variant(sa.REAL(), "sqlite")


def upgrade() -> None:
    is_sqlite = op.get_context().dialect.name == "sqlite"
    op.add_column("reservation", sa.Column("model", sa.Text(), nullable=False, server_default=""))
    op.create_index("ix_reservation_customer", "reservation", ["customer_id", "created_at", "debit_seq"])
    op.execute("DROP TRIGGER tr_reservation_update" + ("" if is_sqlite else " ON reservation"))
    op.create_table(
        "budget_event",
        sa.Column("event_id", sa.Text(), nullable=False),
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("key_id", sa.Text(), nullable=False),
        sa.Column("period", sa.Text(), nullable=False),
        sa.Column("starts_day", INT64, nullable=False),
        sa.Column("level", INT64, nullable=False),
        sa.Column("limit_mils", INT64, nullable=False),
        sa.Column("spent_mils", INT64, nullable=False),
        sa.Column("created_at", SECONDS, nullable=False),
        sa.PrimaryKeyConstraint("event_id", name="pk_budget_event"),
        sa.CheckConstraint(
            "period IN ('day', 'month') AND level IN (75, 90) AND spent_mils * 100 >= limit_mils * level",
            name="ck_budget_event_level",
        ),
        sa.ForeignKeyConstraint(
            ["key_id", "customer_id"], ["api_key.key_id", "api_key.customer_id"], name="fk_budget_event_key"
        ),
        sqlite_strict=True,
    )
    op.create_index("ix_budget_event_customer", "budget_event", ["customer_id", "created_at", "event_id"])
    for statement in SQLITE_TRIGGERS if is_sqlite else POSTGRESQL_TRIGGERS:
        op.execute(statement)


SQLITE_TRIGGERS = (
    """
CREATE TRIGGER tr_reservation_update BEFORE UPDATE ON reservation
WHEN OLD.state = 'settled' OR NEW.request_id <> OLD.request_id OR NEW.customer_id <> OLD.customer_id
  OR NEW.key_id <> OLD.key_id OR NEW.frames <> OLD.frames OR NEW.mils_per_frame <> OLD.mils_per_frame
  OR NEW.amount <> OLD.amount OR NEW.debit_seq <> OLD.debit_seq OR NEW.created_at <> OLD.created_at
  OR NEW.model <> OLD.model
BEGIN SELECT RAISE(ABORT, 'tr_reservation_update: a reservation settles once and its terms never change'); END
""",
    """
CREATE TRIGGER tr_budget_event_update BEFORE UPDATE ON budget_event
BEGIN SELECT RAISE(ABORT, 'tr_budget_event_update: a warning stands as it was given'); END
""",
    """
CREATE TRIGGER tr_budget_event_delete BEFORE DELETE ON budget_event
BEGIN SELECT RAISE(ABORT, 'tr_budget_event_delete: a warning stands as it was given'); END
""",
)

POSTGRESQL_TRIGGERS = (
    """
CREATE TRIGGER tr_reservation_update BEFORE UPDATE ON reservation FOR EACH ROW
WHEN (OLD.state = 'settled' OR NEW.request_id <> OLD.request_id OR NEW.customer_id <> OLD.customer_id
  OR NEW.key_id <> OLD.key_id OR NEW.frames <> OLD.frames OR NEW.mils_per_frame <> OLD.mils_per_frame
  OR NEW.amount <> OLD.amount OR NEW.debit_seq <> OLD.debit_seq OR NEW.created_at <> OLD.created_at
  OR NEW.model <> OLD.model)
EXECUTE FUNCTION billing_refuse('a reservation settles once and its terms never change')
""",
    """
CREATE TRIGGER tr_budget_event_update BEFORE UPDATE ON budget_event
FOR EACH ROW EXECUTE FUNCTION billing_refuse('a warning stands as it was given')
""",
    """
CREATE TRIGGER tr_budget_event_delete BEFORE DELETE ON budget_event
FOR EACH ROW EXECUTE FUNCTION billing_refuse('a warning stands as it was given')
""",
)
