"""Async rollouts as a customer uses them, and a model whose chunks a test lets through one at a time."""

import asyncio
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from tests.support.app import SLUG, App
from tests.support.models import StandInModel, StandInRow
from tests.support.payloads import actions, npy, png

PRICE = 245
"""Of 48 actions, in mils."""


class PacedModel(StandInModel):
    """Each step waits until the test lets one more through."""

    def __init__(self) -> None:
        super().__init__(Path(), "cpu")
        self.entered = threading.Semaphore(0)
        self._allowed = threading.Semaphore(0)
        self.steps = 0

    def step(self, rows: Sequence[StandInRow]) -> None:
        self.entered.release()
        assert self._allowed.acquire(timeout=10)
        self.steps += 1
        super().step(rows)

    def allow(self, steps: int = 1_000) -> None:
        self._allowed.release(steps)


async def queue(app: App, headers: dict[str, str], values: Any = None, seed: int = 0, **options: Any) -> httpx.Response:
    """`POST /v1/rollouts` with mode=async; `options` are further params, and `key` the idempotency key."""
    key = {"Idempotency-Key": options.pop("key")} if "key" in options else {}
    params = {"model": SLUG, "seed": seed, "mode": "async", "num_steps": 1, "guidance": 0.0} | options
    files = {"start_frame": png(), "actions": npy(actions() if values is None else values)}
    return await app.http.post("/v1/rollouts", headers=headers | key, files=files, data={"params": json.dumps(params)})


async def get(app: App, headers: dict[str, str], rollout_id: str) -> dict[str, Any]:
    answer = await app.http.get(f"/v1/rollouts/{rollout_id}", headers=headers)
    assert answer.status_code == 200, answer.text
    envelope: dict[str, Any] = answer.json()
    return envelope


async def reaches(app: App, headers: dict[str, str], rollout_id: str, *states: str) -> dict[str, Any]:
    """The rollout's envelope once it is in one of these states; fails if that does not happen in time."""
    async with asyncio.timeout(20):
        while True:
            envelope = await get(app, headers, rollout_id)
            if envelope["status"] in states:
                return envelope
            await asyncio.sleep(0.01)


async def ended(app: App, headers: dict[str, str], rollout_id: str) -> dict[str, Any]:
    return await reaches(app, headers, rollout_id, "succeeded", "failed", "canceled")
