"""The tables of payments: facts about the provider and what was asked of it. The money itself is in `billing.tables`.

The ledger's writer writes them too, so its fence guards them; they are kept apart from the ledger's own because none of
them says what a balance is.
"""

from sqlalchemy import (
    CheckConstraint,
    Column,
    ForeignKeyConstraint,
    Index,
    MetaData,
    PrimaryKeyConstraint,
    Text,
    UniqueConstraint,
    text,
)
from sqlmodel import Field, SQLModel

from billing.tables import INT64, SECONDS, STRICT, wallet

payments_metadata = MetaData()


class Table(SQLModel):
    metadata = payments_metadata


class StripeCustomerTable(Table, table=True):
    """A customer's name at the provider, and what it agreed to be charged on."""

    __tablename__ = "stripe_customer"
    __table_args__ = (
        PrimaryKeyConstraint("customer_id", name="pk_stripe_customer"),
        UniqueConstraint("provider_customer", name="uq_stripe_customer"),
        ForeignKeyConstraint(["customer_id"], [wallet.c.customer_id], name="fk_stripe_customer_wallet"),
        STRICT,
    )

    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    provider_customer: str = Field(sa_column=Column(Text, nullable=False))
    payment_method: str = Field(sa_column=Column(Text, nullable=False))
    """Empty when there is none to charge."""
    created_at: float = Field(sa_column=Column(SECONDS, nullable=False))


class TopupTable(Table, table=True):
    """A payment that was asked for: by its customer on a page, or automatically."""

    __tablename__ = "topup"
    __table_args__ = (
        PrimaryKeyConstraint("topup_id", name="pk_topup"),
        CheckConstraint("kind IN ('checkout', 'auto')", name="ck_topup_kind"),
        CheckConstraint("amount_cents BETWEEN 500 AND 1000000", name="ck_topup_amount"),
        CheckConstraint(
            "state IN ('new', 'open', 'charging', 'processing', 'paid', 'failed', 'expired', 'refused')",
            name="ck_topup_state",
        ),
        CheckConstraint("attempt >= 0 AND revision >= 0", name="ck_topup_counts"),
        ForeignKeyConstraint(["customer_id"], [wallet.c.customer_id], name="fk_topup_wallet"),
        *(
            Index(
                f"uq_topup_{column}",
                *(("customer_id", column) if column == "idempotency_key" else (column,)),
                unique=True,
                sqlite_where=text(f"{column} <> ''"),
                postgresql_where=text(f"{column} <> ''"),
            )
            for column in ("session_id", "payment_intent", "idempotency_key")
        ),
        # One automatic charge at a time, whoever asks.
        Index(
            "uq_topup_charging",
            "customer_id",
            unique=True,
            sqlite_where=text("state = 'charging'"),
            postgresql_where=text("state = 'charging'"),
        ),
        Index("ix_topup_customer", "customer_id", "created_at"),
        Index(
            "ix_topup_unfinished",
            "updated_at",
            sqlite_where=text("state IN ('new', 'open', 'charging', 'processing')"),
            postgresql_where=text("state IN ('new', 'open', 'charging', 'processing')"),
        ),
        STRICT,
    )

    topup_id: str = Field(sa_column=Column(Text, nullable=False))
    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    kind: str = Field(sa_column=Column(Text, nullable=False))
    amount_cents: int = Field(sa_column=Column(INT64, nullable=False))
    idempotency_key: str = Field(sa_column=Column(Text, nullable=False))
    state: str = Field(sa_column=Column(Text, nullable=False))
    attempt: int = Field(sa_column=Column(INT64, nullable=False))
    session_id: str = Field(sa_column=Column(Text, nullable=False))
    payment_intent: str = Field(sa_column=Column(Text, nullable=False))
    payment_method: str = Field(sa_column=Column(Text, nullable=False))
    url: str = Field(sa_column=Column(Text, nullable=False))
    expires_at: float = Field(sa_column=Column(SECONDS, nullable=False))
    revision: int = Field(sa_column=Column(INT64, nullable=False))
    reason: str = Field(sa_column=Column(Text, nullable=False))
    problem: str = Field(sa_column=Column(Text, nullable=False))
    created_at: float = Field(sa_column=Column(SECONDS, nullable=False))
    updated_at: float = Field(sa_column=Column(SECONDS, nullable=False))


