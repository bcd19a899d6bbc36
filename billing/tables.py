"""The tables of the ledger, and every rule about them that a constraint can say.

The rules that only a trigger can say are in `billing.triggers`. A deployed database is made by `billing.migrations`,
never from here; a test holds the two equal.

An entry points at its predecessor's sequence number *and* balance, and a wallet at its last entry's: a gap, a fork, a
wrong sum or an edited past has no row to point at, so the database refuses it.
"""

from typing import Any

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Double,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    PrimaryKeyConstraint,
    Text,
    UniqueConstraint,
    literal_column,
    text,
)
from sqlalchemy.types import REAL, TypeEngine
from sqlmodel import Field, SQLModel

billing_metadata = MetaData()

# SQLite's STRICT tables know INTEGER, REAL and TEXT; there an INTEGER column refuses 1.5.
INT64: TypeEngine[int] = BigInteger().with_variant(Integer(), "sqlite")
SECONDS: TypeEngine[float] = Double().with_variant(REAL(), "sqlite")
STRICT = {"sqlite_strict": True}
# Checked at COMMIT: rows that are born together point at each other. `use_alter` adds them after both tables exist.
AT_COMMIT: dict[str, Any] = {"deferrable": True, "initially": "DEFERRED", "use_alter": True}


class Table(SQLModel):
    """Base of the ledger's tables, so that they share no metadata with anybody else's."""

    metadata = billing_metadata


class WriterFenceTable(Table, table=True):
    """One row: the epoch of the only writer whose commits count."""

    __tablename__ = "writer_fence"
    __table_args__ = (
        PrimaryKeyConstraint("fence_id", name="pk_writer_fence"),
        CheckConstraint("fence_id = 1", name="ck_writer_fence_single"),
        CheckConstraint("epoch >= 0", name="ck_writer_fence_epoch"),
        STRICT,
    )

    fence_id: int = Field(sa_column=Column(INT64, nullable=False, autoincrement=False))
    epoch: int = Field(sa_column=Column(INT64, nullable=False))
    """0 until the first writer takes over."""
    taken_at: float = Field(sa_column=Column(SECONDS, nullable=False))


class WalletTable(Table, table=True):
    """A customer and its money: a copy of the last entry, kept equal to it by a foreign key."""

    __tablename__ = "wallet"
    __table_args__ = (
        PrimaryKeyConstraint("customer_id", name="pk_wallet"),
        UniqueConstraint("name", name="uq_wallet_name"),
        CheckConstraint("balance_mils >= -credit_limit_mils", name="ck_wallet_balance"),
        CheckConstraint("credit_limit_mils >= 0 AND floor_mils IN (0, -credit_limit_mils)", name="ck_wallet_floor"),
        CheckConstraint(
            "debt_mils >= 0 AND (debt_mils = 0 OR (debt_seq IS NOT NULL AND balance_mils <= 0))", name="ck_wallet_debt"
        ),
        ForeignKeyConstraint(
            ["customer_id", "seq", "balance_mils"],
            ["entry.customer_id", "entry.seq", "entry.balance_after"],
            name="fk_wallet_tail",
            **AT_COMMIT,
        ),
        ForeignKeyConstraint(
            ["customer_id", "debt_seq", "debt_mils"],
            ["debt.customer_id", "debt.seq", "debt.debt_after"],
            name="fk_wallet_debt",
            **AT_COMMIT,
        ),
        STRICT,
    )

    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    name: str = Field(sa_column=Column(Text, nullable=False))
    seq: int = Field(sa_column=Column(INT64, nullable=False))
    balance_mils: int = Field(sa_column=Column(INT64, nullable=False))
    created_at: float = Field(sa_column=Column(SECONDS, nullable=False))
    credit_limit_mils: int = Field(sa_column=Column(INT64, nullable=False, server_default=text("0")))
    """How far below zero the balance may ever be; 0 for prepaid."""
    floor_mils: int = Field(sa_column=Column(INT64, nullable=False, server_default=text("0")))
    """Where spending ends: minus the credit limit, or 0 while an invoice is overdue."""
    debt_mils: int = Field(sa_column=Column(INT64, nullable=False, server_default=text("0")))
    """What was taken back of payments and is not there any more; every mil that comes in repays it first."""
    debt_seq: int | None = Field(default=None, sa_column=Column(INT64, nullable=True))


class ApiKeyTable(Table, table=True):
    """A key by its hash. Many keys spend from one wallet."""

    __tablename__ = "api_key"
    __table_args__ = (
        PrimaryKeyConstraint("key_id", name="pk_api_key"),
        UniqueConstraint("sha256", name="uq_api_key_sha256"),
        UniqueConstraint("key_id", "customer_id", name="uq_api_key_customer"),
        CheckConstraint("length(sha256) = 64", name="ck_api_key_sha256"),
        CheckConstraint("length(last4) = 4", name="ck_api_key_last4"),
        CheckConstraint("refill_per_s > 0 AND burst > 0", name="ck_api_key_limits"),
        CheckConstraint("(revoked_at IS NULL) = (revoked_seq IS NULL)", name="ck_api_key_revoked"),
        ForeignKeyConstraint(["customer_id"], ["wallet.customer_id"], name="fk_api_key_wallet"),
        ForeignKeyConstraint(
            ["customer_id", "created_seq"], ["entry.customer_id", "entry.seq"], name="fk_api_key_created", **AT_COMMIT
        ),
        ForeignKeyConstraint(
            ["customer_id", "revoked_seq"], ["entry.customer_id", "entry.seq"], name="fk_api_key_revoked", **AT_COMMIT
        ),
        STRICT,
    )

    key_id: str = Field(sa_column=Column(Text, nullable=False))
    sha256: str = Field(sa_column=Column(Text, nullable=False))
    last4: str = Field(sa_column=Column(Text, nullable=False))
    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    refill_per_s: float = Field(sa_column=Column(SECONDS, nullable=False))
    burst: int = Field(sa_column=Column(INT64, nullable=False))
    created_at: float = Field(sa_column=Column(SECONDS, nullable=False))
    created_seq: int = Field(sa_column=Column(INT64, nullable=False))
    """The wallet's sequence number when the key was made: orders keys with spending, whatever the clock does."""
    revoked_at: float | None = Field(default=None, sa_column=Column(SECONDS, nullable=True))
    revoked_seq: int | None = Field(default=None, sa_column=Column(INT64, nullable=True))


