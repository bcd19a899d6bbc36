"""Webhooks: delivered from the outbox until the receiver has them, signed as Standard Webhooks says, never to a private
address.

The address is judged when the socket is made, of the very address that it connects to: whatever a name resolved to
before, or resolves to at the second time, does not matter. Redirects are not followed and no proxy is asked.
"""

import asyncio
import contextlib
import ipaddress
import random
import socket
import ssl
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import aiohttp
import structlog
from aiohttp.abc import AbstractResolver
from standardwebhooks import Webhook
from yarl import URL

from billing.commands import CustomerId
from billing.database import DATABASE_FAILURES
from deployments.background import keep_running
from deployments.job_store import Job, JobStore
from deployments.webhook_store import Attempt, Delivery, DeliveryState, WebhookStore

TIMEOUT_S = 15.0
"""From the name's resolution to the status line; the body is not read."""
CONNECT_TIMEOUT_S = 5.0
HOLD_S = 4 * TIMEOUT_S
"""A process that died in the middle of an attempt held the delivery for so long."""
MAX_ATTEMPTS = 10
FIRST_DELAY_S, DELAY_FACTOR, MAX_DELAY_S = 5.0, 4.0, 8 * 3600.0
"""5 s, 20 s, 80 s, ... 8 h: ten attempts take a little less than a day."""
JITTER = 0.2
POLL_S = 2.0
MAX_AT_ONCE = 16
MAX_PER_CUSTOMER = 4
MAX_URL_CHARS = 2048
PORTS = (443, 8443)
LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")

PUBLIC_IPV6 = ipaddress.IPv6Network("2000::/3")
NOT_FOR_US: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = (
    ipaddress.IPv4Network("192.0.0.0/24"),  # of protocols; a cloud keeps its metadata there
    ipaddress.IPv4Network("192.88.99.0/24"),  # relays to 6to4
    ipaddress.IPv4Network("168.63.129.16/32"),  # looks public, and answers with secrets within its cloud
    ipaddress.IPv6Network("2001::/23"),  # of protocols; Teredo carries an IPv4 address, which may be any
    ipaddress.IPv6Network("2002::/16"),  # 6to4 does so too
    ipaddress.IPv6Network("3fff::/20"),  # documentation
)
"""What Python's tables, which differ by version, may take for public."""
NOT_PUBLIC = "its address is not a public one"

log = structlog.get_logger(__name__)