class StripeEventTable(Table, table=True):
    """The inbox: every verified event, by its id, and what became of it."""

    __tablename__ = "stripe_event"
    __table_args__ = (
        PrimaryKeyConstraint("event_id", name="pk_stripe_event"),
        CheckConstraint("state IN ('pending', 'applied', 'ignored', 'unmatched')", name="ck_stripe_event_state"),
        CheckConstraint("via IN ('webhook', 'sweep')", name="ck_stripe_event_via"),
        Index(
            "ix_stripe_event_pending",
            "due_at",
            sqlite_where=text("state = 'pending'"),
            postgresql_where=text("state = 'pending'"),
        ),
        STRICT,
    )

    event_id: str = Field(sa_column=Column(Text, nullable=False))
    type: str = Field(sa_column=Column(Text, nullable=False))
    created: float = Field(sa_column=Column(SECONDS, nullable=False))
    object_id: str = Field(sa_column=Column(Text, nullable=False))
    topup_id: str = Field(sa_column=Column(Text, nullable=False))
    session_id: str = Field(sa_column=Column(Text, nullable=False))
    payment_intent: str = Field(sa_column=Column(Text, nullable=False))
    invoice_id: str = Field(sa_column=Column(Text, nullable=False))
    provider_customer: str = Field(sa_column=Column(Text, nullable=False))
    via: str = Field(sa_column=Column(Text, nullable=False))
    received_at: float = Field(sa_column=Column(SECONDS, nullable=False))
    state: str = Field(sa_column=Column(Text, nullable=False))
    attempts: int = Field(sa_column=Column(INT64, nullable=False))
    due_at: float = Field(sa_column=Column(SECONDS, nullable=False))
    problem: str = Field(sa_column=Column(Text, nullable=False))


class AutoTopupTable(Table, table=True):
    """What a customer agreed to be charged without being asked."""

    __tablename__ = "auto_topup"
    __table_args__ = (
        PrimaryKeyConstraint("customer_id", name="pk_auto_topup"),
        CheckConstraint("enabled IN (0, 1)", name="ck_auto_topup_enabled"),
        CheckConstraint("enabled = 0 OR (consent <> '' AND consent_at IS NOT NULL)", name="ck_auto_topup_consent"),
        CheckConstraint("amount_cents BETWEEN 500 AND 1000000", name="ck_auto_topup_amount"),
        CheckConstraint(
            "threshold_mils >= 0 AND daily_cap_cents >= amount_cents AND monthly_cap_cents >= daily_cap_cents",
            name="ck_auto_topup_caps",
        ),
        ForeignKeyConstraint(["customer_id"], [wallet.c.customer_id], name="fk_auto_topup_wallet"),
        STRICT,
    )

    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    enabled: int = Field(sa_column=Column(INT64, nullable=False))
    threshold_mils: int = Field(sa_column=Column(INT64, nullable=False))
    amount_cents: int = Field(sa_column=Column(INT64, nullable=False))
    daily_cap_cents: int = Field(sa_column=Column(INT64, nullable=False))
    monthly_cap_cents: int = Field(sa_column=Column(INT64, nullable=False))
    consent: str = Field(sa_column=Column(Text, nullable=False))
    consent_at: float | None = Field(default=None, sa_column=Column(SECONDS, nullable=True))
    declines: int = Field(sa_column=Column(INT64, nullable=False))
    retry_at: float = Field(sa_column=Column(SECONDS, nullable=False))
    problem: str = Field(sa_column=Column(Text, nullable=False))


