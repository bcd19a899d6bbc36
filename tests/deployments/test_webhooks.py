"""A webhook reaches whom it was meant for, signed, however often it takes, and nobody else."""

import asyncio
import ipaddress
import itertools
import json
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp.abc import AbstractResolver, ResolveResult
from standardwebhooks import Webhook, WebhookVerificationError

import deployments.webhooks
from deployments.webhooks import MAX_ATTEMPTS, NOT_PUBLIC, WebhookSender, check_url, is_public, retry_delay_s
from tests.support.app import App
from tests.support.jobs import ended, queue
from tests.support.receiver import Receiver, receiving


@pytest.fixture
async def receiver() -> AsyncIterator[Receiver]:
    async with receiving() as running:
        yield running


PRIVATE = (
    "127.0.0.1 0.0.0.0 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 100.100.100.200 192.0.0.192 224.0.0.1"
    " 192.88.99.1 255.255.255.255 240.0.0.1"
    " 168.63.129.16 198.18.0.1 :: ::1 fe80::1 fc00::1 fd00:ec2::254 ff02::1 ::ffff:10.0.0.1"
    " ::ffff:8.8.8.8 64:ff9b::10.0.0.1 64:ff9b::8.8.8.8 64:ff9b:1::1 2002:a00:1::1 2001:0:a00:1::1 2001:db8::1 3fff::1"
)


class TestAddresses:
    @pytest.mark.parametrize("address", PRIVATE.split())
    def test_what_is_private_or_hides_an_address_is_not_public(self, address: str) -> None:
        assert not is_public(ipaddress.ip_address(address))

    @pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111", "2a00:1450:4001:80b::200e"])
    def test_what_anybody_reaches_is_public(self, address: str) -> None:
        assert is_public(ipaddress.ip_address(address))

    @pytest.mark.parametrize(
        "url",
        [
            "https://example.com/hook?x=1",
            "https://example.com:8443/",
            "https://8.8.8.8/",
            "https://[2606:4700:4700::1111]/",
            "https://größe.example/",
        ],
    )
    def test_a_public_https_url_is_accepted(self, url: str) -> None:
        check_url(url, allow_loopback=False)

    @pytest.mark.parametrize(
        "url",
        [
            "",
            "example.com",
            "http://example.com/",
            "ftp://example.com/",
            "file:///etc/passwd",
            "https://",
            "https://user@example.com/",
            "https://user:secret@example.com/",
            "https://example.com:22/",
            "https://example.com:x/",
            "https://127.0.0.1/",
            "https://[::1]/",
            "https://[::ffff:10.0.0.1]/",
            "https://169.254.169.254/latest/meta-data/",
            "http://127.0.0.1/",
            "https://example.com/" + "x" * 2048,
        ],
    )
    def test_any_other_url_is_refused(self, url: str) -> None:
        with pytest.raises(ValueError, match=r"accepted"):
            check_url(url, allow_loopback=False)

    @pytest.mark.parametrize("url", ["http://127.0.0.1:9/", "http://localhost:9/", "http://[::1]:9/"])
    def test_http_to_this_machine_is_accepted_where_development_allows_it(self, url: str) -> None:
        check_url(url, allow_loopback=True)
        with pytest.raises(ValueError, match="accepted"):
            check_url(url, allow_loopback=False)


class Resolver(AbstractResolver):
    """Answers with what it was given, one after the other."""

    def __init__(self, *addresses: str) -> None:
        self.addresses = list(addresses)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        address = self.addresses.pop(0)
        found = socket.AF_INET6 if ":" in address else socket.AF_INET
        return [{"hostname": host, "host": address, "port": port, "family": found, "proto": 0, "flags": 0}]

    async def close(self) -> None:
        pass


async def post(sender: WebhookSender, url: str) -> Any:
    sender.start()
    try:
        return await sender.post(url, b"{}", {})
    finally:
        await sender.stop()


