"""Which interactive sessions there are, whoever holds their socket: one actor per cluster, all state in memory.

It holds no money: a session's budget is a reservation, whose lease its ingress renews. If this actor restarts, sessions
that stream register themselves again; those that nobody had connected to are unknown, and refunded with their lease.
"""

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from billing.commands import CustomerId, KeyId, RequestId
from billing.money import Mils, part_of_rate
from deployments.logs import configure_logs
from deployments.messages import Frame

SILENT_S = 45.0
"""An owner that has not been heard of for this long is gone, and so is the lease of what it streamed."""
UNCLAIMED_S = 120.0
"""So is whoever waits for somebody to connect, which it does for a shorter time than this."""

Refusal = Literal["unknown", "connected", "too many"]
Closed = Literal["unknown", "unclaimed", "ended", "ending"]


@dataclass(frozen=True, slots=True)
class SessionRecord:
    """A session as it was created."""

    request_id: RequestId
    """Of its reservation, and the source of its public id."""
    customer_id: CustomerId
    key_id: KeyId
    model: str
    start_frame: Frame
    seed: int
    num_steps: int
    guidance: float
    budget_frames: int
    mils_per_frame: Mils
    per_frames: int
    """The rate is `mils_per_frame` for so many frames."""
    created_at: float
    frames_covered: int = 0
    """That provisioned units pay for, known once it is reserved: the first ones to be streamed."""

    def cost(self, frames: int) -> Mils:
        return part_of_rate(max(0, frames - self.frames_covered), self.mils_per_frame, self.per_frames)


@dataclass(slots=True)
class _Live:
    record: SessionRecord
    seen_at: float
    owner: str = ""
    """Names the ingress replica that holds its socket; empty before anybody connected."""
    closing: asyncio.Event = field(default_factory=asyncio.Event)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    claimed: asyncio.Event = field(default_factory=asyncio.Event)

    def is_gone(self, now: float) -> bool:
        return now - self.seen_at > (SILENT_S if self.owner else UNCLAIMED_S)


class SessionDirectory:
    """Refusals are values. A session leaves it when it has been settled."""

    def __init__(self, max_per_customer: int, max_sessions: int, clock: Callable[[], float] = time.monotonic) -> None:
        configure_logs()
        self._clock = clock
        self._max_per_customer = max_per_customer
        self._max_sessions = max_sessions
        self._live: dict[RequestId, _Live] = {}

    async def create(self, record: SessionRecord) -> Refusal | None:
        now = self._clock()
        for request_id in [each for each, live in self._live.items() if live.is_gone(now)]:
            await self.ended(request_id)
        customers = Counter(live.record.customer_id for live in self._live.values())
        if customers[record.customer_id] >= self._max_per_customer or len(self._live) >= self._max_sessions:
            return "too many"
        self._live[record.request_id] = _Live(record, self._clock())
        return None

    async def claim(self, request_id: RequestId, customer_id: CustomerId, owner: str) -> SessionRecord | Refusal:
        """Connect `owner` to the customer's session, once."""
        live = self._live.get(request_id)
        if live is None or live.record.customer_id != customer_id or live.closing.is_set():
            return "unknown"
        if live.owner:
            return "connected"
        live.owner, live.seen_at = owner, self._clock()
        live.claimed.set()
        return live.record

    async def register(self, record: SessionRecord, owner: str) -> None:
        """Take in again what this actor knew before it restarted."""
        live = self._live.setdefault(record.request_id, _Live(record, self._clock()))
        live.owner = owner
        live.claimed.set()

    async def wait_claimed(self, request_id: RequestId, timeout_s: float) -> str:
        """Who connected to it; empty, and nobody can any more, if nobody did in time."""
        live = self._live.get(request_id)
        if live is None:
            return ""
        try:
            async with asyncio.timeout(timeout_s):
                await live.claimed.wait()
        except TimeoutError:
            live.closing.set()
        return live.owner

    async def wait_closing(self, request_id: RequestId, timeout_s: float) -> Literal["open", "closing", "unknown"]:
        """Whether the session shall end; its owner asks again and again, which is how it is known to be there."""
        live = self._live.get(request_id)
        if live is None:
            return "unknown"
        live.seen_at = self._clock()
        try:
            async with asyncio.timeout(timeout_s):
                await live.closing.wait()
        except TimeoutError:
            return "open"
        return "closing"

    async def close(self, request_id: RequestId, timeout_s: float) -> Closed:
        """Ask its owner to end it and wait for that; what nobody has connected to is the caller's to settle."""
        live = self._live.get(request_id)
        if live is None:
            return "unknown"
        live.closing.set()
        live.claimed.set()
        if not live.owner:
            return "unclaimed"
        try:
            async with asyncio.timeout(timeout_s):
                await live.ended.wait()
        except TimeoutError:
            return "ending"
        return "ended"

    async def find(self, request_id: RequestId) -> tuple[SessionRecord, bool] | None:
        """The session, and whether somebody is connected."""
        live = self._live.get(request_id)
        return None if live is None else (live.record, bool(live.owner))

    async def ended(self, request_id: RequestId) -> None:
        live = self._live.pop(request_id, None)
        if live is not None:
            live.claimed.set()
            live.closing.set()
            live.ended.set()
