"""The rows of queued rollouts, which ingress processes write side by side.

Every change is a compare-and-set on the state, so a job has one owner at a time and ends once, and the webhook that
tells of its end is written in the same commit. Knows no models, and of money only what a reservation said.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, fields
from typing import Any, Literal

from sqlalchemy import Connection, Engine, Row, and_, delete, func, insert, or_, select, update

from billing.commands import CustomerId, KeyId, RequestId
from billing.database import writer
from billing.job_tables import rollout_job, webhook_attempt, webhook_delivery
from billing.money import Mils
from billing.tables import reservation

JobState = Literal["queued", "running", "succeeded", "failed", "canceled"]
MAX_FORGOTTEN_PER_SWEEP = 500
NOTHING = Mils(0)


@dataclass(frozen=True, slots=True)
class Job:
    """One row. `owner` is empty unless it runs; `captured` and `delivered` are 0 until it has ended."""

    request_id: RequestId
    customer_id: CustomerId
    key_id: KeyId
    model: str
    seed: int
    num_steps: int
    guidance: float
    frames: int
    """What was reserved; `delivered` of them are in its video."""
    amount: Mils
    payload_sha256: str
    start_frame_resized: bool
    score: bool
    base_url: str
    webhook_url: str
    created_at: float
    state: JobState = "queued"
    owner: str = ""
    owned_until: float = 0.0
    attempts: int = 0
    not_before: float = 0.0
    delivered: int = 0
    captured: Mils = NOTHING
    infer_ms: float = 0.0
    psnr_db: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    error_code: str = ""
    error: str = ""
    cancel_requested_at: float | None = None
    started_at: float | None = None
    finished_at: float | None = None


@dataclass(frozen=True, slots=True)
class Ending:
    """How a job ended, and what it delivered and cost."""

    state: Literal["succeeded", "failed", "canceled"]
    delivered: int = 0
    captured: Mils = NOTHING
    infer_ms: float = 0.0
    psnr_db: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    error_code: str = ""
    error: str = ""


@dataclass(frozen=True, slots=True)
class Held:
    """A job that this owner holds, as the database sees it."""

    request_id: RequestId
    cancel_requested: bool


@dataclass(frozen=True, slots=True)
class OpenReservation:
    """Money that is held for a job."""

    request_id: RequestId
    state: JobState
    lease_until: float


@dataclass(frozen=True, slots=True)
class Filters:
    """Which of a customer's jobs are listed."""

    state: JobState | None = None
    model: str | None = None
    created_from: float | None = None
    created_until: float | None = None


_COLUMNS = tuple(rollout_job.c[field.name] for field in fields(Job))
_FLAGS = ("start_frame_resized", "score")
_LIVE = rollout_job.c.finished_at.is_(None)


