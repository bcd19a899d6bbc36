"""Calls from one process of the cluster to another over a connection that both keep, for what every request waits for.

A call of an actor takes 0.6 ms of a core at either end, and one through a Serve handle more; these take 0.02 ms. Ray
still says who is where: whoever listens hands its `Address` out through a method of its actor, and the secret in it is
what callers begin with. Like Ray's own, messages are pickled, and neither encrypted nor signed.

ChannelError
├── ChannelLost   there is no connection, or it broke: the call may or may not have been carried out
└── CallFailed    it was carried out, and raised
"""

import asyncio
import hmac
import pickle
import secrets
import socket
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import structlog

CONNECT_TIMEOUT_S = 10.0
ADMIT_TIMEOUT_S = 5.0
"""Whoever has not said the secret by then is not listened to any longer."""
SECRET_BYTES = 32
MAX_MESSAGE_BYTES = 2**30
KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 3, "TCP_USER_TIMEOUT": 10_000}
"""Some ten seconds after a machine is gone its connections are lost. A process that ends loses them at once."""
_LENGTH_BYTES = 8
_CANCEL = ""
"""In place of a method's name: its caller no longer waits for this call."""

_PART, _ANSWER, _FAILURE = range(3)

Handler = Callable[..., Awaitable[Any] | AsyncGenerator[Any, None]]

log = structlog.get_logger(__name__)


class ChannelError(Exception):
    """Base of what a call raises."""


class ChannelLost(ChannelError):
    def __init__(self, why: str) -> None:
        super().__init__(why)


class CallFailed(ChannelError):
    def __init__(self, method: str, why: str) -> None:
        super().__init__(method, why)


@dataclass(frozen=True, slots=True)
class Address:
    host: str
    port: int
    secret: bytes = field(repr=False)


class Channel:
    """Calls to whoever listens at the address that `find` tells; connects when it is first needed, and again after a
    loss. Of one event loop."""

    def __init__(self, find: Callable[[], Awaitable[Address]]) -> None:
        self._find = find
        self._connection: _Calling | None = None
        self._connecting: asyncio.Task[_Calling] | None = None

    @property
    def is_in_use(self) -> bool:
        """Connected, or being connected."""
        if self._connecting is not None and not self._connecting.done():
            return True
        return self._connection is not None and not self._connection.is_lost

    async def call(self, method: str, *arguments: Any) -> Any:
        """What `method` of the other side returns. Being cancelled cancels it there.

        Raises:
            ChannelLost, CallFailed
        """
        return await (await self._connected()).call(method, arguments)

    async def stream(self, method: str, *arguments: Any) -> AsyncGenerator[Any, None]:
        """What `method`, an asynchronous generator there, yields; closing this one ends it. Raises as `call` does."""
        async with aclosing((await self._connected()).stream(method, arguments)) as parts:
            async for part in parts:
                yield part

    def close(self) -> None:
        """Give up what is waiting; the next call connects again."""
        if self._connection is not None:
            self._connection.close()

    async def _connected(self) -> "_Calling":
        """All who wait for a connection get the same, made by a task of its own, which no request's end cancels; should
        they all leave, it is there for the next."""
        if self._connection is not None and not self._connection.is_lost:
            return self._connection
        if self._connecting is None or self._connecting.done():
            self._connecting = asyncio.get_running_loop().create_task(self._connect_now(), context=Context())
            self._connecting.add_done_callback(_seen)
        return await asyncio.shield(self._connecting)

    async def _connect_now(self) -> "_Calling":
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                address = await self._find()
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: _Calling(address.secret), address.host, address.port
                )
        except Exception as error:  # Ray's, while the actor is away, or the network's
            raise ChannelLost(f"cannot connect: {error!r}") from error
        self._connection = connection
        return connection


def connect(address: Address) -> Channel:
    """A channel to an address that is known, and never another."""

    async def find() -> Address:
        return address

    return Channel(find)


