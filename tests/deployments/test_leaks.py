"""Nothing is held for whoever has left, in whatever order clients, replicas and their connections come and go.

All is real but Ray: clients, channels over sockets, the scheduler's actor, jobs and engines. At the end the scheduler's
clock is put forward, to find out silent replicas.
"""

import asyncio
import secrets
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import deployments.model_client
import deployments.scheduler_actor
from billing.money import Mils
from deployments.batching import BatchProfile
from deployments.channel import SECRET_BYTES, Channel, Listener, connect
from deployments.engine import Engine
from deployments.errors import DeadlinePassed, EngineFailed, ModelOverloaded
from deployments.messages import ChunkPiece, ChunkRow, ModelSpec, ReplicaId, TicketId, TicketTerms
from deployments.model_client import ModelClient
from deployments.replica import Replica
from deployments.replica_jobs import ReplicaJobs
from deployments.replies import Replies
from deployments.scheduler import Scheduler, SchedulerLimits
from deployments.scheduler_actor import SchedulerActor
from tests.support.models import StandInModel, StandInRow

HOST = "127.0.0.1"
SPEC = ModelSpec("m", (16, 16), 8, 1, 10, 4, 0.0, Mils(5), piece_frames=1)
ROW = ChunkRow(np.zeros((16, 16, 3), np.uint8), np.zeros((1, 8), np.float32), 0, 0, 0, 2, 0.0, form="jpeg")
CAPACITY = 1
REPLICA_TIMEOUT_S = 5.0
ENOUGH = 10_000
"""Steps, for all that a test asks for."""
PATIENCE_S = 10.0
"""Of the test with whatever should happen at once."""


class GatedModel(StandInModel):
    """A step waits until the test lets it through."""

    def __init__(self) -> None:
        super().__init__(Path(), "cpu")
        self.permits = threading.Semaphore(0)

    def step(self, rows: Sequence[StandInRow]) -> None:
        assert self.permits.acquire(timeout=2 * PATIENCE_S)
        super().step(rows)


class Host:
    """What `Replica` is made of."""

    def __init__(self, name: str, actor: SchedulerActor) -> None:
        self._actor = actor
        self.replica_id = ReplicaId(name)
        self.is_alive = True
        self.model = GatedModel()
        self.engine = Engine(self.model, SPEC.resolution, SPEC.fps, CAPACITY)
        self._loop = asyncio.get_running_loop()
        self.jobs, self.replies = ReplicaJobs(self.engine, self._withdraw), Replies()
        inside: Any = SimpleNamespace(_jobs=self.jobs, _replies=self.replies, _id=self.replica_id)
        self.listener = Listener(
            {
                "run_chunk": lambda job: Replica.run_chunk(inside, job),
                "stream_chunk": lambda job: Replica.stream_chunk(inside, job),
            }
        )

    async def start(self) -> None:
        self._address = await self.listener.start(HOST)
        await self.beat()

    async def beat(self) -> None:
        profile = BatchProfile(0.03, 0.01)
        self.jobs.stop(
            await self._actor.replica_alive(self.replica_id, CAPACITY, profile=profile, address=self._address)
        )

    def _withdraw(self, ticket_id: TicketId) -> None:
        """From any thread, as a call of Ray's actor is."""
        if self.is_alive:
            notice = self._actor.notice([("withdraw", ticket_id)])
            self._loop.call_soon_threadsafe(lambda: asyncio.ensure_future(notice))

    def die(self) -> None:
        """As a process does: a server of asyncio that closes would forget, and leave open, what it was accepting."""
        self.is_alive = False
        self.listener.secret = secrets.token_bytes(SECRET_BYTES)  # whoever connects now is hung up on as well
        hang_up(self.listener, for_good=False)

    def held(self) -> dict[str, Any]:
        return {
            "jobs": self.jobs._running,
            "rows": self.engine.num_rows,
            "jobs waiting": self.engine._waiting,
            "calls of the model": self.engine._calls,
            "replies": self.replies._ready,
            "calls": tasks_of(self.listener),
        }


