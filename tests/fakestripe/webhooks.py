"""Stripe's deliveries: signed, at least once, in no promised order, retried for days."""

import asyncio
import hashlib
import hmac
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import httpx

from tests.fakestripe.faults import Faults

RETRY_AFTER_S = (5.0, 60.0, 300.0, 3_600.0, 4 * 3_600.0, 12 * 3_600.0, 24 * 3_600.0, 24 * 3_600.0)
REORDER_BY_S = 90.0
STALE_BY_S = 3_600
OLD_VERSION = "2019-12-03"


@dataclass
class Delivery:
    event: dict[str, Any]
    due_at: float
    attempts: int = 0


def sign(body: bytes, secrets: list[str], timestamp: int) -> str:
    """Written from the documentation, not with the library's helper, so that one bug cannot hide another."""
    macs = [
        hmac.new(secret.encode(), f"{timestamp}.".encode() + body, hashlib.sha256).hexdigest() for secret in secrets
    ]
    return ",".join([f"t={timestamp}", *(f"v1={mac}" for mac in macs)])


class Webhooks:
    """Delivers to one endpoint. `secrets` are several while one is being rolled."""

    def __init__(self, clock: Callable[[], float], faults: Faults, url: str, secrets: list[str]) -> None:
        self.clock = clock
        self.faults = faults
        self.url = url
        self.secrets = secrets
        self.client = httpx.AsyncClient(timeout=20.0)
        self.waiting: list[Delivery] = []
        self.failed: set[str] = set()
        """Ids of events that have not been delivered."""

    def enqueue(self, event: dict[str, Any]) -> None:
        self.failed.add(event["id"])
        if not self.url:
            return
        now = self.clock()
        match self.faults.of_webhook():
            case "drop":
                return
            case "duplicate":
                self.waiting += [Delivery(event, now), Delivery(event, now)]
            case "reorder":
                self.waiting.append(Delivery(event, now + REORDER_BY_S))
            case fault:
                self.waiting.append(Delivery(event | {"_fault": fault}, now))

    async def deliver_due(self) -> int:
        """Send what is due, all at once; returns how many were sent."""
        now = self.clock()
        due = [each for each in self.waiting if each.due_at <= now]
        self.waiting = [each for each in self.waiting if each.due_at > now]
        await asyncio.gather(*(self._deliver(each) for each in due))
        return len(due)

    async def _deliver(self, delivery: Delivery) -> None:
        event = dict(delivery.event)
        fault = event.pop("_fault", None)
        secrets = self.secrets
        timestamp = int(self.clock())
        if fault == "stale":
            timestamp -= STALE_BY_S
        if fault == "two_signatures":
            secrets = ["whsec_rolled_out", *secrets]
        if fault == "forged":
            secrets = ["whsec_somebody_else"]
        if fault == "old_version":
            event["api_version"] = OLD_VERSION
        body = json.dumps(event).encode()
        headers = {
            "Stripe-Signature": sign(body, secrets, timestamp),
            "Content-Type": "application/json; charset=utf-8",
        }
        try:
            accepted = (await self.client.post(self.url, content=body, headers=headers)).is_success
        except httpx.HTTPError:
            accepted = False
        if accepted:
            self.failed.discard(event["id"])
        elif delivery.attempts < len(RETRY_AFTER_S):
            wait_s = RETRY_AFTER_S[delivery.attempts]
            self.waiting.append(Delivery(event, self.clock() + wait_s, delivery.attempts + 1))