class ReservationTable(Table, table=True):
    """Money held for one request: debited when it opens, kept or given back when it settles, once."""

    __tablename__ = "reservation"
    __table_args__ = (
        PrimaryKeyConstraint("request_id", name="pk_reservation"),
        UniqueConstraint("request_id", "customer_id", "amount", name="uq_reservation_amount"),
        CheckConstraint("frames > 0 AND mils_per_frame > 0 AND per_frames > 0", name="ck_reservation_price"),
        # Whole numbers divide downwards: this is rounded up, once.
        CheckConstraint("covered > 0 AND covered <= frames", name="ck_reservation_covered"),
        CheckConstraint(
            "amount = ((frames - COALESCE(covered, 0)) * mils_per_frame + per_frames - 1) / per_frames",
            name="ck_reservation_amount",
        ),
        CheckConstraint(
            "(state = 'open' AND captured = 0 AND refunded = 0 AND settled_seq IS NULL AND settled_at IS NULL"
            " AND frames_delivered IS NULL)"
            " OR (state = 'settled' AND captured >= 0 AND refunded >= 0 AND captured + refunded = amount"
            " AND settled_seq IS NOT NULL AND settled_at IS NOT NULL AND frames_delivered IS NOT NULL)",
            name="ck_reservation_state",
        ),
        CheckConstraint(
            "frames_delivered IS NULL OR (frames_delivered >= 0 AND frames_delivered <= frames"
            " AND captured = ((CASE WHEN frames_delivered > COALESCE(covered, 0)"
            " THEN frames_delivered - COALESCE(covered, 0) ELSE 0 END) * mils_per_frame + per_frames - 1)"
            " / per_frames)",
            name="ck_reservation_delivered",
        ),
        # What units cover is counted against their allotment.
        ForeignKeyConstraint(
            ["request_id", "covered"],
            ["unit_use.request_id", "unit_use.frames"],
            name="fk_reservation_covered",
            **AT_COMMIT,
        ),
        # The key must be one of this wallet's.
        ForeignKeyConstraint(
            ["key_id", "customer_id"], ["api_key.key_id", "api_key.customer_id"], name="fk_reservation_key"
        ),
        Index(
            "ix_reservation_open_lease",
            "lease_until",
            sqlite_where=text("state = 'open'"),
            postgresql_where=text("state = 'open'"),
        ),
        # Partial by what is true of every row, so that only queries which say so use it: without statistics PostgreSQL
        # would look for a foreign key's row here, among all of the customer's.
        Index("ix_reservation_customer", "customer_id", "created_at", "debit_seq", postgresql_where=text("frames > 0")),
        STRICT,
    )

    request_id: str = Field(sa_column=Column(Text, nullable=False))
    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    key_id: str = Field(sa_column=Column(Text, nullable=False))
    frames: int = Field(sa_column=Column(INT64, nullable=False))
    mils_per_frame: int = Field(sa_column=Column(INT64, nullable=False))
    """The price when the work was reserved, for every `per_frames` frames; what is captured later uses this one."""
    amount: int = Field(sa_column=Column(INT64, nullable=False))
    captured: int = Field(sa_column=Column(INT64, nullable=False))
    refunded: int = Field(sa_column=Column(INT64, nullable=False))
    state: str = Field(sa_column=Column(Text, nullable=False))
    lease_until: float = Field(sa_column=Column(SECONDS, nullable=False))
    reason: str = Field(sa_column=Column(Text, nullable=False))
    created_at: float = Field(sa_column=Column(SECONDS, nullable=False))
    # No foreign keys on the next one and `settled_seq`: SQLite would scan this table for each entry that it inserts.
    debit_seq: int = Field(sa_column=Column(INT64, nullable=False))
    settled_at: float | None = Field(default=None, sa_column=Column(SECONDS, nullable=True))
    settled_seq: int | None = Field(default=None, sa_column=Column(INT64, nullable=True))
    """The wallet's last entry once this was settled: the refund, if there was one."""
    model: str = Field(sa_column=Column(Text, nullable=False, server_default=""))
    """What ran; empty for what an older version reserved."""
    per_frames: int = Field(sa_column=Column(INT64, nullable=False, server_default=text("1")))
    frames_delivered: int | None = Field(default=None, sa_column=Column(INT64, nullable=True))
    """Null while it is open."""
    covered: int | None = Field(default=None, sa_column=Column(INT64, nullable=True))
    """Frames that provisioned units pay for, which are the first to be delivered; null when there are none."""


