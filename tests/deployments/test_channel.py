import asyncio
import dataclasses
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import uvloop

import deployments.channel
from deployments.channel import Address, CallFailed, Channel, ChannelLost, Listener

HOST = "127.0.0.1"


class Other:
    """What listens: `wait` until a test lets it go on."""

    def __init__(self) -> None:
        self.listener = Listener(
            {"echo": self.echo, "wait": self.wait, "fail": self.fail, "odd": self.odd, "count": self.count}
        )
        self.go_on = asyncio.Event()
        self.waiting = 0
        self.cancelled = 0
        self.counted = False

    async def echo(self, *values: Any) -> Any:
        return values

    async def wait(self) -> str:
        self.waiting += 1
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        finally:
            self.waiting -= 1
        return "done"

    async def fail(self) -> None:
        raise ValueError("secret")

    async def count(self, end: int) -> AsyncIterator[int]:
        try:
            for number in range(end):
                if number == 3:
                    await self.wait()
                yield number
        finally:
            self.counted = True

    async def odd(self) -> Any:
        return lambda: None  # cannot be pickled


@pytest.fixture
def other() -> Other:
    return Other()


@pytest.fixture
async def address(other: Other) -> AsyncIterator[Address]:
    yield await other.listener.start(HOST)
    other.go_on.set()
    await other.listener.stop()


@pytest.fixture
async def channel(address: Address) -> AsyncIterator[Channel]:
    async def find() -> Address:
        return address

    calling = Channel(find)
    yield calling
    calling.close()


async def until(condition: Any) -> None:
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not happen")


async def test_what_is_sent_arrives_whole_whatever_its_size(channel: Channel) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 480, 640, 3), np.uint8)
    (echoed, name), small = await asyncio.gather(channel.call("echo", frames, "f"), channel.call("echo"))
    assert np.array_equal(echoed, frames)
    assert (name, small) == ("f", ())


async def test_answers_find_their_calls_in_whatever_order_they_come(channel: Channel, other: Other) -> None:
    slow = asyncio.create_task(channel.call("wait"))
    await until(lambda: other.waiting)
    assert await asyncio.gather(*(channel.call("echo", index) for index in range(50))) == [(i,) for i in range(50)]
    other.go_on.set()
    assert await slow == "done"


async def test_calls_are_begun_in_the_order_in_which_they_were_made(channel: Channel, other: Other) -> None:
    order: list[int] = []

    async def note(index: int) -> None:
        order.append(index)

    other.listener.handlers = {"note": note}
    await asyncio.gather(*(channel.call("note", index) for index in range(20)))
    assert order == list(range(20))


async def test_a_caller_that_leaves_ends_its_call_and_no_other(channel: Channel, other: Other) -> None:
    leaves, stays = asyncio.create_task(channel.call("wait")), asyncio.create_task(channel.call("wait"))
    await until(lambda: other.waiting == 2)
    leaves.cancel()
    await until(lambda: other.cancelled == 1)
    other.go_on.set()
    assert await stays == "done"


async def test_parts_arrive_as_they_are_made(channel: Channel, other: Other) -> None:
    counting = channel.stream("count", 5)
    assert [await anext(counting) for _ in range(3)] == [0, 1, 2]
    other.go_on.set()
    assert [number async for number in counting] == [3, 4]
    assert [number async for number in channel.stream("count", 0)] == []


async def test_a_reader_that_stops_ends_what_it_read(channel: Channel, other: Other) -> None:
    counting = channel.stream("count", 5)
    assert await anext(counting) == 0
    await counting.aclose()
    await until(lambda: other.counted)


async def test_a_stream_whose_other_side_is_gone_fails(channel: Channel, other: Other) -> None:
    counting = channel.stream("count", 5)
    assert await anext(counting) == 0
    channel.close()
    with pytest.raises(ChannelLost):
        async for _ in counting:
            pass


async def test_a_call_that_comes_while_the_listener_stops_is_lost(channel: Channel, other: Other) -> None:
    taken = asyncio.create_task(channel.call("wait"))
    await until(lambda: other.waiting)
    stopping = asyncio.create_task(other.listener.stop())
    await asyncio.sleep(0)
    late = asyncio.create_task(channel.call("echo"))
    await asyncio.sleep(0.01)
    other.go_on.set()
    assert await taken == "done"
    with pytest.raises(ChannelLost):
        await late
    await stopping