class TestSending:
    @pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "::ffff:127.0.0.1"])
    async def test_a_name_that_resolves_to_a_private_address_is_not_connected_to(
        self, address: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def connected(*_: object, **__: object) -> None:
            raise AssertionError("a socket was made")

        monkeypatch.setattr(socket, "socket", connected)
        sender = WebhookSender(allow_loopback=False, resolver=Resolver(address))
        assert await post(sender, "https://hooks.example.com/") == deployments.webhooks.Answer(None, NOT_PUBLIC)

    async def test_a_name_that_turns_private_after_it_was_looked_at_is_not_connected_to(
        self, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """DNS rebinding: the first answer is public, the one that the connection uses is not."""
        port = int(receiver.url.split(":")[2].split("/")[0])
        monkeypatch.setattr(deployments.webhooks, "PORTS", (port,))
        resolver = Resolver("8.8.8.8", "127.0.0.1")
        await resolver.resolve("hooks.example.com")  # whoever checked the name beforehand was told this
        sender = WebhookSender(allow_loopback=False, resolver=resolver)
        answer = await post(sender, f"https://hooks.example.com:{port}/")
        assert answer.problem == NOT_PUBLIC
        assert receiver.connections == 0

    async def test_a_redirect_is_not_followed(self, receiver: Receiver) -> None:
        receiver.answers = [b"HTTP/1.1 307 X\r\nLocation: " + receiver.url.encode() + b"\r\nContent-Length: 0\r\n\r\n"]
        answer = await post(WebhookSender(allow_loopback=True), receiver.url)
        assert (answer.status, answer.problem) == (307, "it answered 307; redirects are not followed")
        assert receiver.connections == 1

    async def test_a_receiver_that_says_nothing_is_given_up(
        self, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(deployments.webhooks, "TIMEOUT_S", 0.1)
        receiver.answers = [b""]
        answer = await post(WebhookSender(allow_loopback=True), receiver.url)
        assert answer.status is None
        assert answer.problem.startswith("no answer within")

    async def test_a_body_without_end_is_not_read(self, receiver: Receiver) -> None:
        receiver.answers = [b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"5\r\nhello\r\n" * 1_000]
        answer = await post(WebhookSender(allow_loopback=True), receiver.url)
        assert (answer.status, answer.problem) == (200, "")

    async def test_a_receiver_that_talks_nonsense_or_is_not_there_is_said_so(self, receiver: Receiver) -> None:
        receiver.answers = [b"hello\r\n\r\n"]
        assert (await post(WebhookSender(allow_loopback=True), receiver.url)).problem == "it broke the connection off"
        nobody = await post(WebhookSender(allow_loopback=True), "http://127.0.0.1:1/")
        assert nobody.problem == "it refused the connection"

    def test_ten_attempts_take_about_a_day_and_no_two_are_in_step(self) -> None:
        delays = [retry_delay_s(attempt) for attempt in range(1, MAX_ATTEMPTS)]
        assert 0.75 * 86_400 < sum(delays) < 1.2 * 86_400
        assert all(later > 2 * earlier for earlier, later in itertools.pairwise(delays[:6]))
        assert len({retry_delay_s(1) for _ in range(10)}) > 1


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retries come at once."""
    monkeypatch.setattr(deployments.webhooks, "FIRST_DELAY_S", 0.0)
    monkeypatch.setattr(deployments.webhooks, "POLL_S", 0.02)


async def log_of(app: App, headers: dict[str, str], rollout_id: str, state: str) -> dict[str, Any]:
    """The rollout's one delivery, once it is in that state."""
    async with asyncio.timeout(20):
        while True:
            log = (await app.http.get(f"/v1/rollouts/{rollout_id}/deliveries", headers=headers)).json()
            (delivery,) = log["data"] or [{"state": "none"}]
            if delivery["state"] == state:
                return delivery
            await asyncio.sleep(0.01)


class TestDelivering:
    async def test_the_envelope_arrives_signed_with_the_customers_secret(self, app: App, receiver: Receiver) -> None:
        headers, _ = app.key()
        secret = (await app.http.get("/v1/webhooks/secret", headers=headers)).json()["secrets"][0]["secret"]
        rollout_id = (await queue(app, headers, webhook_url=receiver.url)).json()["id"]
        done = await ended(app, headers, rollout_id)
        delivery = await log_of(app, headers, rollout_id, "delivered")
        ((sent, body),) = receiver.received
        assert Webhook(secret).verify(body, sent) == done
        assert sent["webhook-id"] == delivery["id"]
        assert delivery["attempts"][0]["status"] == 200
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(body.replace(b"succeeded", b"failed"), sent)

    async def test_it_is_sent_again_until_it_is_taken_under_the_same_id(
        self, app: App, receiver: Receiver, soon: None
    ) -> None:
        receiver.answers = [b"HTTP/1.1 500 X\r\nContent-Length: 0\r\n\r\n"] * 2
        headers, _ = app.key()
        rollout_id = (await queue(app, headers, webhook_url=receiver.url)).json()["id"]
        delivery = await log_of(app, headers, rollout_id, "delivered")
        assert [attempt["status"] for attempt in delivery["attempts"]] == [500, 500, 200]
        assert delivery["attempts"][0]["problem"] == "it answered 500"
        assert len({sent["webhook-id"] for sent, _ in receiver.received}) == 1

    async def test_a_receiver_that_is_never_there_is_given_up_and_the_rollout_stands(
        self, app: App, soon: None
    ) -> None:
        headers, _ = app.key()
        rollout_id = (await queue(app, headers, webhook_url="http://127.0.0.1:1/")).json()["id"]
        delivery = await log_of(app, headers, rollout_id, "failed")
        assert len(delivery["attempts"]) == MAX_ATTEMPTS
        assert "next_attempt_at" not in delivery
        assert (await ended(app, headers, rollout_id))["status"] == "succeeded"

    async def test_what_cannot_be_told_because_of_a_defect_of_ours_is_given_up_as_well(
        self, app: App, soon: None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(_: object) -> bytes:
            raise KeyError("no such model")

        monkeypatch.setattr(app.services.jobs.deliverer, "_render", broken)
        headers, _ = app.key()
        rollout_id = (await queue(app, headers, webhook_url="http://127.0.0.1:1/")).json()["id"]
        delivery = await log_of(app, headers, rollout_id, "failed")
        assert [attempt["problem"] for attempt in delivery["attempts"]] == ["the server failed"] * MAX_ATTEMPTS

    async def test_a_receiver_that_is_gone_for_good_is_not_asked_again(self, app: App, receiver: Receiver) -> None:
        receiver.answers = [b"HTTP/1.1 410 Gone\r\nContent-Length: 0\r\n\r\n"]
        headers, _ = app.key()
        rollout_id = (await queue(app, headers, webhook_url=receiver.url)).json()["id"]
        delivery = await log_of(app, headers, rollout_id, "failed")
        assert [attempt["status"] for attempt in delivery["attempts"]] == [410]

    async def test_a_process_that_vanished_while_it_delivered_is_made_up_for(
        self, app: App, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await app.services.jobs.deliverer.stop()
        headers, customer = app.key()
        rollout_id = (await queue(app, headers, webhook_url=receiver.url)).json()["id"]
        await ended(app, headers, rollout_id)
        claimed = app.services.jobs.outbox.claim({}, 1, hold_s=0.0)
        assert claimed is not None
        assert claimed.customer_id == customer
        app.services.jobs.deliverer.start()
        delivery = await log_of(app, headers, rollout_id, "delivered")
        assert [attempt["attempt"] for attempt in delivery["attempts"]] == [2]

    async def test_a_cancellation_is_told_too(self, app: App, receiver: Receiver) -> None:
        headers, _ = app.key()
        rollout_id = (await queue(app, headers, webhook_url=receiver.url)).json()["id"]
        await app.http.delete(f"/v1/rollouts/{rollout_id}", headers=headers)
        done = await ended(app, headers, rollout_id)
        await log_of(app, headers, rollout_id, "delivered")
        assert [json.loads(body) for _, body in receiver.received] == [done]

    async def test_after_a_rotation_both_secrets_verify_and_a_day_later_only_the_new_one(
        self, app: App, receiver: Receiver
    ) -> None:
        headers, customer = app.key()
        old = (await app.http.get("/v1/webhooks/secret", headers=headers)).json()["secrets"][0]["secret"]
        both = (await app.http.post("/v1/webhooks/secret/rotate", headers=headers)).json()["secrets"]
        assert [each["secret"] for each in both][1] == old
        rollout_id = (await queue(app, headers, webhook_url=receiver.url)).json()["id"]
        await log_of(app, headers, rollout_id, "delivered")
        ((sent, body),) = receiver.received
        for each in both:
            Webhook(each["secret"]).verify(body, sent)
        outbox = app.services.jobs.outbox
        outbox._clock = lambda: both[0]["created"] + deployments.webhook_store.ROTATION_OVERLAP_S
        assert [each.secret for each in outbox.secrets(customer)] == [both[0]["secret"]]

    async def test_a_customer_with_slow_receivers_holds_up_only_itself(self, app: App) -> None:
        slow, slow_customer = app.key()
        quick, quick_customer = app.key()
        await app.services.jobs.deliverer.stop()
        for seed in range(2):
            await ended(app, slow, (await queue(app, slow, seed=seed, webhook_url="http://127.0.0.1:1/")).json()["id"])
        await ended(app, quick, (await queue(app, quick, webhook_url="http://127.0.0.1:1/")).json()["id"])
        claimed = app.services.jobs.outbox.claim({slow_customer: 4}, 4, hold_s=60)
        assert claimed is not None
        assert claimed.customer_id == quick_customer
        assert app.services.jobs.outbox.claim({slow_customer: 4}, 4, hold_s=60) is None
        app.services.jobs.deliverer.start()