class SubmissionTable(Table, table=True):
    """By what a customer's request is recognised when it comes again: its idempotency key and its payload.

    A key belongs to one request at a time. A request that was refunded in full releases it when the key comes again;
    its row stays, so the attempts under one key can be read until they are forgotten, a day later.
    """

    __tablename__ = "submission"
    __table_args__ = (
        PrimaryKeyConstraint("request_id", name="pk_submission"),
        CheckConstraint("length(payload_sha256) = 64", name="ck_submission_payload"),
        CheckConstraint("length(idempotency_key) <= 256", name="ck_submission_key"),
        # The request must be this customer's.
        ForeignKeyConstraint(
            ["request_id", "customer_id", "amount"],
            ["reservation.request_id", "reservation.customer_id", "reservation.amount"],
            name="fk_submission_reservation",
        ),
        Index(
            "uq_submission_key",
            "customer_id",
            "idempotency_key",
            unique=True,
            sqlite_where=text("released_at IS NULL AND idempotency_key <> ''"),
            postgresql_where=text("released_at IS NULL AND idempotency_key <> ''"),
        ),
        Index("ix_submission_payload", "customer_id", "payload_sha256", "created_at"),
        Index("ix_submission_age", "created_at"),
        STRICT,
    )

    request_id: str = Field(sa_column=Column(Text, nullable=False))
    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    amount: int = Field(sa_column=Column(INT64, nullable=False))
    idempotency_key: str = Field(sa_column=Column(Text, nullable=False))
    """Empty for a request that is recognised by its payload alone."""
    payload_sha256: str = Field(sa_column=Column(Text, nullable=False))
    created_at: float = Field(sa_column=Column(SECONDS, nullable=False))
    released_at: float | None = Field(default=None, sa_column=Column(SECONDS, nullable=True))


class KeyTermsTable(Table, table=True):
    """What a key may do. A key without a row may do everything."""

    __tablename__ = "key_terms"
    __table_args__ = (
        PrimaryKeyConstraint("key_id", name="pk_key_terms"),
        CheckConstraint("scope IN ('spend', 'read')", name="ck_key_terms_scope"),
        CheckConstraint("daily_budget_mils >= 0 AND monthly_budget_mils >= 0", name="ck_key_terms_budgets"),
        ForeignKeyConstraint(["key_id"], ["api_key.key_id"], name="fk_key_terms_key"),
        ForeignKeyConstraint(["budget_id"], ["api_key.key_id"], name="fk_key_terms_budget"),
        STRICT,
    )

    key_id: str = Field(sa_column=Column(Text, nullable=False))
    budget_id: str = Field(sa_column=Column(Text, nullable=False))
    """The first key of those that were rotated into this one: its spending counts for all of them."""
    label: str = Field(sa_column=Column(Text, nullable=False))
    scope: str = Field(sa_column=Column(Text, nullable=False))
    models: str = Field(sa_column=Column(Text, nullable=False))
    """Separated by spaces; empty for all."""
    expires_at: float | None = Field(default=None, sa_column=Column(SECONDS, nullable=True))
    daily_budget_mils: int | None = Field(default=None, sa_column=Column(INT64, nullable=True))
    monthly_budget_mils: int | None = Field(default=None, sa_column=Column(INT64, nullable=True))


class BudgetUseTable(Table, table=True):
    """A reservation that counts against a budget. What was spent is never stored, only summed over these."""

    __tablename__ = "budget_use"
    __table_args__ = (
        PrimaryKeyConstraint("request_id", name="pk_budget_use"),
        ForeignKeyConstraint(["request_id"], ["reservation.request_id"], name="fk_budget_use_reservation"),
        ForeignKeyConstraint(["budget_id"], ["api_key.key_id"], name="fk_budget_use_budget"),
        Index("ix_budget_use_day", "budget_id", "day"),
        STRICT,
    )

    request_id: str = Field(sa_column=Column(Text, nullable=False))
    budget_id: str = Field(sa_column=Column(Text, nullable=False))
    day: int = Field(sa_column=Column(INT64, nullable=False))
    """Of the reservation, in days of UTC since 1970."""


class BudgetEventTable(Table, table=True):
    """A key's budget came to a level: written once for each budget, period, limit and level, never touched again."""

    __tablename__ = "budget_event"
    __table_args__ = (
        PrimaryKeyConstraint("event_id", name="pk_budget_event"),
        CheckConstraint(
            "period IN ('day', 'month') AND level IN (75, 90) AND spent_mils * 100 >= limit_mils * level",
            name="ck_budget_event_level",
        ),
        ForeignKeyConstraint(
            ["key_id", "customer_id"], ["api_key.key_id", "api_key.customer_id"], name="fk_budget_event_key"
        ),
        Index("ix_budget_event_customer", "customer_id", "created_at", "event_id"),
        STRICT,
    )

    event_id: str = Field(sa_column=Column(Text, nullable=False))
    """Made of the budget, the period, the limit and the level: the same again is the same row."""
    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    key_id: str = Field(sa_column=Column(Text, nullable=False))
    """The key that spent it; after a rotation not the one that the budget began with."""
    period: str = Field(sa_column=Column(Text, nullable=False))
    starts_day: int = Field(sa_column=Column(INT64, nullable=False))
    """Of the period, in days of UTC since 1970."""
    level: int = Field(sa_column=Column(INT64, nullable=False))
    """Per cent."""
    limit_mils: int = Field(sa_column=Column(INT64, nullable=False))
    spent_mils: int = Field(sa_column=Column(INT64, nullable=False))
    created_at: float = Field(sa_column=Column(SECONDS, nullable=False))


