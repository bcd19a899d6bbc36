"""Every request gets an id, a bound on its body, an answer and one line in the log."""

import json
import re
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import structlog
from structlog.testing import capture_logs

from deployments.meter import Meter
from serve_app.errors import BodyTooLarge
from serve_app.middleware import HeldBodies, RequestEnvelope
from serve_app.settings import Limits
from tests.support.app import App, running_app
from tests.support.hostile import MULTIPART, disposition, multipart
from tests.support.payloads import actions, npy, png

REQUEST_ID = re.compile(r"req_[0-9a-f]{32}")
MAX_BODY_BYTES = 1000
MAX_HELD_BYTES = 10_000


@pytest.fixture
async def app(tmp_path: Path) -> AsyncIterator[App]:
    async with running_app(tmp_path, limits=Limits(max_body_bytes=2**20)) as running:
        yield running


def good(frame_seed: int = 0) -> dict[str, bytes]:
    return {"frame": png(seed=frame_seed), "actions": npy(actions())}


class TestRequestId:
    @pytest.mark.parametrize(
        ("method", "path", "status"),
        [
            ("GET", "/healthz", 200),
            ("GET", "/v1/models", 200),
            ("GET", "/v1/models/nothing", 404),
            ("GET", "/no/such/path", 404),
            ("DELETE", "/v1/models", 405),
            ("GET", "/v1/models/", 307),
            ("GET", "/v1/billing/balance", 401),
            ("POST", "/v1/predict", 401),
            ("GET", "/v1/rollouts/x/video", 422),
            ("GET", "/v1/rollouts/x/video?expires=1&signature=x", 403),
            ("GET", "/docs", 200),
            ("GET", "/openapi.json", 200),
        ],
    )
    async def test_every_answer_says_its_id(self, app: App, method: str, path: str, status: int) -> None:
        answer = await app.http.request(method, path)
        assert answer.status_code == status
        assert REQUEST_ID.fullmatch(answer.headers["X-DreamEngine-Request-Id"])

    async def test_a_bug_is_answered_too_with_its_id_and_what_was_logged(
        self, app: App, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def broken(*_: object) -> None:
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(type(app.services.ingress), "run", broken)
        headers, customer = app.key()
        with capture_logs() as logs:
            answer = await app.http.post("/v1/predict", headers=headers, files=good())
        assert answer.status_code == 500
        message = "the server failed; what was not delivered is not charged"
        assert answer.json() == {
            "detail": message,
            "error": {"message": message, "type": "api_error", "code": "ENGINE_FAILED"},
        }
        request_id = answer.headers["X-DreamEngine-Request-Id"]
        assert REQUEST_ID.fullmatch(request_id)
        assert [(line["event"], line["request_id"]) for line in logs] == [
            ("request_failed", request_id),
            ("request", request_id),
        ]
        assert logs[0]["error"] == "ZeroDivisionError('a bug')"
        assert app.ledger.rows(customer) == [("credit", 1_000_000)]

    @pytest.mark.parametrize("name", ["X-DreamEngine-Request-Id", "X-Request-Id", "Request-Id"])
    async def test_a_clients_own_id_is_never_taken(self, app: App, name: str) -> None:
        own = "req_" + "0" * 32
        headers, customer = app.key()
        answer = await app.http.post("/v1/predict", headers={**headers, name: own}, files=good())
        assert answer.headers["X-DreamEngine-Request-Id"] != own
        ids = [row.public_id for row in app.ledger.reader.transactions(customer, 200)]
        assert ids[0] == answer.headers["X-DreamEngine-Request-Id"]
        assert own not in ids

    async def test_each_request_has_another_id(self, app: App) -> None:
        ids = {(await app.http.get("/healthz")).headers["X-DreamEngine-Request-Id"] for _ in range(20)}
        assert len(ids) == 20


class TestBodyBound:
    async def test_a_body_declared_too_large_is_refused_unread(self, app: App) -> None:
        headers, customer = app.key()
        answer = await app.http.post(
            "/v1/predict", headers={**headers, **MULTIPART, "Content-Length": str(2**20 + 1)}, content=_unread()
        )
        assert answer.status_code == 413
        assert answer.json()["detail"] == "body: larger than the 1048576 bytes that are accepted"
        assert answer.json()["error"]["code"] == "INVALID_REQUEST"
        assert REQUEST_ID.fullmatch(answer.headers["X-DreamEngine-Request-Id"])
        assert app.ledger.rows(customer) == [("credit", 1_000_000)]

    @pytest.mark.parametrize("path", ["/v1/predict", "/v1/predict/batch", "/v1/rollouts", "/models/x/v1/rollouts"])
    async def test_a_chunked_body_is_read_no_further_than_the_bound(self, app: App, path: str) -> None:
        sent = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal sent
            yield multipart((disposition("frame", "f"), b""), closed=False)[:-2]
            while True:
                sent += 2**16
                yield bytes(2**16)

        headers, customer = app.key()
        answer = await app.http.post(path, headers={**headers, **MULTIPART}, content=endless())
        assert answer.status_code == 413
        assert sent <= 2**20 + 2**16
        assert REQUEST_ID.fullmatch(answer.headers["X-DreamEngine-Request-Id"])
        assert app.ledger.rows(customer) == [("credit", 1_000_000)]

    async def test_a_body_that_declares_less_than_it_sends_is_bounded_by_what_it_sends(self, app: App) -> None:
        headers, _ = app.key()
        large = multipart((disposition("frame", "f"), bytes(2**20)))
        answer = await app.http.post(
            "/v1/predict", headers={**headers, **MULTIPART, "Content-Length": "10"}, content=_once(large)
        )
        assert answer.status_code == 413

    @pytest.mark.parametrize(("num_bytes", "status"), [(MAX_BODY_BYTES, 200), (MAX_BODY_BYTES + 1, 413)])
    @pytest.mark.parametrize("chunked", [False, True])
    async def test_the_bound_itself_is_accepted_and_one_byte_more_is_not(
        self, num_bytes: int, status: int, chunked: bool
    ) -> None:
        body = bytes(num_bytes)
        async with _client(_reads_all) as client:
            answer = await client.post("/", content=_once(body) if chunked else body)
        assert answer.status_code == status

    @pytest.mark.parametrize(
        ("declared", "status"),
        [
            ("0", 200),
            ("000000000000000000000000000001000", 200),
            ("1001", 413),
            ("9" * 18, 413),
            ("9" * 19, 413),
            ("9" * 5000, 413),
            ("-1", 200),
            ("1e9", 200),
            ("", 200),
            ("\N{SUPERSCRIPT TWO}", 200),
            ("0x10000", 200),
        ],
        ids=lambda case: str(case)[:20],
    )
    async def test_a_declared_length_of_any_kind_is_answered(self, declared: str, status: int) -> None:
        async with _client(_reads_all) as client:
            answer = await client.post("/", headers={b"Content-Length": declared.encode("latin-1")}, content=_once(b""))
        assert answer.status_code == status


class TestAnswer:
    async def test_an_answer_that_breaks_midway_closes_the_connection(self) -> None:
        async def breaks(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            raise ZeroDivisionError

        with capture_logs() as logs, pytest.raises(ZeroDivisionError):
            async with _client(breaks) as client:
                await client.get("/")
        assert [(line["event"], line["status"]) for line in logs] == [("request", 200)]

    async def test_other_protocols_pass_untouched(self) -> None:
        seen = []

        async def application(scope: Any, receive: Any, send: Any) -> None:
            seen.append((scope, receive, send))

        arguments: Any = ({"type": "websocket"}, object(), object())
        await RequestEnvelope(application, MAX_BODY_BYTES, HeldBodies(MAX_HELD_BYTES), Meter())(*arguments)
        assert seen == [arguments]


class TestLog:
    async def test_one_line_says_what_was_asked_and_how_it_was_answered(self, app: App) -> None:
        with capture_logs() as logs:
            answer = await app.http.get("/v1/models/nothing?secret=1")
        (line,) = logs
        assert line.pop("ms") >= 0
        assert line == {
            "event": "request",
            "log_level": "info",
            "request_id": answer.headers["X-DreamEngine-Request-Id"],
            "method": "GET",
            "path": "/v1/models/nothing",
            "status": 404,
        }

    async def test_a_path_cannot_forge_a_line(self, app: App) -> None:
        with capture_logs() as logs:
            await app.http.get("/v1/models/%0A%7B%22event%22%3A%22request%22%7D%00%1b[2J")
        assert "\n" not in structlog.processors.JSONRenderer()(None, "info", logs[0])
        json.loads(structlog.processors.JSONRenderer()(None, "info", logs[0]))


def _client(application: Any) -> httpx.AsyncClient:
    envelope: Any = RequestEnvelope(application, MAX_BODY_BYTES, HeldBodies(MAX_HELD_BYTES), Meter())
    return httpx.AsyncClient(transport=httpx.ASGITransport(envelope), base_url="http://cluster.test")


async def _reads_all(scope: Any, receive: Any, send: Any) -> None:
    """An application that reads its body and answers 200, or the status of the bound."""
    status = 200
    try:
        while (await receive()).get("more_body"):
            pass
    except BodyTooLarge as error:
        status = error.status
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body"})


async def _once(body: bytes) -> AsyncIterator[bytes]:
    yield body


async def _unread() -> AsyncIterator[bytes]:
    raise AssertionError("the body was read")
    yield b""
