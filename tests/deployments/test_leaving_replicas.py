"""Between an ingress and its scheduler and replica, over real connections: whoever leaves or breaks at whatever moment,
no room stays taken and no row runs on."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal, get_args

import numpy as np
import pytest
import pytest_asyncio

import deployments.model_client
from deployments.channel import Address, Channel, Listener, connect
from deployments.engine import Engine
from deployments.messages import ChunkRow, ReplicaId
from deployments.model_client import ModelClient
from deployments.replica import Replica
from deployments.replica_jobs import ReplicaJobs
from deployments.replies import Replies
from deployments.scheduler import SchedulerLimits
from deployments.scheduler_actor import SchedulerActor
from serve_app.catalog import CATALOG, model_spec
from tests.support.cuts import Moment, interrupted, left_at
from tests.support.models import StandInModel

pytestmark = pytest.mark.asyncio(loop_scope="module")

SPEC = model_spec(CATALOG["tiny-pusher"])
ROWS = [
    ChunkRow(np.zeros((64, 64, 3), np.uint8), np.zeros((12, 8), np.float32), 0, candidate, 0, 1, 0.0)
    for candidate in range(2)
]


@dataclass
class Cluster:
    scheduler: SchedulerActor
    engine: Engine
    jobs: ReplicaJobs
    listeners: tuple[Listener, ...]
    client: ModelClient
    chunks: "itertools.count[int]"

    def run_chunk(self) -> Any:
        return self.client.run_chunk(f"work{next(self.chunks)}/0", ROWS, begun=False)

    async def quiet(self) -> None:
        """Fails if room stays taken, a row runs on, or something waits to be told."""
        async with asyncio.timeout(10):
            while True:
                status = await self.scheduler.status()
                held = status.queued_rows, status.running_rows, self.engine.num_rows, len(self.jobs._running)
                if not any(held) and self.client._notices.empty():
                    return
                await asyncio.sleep(0.001)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def cluster() -> AsyncIterator[Cluster]:
    scheduler = SchedulerActor(SchedulerLimits(max_queued_rows=64))
    methods = (scheduler.place, scheduler.notice, scheduler.attend)
    at_scheduler = Listener({method.__name__: method for method in methods})
    address = await at_scheduler.start("127.0.0.1")

    engine = Engine(StandInModel(Path(), "cpu"), SPEC.resolution, SPEC.fps, max_rows=4)
    loop = asyncio.get_running_loop()
    jobs = ReplicaJobs(
        engine,
        lambda ticket: asyncio.run_coroutine_threadsafe(scheduler.notice([("withdraw", ticket)]), loop),
    )
    replica: Any = SimpleNamespace(_replies=Replies(), _jobs=jobs, _id=ReplicaId("r"))  # one that Serve has not made
    at_replica = Listener({"run_chunk": lambda job: Replica.run_chunk(replica, job)})
    replica_address = await at_replica.start("127.0.0.1")

    async def announce() -> None:
        while True:
            jobs.stop(await scheduler.replica_alive(ReplicaId("r"), 4, address=replica_address))
            await asyncio.sleep(0.01)

    async def find() -> Address:
        return address

    announcing = loop.create_task(announce())
    client = ModelClient(SPEC, Channel(find), connect, queue_timeout_s=10, chunk_timeout_s=10)
    client.start()
    yield Cluster(scheduler, engine, jobs, (at_scheduler, at_replica), client, itertools.count())
    await client.stop()
    announcing.cancel()
    if scheduler._expiry is not None:
        scheduler._expiry.cancel()
    for listener in (at_scheduler, at_replica):
        for connection in list(listener.connections):
            connection.abort("the test ends")
        await listener.stop()
    engine.stop()


@pytest.mark.parametrize("moment", get_args(Moment))
async def test_a_client_that_leaves_at_any_wait_holds_no_room(cluster: Cluster, moment: Moment) -> None:
    at_wait = 1
    while await left_at(cluster.run_chunk(), at_wait, moment):
        await cluster.quiet()
        at_wait += 1
    assert at_wait > 2, "for room, and for the chunk"
    await cluster.quiet()


@pytest.mark.parametrize("moment", get_args(Moment))
@pytest.mark.parametrize("end", [0, 1], ids=["scheduler", "replica"])
async def test_a_connection_that_breaks_at_any_wait_costs_nothing_but_time(
    cluster: Cluster, end: Literal[0, 1], moment: Moment, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The chunk runs all the same, on its connection or on another."""
    monkeypatch.setattr(deployments.model_client, "SCHEDULER_RETRY_S", 0.001)

    def hang_up() -> None:
        for connection in list(cluster.listeners[end].connections):
            connection.abort("the test cuts it")

    for at_wait in itertools.count(1):
        try:
            report, _ = await interrupted(cluster.run_chunk(), at_wait, moment, hang_up)
        except LookupError:
            break
        assert len(report.outcomes) == len(ROWS)
        await cluster.quiet()
    assert at_wait > 2, "for room, and for the chunk"
    await cluster.quiet()
