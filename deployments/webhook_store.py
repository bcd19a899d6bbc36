"""The rows of webhooks: what is to be delivered, what became of each attempt, and what customers verify them with."""

import base64
import contextlib
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from sqlalchemy import Connection, Engine, and_, func, insert, select, update
from sqlalchemy.exc import IntegrityError

from billing.commands import CustomerId, RequestId
from billing.database import writer
from billing.job_tables import webhook_attempt, webhook_delivery, webhook_secret

SECRET_BYTES = 32
ROTATION_OVERLAP_S = 24 * 3600.0
"""For how long after a rotation the secret before it signs too, so that a receiver can change over."""

DeliveryState = Literal["pending", "delivered", "failed"]


@dataclass(frozen=True, slots=True)
class Delivery:
    """A webhook to deliver, or one that was."""

    delivery_id: str
    request_id: RequestId
    customer_id: CustomerId
    url: str
    state: DeliveryState
    attempts: int
    """Begun, the one that runs included."""
    next_attempt_at: float
    created_at: float
    finished_at: float | None


@dataclass(frozen=True, slots=True)
class Attempt:
    delivery_id: str
    attempt: int
    at: float
    took_ms: float
    status: int | None
    """What the receiver answered; None if it did not."""
    problem: str
    """Empty when it was delivered."""


@dataclass(frozen=True, slots=True)
class SigningSecret:
    secret: str
    """`whsec_` and base64, as Standard Webhooks writes it."""
    created_at: float


_DELIVERY = tuple(webhook_delivery.c[name] for name in Delivery.__dataclass_fields__)
_ATTEMPT = tuple(webhook_attempt.c[name] for name in Attempt.__dataclass_fields__)


class WebhookStore:
    """Safe to share between threads. Every method raises one of `DATABASE_FAILURES` when the database fails."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._writer = writer(engine)
        self._clock = clock

    def claim(self, busy: Mapping[CustomerId, int], most_per_customer: int, hold_s: float) -> Delivery | None:
        """The delivery that is due and whose turn it is, for this process alone for `hold_s`; None if there is none.

        `busy` counts what this process is delivering: a customer whose receivers are slow holds up only itself.
        """
        now = self._clock()
        pending = webhook_delivery.c.state == "pending"
        due = (
            select(webhook_delivery.c.customer_id, func.min(webhook_delivery.c.next_attempt_at).label("at"))
            .where(pending, webhook_delivery.c.next_attempt_at <= now)
            .group_by(webhook_delivery.c.customer_id)
            .subquery()
        )
        first = (
            select(*_DELIVERY)
            .join(
                due,
                and_(
                    webhook_delivery.c.customer_id == due.c.customer_id,
                    webhook_delivery.c.next_attempt_at == due.c.at,
                ),
            )
            .where(pending)
            .order_by(webhook_delivery.c.next_attempt_at)
        )
        with self._engine.connect() as connection:
            candidates = [Delivery(*row) for row in connection.execute(first)]
        for each in candidates:
            if busy.get(each.customer_id, 0) >= most_per_customer:
                continue
            with self._writer.begin() as connection:
                claimed = connection.execute(
                    update(webhook_delivery)
                    .where(
                        webhook_delivery.c.delivery_id == each.delivery_id,
                        pending,
                        webhook_delivery.c.attempts == each.attempts,
                        webhook_delivery.c.next_attempt_at <= now,
                    )
                    .values(attempts=each.attempts + 1, next_attempt_at=now + hold_s)
                )
                if claimed.rowcount:
                    return _delivery(connection, each.delivery_id)
        return None

    def record(self, attempt: Attempt, state: DeliveryState, next_attempt_at: float = 0.0) -> None:
        """What became of a claimed attempt, and so of the delivery."""
        finished_at = None if state == "pending" else self._clock()
        with self._writer.begin() as connection:
            connection.execute(
                insert(webhook_attempt).values({name: getattr(attempt, name) for name in Attempt.__dataclass_fields__})
            )
            connection.execute(
                update(webhook_delivery)
                .where(
                    webhook_delivery.c.delivery_id == attempt.delivery_id,
                    webhook_delivery.c.state == "pending",
                    webhook_delivery.c.attempts == attempt.attempt,
                )
                .values(state=state, next_attempt_at=next_attempt_at, finished_at=finished_at)
            )

    def log(self, request_id: RequestId) -> list[tuple[Delivery, list[Attempt]]]:
        """What was to be delivered of a job, and every attempt, oldest first."""
        deliveries = select(*_DELIVERY).where(webhook_delivery.c.request_id == request_id)
        with self._engine.connect() as connection:
            found = [Delivery(*row) for row in connection.execute(deliveries)]
            return [(each, _attempts(connection, each.delivery_id)) for each in found]

    def secrets(self, customer_id: CustomerId) -> list[SigningSecret]:
        """What this customer's webhooks are signed with now, the newest first; made when first asked for."""
        valid = self._valid(customer_id)
        if not valid:
            with contextlib.suppress(IntegrityError):  # another process made the first one just now
                self._mint(customer_id, first=True)
            valid = self._valid(customer_id)
        return valid

    def rotate(self, customer_id: CustomerId) -> list[SigningSecret]:
        """Make a new secret; the one before it stays valid for `ROTATION_OVERLAP_S`."""
        with contextlib.suppress(IntegrityError):  # another process did so just now, and its secret is as new
            self._mint(customer_id, first=False)
        return self._valid(customer_id)

    def _mint(self, customer_id: CustomerId, first: bool) -> None:
        newest = select(func.max(webhook_secret.c.version)).where(webhook_secret.c.customer_id == customer_id)
        with self._writer.begin() as connection:
            connection.execute(
                insert(webhook_secret).values(
                    customer_id=customer_id,
                    version=1 if first else (connection.execute(newest).scalar_one() or 0) + 1,
                    secret=f"whsec_{base64.b64encode(secrets.token_bytes(SECRET_BYTES)).decode()}",
                    created_at=self._clock(),
                )
            )

    def _valid(self, customer_id: CustomerId) -> list[SigningSecret]:
        newest = (
            select(webhook_secret.c.secret, webhook_secret.c.created_at)
            .where(webhook_secret.c.customer_id == customer_id)
            .order_by(webhook_secret.c.version.desc())
            .limit(2)
        )
        with self._engine.connect() as connection:
            found = [SigningSecret(*row) for row in connection.execute(newest)]
        overlapping = found and found[0].created_at + ROTATION_OVERLAP_S > self._clock()
        return found if overlapping else found[:1]


def _delivery(connection: Connection, delivery_id: str) -> Delivery:
    rows: Any = connection.execute(select(*_DELIVERY).where(webhook_delivery.c.delivery_id == delivery_id))
    return Delivery(*rows.one())


def _attempts(connection: Connection, delivery_id: str) -> list[Attempt]:
    rows = select(*_ATTEMPT).where(webhook_attempt.c.delivery_id == delivery_id).order_by(webhook_attempt.c.attempt)
    return [Attempt(*row) for row in connection.execute(rows)]