class JobStore:
    """Safe to share between threads. Every method raises one of `DATABASE_FAILURES` when the database fails."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.time) -> None:
        self._engine = engine
        self._writer = writer(engine)
        self._clock = clock

    def add(self, job: Job) -> None:
        with self._writer.begin() as connection:
            values = {field.name: getattr(job, field.name) for field in fields(Job)}
            values |= {name: int(values[name]) for name in _FLAGS}
            connection.execute(insert(rollout_job).values(values))

    def get(self, request_id: RequestId) -> Job | None:
        with self._engine.connect() as connection:
            return _get(connection, request_id)

    def live(self, customer_id: CustomerId) -> tuple[int, int]:
        """How many jobs have not ended: this customer's, and all."""
        counts = select(rollout_job.c.customer_id, func.count()).where(_LIVE).group_by(rollout_job.c.customer_id)
        with self._engine.connect() as connection:
            live = {row[0]: int(row[1]) for row in connection.execute(counts)}
        return live.get(customer_id, 0), sum(live.values())

    def ended_since(self, when: float) -> int:
        counted = select(func.count()).where(rollout_job.c.finished_at >= when)
        with self._engine.connect() as connection:
            return int(connection.execute(counted).scalar_one())

    def claim(self, owner: str, lease_s: float) -> Job | None:
        """Become the owner of the job whose turn it is; None if there is none.

        First those whose owner has gone. Then the oldest job of the customer that has the fewest running, so that
        thousands from one customer do not keep another's single one waiting.
        """
        now = self._clock()
        with self._engine.connect() as connection:
            candidates = _turns(connection, now)
        for request_id in candidates:
            with self._writer.begin() as connection:
                claimed = connection.execute(
                    update(rollout_job)
                    .where(rollout_job.c.request_id == request_id, _claimable(now))
                    .values(
                        state="running",
                        owner=owner,
                        owned_until=now + lease_s,
                        attempts=rollout_job.c.attempts + 1,
                        started_at=func.coalesce(rollout_job.c.started_at, now),
                    )
                )
                if claimed.rowcount:
                    return _get(connection, request_id)
        return None

    def renew(self, owner: str, request_ids: Collection[RequestId], lease_s: float) -> list[Held]:
        """Hold on to these; what is not in the answer is no longer this owner's."""
        with self._writer.begin() as connection:
            connection.execute(
                update(rollout_job)
                .where(
                    rollout_job.c.request_id.in_(request_ids),
                    rollout_job.c.state == "running",
                    rollout_job.c.owner == owner,
                )
                .values(owned_until=self._clock() + lease_s)
            )
        return self.held(owner)

    def held(self, owner: str) -> list[Held]:
        mine = select(rollout_job.c.request_id, rollout_job.c.cancel_requested_at).where(
            _LIVE, rollout_job.c.state == "running", rollout_job.c.owner == owner
        )
        with self._engine.connect() as connection:
            return [Held(row.request_id, row.cancel_requested_at is not None) for row in connection.execute(mine)]

    def release(self, request_id: RequestId, owner: str, not_before: float) -> bool:
        """Put a job that this owner holds back into the queue, as if it had not been begun."""
        with self._writer.begin() as connection:
            released = connection.execute(
                update(rollout_job)
                .where(_held_by(request_id, owner))
                .values(
                    state="queued",
                    owner="",
                    owned_until=0.0,
                    not_before=not_before,
                    attempts=rollout_job.c.attempts - 1,
                )
            )
        return bool(released.rowcount)

    def finish(self, request_id: RequestId, owner: str, ending: Ending) -> bool:
        """End a job that this owner holds; False if it is no longer this owner's."""
        with self._writer.begin() as connection:
            return self._end(connection, _held_by(request_id, owner), request_id, ending)

    def cancel(self, request_id: RequestId) -> Job | None:
        """End it if it is queued; ask its owner to end it if it runs; else leave it. Returns what it is then."""
        with self._writer.begin() as connection:
            queued = and_(rollout_job.c.request_id == request_id, rollout_job.c.state == "queued")
            if not self._end(connection, queued, request_id, Ending("canceled")):
                connection.execute(
                    update(rollout_job)
                    .where(
                        rollout_job.c.request_id == request_id,
                        rollout_job.c.state == "running",
                        rollout_job.c.cancel_requested_at.is_(None),
                    )
                    .values(cancel_requested_at=self._clock())
                )
            return _get(connection, request_id)

    def page(
        self,
        customer_id: CustomerId,
        filters: Filters,
        at_most: int,
        older_than: RequestId | None = None,
        newer_than: RequestId | None = None,
    ) -> list[Job]:
        """A customer's jobs, newest first: the newest, or those next to one that is named, on either side of it."""
        wanted = select(*_COLUMNS).where(rollout_job.c.customer_id == customer_id)
        if filters.state is not None:
            wanted = wanted.where(rollout_job.c.state == filters.state)
        if filters.model is not None:
            wanted = wanted.where(rollout_job.c.model == filters.model)
        if filters.created_from is not None:
            wanted = wanted.where(rollout_job.c.created_at >= filters.created_from)
        if filters.created_until is not None:
            wanted = wanted.where(rollout_job.c.created_at < filters.created_until)
        if older_than is not None:
            wanted = wanted.where(rollout_job.c.request_id < older_than)
        order = rollout_job.c.request_id.desc()
        if newer_than is not None:
            wanted, order = wanted.where(rollout_job.c.request_id > newer_than), rollout_job.c.request_id.asc()
        with self._engine.connect() as connection:
            found = [_job(row) for row in connection.execute(wanted.order_by(order).limit(at_most))]
        return found[::-1] if newer_than is not None else found

    def open_reservations(self) -> list[OpenReservation]:
        """Of jobs in any state: whoever has ended and still holds money was not settled."""
        held = (
            select(reservation.c.request_id, rollout_job.c.state, reservation.c.lease_until)
            .join_from(reservation, rollout_job, rollout_job.c.request_id == reservation.c.request_id)
            .where(reservation.c.state == "open")
        )
        with self._engine.connect() as connection:
            return [OpenReservation(*row) for row in connection.execute(held)]

    def forget(self, ended_before: float) -> int:
        """Delete jobs that ended long ago, with their delivery logs; returns how many, a bounded number at a time."""
        old = (
            select(rollout_job.c.request_id)
            .where(rollout_job.c.finished_at < ended_before)
            .limit(MAX_FORGOTTEN_PER_SWEEP)
        )
        with self._engine.connect() as connection:
            forgotten = list(connection.execute(old).scalars())
        if not forgotten:
            return 0
        deliveries = select(webhook_delivery.c.delivery_id).where(webhook_delivery.c.request_id.in_(forgotten))
        with self._writer.begin() as connection:
            connection.execute(delete(webhook_attempt).where(webhook_attempt.c.delivery_id.in_(deliveries)))
            connection.execute(delete(webhook_delivery).where(webhook_delivery.c.request_id.in_(forgotten)))
            connection.execute(delete(rollout_job).where(rollout_job.c.request_id.in_(forgotten)))
        return len(forgotten)

    def _end(self, connection: Connection, condition: Any, request_id: RequestId, ending: Ending) -> bool:
        now = self._clock()
        values = {field.name: getattr(ending, field.name) for field in fields(Ending)}
        ended = connection.execute(
            update(rollout_job).where(condition).values(**values, owner="", owned_until=0.0, finished_at=now)
        )
        if not ended.rowcount:
            return False
        told = select(rollout_job.c.customer_id, rollout_job.c.webhook_url).where(
            rollout_job.c.request_id == request_id, rollout_job.c.webhook_url != ""
        )
        for customer_id, url in connection.execute(told).all():
            connection.execute(
                insert(webhook_delivery).values(
                    delivery_id=f"msg_{request_id.removeprefix('req_')}",
                    request_id=request_id,
                    customer_id=customer_id,
                    url=url,
                    state="pending",
                    attempts=0,
                    next_attempt_at=now,
                    created_at=now,
                )
            )
        return True


