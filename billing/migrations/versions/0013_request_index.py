"""PostgreSQL looks up a request by its id and not among all of its customer's, also before it has statistics."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    if op.get_context().dialect.name == "sqlite":
        return
    op.drop_index("ix_reservation_customer", "reservation")
    op.create_index(
        "ix_reservation_customer",
        "reservation",
        ["customer_id", "created_at", "debit_seq"],
        postgresql_where=sa.text("frames > 0"),
    )