class QuoteTable(Table, table=True):
    """A price that was promised for a while. Written once, never touched again."""

    __tablename__ = "quote"
    __table_args__ = (
        PrimaryKeyConstraint("quote_id", name="pk_quote"),
        CheckConstraint(
            "frames > 0 AND mils_per_frame > 0 AND per_frames > 0 AND price_version >= 0", name="ck_quote_price"
        ),
        CheckConstraint("expires_at > created_at", name="ck_quote_expiry"),
        ForeignKeyConstraint(["customer_id"], ["wallet.customer_id"], name="fk_quote_wallet"),
        STRICT,
    )

    quote_id: str = Field(sa_column=Column(Text, nullable=False))
    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    model: str = Field(sa_column=Column(Text, nullable=False))
    frames: int = Field(sa_column=Column(INT64, nullable=False))
    mils_per_frame: int = Field(sa_column=Column(INT64, nullable=False))
    price_version: int = Field(sa_column=Column(INT64, nullable=False))
    balance_mils: int = Field(sa_column=Column(INT64, nullable=False))
    """When it was asked for: the answer to the same question again."""
    created_at: float = Field(sa_column=Column(SECONDS, nullable=False))
    expires_at: float = Field(sa_column=Column(SECONDS, nullable=False))
    per_frames: int = Field(sa_column=Column(INT64, nullable=False, server_default=text("1")))
    """The rate is `mils_per_frame` for so many frames."""


class PriceTable(Table, table=True):
    """A version of a model's price, for everybody or for one customer. Written once, never touched again.

    A version points at its predecessor's number and date, so versions have no gap and take effect in their order.
    """

    __tablename__ = "price"
    __table_args__ = (
        PrimaryKeyConstraint("model", "customer_id", "version", name="pk_price"),
        UniqueConstraint("model", "customer_id", "version", "effective_from", name="uq_price_effective"),
        CheckConstraint(
            "(version = 1 AND prev_version IS NULL AND prev_effective_from IS NULL)"
            " OR (version > 1 AND prev_version IS NOT NULL AND prev_version = version - 1"
            " AND prev_effective_from IS NOT NULL AND prev_effective_from < effective_from)",
            name="ck_price_chain",
        ),
        ForeignKeyConstraint(
            ["model", "customer_id", "prev_version", "prev_effective_from"],
            ["price.model", "price.customer_id", "price.version", "price.effective_from"],
            name="fk_price_previous",
        ),
        STRICT,
    )

    model: str = Field(sa_column=Column(Text, nullable=False))
    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    """Whose price it is; empty for the list price."""
    version: int = Field(sa_column=Column(INT64, nullable=False, autoincrement=False))
    prev_version: int | None = Field(default=None, sa_column=Column(INT64, nullable=True))
    prev_effective_from: float | None = Field(default=None, sa_column=Column(SECONDS, nullable=True))
    effective_from: float = Field(sa_column=Column(SECONDS, nullable=False))
    terms: str = Field(sa_column=Column(Text, nullable=False))
    """Rates and factors, as `billing.price_terms` writes them."""
    created_at: float = Field(sa_column=Column(SECONDS, nullable=False))


class ProvisionTable(Table, table=True):
    """How many units of a model a customer has from one month on. Written once; what comes next is another version.

    A version points at its predecessor's number and month, so versions have no gap and take effect in their order.
    """

    __tablename__ = "provision"
    __table_args__ = (
        PrimaryKeyConstraint("customer_id", "model", "version", name="pk_provision"),
        UniqueConstraint("customer_id", "model", "version", "from_period", name="uq_provision_period"),
        UniqueConstraint(
            "customer_id", "model", "version", "units", "unit_mils", "unit_frames", name="uq_provision_terms"
        ),
        CheckConstraint(
            "(version = 1 AND prev_version IS NULL AND prev_period IS NULL)"
            " OR (version > 1 AND prev_version IS NOT NULL AND prev_version = version - 1"
            " AND prev_period IS NOT NULL AND prev_period < from_period)",
            name="ck_provision_chain",
        ),
        CheckConstraint(
            "units >= 0 AND unit_mils > 0 AND unit_frames >= 0 AND units_per_replica >= 0"
            " AND unit_frames + units_per_replica > 0 AND length(from_period) = 7",
            name="ck_provision_terms",
        ),
        ForeignKeyConstraint(["customer_id"], ["wallet.customer_id"], name="fk_provision_wallet"),
        ForeignKeyConstraint(
            ["customer_id", "model", "prev_version", "prev_period"],
            ["provision.customer_id", "provision.model", "provision.version", "provision.from_period"],
            name="fk_provision_previous",
        ),
        STRICT,
    )

    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    model: str = Field(sa_column=Column(Text, nullable=False))
    version: int = Field(sa_column=Column(INT64, nullable=False, autoincrement=False))
    prev_version: int | None = Field(default=None, sa_column=Column(INT64, nullable=True))
    prev_period: str | None = Field(default=None, sa_column=Column(Text, nullable=True))
    from_period: str = Field(sa_column=Column(Text, nullable=False))
    """`YYYY-MM`."""
    units: int = Field(sa_column=Column(INT64, nullable=False))
    """0 ends it."""
    unit_mils: int = Field(sa_column=Column(INT64, nullable=False))
    """What a unit costs a month."""
    unit_frames: int = Field(sa_column=Column(INT64, nullable=False))
    """Frames a month that a unit pays for."""
    units_per_replica: int = Field(sa_column=Column(INT64, nullable=False))
    """So many units are one replica that is always there; 0 when no capacity is promised."""
    created_at: float = Field(sa_column=Column(SECONDS, nullable=False))