def _held_by(request_id: RequestId, owner: str) -> Any:
    return and_(rollout_job.c.request_id == request_id, rollout_job.c.state == "running", rollout_job.c.owner == owner)


def _claimable(now: float) -> Any:
    queued = and_(rollout_job.c.state == "queued", rollout_job.c.not_before <= now)
    return and_(_LIVE, or_(queued, and_(rollout_job.c.state == "running", rollout_job.c.owned_until <= now)))


def _turns(connection: Connection, now: float) -> Collection[RequestId]:
    """Jobs that can be claimed, in the order in which it is their turn; of a customer's queued ones the oldest."""
    running: dict[str, int] = {}
    abandoned: list[RequestId] = []
    rows = select(rollout_job.c.request_id, rollout_job.c.customer_id, rollout_job.c.owned_until).where(
        _LIVE, rollout_job.c.state == "running"
    )
    for request_id, customer_id, owned_until in connection.execute(rows):
        if owned_until <= now:
            abandoned.append(request_id)
        else:
            running[customer_id] = running.get(customer_id, 0) + 1
    oldest = connection.execute(
        select(rollout_job.c.customer_id, func.min(rollout_job.c.request_id))
        .where(_LIVE, rollout_job.c.state == "queued", rollout_job.c.not_before <= now)
        .group_by(rollout_job.c.customer_id)
    )
    turns = sorted((running.get(customer_id, 0), request_id) for customer_id, request_id in oldest)
    return [*sorted(abandoned), *(request_id for _, request_id in turns)]


def _get(connection: Connection, request_id: RequestId) -> Job | None:
    row = connection.execute(select(*_COLUMNS).where(rollout_job.c.request_id == request_id)).first()
    return None if row is None else _job(row)


def _job(row: Row[Any]) -> Job:
    values = row._asdict()
    return Job(**values | {name: bool(values[name]) for name in _FLAGS})