class Listener:
    """Answers calls with `handlers`, by the names that callers use: coroutine functions, or asynchronous generators for
    `Channel.stream`. A call's task is cancelled when its caller gives it up or is gone."""

    def __init__(self, handlers: Mapping[str, Handler]) -> None:
        self.handlers = handlers
        self.secret = secrets.token_bytes(SECRET_BYTES)
        self.connections: set[_Answering] = set()
        self.is_stopping = False
        self._server: asyncio.Server | None = None

    async def start(self, host: str) -> Address:
        """Listen on a free port of `host`."""
        self._server = await asyncio.get_running_loop().create_server(lambda: _Answering(self), host, 0)
        return Address(host, self._server.sockets[0].getsockname()[1], self.secret)

    async def stop(self) -> None:
        """Take no more calls, answer those that were taken, then hang up: whoever called since finds its call lost."""
        self.is_stopping = True
        if self._server is not None:
            self._server.close()
        tasks = [task for connection in self.connections for task in connection.tasks.values()]
        if tasks:
            await asyncio.wait(tasks)
        for connection in list(self.connections):
            connection.close()


def listen_in_thread(handlers: Mapping[str, Handler], host: str) -> Address:
    """Answer calls on an event loop of its own, for as long as the process lives."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="channel", daemon=True).start()
    return asyncio.run_coroutine_threadsafe(Listener(handlers).start(host), loop).result()


class _Messages(asyncio.Protocol):
    """One end of a connection: messages of a length and a pickle."""

    def __init__(self) -> None:
        self._received = bytearray()
        self._transport: asyncio.Transport | None = None
        self.is_lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's own are of no class of asyncio's
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):  # Linux has them all
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def connection_lost(self, error: Exception | None) -> None:
        self.is_lost = True

    def data_received(self, data: bytes) -> None:
        received = self._received
        received += data
        while len(received) >= _LENGTH_BYTES:
            length = int.from_bytes(received[:_LENGTH_BYTES], "little")
            if length > MAX_MESSAGE_BYTES:
                self.abort(f"a message of {length} bytes")
                return
            end = _LENGTH_BYTES + length
            if len(received) < end:
                return
            with memoryview(received) as view, view[_LENGTH_BYTES:end] as packed:
                message = pickle.loads(packed)  # noqa: S301 - of a process of ours: it knew the secret
            del received[:end]
            self.message_received(message)

    def message_received(self, message: Any) -> None:
        raise NotImplementedError

    def write(self, message: Any) -> None:
        packed = pickle.dumps(message, protocol=5)
        if len(packed) > MAX_MESSAGE_BYTES:
            raise ValueError(f"a message of {len(packed)} bytes; {MAX_MESSAGE_BYTES} are possible")
        assert self._transport is not None
        self._transport.writelines((len(packed).to_bytes(_LENGTH_BYTES, "little"), packed))

    def close(self) -> None:
        """Hang up once everything that was written has been sent."""
        if self._transport is not None:
            self._transport.close()

    def abort(self, why: str) -> None:
        log.warning("channel_aborted", why=why)
        assert self._transport is not None
        self._transport.abort()


class _Call(NamedTuple):
    method: str
    answer: "asyncio.Future[Any]"
    parts: "asyncio.Queue[tuple[Any, ...]] | None"


class _Calling(_Messages):
    def __init__(self, secret: bytes) -> None:
        super().__init__()
        self._secret = secret
        self._calls: dict[int, _Call] = {}
        self._num_calls = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        assert self._transport is not None
        self._transport.write(self._secret)

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        calls, self._calls = self._calls, {}
        for call in calls.values():
            if not call.answer.done():
                call.answer.set_exception(ChannelLost("the connection broke"))

    async def call(self, method: str, arguments: tuple[Any, ...]) -> Any:
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        call_id = self._begin(method, arguments, answer, None)
        try:
            return await answer
        finally:
            self._end(call_id)

    async def stream(self, method: str, arguments: tuple[Any, ...]) -> AsyncGenerator[Any, None]:
        ended: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        parts: asyncio.Queue[tuple[Any, ...]] = asyncio.Queue()
        ended.add_done_callback(lambda _: parts.put_nowait(()))
        call_id = self._begin(method, arguments, ended, parts)
        try:
            while part := await parts.get():
                yield part[0]
            ended.result()
        finally:
            self._end(call_id)
            ended.cancel()

    def message_received(self, message: Any) -> None:
        call_id, kind, value = message
        call = self._calls.get(call_id)
        if call is None:
            return
        if kind == _PART:
            assert call.parts is not None
            call.parts.put_nowait((value,))
            return
        del self._calls[call_id]
        if call.answer.done():
            return
        if kind == _ANSWER:
            call.answer.set_result(value)
        else:
            call.answer.set_exception(CallFailed(call.method, value))

    def _begin(
        self,
        method: str,
        arguments: tuple[Any, ...],
        answer: "asyncio.Future[Any]",
        parts: "asyncio.Queue[tuple[Any, ...]] | None",
    ) -> int:
        if self.is_lost:
            raise ChannelLost("the connection broke")
        self._num_calls += 1
        self.write((self._num_calls, method, arguments))
        self._calls[self._num_calls] = _Call(method, answer, parts)
        return self._num_calls

    def _end(self, call_id: int) -> None:
        if self._calls.pop(call_id, None) is not None and not self.is_lost:  # it was not answered: we left
            self.write((call_id, _CANCEL, ()))


class _Answering(_Messages):
    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self._listener = listener
        self._is_admitted = False
        self._admission: asyncio.TimerHandle | None = None
        self.tasks: dict[int, asyncio.Task[None]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._listener.connections.add(self)
        self._admission = asyncio.get_running_loop().call_later(ADMIT_TIMEOUT_S, self.abort, "nobody said the secret")

    def connection_lost(self, error: Exception | None) -> None:
        super().connection_lost(error)
        self._listener.connections.discard(self)
        assert self._admission is not None
        self._admission.cancel()
        for task in self.tasks.values():
            task.cancel()

    def data_received(self, data: bytes) -> None:
        if not self._is_admitted:
            self._received += data
            if len(self._received) < SECRET_BYTES:
                return
            if not hmac.compare_digest(self._received[:SECRET_BYTES], self._listener.secret):
                self.abort("a caller without the secret")
                return
            self._is_admitted = True
            assert self._admission is not None
            self._admission.cancel()
            del self._received[:SECRET_BYTES]
            data = b""
        super().data_received(data)

    def message_received(self, message: Any) -> None:
        call_id, method, arguments = message
        if method == _CANCEL:
            if call_id in self.tasks:
                self.tasks[call_id].cancel()
            return
        if self._listener.is_stopping:
            return
        task = asyncio.get_running_loop().create_task(self._answer(call_id, method, arguments))
        self.tasks[call_id] = task
        task.add_done_callback(lambda _: self.tasks.pop(call_id))

    async def _answer(self, call_id: int, method: str, arguments: tuple[Any, ...]) -> None:
        try:
            answer = self._listener.handlers[method](*arguments)
            if isinstance(answer, AsyncGenerator):
                async with aclosing(answer):
                    async for part in answer:
                        self._reply(call_id, _PART, part)
                self._reply(call_id, _ANSWER, None)
            else:
                self._reply(call_id, _ANSWER, await answer)
        except asyncio.CancelledError:
            self._reply(call_id, _FAILURE, "cancelled")
            raise
        except Exception as error:
            log.error("call_failed", method=method, error=repr(error), exc_info=error)
            self._reply(call_id, _FAILURE, type(error).__name__)

    def _reply(self, call_id: int, kind: int, value: Any) -> None:
        if not self.is_lost:
            self.write((call_id, kind, value))


def _seen(connecting: "asyncio.Task[_Calling]") -> None:
    """Whoever waited for it may have left."""
    if not connecting.cancelled():
        connecting.exception()