class UnitChargeTable(Table, table=True):
    """A month of a customer's units, charged once: the frames that it pays for, and the entry that paid."""

    __tablename__ = "unit_charge"
    __table_args__ = (
        PrimaryKeyConstraint("customer_id", "model", "period", name="pk_unit_charge"),
        UniqueConstraint("customer_id", "model", "period", "frames", name="uq_unit_charge_frames"),
        CheckConstraint(
            "units > 0 AND amount = units * unit_mils AND frames = units * unit_frames", name="ck_unit_charge_amount"
        ),
        ForeignKeyConstraint(
            ["customer_id", "model", "version", "units", "unit_mils", "unit_frames"],
            [
                "provision.customer_id",
                "provision.model",
                "provision.version",
                "provision.units",
                "provision.unit_mils",
                "provision.unit_frames",
            ],
            name="fk_unit_charge_provision",
        ),
        ForeignKeyConstraint(
            ["customer_id", "entry_seq"], ["entry.customer_id", "entry.seq"], name="fk_unit_charge_entry", **AT_COMMIT
        ),
        Index("ix_unit_charge_entry", "customer_id", "entry_seq"),
        STRICT,
    )

    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    model: str = Field(sa_column=Column(Text, nullable=False))
    period: str = Field(sa_column=Column(Text, nullable=False))
    """`YYYY-MM`, of UTC."""
    version: int = Field(sa_column=Column(INT64, nullable=False, autoincrement=False))
    units: int = Field(sa_column=Column(INT64, nullable=False))
    unit_mils: int = Field(sa_column=Column(INT64, nullable=False))
    unit_frames: int = Field(sa_column=Column(INT64, nullable=False))
    amount: int = Field(sa_column=Column(INT64, nullable=False))
    frames: int = Field(sa_column=Column(INT64, nullable=False))
    entry_seq: int = Field(sa_column=Column(INT64, nullable=False))
    charged_at: float = Field(sa_column=Column(SECONDS, nullable=False))


class UnitUseTable(Table, table=True):
    """Frames that a month's units pay for, or that come back undelivered: chained, like entries."""

    __tablename__ = "unit_use"
    __table_args__ = (
        PrimaryKeyConstraint("customer_id", "model", "period", "seq", name="pk_unit_use"),
        UniqueConstraint("customer_id", "model", "period", "seq", "used_after", name="uq_unit_use_after"),
        UniqueConstraint("request_id", "frames", name="uq_unit_use_request"),
        CheckConstraint(
            "(seq = 1 AND prev_seq IS NULL AND used_before = 0)"
            " OR (seq > 1 AND prev_seq IS NOT NULL AND prev_seq = seq - 1)",
            name="ck_unit_use_chain",
        ),
        CheckConstraint(
            "frames <> 0 AND used_after = used_before + frames AND used_after >= 0 AND used_after <= allotment",
            name="ck_unit_use_sum",
        ),
        ForeignKeyConstraint(
            ["customer_id", "model", "period", "allotment"],
            ["unit_charge.customer_id", "unit_charge.model", "unit_charge.period", "unit_charge.frames"],
            name="fk_unit_use_charge",
        ),
        ForeignKeyConstraint(
            ["customer_id", "model", "period", "prev_seq", "used_before"],
            ["unit_use.customer_id", "unit_use.model", "unit_use.period", "unit_use.seq", "unit_use.used_after"],
            name="fk_unit_use_previous",
        ),
        STRICT,
    )

    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    model: str = Field(sa_column=Column(Text, nullable=False))
    period: str = Field(sa_column=Column(Text, nullable=False))
    seq: int = Field(sa_column=Column(INT64, nullable=False, autoincrement=False))
    prev_seq: int | None = Field(default=None, sa_column=Column(INT64, nullable=True))
    used_before: int = Field(sa_column=Column(INT64, nullable=False))
    frames: int = Field(sa_column=Column(INT64, nullable=False))
    """Negative when they come back."""
    used_after: int = Field(sa_column=Column(INT64, nullable=False))
    allotment: int = Field(sa_column=Column(INT64, nullable=False))
    request_id: str = Field(sa_column=Column(Text, nullable=False))


class EntryTable(Table, table=True):
    """One change of one wallet's balance. Written once, never touched again.

    Entry 0 opens the wallet and moves nothing; it exists so that every other entry has a predecessor.
    """

    __tablename__ = "entry"
    __table_args__ = (
        PrimaryKeyConstraint("customer_id", "seq", name="pk_entry"),
        UniqueConstraint("customer_id", "seq", "balance_after", name="uq_entry_balance"),
        CheckConstraint("balance_after = prev_balance + amount", name="ck_entry_sum"),
        CheckConstraint(
            "(kind = 'opening' AND seq = 0 AND prev_seq IS NULL AND prev_balance = 0)"
            " OR (kind <> 'opening' AND seq > 0 AND prev_seq IS NOT NULL AND prev_seq = seq - 1)",
            name="ck_entry_chain",
        ),
        CheckConstraint(
            "(kind = 'opening' AND amount = 0 AND reserved IS NULL)"
            " OR (kind IN ('credit', 'reinstatement', 'transfer_in') AND amount > 0 AND reserved IS NULL)"
            " OR (kind IN ('reversal', 'repayment', 'transfer_out', 'fee') AND amount < 0 AND reserved IS NULL)"
            " OR (kind = 'debit' AND amount <= 0 AND reserved IS NOT NULL AND amount = -reserved)"
            " OR (kind = 'refund' AND amount > 0 AND reserved IS NOT NULL AND amount <= reserved)",
            name="ck_entry_kind",
        ),
        ForeignKeyConstraint(["customer_id"], ["wallet.customer_id"], name="fk_entry_wallet"),
        ForeignKeyConstraint(
            ["customer_id", "prev_seq", "prev_balance"],
            ["entry.customer_id", "entry.seq", "entry.balance_after"],
            name="fk_entry_previous",
        ),
        # `reserved` is null for money from outside, which belongs to no request.
        ForeignKeyConstraint(
            ["public_id", "customer_id", "reserved"],
            ["reservation.request_id", "reservation.customer_id", "reservation.amount"],
            name="fk_entry_reservation",
        ),
        *(
            Index(
                f"uq_entry_{kind}",
                "public_id",
                unique=True,
                sqlite_where=text(f"kind = '{kind}'"),
                postgresql_where=text(f"kind = '{kind}'"),
            )
            for kind in ("debit", "refund", "credit")
        ),
        STRICT,
    )

    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    seq: int = Field(sa_column=Column(INT64, nullable=False, autoincrement=False))
    prev_seq: int | None = Field(default=None, sa_column=Column(INT64, nullable=True))
    prev_balance: int = Field(sa_column=Column(INT64, nullable=False))
    amount: int = Field(sa_column=Column(INT64, nullable=False))
    balance_after: int = Field(sa_column=Column(INT64, nullable=False))
    kind: str = Field(sa_column=Column(Text, nullable=False))
    public_id: str = Field(sa_column=Column(Text, nullable=False))
    """What the customer sees as `id`: the request's for a debit and its refund, the payment's for a credit."""
    reserved: int | None = Field(default=None, sa_column=Column(INT64, nullable=True))
    ts: float = Field(sa_column=Column(SECONDS, nullable=False))
    detail: str = Field(sa_column=Column(Text, nullable=False))
    epoch: int = Field(sa_column=Column(INT64, nullable=False))
    """Which writer wrote it."""


