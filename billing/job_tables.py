"""The tables of work that outlives its request: queued rollouts, and the webhooks that tell of them.

No money is in them. They share the ledger's database and its migrations, so that a job cannot exist without the
reservation that pays for it, and so that a job's end and the webhook that tells of it are one commit.
"""

from sqlalchemy import CheckConstraint, Column, ForeignKeyConstraint, Index, PrimaryKeyConstraint, Text, text
from sqlmodel import Field

from billing.tables import INT64, SECONDS, STRICT, Table, billing_metadata

__all__ = ["billing_metadata", "rollout_job", "webhook_attempt", "webhook_delivery", "webhook_secret"]


class RolloutJobTable(Table, table=True):
    """A rollout that was sent with mode=async. Its inputs are beside the results; its price is its reservation's."""

    __tablename__ = "rollout_job"
    __table_args__ = (
        PrimaryKeyConstraint("request_id", name="pk_rollout_job"),
        # The request must be this customer's, and reserved at this price.
        ForeignKeyConstraint(
            ["request_id", "customer_id", "amount"],
            ["reservation.request_id", "reservation.customer_id", "reservation.amount"],
            name="fk_rollout_job_reservation",
        ),
        CheckConstraint(
            "state IN ('queued', 'running', 'succeeded', 'failed', 'canceled')", name="ck_rollout_job_state"
        ),
        CheckConstraint("(state = 'running') = (owner <> '')", name="ck_rollout_job_owner"),
        CheckConstraint("(state IN ('queued', 'running')) = (finished_at IS NULL)", name="ck_rollout_job_finished"),
        CheckConstraint("delivered >= 0 AND delivered <= frames", name="ck_rollout_job_delivered"),
        CheckConstraint("captured >= 0 AND captured <= amount", name="ck_rollout_job_captured"),
        CheckConstraint("(state = 'failed') = (error_code <> '')", name="ck_rollout_job_error"),
        Index("ix_rollout_job_customer", "customer_id", "request_id"),
        Index(
            "ix_rollout_job_live",
            "state",
            "customer_id",
            "request_id",
            sqlite_where=text("finished_at IS NULL"),
            postgresql_where=text("finished_at IS NULL"),
        ),
        Index(
            "ix_rollout_job_finished",
            "finished_at",
            sqlite_where=text("finished_at IS NOT NULL"),
            postgresql_where=text("finished_at IS NOT NULL"),
        ),
        STRICT,
    )

    request_id: str = Field(sa_column=Column(Text, nullable=False))
    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    key_id: str = Field(sa_column=Column(Text, nullable=False))
    model: str = Field(sa_column=Column(Text, nullable=False))
    seed: int = Field(sa_column=Column(INT64, nullable=False))
    num_steps: int = Field(sa_column=Column(INT64, nullable=False))
    guidance: float = Field(sa_column=Column(SECONDS, nullable=False))
    frames: int = Field(sa_column=Column(INT64, nullable=False))
    amount: int = Field(sa_column=Column(INT64, nullable=False))
    payload_sha256: str = Field(sa_column=Column(Text, nullable=False))
    start_frame_resized: int = Field(sa_column=Column(INT64, nullable=False))
    score: int = Field(sa_column=Column(INT64, nullable=False))
    base_url: str = Field(sa_column=Column(Text, nullable=False))
    """Where its links lead; no request is there when it ends."""
    webhook_url: str = Field(sa_column=Column(Text, nullable=False))
    """Empty when nobody wants to be told."""
    state: str = Field(sa_column=Column(Text, nullable=False))
    owner: str = Field(sa_column=Column(Text, nullable=False))
    """The process that runs it, for as long as it renews `owned_until`."""
    owned_until: float = Field(sa_column=Column(SECONDS, nullable=False))
    attempts: int = Field(sa_column=Column(INT64, nullable=False))
    """How many processes have begun it and neither ended it nor put it back."""
    not_before: float = Field(sa_column=Column(SECONDS, nullable=False))
    """There was no room for it, so it waits until then."""
    created_at: float = Field(sa_column=Column(SECONDS, nullable=False))
    delivered: int = Field(sa_column=Column(INT64, nullable=False))
    """Frames that are in its video."""
    captured: int = Field(sa_column=Column(INT64, nullable=False))
    infer_ms: float = Field(sa_column=Column(SECONDS, nullable=False))
    psnr_db: float | None = Field(default=None, sa_column=Column(SECONDS, nullable=True))
    ssim: float | None = Field(default=None, sa_column=Column(SECONDS, nullable=True))
    lpips: float | None = Field(default=None, sa_column=Column(SECONDS, nullable=True))
    error_code: str = Field(sa_column=Column(Text, nullable=False))
    error: str = Field(sa_column=Column(Text, nullable=False))
    cancel_requested_at: float | None = Field(default=None, sa_column=Column(SECONDS, nullable=True))
    started_at: float | None = Field(default=None, sa_column=Column(SECONDS, nullable=True))
    finished_at: float | None = Field(default=None, sa_column=Column(SECONDS, nullable=True))


