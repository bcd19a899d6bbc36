"""No loop that a process lives by ends with the first thing that nobody expected."""

import asyncio
import contextlib
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy.exc import TimeoutError as NoConnectionFree

import deployments.background
import deployments.reservations
import deployments.rollout_jobs
import deployments.scheduler_actor
import deployments.status_client
import deployments.webhooks
from billing.commands import ExpireLeases, Heartbeat, RequestId
from deployments.background import keep_running
from deployments.engine import Engine
from deployments.errors import LedgerUnavailable
from deployments.job_store import JobStore
from deployments.ledger_client import LedgerClient
from deployments.messages import ReplicaId
from deployments.replica import Replica
from deployments.rollout_jobs import RolloutJobs
from deployments.scheduler import Scheduler, SchedulerLimits
from deployments.scheduler_actor import SchedulerActor
from deployments.status_client import StatusClient
from deployments.webhook_store import WebhookStore
from tests.support.app import running_app
from tests.support.jobs import PacedModel, queue
from tests.support.models import StandInModel


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for module, names in (
        (deployments.background, ("RESTART_S",)),
        (deployments.reservations, ("HEARTBEAT_EVERY_S",)),
        (deployments.rollout_jobs, ("RENEW_EVERY_S", "POLL_S", "KEEP_EVERY_S")),
        (deployments.scheduler_actor, ("EXPIRE_EVERY_S",)),
        (deployments.status_client, ("SEND_EVERY_S",)),
        (deployments.webhooks, ("POLL_S",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, 0.01)


async def test_what_breaks_is_begun_again_until_it_returns() -> None:
    begun = 0

    async def loop() -> None:
        nonlocal begun
        begun += 1
        if begun < 3:
            raise RuntimeError

    await keep_running(loop)
    assert begun == 3


async def test_what_is_canceled_is_not_begun_again() -> None:
    begun = 0

    async def loop() -> None:
        nonlocal begun
        begun += 1
        await asyncio.Event().wait()

    task = keep_running(loop)
    await asyncio.sleep(0)
    task.cancel()
    assert (await asyncio.gather(task, return_exceptions=True))[0].__class__ is asyncio.CancelledError
    assert begun == 1


async def test_the_loops_of_an_ingress_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: Counter[str] = Counter()

    def breaks_once(owner: type, name: str, when: Callable[..., bool] = lambda *_: True) -> None:
        real = getattr(owner, name)

        @functools.wraps(real)
        def broken(*arguments: Any) -> Any:
            if when(*arguments):
                calls[real.__qualname__] += 1
                if calls[real.__qualname__] == 1:
                    raise RuntimeError("as nobody expected")
            return real(*arguments)

        calls[real.__qualname__] = 0
        monkeypatch.setattr(owner, name, broken)

    breaks_once(JobStore, "claim")
    breaks_once(JobStore, "renew")
    breaks_once(RolloutJobs, "_keep_reservations")
    breaks_once(WebhookStore, "claim")
    breaks_once(StatusClient, "_send")
    breaks_once(LedgerClient, "apply", lambda _, command: isinstance(command, Heartbeat | ExpireLeases))
    model = PacedModel()
    async with running_app(tmp_path, model) as app:
        headers, _ = app.key()
        assert (await queue(app, headers)).status_code == 202
        async with asyncio.timeout(10):
            while any(number < 2 for number in calls.values()):  # noqa: ASYNC110 - of loops in this process
                await asyncio.sleep(0.01)
        model.allow()


async def test_a_settlement_that_breaks_leaves_no_lease_that_is_renewed(tmp_path: Path) -> None:
    async def broken() -> None:
        raise RuntimeError("as nobody expected")

    async with running_app(tmp_path) as app:
        reservations = app.services.ingress._reservations
        reservations._open.add(RequestId("req_1"))
        with pytest.raises(RuntimeError):
            await reservations.settle_later(RequestId("req_1"), 0, "", first=broken)
        assert reservations._open == set()


async def test_a_schedulers_expiry_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    expired = asyncio.Event()

    def broken(_: Scheduler) -> list[Any]:
        monkeypatch.setattr(Scheduler, "expire", lambda _: expired.set() or [])
        raise RuntimeError("as nobody expected")

    monkeypatch.setattr(Scheduler, "expire", broken)
    scheduler = SchedulerActor(SchedulerLimits(max_queued_rows=4))
    await scheduler.replica_alive(ReplicaId("r"), 1)
    async with asyncio.timeout(10):
        await expired.wait()
    assert scheduler._expiry is not None
    scheduler._expiry.cancel()


async def test_a_database_that_is_too_slow_for_its_pool_counts_as_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running_app(tmp_path) as app:
        headers, _ = app.key()
        pool = app.ledger.database.pool
        monkeypatch.setattr(pool, "_max_overflow", 0)
        monkeypatch.setattr(pool, "_timeout", 0.2)
        with contextlib.ExitStack() as held:
            with contextlib.suppress(NoConnectionFree):
                while True:
                    held.enter_context(app.ledger.database.connect())
            answer = await app.http.get("/v1/billing/balance", headers=headers)
            with pytest.raises(LedgerUnavailable):
                await app.services.ingress._reservations.record(RequestId("req_1"))
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "OVERLOADED")


async def test_a_replica_that_does_not_announce_itself_any_more_is_unhealthy() -> None:
    """Serve then replaces it: without its scheduler it would stand idle for ever."""
    engine = Engine(StandInModel(Path(), "cpu"), (64, 64), 10, max_rows=1)
    announcing = asyncio.get_running_loop().create_task(asyncio.sleep(0))
    replica: Any = SimpleNamespace(_engine=engine, _announcing=announcing)  # one that Serve has not made
    try:
        Replica.check_health(replica)
        await announcing
        with pytest.raises(RuntimeError, match="scheduler"):
            Replica.check_health(replica)
    finally:
        engine.stop()