class CreditLineTable(Table, table=True):
    """How far down a customer may spend from one entry on. Written once, never touched again."""

    __tablename__ = "credit_line"
    __table_args__ = (
        PrimaryKeyConstraint("customer_id", "seq", name="pk_credit_line"),
        CheckConstraint("limit_mils >= 0 AND floor_mils IN (0, -limit_mils)", name="ck_credit_line_floor"),
        ForeignKeyConstraint(
            ["customer_id", "entry_seq"], ["entry.customer_id", "entry.seq"], name="fk_credit_line_entry", **AT_COMMIT
        ),
        Index("ix_credit_line_entry", "customer_id", "entry_seq"),
        STRICT,
    )

    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    seq: int = Field(sa_column=Column(INT64, nullable=False, autoincrement=False))
    limit_mils: int = Field(sa_column=Column(INT64, nullable=False))
    floor_mils: int = Field(sa_column=Column(INT64, nullable=False))
    entry_seq: int = Field(sa_column=Column(INT64, nullable=False))
    """The wallet's last entry when it was drawn."""
    ts: float = Field(sa_column=Column(SECONDS, nullable=False))


class StatementTable(Table, table=True):
    """A closed period of a wallet: the entries after `from_seq` up to `to_seq`.

    It points at its predecessor's end and at the entry it ends with, so that every entry is in exactly one.
    """

    __tablename__ = "statement"
    __table_args__ = (
        PrimaryKeyConstraint("customer_id", "number", name="pk_statement"),
        UniqueConstraint("customer_id", "period", name="uq_statement_period"),
        UniqueConstraint("customer_id", "number", "to_seq", "closing_mils", name="uq_statement_end"),
        CheckConstraint(
            "(number = 1 AND prev_number IS NULL AND from_seq = 0 AND opening_mils = 0)"
            " OR (number > 1 AND prev_number IS NOT NULL AND prev_number = number - 1)",
            name="ck_statement_chain",
        ),
        CheckConstraint(
            "to_seq >= from_seq AND closing_mils = opening_mils + usage_mils + payments_mils + transfers_mils",
            name="ck_statement_sum",
        ),
        ForeignKeyConstraint(
            ["customer_id", "prev_number", "from_seq", "opening_mils"],
            ["statement.customer_id", "statement.number", "statement.to_seq", "statement.closing_mils"],
            name="fk_statement_previous",
        ),
        ForeignKeyConstraint(
            ["customer_id", "to_seq", "closing_mils"],
            ["entry.customer_id", "entry.seq", "entry.balance_after"],
            name="fk_statement_entry",
        ),
        STRICT,
    )

    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    number: int = Field(sa_column=Column(INT64, nullable=False, autoincrement=False))
    prev_number: int | None = Field(default=None, sa_column=Column(INT64, nullable=True))
    period: str = Field(sa_column=Column(Text, nullable=False))
    """`YYYY-MM`."""
    from_seq: int = Field(sa_column=Column(INT64, nullable=False))
    to_seq: int = Field(sa_column=Column(INT64, nullable=False))
    opening_mils: int = Field(sa_column=Column(INT64, nullable=False))
    usage_mils: int = Field(sa_column=Column(INT64, nullable=False))
    """Debits less refunds: negative."""
    payments_mils: int = Field(sa_column=Column(INT64, nullable=False))
    """Credits less what was taken back of them."""
    transfers_mils: int = Field(sa_column=Column(INT64, nullable=False))
    """Within the team."""
    closing_mils: int = Field(sa_column=Column(INT64, nullable=False))
    closed_at: float = Field(sa_column=Column(SECONDS, nullable=False))


