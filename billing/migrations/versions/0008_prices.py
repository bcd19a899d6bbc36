"""The price book becomes rows, and a reservation's rate may be any fraction of a mil."""

import sqlalchemy as sa
from alembic import op

from billing.migrations import redeclare as redeclaring

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

INT64 = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
SECONDS: sa.types.TypeEngine[float] = sa.Double().with_variant(sa.REAL(), "sqlite")


def upgrade() -> None:
    is_sqlite = op.get_context().dialect.name == "sqlite"
    if not is_sqlite:
        op.execute("SET CONSTRAINTS ALL IMMEDIATE")  # PostgreSQL alters no table that still has rows to check
    op.create_table(
        "price",
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("customer_id", sa.Text(), nullable=False),
        sa.Column("version", INT64, nullable=False, autoincrement=False),
        sa.Column("prev_version", INT64, nullable=True),
        sa.Column("prev_effective_from", SECONDS, nullable=True),
        sa.Column("effective_from", SECONDS, nullable=False),
        sa.Column("terms", sa.Text(), nullable=False),
        sa.Column("created_at", SECONDS, nullable=False),
        sa.PrimaryKeyConstraint("model", "customer_id", "version", name="pk_price"),
        sa.UniqueConstraint("model", "customer_id", "version", "effective_from", name="uq_price_effective"),
        sa.CheckConstraint(
            "(version = 1 AND prev_version IS NULL AND prev_effective_from IS NULL)"
            " OR (version > 1 AND prev_version IS NOT NULL AND prev_version = version - 1"
            " AND prev_effective_from IS NOT NULL AND prev_effective_from < effective_from)",
            name="ck_price_chain",
        ),
        sa.ForeignKeyConstraint(
            ["model", "customer_id", "prev_version", "prev_effective_from"],
            ["price.model", "price.customer_id", "price.version", "price.effective_from"],
            name="fk_price_previous",
        ),
        sqlite_strict=True,
    )
    for table in ("reservation", "quote"):
        op.add_column(table, sa.Column("per_frames", INT64, nullable=False, server_default=sa.text("1")))
    op.add_column("reservation", sa.Column("frames_delivered", INT64, nullable=True))
    op.execute("DROP TRIGGER tr_reservation_update" + ("" if is_sqlite else " ON reservation"))
    op.execute("UPDATE reservation SET frames_delivered = captured / mils_per_frame WHERE state = 'settled'")
    if is_sqlite:
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
        sa.PrimaryKeyConstraint("request_id", name="pk_reservation"),
        sa.UniqueConstraint("request_id", "customer_id", "amount", name="uq_reservation_amount"),
        sa.CheckConstraint("frames > 0 AND mils_per_frame > 0 AND per_frames > 0", name="ck_reservation_price"),
        sa.CheckConstraint(
            "amount = (frames * mils_per_frame + per_frames - 1) / per_frames", name="ck_reservation_amount"
        ),
        sa.CheckConstraint(
            "(state = 'open' AND captured = 0 AND refunded = 0 AND settled_seq IS NULL"
            " AND settled_at IS NULL AND frames_delivered IS NULL) OR (state = 'settled'"
            " AND captured >= 0 AND refunded >= 0 AND captured + refunded = amount"
            " AND settled_seq IS NOT NULL AND settled_at IS NOT NULL"
            " AND frames_delivered IS NOT NULL)",
            name="ck_reservation_state",
        ),
        sa.CheckConstraint(
            "frames_delivered IS NULL OR (frames_delivered >= 0 AND frames_delivered <= frames"
            " AND captured = (frames_delivered * mils_per_frame + per_frames - 1) / per_frames)",
            name="ck_reservation_delivered",
        ),
        sa.ForeignKeyConstraint(
            ["key_id", "customer_id"], ["api_key.key_id", "api_key.customer_id"], name="fk_reservation_key"
        ),
    )
    redeclaring.redeclare(
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
        sa.Column("per_frames", INT64, nullable=False, server_default=sa.text("1")),
        sa.PrimaryKeyConstraint("quote_id", name="pk_quote"),
        sa.CheckConstraint(
            "frames > 0 AND mils_per_frame > 0 AND per_frames > 0 AND price_version >= 0", name="ck_quote_price"
        ),
        sa.CheckConstraint("expires_at > created_at", name="ck_quote_expiry"),
        sa.ForeignKeyConstraint(["customer_id"], ["wallet.customer_id"], name="fk_quote_wallet"),
    )