class StripeMovementTable(Table, table=True):
    """What moved in the provider's books on account of a customer, as we know it. Written with its effect."""

    __tablename__ = "stripe_movement"
    __table_args__ = (
        PrimaryKeyConstraint("movement_id", name="pk_stripe_movement"),
        ForeignKeyConstraint(["customer_id"], [wallet.c.customer_id], name="fk_stripe_movement_wallet"),
        Index("ix_stripe_movement_created", "created"),
        Index("ix_stripe_movement_source", "source"),
        STRICT,
    )

    movement_id: str = Field(sa_column=Column(Text, nullable=False))
    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    source: str = Field(sa_column=Column(Text, nullable=False))
    """The payment's, as in the ledger."""
    kind: str = Field(sa_column=Column(Text, nullable=False))
    amount_cents: int = Field(sa_column=Column(INT64, nullable=False))
    created: float = Field(sa_column=Column(SECONDS, nullable=False))


class StripeInvoiceTable(Table, table=True):
    """An invoice of a closed month, one per customer and month."""

    __tablename__ = "stripe_invoice"
    __table_args__ = (
        PrimaryKeyConstraint("customer_id", "period", name="pk_stripe_invoice"),
        CheckConstraint("amount_cents > 0 AND carry_mils >= 0 AND carry_mils < 100", name="ck_stripe_invoice_amount"),
        CheckConstraint(
            "state IN ('new', 'open', 'paid', 'overdue', 'void', 'uncollectible')", name="ck_stripe_invoice_state"
        ),
        CheckConstraint("attempt >= 0 AND revision >= 0", name="ck_stripe_invoice_counts"),
        ForeignKeyConstraint(["customer_id"], [wallet.c.customer_id], name="fk_stripe_invoice_wallet"),
        *(
            Index(
                f"uq_stripe_invoice_{column}",
                column,
                unique=True,
                sqlite_where=text(f"{column} <> ''"),
                postgresql_where=text(f"{column} <> ''"),
            )
            for column in ("invoice_id", "payment_intent")
        ),
        STRICT,
    )

    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    period: str = Field(sa_column=Column(Text, nullable=False))
    amount_cents: int = Field(sa_column=Column(INT64, nullable=False))
    carry_mils: int = Field(sa_column=Column(INT64, nullable=False))
    state: str = Field(sa_column=Column(Text, nullable=False))
    attempt: int = Field(sa_column=Column(INT64, nullable=False))
    invoice_id: str = Field(sa_column=Column(Text, nullable=False))
    payment_intent: str = Field(sa_column=Column(Text, nullable=False))
    url: str = Field(sa_column=Column(Text, nullable=False))
    revision: int = Field(sa_column=Column(INT64, nullable=False))
    problem: str = Field(sa_column=Column(Text, nullable=False))
    created_at: float = Field(sa_column=Column(SECONDS, nullable=False))
    updated_at: float = Field(sa_column=Column(SECONDS, nullable=False))


class StripeCursorTable(Table, table=True):
    """How far each sweep has come."""

    __tablename__ = "stripe_cursor"
    __table_args__ = (PrimaryKeyConstraint("name", name="pk_stripe_cursor"), STRICT)

    name: str = Field(sa_column=Column(Text, nullable=False))
    value: float = Field(sa_column=Column(SECONDS, nullable=False))


class StripeReportTable(Table, table=True):
    """Each day's comparison of our books with the provider's, signed."""

    __tablename__ = "stripe_report"
    __table_args__ = (PrimaryKeyConstraint("day", name="pk_stripe_report"), STRICT)

    day: int = Field(sa_column=Column(INT64, nullable=False, autoincrement=False))
    body: str = Field(sa_column=Column(Text, nullable=False))
    signature: str = Field(sa_column=Column(Text, nullable=False))
    difference_cents: int = Field(sa_column=Column(INT64, nullable=False))
    filed_at: float = Field(sa_column=Column(SECONDS, nullable=False))


stripe_customer = payments_metadata.tables["stripe_customer"]
topup = payments_metadata.tables["topup"]
stripe_event = payments_metadata.tables["stripe_event"]
auto_topup = payments_metadata.tables["auto_topup"]
stripe_movement = payments_metadata.tables["stripe_movement"]
stripe_invoice = payments_metadata.tables["stripe_invoice"]
stripe_cursor = payments_metadata.tables["stripe_cursor"]
stripe_report = payments_metadata.tables["stripe_report"]