class MembershipTable(Table, table=True):
    """A customer that belongs to another one's team: with money of its own, or with a cap on the parent's."""

    __tablename__ = "membership"
    __table_args__ = (
        PrimaryKeyConstraint("customer_id", name="pk_membership"),
        CheckConstraint("customer_id <> parent_id", name="ck_membership_parent"),
        CheckConstraint(
            "(cap_mils IS NULL AND cap_period IS NULL)"
            " OR (cap_mils IS NOT NULL AND cap_mils >= 0"
            " AND cap_period IS NOT NULL AND cap_period IN ('day', 'month'))",
            name="ck_membership_cap",
        ),
        ForeignKeyConstraint(["customer_id"], ["wallet.customer_id"], name="fk_membership_customer"),
        ForeignKeyConstraint(["parent_id"], ["wallet.customer_id"], name="fk_membership_parent"),
        Index("ix_membership_parent", "parent_id"),
        STRICT,
    )

    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    parent_id: str = Field(sa_column=Column(Text, nullable=False))
    cap_mils: int | None = Field(default=None, sa_column=Column(INT64, nullable=True))
    cap_period: str | None = Field(default=None, sa_column=Column(Text, nullable=True))


class TransferTable(Table, table=True):
    """Money that moved within a team: both entries in one commit."""

    __tablename__ = "transfer"
    __table_args__ = (
        PrimaryKeyConstraint("transfer_id", name="pk_transfer"),
        CheckConstraint("amount > 0", name="ck_transfer_amount"),
        ForeignKeyConstraint(
            ["from_id", "from_seq"], ["entry.customer_id", "entry.seq"], name="fk_transfer_from", **AT_COMMIT
        ),
        ForeignKeyConstraint(
            ["to_id", "to_seq"], ["entry.customer_id", "entry.seq"], name="fk_transfer_to", **AT_COMMIT
        ),
        Index("ix_transfer_from", "from_id", "from_seq"),
        Index("ix_transfer_to", "to_id", "to_seq"),
        STRICT,
    )

    transfer_id: str = Field(sa_column=Column(Text, nullable=False))
    from_id: str = Field(sa_column=Column(Text, nullable=False))
    to_id: str = Field(sa_column=Column(Text, nullable=False))
    amount: int = Field(sa_column=Column(INT64, nullable=False))
    from_seq: int = Field(sa_column=Column(INT64, nullable=False))
    to_seq: int = Field(sa_column=Column(INT64, nullable=False))


class DrawTable(Table, table=True):
    """What a capped member's request took of its parent's wallet; what is left of the cap is summed over these."""

    __tablename__ = "draw"
    __table_args__ = (
        PrimaryKeyConstraint("request_id", name="pk_draw"),
        CheckConstraint("drawn > 0", name="ck_draw_drawn"),
        ForeignKeyConstraint(["request_id"], ["reservation.request_id"], name="fk_draw_reservation"),
        ForeignKeyConstraint(["customer_id"], ["membership.customer_id"], name="fk_draw_member"),
        Index("ix_draw_day", "customer_id", "day"),
        STRICT,
    )

    request_id: str = Field(sa_column=Column(Text, nullable=False))
    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    day: int = Field(sa_column=Column(INT64, nullable=False))
    """Of the reservation, in days of UTC since 1970."""
    drawn: int = Field(sa_column=Column(INT64, nullable=False))


class PaymentTable(Table, table=True):
    """A credit that was paid for outside, once for each `source`, and how much of it was taken back since."""

    __tablename__ = "payment"
    __table_args__ = (
        PrimaryKeyConstraint("source", name="pk_payment"),
        UniqueConstraint("public_id", name="uq_payment_public_id"),
        UniqueConstraint("source", "customer_id", name="uq_payment_customer"),
        CheckConstraint("granted > 0 AND reversed >= 0 AND reversed <= granted", name="ck_payment_reversed"),
        CheckConstraint("reversal_seq IS NOT NULL OR reversed = 0", name="ck_payment_untouched"),
        ForeignKeyConstraint(
            ["source", "reversal_seq", "reversed"],
            ["reversal.source", "reversal.seq", "reversal.to_mils"],
            name="fk_payment_reversal",
            **AT_COMMIT,
        ),
        STRICT,
    )

    source: str = Field(sa_column=Column(Text, nullable=False))
    """What was paid, by its own name: `stripe:cs_...`."""
    public_id: str = Field(sa_column=Column(Text, nullable=False))
    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    granted: int = Field(sa_column=Column(INT64, nullable=False))
    credit_seq: int = Field(sa_column=Column(INT64, nullable=False))
    """Its entry, which a trigger looks up when the payment is inserted."""
    reversed: int = Field(sa_column=Column(INT64, nullable=False))
    reversal_seq: int | None = Field(default=None, sa_column=Column(INT64, nullable=True))
    created_at: float = Field(sa_column=Column(SECONDS, nullable=False))