def _alter() -> None:
    op.drop_constraint("ck_reservation_price", "reservation")
    op.create_check_constraint(
        "ck_reservation_price", "reservation", "frames > 0 AND mils_per_frame > 0 AND per_frames > 0"
    )
    op.drop_constraint("ck_reservation_amount", "reservation")
    op.create_check_constraint(
        "ck_reservation_amount", "reservation", "amount = (frames * mils_per_frame + per_frames - 1) / per_frames"
    )
    op.drop_constraint("ck_reservation_state", "reservation")
    op.create_check_constraint(
        "ck_reservation_state",
        "reservation",
        "(state = 'open' AND captured = 0 AND refunded = 0 AND settled_seq IS NULL"
        " AND settled_at IS NULL AND frames_delivered IS NULL) OR (state = 'settled' AND captured >= 0"
        " AND refunded >= 0 AND captured + refunded = amount AND settled_seq IS NOT NULL"
        " AND settled_at IS NOT NULL AND frames_delivered IS NOT NULL)",
    )
    op.drop_constraint("ck_quote_price", "quote")
    op.create_check_constraint(
        "ck_quote_price", "quote", "frames > 0 AND mils_per_frame > 0 AND per_frames > 0 AND price_version >= 0"
    )
    op.drop_constraint("ck_reservation_whole_frames", "reservation")
    op.create_check_constraint(
        "ck_reservation_delivered",
        "reservation",
        "frames_delivered IS NULL OR (frames_delivered >= 0 AND frames_delivered <= frames"
        " AND captured = (frames_delivered * mils_per_frame + per_frames - 1) / per_frames)",
    )


SQLITE_TRIGGERS = (
    """
CREATE TRIGGER tr_reservation_update BEFORE UPDATE ON reservation
WHEN OLD.state = 'settled' OR NEW.request_id <> OLD.request_id OR NEW.customer_id <> OLD.customer_id
  OR NEW.key_id <> OLD.key_id OR NEW.frames <> OLD.frames OR NEW.mils_per_frame <> OLD.mils_per_frame
  OR NEW.amount <> OLD.amount OR NEW.debit_seq <> OLD.debit_seq OR NEW.created_at <> OLD.created_at
  OR NEW.model <> OLD.model OR NEW.per_frames <> OLD.per_frames
BEGIN SELECT RAISE(ABORT, 'tr_reservation_update: a reservation settles once and its terms never change'); END
""",
    """
CREATE TRIGGER tr_price_update BEFORE UPDATE ON price
BEGIN SELECT RAISE(ABORT, 'tr_price_update: another price is another version'); END
""",
    """
CREATE TRIGGER tr_price_delete BEFORE DELETE ON price
BEGIN SELECT RAISE(ABORT, 'tr_price_delete: prices are never deleted'); END
""",
)

POSTGRESQL_TRIGGERS = (
    """
CREATE TRIGGER tr_reservation_update BEFORE UPDATE ON reservation FOR EACH ROW
WHEN (OLD.state = 'settled' OR NEW.request_id <> OLD.request_id OR NEW.customer_id <> OLD.customer_id
  OR NEW.key_id <> OLD.key_id OR NEW.frames <> OLD.frames OR NEW.mils_per_frame <> OLD.mils_per_frame
  OR NEW.amount <> OLD.amount OR NEW.debit_seq <> OLD.debit_seq OR NEW.created_at <> OLD.created_at
  OR NEW.model <> OLD.model OR NEW.per_frames <> OLD.per_frames)
EXECUTE FUNCTION billing_refuse('a reservation settles once and its terms never change')
""",
    """
CREATE TRIGGER tr_price_update BEFORE UPDATE ON price
FOR EACH ROW EXECUTE FUNCTION billing_refuse('another price is another version')
""",
    """
CREATE TRIGGER tr_price_delete BEFORE DELETE ON price
FOR EACH ROW EXECUTE FUNCTION billing_refuse('prices are never deleted')
""",
)