class Client:
    def __init__(self, address: Any) -> None:
        async def find() -> Any:
            return address

        self.channels = [Channel(find)]
        self.model = ModelClient(SPEC, self.channels[0], self._connect, 30.0, 30.0)
        self.model.start()

    def _connect(self, address: Any) -> Channel:
        self.channels.append(connect(address))
        return self.channels[-1]

    def drop(self, channel: Channel) -> None:
        """The connection breaks, with whatever was on its way."""
        if channel._connection is not None and channel._connection._transport is not None:
            channel._connection._transport.abort()

    def die(self) -> None:
        """Without a word to anybody."""
        for task in self.model._tasks:
            task.cancel()
        for channel in self.channels:
            if channel._connecting is not None:
                channel._connecting.cancel()
            self.drop(channel)

    def held(self) -> dict[str, Any]:
        waiting = [call for channel in self.channels if channel._connection for call in channel._connection._calls]
        return {"calls beside attending": waiting[1:], "notices": self.model._notices.qsize()}


class World:
    """Two clients, two replicas, one scheduler; one that dies has a successor at once."""

    def __init__(self) -> None:
        self.ahead_s = 0.0
        self.actor = SchedulerActor(SchedulerLimits())
        self.scheduler = self.actor._scheduler = Scheduler(
            lambda: time.monotonic() + self.ahead_s, SchedulerLimits(100, replica_timeout_s=REPLICA_TIMEOUT_S)
        )
        methods = (self.actor.place, self.actor.notice, self.actor.attend)
        self.listener = Listener({method.__name__: method for method in methods})
        self.all_clients: list[Client] = []
        self.all_hosts: list[Host] = []
        self.asked: list[tuple[Client, asyncio.Task[Any]]] = []

    async def start(self) -> None:
        self.address = await self.listener.start(HOST)
        self.clients = [self._client(), self._client()]
        self.hosts = [await self._host(), await self._host()]
        while len(tasks_of(self.listener)) < len(self.clients):  # noqa: ASYNC110 - nothing tells of it
            await asyncio.sleep(0)

    def _client(self) -> Client:
        client = Client(self.address)
        self.all_clients.append(client)
        return client

    async def _host(self) -> Host:
        host = Host(f"replica {len(self.all_hosts)}", self.actor)
        self.all_hosts.append(host)
        await host.start()
        return host

    async def ask(self, which: int, num_rows: int, begun: bool, streams: bool, deadline_s: float | None) -> None:
        client = self.clients[which]
        rows = [replace(ROW, candidate=candidate) for candidate in range(num_rows)]
        name, terms = f"ticket {len(self.asked)}", TicketTerms(deadline_s=deadline_s)
        call = client.model.run_chunk(name, rows, begun, terms, on_piece=_tell if streams else None)
        self.asked.append((client, asyncio.create_task(call)))

    async def leave(self, number: int) -> None:
        if self.asked:
            self.asked[number % len(self.asked)][1].cancel()

    async def kill_client(self, which: int) -> None:
        dead = self.clients[which]
        for client, asked in self.asked:
            if client is dead:
                asked.cancel()
        dead.die()
        self.clients[which] = self._client()

    async def kill_replica(self, which: int) -> None:
        self.hosts[which].die()
        self.hosts[which] = await self._host()

    async def drop_connection(self, which: int, number: int) -> None:
        channels = self.clients[which].channels
        self.clients[which].drop(channels[number % len(channels)])

    async def hang_up_on_all(self, which: int) -> None:
        hang_up(self.listener if which == 2 else self.hosts[which].listener, for_good=False)

    async def step(self, which: int, times: int) -> None:
        self.hosts[which].model.permits.release(times)

    async def beat(self) -> None:
        for host in self.hosts:
            await host.beat()

    async def wait(self, milliseconds: int) -> None:
        await asyncio.sleep(milliseconds / 1000)

    async def settle(self) -> None:
        """Everybody may finish, and silent replicas are found out; no grant is old enough to be taken back."""
        for host in self.all_hosts:
            host.model.permits.release(ENOUGH)
        began = time.monotonic()
        while late := [asked for _, asked in self.asked if not asked.done()]:
            assert time.monotonic() < began + PATIENCE_S, (late, self.held())
            await self.beat()
            await asyncio.sleep(0.001)
        self.ahead_s = REPLICA_TIMEOUT_S
        began = time.monotonic()
        while held := {name: each for name, each in self.held().items() if each}:
            assert time.monotonic() < began + PATIENCE_S, held
            await self.beat()
            self.scheduler.expire()
            await asyncio.sleep(0.001)

    def held(self) -> dict[str, Any]:
        scheduler, alive = self.scheduler, {client.model._caller for client in self.clients}
        status = scheduler.status()
        present = {host.replica_id for host in self.hosts}
        return {
            "rows": status.running_rows + status.queued_rows,
            "running": scheduler._running,
            "queued": list(scheduler._queue),
            "cost": round(scheduler._queue.cost + scheduler._backlog_cost + scheduler._cost_ahead, 6),
            "orphans": scheduler._orphans,
            "rows of customers": scheduler._rows_of,
            "replicas": scheduler._replicas.keys() - present,
            "present batches": scheduler._present.left_s(scheduler._clock()),
            "waiting": self.actor._waiting,
            "callers": set(self.actor._attending) - alive,
            "calls beside attending": tasks_of(self.listener)[len(self.clients) :],
            **{f"{host.replica_id}, {name}": each for host in self.hosts for name, each in host.held().items()},
            **{
                f"client {number}, {name}": each
                for number, client in enumerate(self.clients)
                for name, each in client.held().items()
            },
        }

    async def stop(self) -> None:
        for _, asked in self.asked:
            asked.cancel()
        for host in self.all_hosts:
            host.model.permits.release(ENOUGH)
        if self.actor._expiry is not None:
            self.actor._expiry.cancel()
        for _ in range(10):  # a connection may still be being made
            for client in self.all_clients:
                client.die()
            for listener in (self.listener, *(host.listener for host in self.all_hosts)):
                hang_up(listener)
            await asyncio.sleep(0.001)
        for host in self.all_hosts:
            await asyncio.to_thread(host.engine.stop)