class ReversalTable(Table, table=True):
    """One change of how much of a payment is taken back, in either direction: chained, like entries."""

    __tablename__ = "reversal"
    __table_args__ = (
        PrimaryKeyConstraint("source", "seq", name="pk_reversal"),
        UniqueConstraint("source", "seq", "to_mils", name="uq_reversal_to"),
        CheckConstraint(
            "(seq = 1 AND prev_seq IS NULL AND prev_mils = 0)"
            " OR (seq > 1 AND prev_seq IS NOT NULL AND prev_seq = seq - 1)",
            name="ck_reversal_chain",
        ),
        CheckConstraint("to_mils >= 0 AND to_mils - prev_mils = taken + owed", name="ck_reversal_sum"),
        CheckConstraint(
            "owed >= 0 AND ((to_mils > prev_mils AND taken >= 0) OR (to_mils < prev_mils AND owed = 0))",
            name="ck_reversal_parts",
        ),
        # The payment must be this customer's.
        ForeignKeyConstraint(
            ["source", "customer_id"],
            ["payment.source", "payment.customer_id"],
            name="fk_reversal_payment",
            **AT_COMMIT,
        ),
        ForeignKeyConstraint(
            ["source", "prev_seq", "prev_mils"],
            ["reversal.source", "reversal.seq", "reversal.to_mils"],
            name="fk_reversal_previous",
        ),
        ForeignKeyConstraint(
            ["customer_id", "entry_seq"], ["entry.customer_id", "entry.seq"], name="fk_reversal_entry", **AT_COMMIT
        ),
        Index("ix_reversal_entry", "customer_id", "entry_seq"),
        STRICT,
    )

    source: str = Field(sa_column=Column(Text, nullable=False))
    seq: int = Field(sa_column=Column(INT64, nullable=False, autoincrement=False))
    prev_seq: int | None = Field(default=None, sa_column=Column(INT64, nullable=True))
    prev_mils: int = Field(sa_column=Column(INT64, nullable=False))
    to_mils: int = Field(sa_column=Column(INT64, nullable=False))
    taken: int = Field(sa_column=Column(INT64, nullable=False))
    """Out of the wallet; negative when it came back."""
    owed: int = Field(sa_column=Column(INT64, nullable=False))
    """What was no longer there to be taken."""
    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    entry_seq: int = Field(sa_column=Column(INT64, nullable=False))
    """The entry that moved the money; the wallet's last one if none was moved."""
    public_id: str = Field(sa_column=Column(Text, nullable=False))
    ts: float = Field(sa_column=Column(SECONDS, nullable=False))


class DebtTable(Table, table=True):
    """One change of what a customer owes after a reversal that its balance did not cover: chained, like entries."""

    __tablename__ = "debt"
    __table_args__ = (
        PrimaryKeyConstraint("customer_id", "seq", name="pk_debt"),
        UniqueConstraint("customer_id", "seq", "debt_after", name="uq_debt_after"),
        CheckConstraint("debt_after >= 0 AND debt_after = prev_debt + amount", name="ck_debt_sum"),
        CheckConstraint(
            "(seq = 1 AND prev_seq IS NULL AND prev_debt = 0)"
            " OR (seq > 1 AND prev_seq IS NOT NULL AND prev_seq = seq - 1)",
            name="ck_debt_chain",
        ),
        CheckConstraint(
            "(kind = 'shortage' AND amount > 0) OR (kind = 'repayment' AND amount < 0)", name="ck_debt_kind"
        ),
        ForeignKeyConstraint(
            ["customer_id", "prev_seq", "prev_debt"],
            ["debt.customer_id", "debt.seq", "debt.debt_after"],
            name="fk_debt_previous",
        ),
        ForeignKeyConstraint(
            ["customer_id", "entry_seq"], ["entry.customer_id", "entry.seq"], name="fk_debt_entry", **AT_COMMIT
        ),
        Index("ix_debt_entry", "customer_id", "entry_seq"),
        STRICT,
    )

    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    seq: int = Field(sa_column=Column(INT64, nullable=False, autoincrement=False))
    prev_seq: int | None = Field(default=None, sa_column=Column(INT64, nullable=True))
    prev_debt: int = Field(sa_column=Column(INT64, nullable=False))
    amount: int = Field(sa_column=Column(INT64, nullable=False))
    debt_after: int = Field(sa_column=Column(INT64, nullable=False))
    kind: str = Field(sa_column=Column(Text, nullable=False))
    entry_seq: int = Field(sa_column=Column(INT64, nullable=False))
    """The entry that repaid it, or for a shortage the wallet's last one."""
    public_id: str = Field(sa_column=Column(Text, nullable=False))
    """Of what caused it: the reversal, or what came in and repaid."""
    ts: float = Field(sa_column=Column(SECONDS, nullable=False))


class PaymentEventTable(Table, table=True):
    """A provider's message that was taken into account, marked in the commit of its effect."""

    __tablename__ = "payment_event"
    __table_args__ = (
        PrimaryKeyConstraint("event_id", name="pk_payment_event"),
        ForeignKeyConstraint(["source"], ["payment.source"], name="fk_payment_event_payment"),
        STRICT,
    )

    event_id: str = Field(sa_column=Column(Text, nullable=False))
    source: str = Field(sa_column=Column(Text, nullable=False))
    applied_at: float = Field(sa_column=Column(SECONDS, nullable=False))


writer_fence = billing_metadata.tables["writer_fence"]
wallet = billing_metadata.tables["wallet"]
api_key = billing_metadata.tables["api_key"]
reservation = billing_metadata.tables["reservation"]
has_frames = reservation.c.frames > literal_column("0")
"""True of every reservation; with it a query may use `ix_reservation_customer`."""
submission = billing_metadata.tables["submission"]
key_terms = billing_metadata.tables["key_terms"]
budget_use = billing_metadata.tables["budget_use"]
budget_event = billing_metadata.tables["budget_event"]
quote = billing_metadata.tables["quote"]
entry = billing_metadata.tables["entry"]
payment = billing_metadata.tables["payment"]
reversal = billing_metadata.tables["reversal"]
debt = billing_metadata.tables["debt"]
payment_event = billing_metadata.tables["payment_event"]
price = billing_metadata.tables["price"]
credit_line = billing_metadata.tables["credit_line"]
statement = billing_metadata.tables["statement"]
membership = billing_metadata.tables["membership"]
transfer = billing_metadata.tables["transfer"]
draw = billing_metadata.tables["draw"]
provision = billing_metadata.tables["provision"]
unit_charge = billing_metadata.tables["unit_charge"]
unit_use = billing_metadata.tables["unit_use"]