async def test_a_process_that_is_gone_ends_its_calls(channel: Channel, other: Other) -> None:
    lost = asyncio.create_task(channel.call("wait"))
    await until(lambda: other.waiting)
    channel.close()
    with pytest.raises(ChannelLost):
        await lost
    await until(lambda: other.cancelled)


@pytest.mark.parametrize("method", ["fail", "odd", "unknown"])
async def test_a_call_that_raises_says_what_kind_of_error_and_nothing_more(channel: Channel, method: str) -> None:
    with pytest.raises(CallFailed) as failure:
        await channel.call(method)
    assert "secret" not in str(failure.value)
    assert await channel.call("echo", 1) == (1,)


async def test_a_listener_that_is_lost_fails_what_waits_and_is_found_again_at_its_new_address(other: Other) -> None:
    first, second = await other.listener.start(HOST), Other()
    addresses = [first, await second.listener.start(HOST)]

    async def find() -> Address:
        return addresses.pop(0)

    channel = Channel(find)
    waiting = asyncio.create_task(channel.call("wait"))
    await until(lambda: other.waiting)
    for connection in list(other.listener.connections):
        connection.abort("it died")
    with pytest.raises(ChannelLost):
        await waiting
    assert await channel.call("echo", 1) == (1,)
    for each in (other, second):
        await each.listener.stop()


async def test_stopping_answers_what_was_taken(channel: Channel, other: Other) -> None:
    waiting = asyncio.create_task(channel.call("wait"))
    await until(lambda: other.waiting)
    stopping = asyncio.create_task(other.listener.stop())
    other.go_on.set()
    assert await waiting == "done"
    await stopping
    with pytest.raises(ChannelLost):
        await channel.call("echo")


async def test_nothing_is_read_of_who_does_not_know_the_secret(address: Address, other: Other) -> None:
    async def find() -> Address:
        return dataclasses.replace(address, secret=b"?" * 32)

    with pytest.raises(ChannelLost):
        await Channel(find).call("echo", 1)
    assert "secret" not in repr(address)


async def test_who_says_nothing_is_hung_up_on(address: Address, other: Other, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployments.channel, "ADMIT_TIMEOUT_S", 0.01)
    reader, writer = await asyncio.open_connection(address.host, address.port)
    assert await reader.read() == b""
    writer.close()
    await writer.wait_closed()
    await until(lambda: not other.listener.connections)


async def test_an_address_that_cannot_be_found_or_reached_is_a_lost_channel(address: Address) -> None:
    async def find() -> Address:
        raise RuntimeError("the actor is away")

    with pytest.raises(ChannelLost, match="away"):
        await Channel(find).call("echo")


async def test_a_caller_that_leaves_while_the_connection_is_made_leaves_it_to_the_others(address: Address) -> None:
    found = asyncio.Event()

    async def find() -> Address:
        await found.wait()
        return address

    channel = Channel(find)
    leaves, stays = (asyncio.create_task(channel.call("echo", index)) for index in range(2))
    await asyncio.sleep(0)
    leaves.cancel()
    await asyncio.wait([leaves])
    found.set()
    assert await stays == (1,)
    channel.close()


async def test_a_connection_whose_only_caller_left_while_it_was_made_is_there_for_the_next(
    address: Address, other: Other
) -> None:
    found = asyncio.Event()

    async def find() -> Address:
        await found.wait()
        return address

    channel = Channel(find)
    leaves = asyncio.create_task(channel.call("echo"))
    await asyncio.sleep(0)
    assert channel.is_in_use
    leaves.cancel()
    await asyncio.wait([leaves])
    found.set()
    await until(lambda: other.listener.connections)
    assert await channel.call("echo", 1) == (1,)
    assert len(other.listener.connections) == 1
    channel.close()
    await until(lambda: not channel.is_in_use)


def test_it_works_on_the_loop_that_rays_actors_have() -> None:
    async def conversation() -> Any:
        other = Other()
        address = await other.listener.start(HOST)

        async def find() -> Address:
            return address

        answer = await Channel(find).call("echo", 1)
        await other.listener.stop()
        return answer

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(conversation()) == (1,)