def check_url(url: str, allow_loopback: bool) -> None:
    """Raises ValueError, saying what is accepted, unless `url` may be called at all."""
    if len(url) > MAX_URL_CHARS:
        raise ValueError(f"has {len(url)} characters; at most {MAX_URL_CHARS} are accepted")
    try:
        parsed = URL(url)
        host, port = parsed.host, parsed.port
    except ValueError:
        raise ValueError("is not a URL; https://host/path is accepted") from None
    if allow_loopback and parsed.scheme == "http" and host in LOOPBACK_HOSTS:
        return
    if parsed.scheme != "https" or not host or parsed.user is not None or parsed.password is not None:
        raise ValueError("is not accepted; https://host/path without user or password is")
    if port not in PORTS:
        raise ValueError(f"names port {port}; {' and '.join(map(str, PORTS))} are accepted")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return  # a name: what it resolves to is judged when it is called
    if not is_public(address):
        raise ValueError(f"is not accepted: {NOT_PUBLIC}")


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether anybody on the Internet could reach it, and nobody inside this cluster gave it a meaning of its own."""
    if any(address in network for network in NOT_FOR_US if network.version == address.version):
        return False
    if isinstance(address, ipaddress.IPv6Address):
        # Outside of 2000::/3 lie the local ones, multicast, and both ways to write an IPv4 address (::ffff:, NAT64).
        return address in PUBLIC_IPV6 and address.is_global
    return address.is_global and not address.is_multicast and not address.is_reserved


@dataclass(frozen=True, slots=True)
class Answer:
    status: int | None
    problem: str
    """Empty when the receiver took it."""


class WebhookSender:
    """Posts to URLs that customers name. `allow_loopback` is for development: http to this machine."""

    def __init__(
        self, allow_loopback: bool, resolver: AbstractResolver | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self._allow_loopback = allow_loopback
        self._resolver = resolver
        self._tls = tls or ssl.create_default_context()
        self._session: aiohttp.ClientSession | None = None

    def start(self) -> None:
        connector = aiohttp.TCPConnector(
            ssl=self._tls,
            resolver=self._resolver,
            use_dns_cache=False,
            force_close=True,
            limit=MAX_AT_ONCE,
            socket_factory=self._checked_socket,
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            timeout=aiohttp.ClientTimeout(total=TIMEOUT_S, sock_connect=CONNECT_TIMEOUT_S),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
        )

    async def stop(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def post(self, url: str, body: bytes, headers: dict[str, str]) -> Answer:
        """What the receiver made of it. Never raises for anything that a receiver, or its name server, can do."""
        assert self._session is not None, "not started"
        try:
            check_url(url, self._allow_loopback)
            async with self._session.post(url, data=body, headers=headers, allow_redirects=False) as response:
                return Answer(response.status, _why_not(response.status))
        except TimeoutError:
            return Answer(None, f"no answer within {TIMEOUT_S:.0f} s")
        except (aiohttp.ClientError, OSError, ValueError) as error:
            return Answer(None, _why_no_answer(error))

    def _checked_socket(self, info: Any) -> socket.socket:
        """A socket for the address that it is about to be connected to, if that may be."""
        family, kind, protocol, _, destination = info
        address = ipaddress.ip_address(destination[0].partition("%")[0])
        if not (is_public(address) or (self._allow_loopback and address.is_loopback)):
            raise OSError(NOT_PUBLIC)
        return socket.socket(family=family, type=kind, proto=protocol)


def _why_not(status: int) -> str:
    if 200 <= status < 300:
        return ""
    return f"it answered {status}" + ("; redirects are not followed" if 300 <= status < 400 else "")


def _why_no_answer(error: Exception) -> str:
    """In words that say nothing of what our name server or network knows."""
    if isinstance(error, aiohttp.ClientConnectorError) and NOT_PUBLIC in str(error.os_error):
        return NOT_PUBLIC
    match error:
        case aiohttp.ClientConnectorDNSError():
            return "its name does not resolve"
        case aiohttp.ClientSSLError():
            return "its TLS certificate or handshake was not accepted"
        case aiohttp.ClientConnectorError():
            return "it refused the connection"
        case ValueError() if not isinstance(error, aiohttp.ClientError):
            return f"the URL {error}"
        case _:
            return "it broke the connection off"


def retry_delay_s(attempt: int) -> float:
    """After the attempt of that number, 1 being the first, with jitter so that receivers are not called in step."""
    delay_s = min(FIRST_DELAY_S * DELAY_FACTOR ** (attempt - 1), MAX_DELAY_S)
    return delay_s * random.uniform(1 - JITTER, 1 + JITTER)  # noqa: S311 - no secret


class WebhookDeliverer:
    """Empties the outbox, beside whatever other processes do. `render` makes the body from the job that it tells of."""

    def __init__(
        self,
        outbox: WebhookStore,
        jobs: JobStore,
        sender: WebhookSender,
        render: Callable[[Job], bytes],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._outbox = outbox
        self._jobs = jobs
        self._sender = sender
        self._render = render
        self._clock = clock
        self._busy: Counter[CustomerId] = Counter()
        self._delivering: set[asyncio.Task[None]] = set()
        self._wake = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._sender.start()
        self._loop = keep_running(self._deliver_forever)

    async def stop(self) -> None:
        """What is being delivered is given up, and delivered by another process or the next start."""
        if self._loop is not None:
            self._loop.cancel()
            await asyncio.wait([self._loop])
        for task in self._delivering:
            task.cancel()
        if self._delivering:
            await asyncio.wait(self._delivering)
        await self._sender.stop()

    def wake(self) -> None:
        """There is something to deliver; it is found sooner or later anyway."""
        self._wake.set()

    async def _deliver_forever(self) -> None:
        while True:
            self._wake.clear()
            try:
                while len(self._delivering) < MAX_AT_ONCE:
                    delivery = await asyncio.to_thread(self._outbox.claim, self._busy, MAX_PER_CUSTOMER, HOLD_S)
                    if delivery is None:
                        break
                    self._begin(delivery)
            except DATABASE_FAILURES as error:
                log.warning("webhooks_delayed", error=type(error).__name__)
            with contextlib.suppress(TimeoutError):  # not `wait_for`, which may lose a cancellation on 3.11
                async with asyncio.timeout(POLL_S):
                    await self._wake.wait()

    def _begin(self, delivery: Delivery) -> None:
        self._busy[delivery.customer_id] += 1
        task = asyncio.get_running_loop().create_task(self._deliver(delivery))
        self._delivering.add(task)

        def ended(task: asyncio.Task[None]) -> None:
            self._delivering.discard(task)
            self._busy[delivery.customer_id] -= 1
            self._busy += Counter()  # drops those at zero
            self._wake.set()

        task.add_done_callback(ended)

    async def _deliver(self, delivery: Delivery) -> None:
        try:
            started, at = time.perf_counter(), self._clock()
            answer = await self._post(delivery, at)
            took_ms = (time.perf_counter() - started) * 1e3
            attempt = Attempt(delivery.delivery_id, delivery.attempts, at, took_ms, answer.status, answer.problem)
            state = _after(answer, delivery.attempts)
            next_attempt_at = self._clock() + retry_delay_s(delivery.attempts) if state == "pending" else 0.0
            await asyncio.to_thread(self._outbox.record, attempt, state, next_attempt_at)
        except DATABASE_FAILURES as error:  # it is held for a while, and then delivered again
            log.warning("webhook_not_recorded", request_id=delivery.request_id, error=type(error).__name__)
        else:
            log.info("webhook", request_id=delivery.request_id, attempt=delivery.attempts, state=state)

    async def _post(self, delivery: Delivery, at: float) -> Answer:
        job = await asyncio.to_thread(self._jobs.get, delivery.request_id)
        secrets = await asyncio.to_thread(self._outbox.secrets, delivery.customer_id)
        try:
            assert job is not None, "a delivery belongs to a job"
            body = self._render(job)
            return await self._sender.post(delivery.url, body, _headers(delivery, body, secrets, at))
        except Exception as error:  # a defect of ours, which is tried no more often than a receiver that is not there
            log.error("webhook_failed", request_id=delivery.request_id, error=repr(error), exc_info=error)
            return Answer(None, "the server failed")


def _after(answer: Answer, attempt: int) -> DeliveryState:
    if not answer.problem:
        return "delivered"
    # 410: the receiver wants no more of this, says Standard Webhooks.
    return "failed" if answer.status == 410 or attempt >= MAX_ATTEMPTS else "pending"


def _headers(delivery: Delivery, body: bytes, secrets: list[Any], at: float) -> dict[str, str]:
    moment = datetime.fromtimestamp(int(at), UTC)
    signatures = [Webhook(each.secret).sign(delivery.delivery_id, moment, body.decode()) for each in secrets]
    return {
        "Content-Type": "application/json",
        "User-Agent": "dream-engine-cluster",
        "webhook-id": delivery.delivery_id,
        "webhook-timestamp": str(int(at)),
        "webhook-signature": " ".join(signatures),
    }