class WebhookDeliveryTable(Table, table=True):
    """A webhook that has to be delivered: written in the commit that ends the job it tells of."""

    __tablename__ = "webhook_delivery"
    __table_args__ = (
        PrimaryKeyConstraint("delivery_id", name="pk_webhook_delivery"),
        ForeignKeyConstraint(["request_id"], ["rollout_job.request_id"], name="fk_webhook_delivery_job"),
        CheckConstraint("state IN ('pending', 'delivered', 'failed')", name="ck_webhook_delivery_state"),
        CheckConstraint("(state = 'pending') = (finished_at IS NULL)", name="ck_webhook_delivery_finished"),
        Index("ix_webhook_delivery_job", "request_id"),
        Index(
            "ix_webhook_delivery_due",
            "customer_id",
            "next_attempt_at",
            sqlite_where=text("state = 'pending'"),
            postgresql_where=text("state = 'pending'"),
        ),
        STRICT,
    )

    delivery_id: str = Field(sa_column=Column(Text, nullable=False))
    """What the receiver sees as `webhook-id`: the same for every attempt."""
    request_id: str = Field(sa_column=Column(Text, nullable=False))
    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    url: str = Field(sa_column=Column(Text, nullable=False))
    state: str = Field(sa_column=Column(Text, nullable=False))
    attempts: int = Field(sa_column=Column(INT64, nullable=False))
    next_attempt_at: float = Field(sa_column=Column(SECONDS, nullable=False))
    created_at: float = Field(sa_column=Column(SECONDS, nullable=False))
    finished_at: float | None = Field(default=None, sa_column=Column(SECONDS, nullable=True))


class WebhookAttemptTable(Table, table=True):
    """The delivery log: what became of each attempt."""

    __tablename__ = "webhook_attempt"
    __table_args__ = (
        PrimaryKeyConstraint("delivery_id", "attempt", name="pk_webhook_attempt"),
        ForeignKeyConstraint(["delivery_id"], ["webhook_delivery.delivery_id"], name="fk_webhook_attempt_delivery"),
        STRICT,
    )

    delivery_id: str = Field(sa_column=Column(Text, nullable=False))
    attempt: int = Field(sa_column=Column(INT64, nullable=False, autoincrement=False))
    at: float = Field(sa_column=Column(SECONDS, nullable=False))
    took_ms: float = Field(sa_column=Column(SECONDS, nullable=False))
    problem: str = Field(sa_column=Column(Text, nullable=False))
    """Empty when it was delivered."""
    status: int | None = Field(default=None, sa_column=Column(INT64, nullable=True))
    """What the receiver answered, if it did."""


class WebhookSecretTable(Table, table=True):
    """What a customer's webhooks are signed with. After a rotation the one before it signs too, for a while."""

    __tablename__ = "webhook_secret"
    __table_args__ = (
        PrimaryKeyConstraint("customer_id", "version", name="pk_webhook_secret"),
        ForeignKeyConstraint(["customer_id"], ["wallet.customer_id"], name="fk_webhook_secret_wallet"),
        CheckConstraint("version > 0", name="ck_webhook_secret_version"),
        STRICT,
    )

    customer_id: str = Field(sa_column=Column(Text, nullable=False))
    version: int = Field(sa_column=Column(INT64, nullable=False, autoincrement=False))
    secret: str = Field(sa_column=Column(Text, nullable=False))
    created_at: float = Field(sa_column=Column(SECONDS, nullable=False))


rollout_job = billing_metadata.tables["rollout_job"]
webhook_delivery = billing_metadata.tables["webhook_delivery"]
webhook_attempt = billing_metadata.tables["webhook_attempt"]
webhook_secret = billing_metadata.tables["webhook_secret"]