def _tell(piece: ChunkPiece) -> None:
    """What a stream's reader makes of its frames is not looked at here."""


def tasks_of(listener: Listener) -> list[Any]:
    return [task for connection in listener.connections for task in connection.tasks.values()]


def hang_up(listener: Listener, for_good: bool = True) -> None:
    if for_good and listener._server is not None:
        listener._server.close()
    for connection in list(listener.connections):
        assert connection._transport is not None
        connection._transport.abort()


ONE_OF_TWO = st.integers(0, 1)
ASK = st.tuples(
    st.just(World.ask),
    ONE_OF_TWO,
    st.integers(1, 3),
    st.booleans(),
    st.booleans(),
    st.sampled_from([None, None, 0.003]),
)
LEAVE = st.tuples(st.just(World.leave), st.integers(0, 20))
WAIT = st.tuples(st.just(World.wait), st.integers(0, 3))
KINDS = (
    *[ASK] * 6,
    *[LEAVE, WAIT] * 3,
    st.tuples(st.just(World.kill_client), ONE_OF_TWO),
    st.tuples(st.just(World.kill_replica), ONE_OF_TWO),
    st.tuples(st.just(World.drop_connection), ONE_OF_TWO, st.integers(0, 5)),
    st.tuples(st.just(World.hang_up_on_all), st.integers(0, 2)),
    st.tuples(st.just(World.step), ONE_OF_TWO, st.integers(1, 3)),
    st.tuples(st.just(World.beat)),
)
EVENTS = st.integers(0, len(KINDS) - 1).flatmap(lambda index: KINDS[index])
"""By how often each should happen, which `one_of` does not take."""


async def play(events: Iterable[Any]) -> None:
    world, unseen = World(), list[Any]()
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unseen.append(context))
    await world.start()
    try:
        for happens, *details in events:
            await happens(world, *details)
        await world.settle()
        for _, asked in world.asked:
            failed = None if asked.cancelled() else asked.exception()
            assert failed is None or isinstance(failed, DeadlinePassed | EngineFailed | ModelOverloaded), failed
        assert not unseen
    finally:
        await world.stop()


@given(st.lists(EVENTS, min_size=20, max_size=40))
@settings(max_examples=25)
def test_nothing_is_held_once_all_have_come_and_gone(events: list[Any]) -> None:
    with (
        patch.object(deployments.scheduler_actor, "RECONNECT_S", 0.005),
        patch.object(deployments.model_client, "SCHEDULER_RETRY_S", 0.001),
    ):
        asyncio.run(play(events))
