"""Rollouts over HTTP whose frames leave as they are made."""

import asyncio
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from deployments.messages import Frame
from serve_app.settings import Limits
from tests.support.app import App, running_app
from tests.support.models import RAISE, SLEEP_S, SteeredModel
from tests.support.payloads import actions, image_bytes, npy
from tests.support.video import decode

pytestmark = pytest.mark.asyncio(loop_scope="module")

GREY = image_bytes(Image.fromarray(np.full((64, 64, 3), 100, np.uint8)), "PNG")


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[App]:
    directory, limits = tmp_path_factory.mktemp("streams"), Limits(send_timeout_s=0.5)
    async with running_app(directory, SteeredModel(Path(), "cpu"), limits) as running:
        yield running


def steer(length: int = 30, **at: float) -> bytes:
    """One level brighter per frame; `at`: seconds to sleep in every step, or the action from which the model raises."""
    values = actions(length)
    values[:, 0] = 1
    values[:, SLEEP_S] = at.get("sleep_s", 0)
    if "raises" in at:
        values[int(at["raises"]), RAISE] = 1
    return npy(values)


async def send(app: App, headers: dict[str, str], body: bytes | None = None, **query: str) -> httpx.Response:
    files = {"frame": GREY, "actions": body or steer()}
    return await app.http.post("/v1/predict", headers=headers, files=files, data={"num_steps": "1"}, params=query)


def pictures(answer: httpx.Response) -> list[Frame]:
    assert answer.headers["content-type"] == "multipart/x-mixed-replace; boundary=frame"
    *parts, end = answer.content.split(b"--frame")[1:]
    assert end == b"--\r\n"
    return [np.asarray(Image.open(io.BytesIO(part.split(b"\r\n\r\n", 1)[1]))) for part in parts]


async def rows(app: App, customer: Any) -> list[tuple[str, int]]:
    await app.services.ingress._reservations.settled()
    return app.ledger.rows(customer)[1:]


async def test_pngs_come_one_by_one_and_are_charged(app: App) -> None:
    headers, customer = app.key()
    answer = await send(app, headers, stream="png")
    assert [int(frame[0, 0, 0]) for frame in pictures(answer)] == [100 + index for index in range(31)]
    assert answer.headers["X-DreamEngine-Model"] == "tiny-pusher"
    assert await rows(app, customer) == [("debit", -155)]


async def test_a_client_that_accepts_nothing_else_gets_jpegs(app: App) -> None:
    headers, _ = app.key()
    answer = await send(app, headers | {"Accept": "multipart/x-mixed-replace"})
    assert len(pictures(answer)) == 31
    assert answer.content.count(b"Content-Type: image/jpeg") == 31


@pytest.mark.parametrize("length", [1, 12, 13, 30])
async def test_a_fragmented_mp4_holds_the_same_frames_as_a_whole_one(app: App, length: int) -> None:
    headers, customer = app.key()
    streamed = await send(app, headers, steer(length), stream="mp4")
    whole = await send(app, headers, steer(length))
    assert streamed.headers["content-type"] == "video/mp4"
    assert np.array_equal(decode(streamed.content), decode(whole.content))
    assert await rows(app, customer) == [("debit", -5 * (1 + length))] * 2, "a stream is its own run"


class Held:
    """A client that takes one message at a time, when told to, and may leave."""

    def __init__(self, app: App, headers: dict[str, str], body: bytes, query: str) -> None:
        request = app.http.build_request("POST", "/v1/predict", files={"frame": GREY, "actions": body})
        self.body = request.read()
        self.asked = False
        self.left = asyncio.Event()
        self.taken: asyncio.Queue[dict[str, Any]] = asyncio.Queue(1)
        sent = {**headers, "Content-Type": request.headers["content-type"]}
        scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.4"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": "/v1/predict",
            "raw_path": b"/v1/predict",
            "root_path": "",
            "query_string": query.encode(),
            "headers": [(name.lower().encode(), value.encode()) for name, value in sent.items()],
            "client": ("127.0.0.1", 1),
            "server": ("cluster.test", 80),
        }
        self.serving = asyncio.create_task(app.api(scope, self.receive, self.taken.put))  # type: ignore[arg-type]

    async def receive(self) -> dict[str, Any]:
        if not self.asked:
            self.asked = True
            return {"type": "http.request", "body": self.body, "more_body": False}
        await self.left.wait()
        return {"type": "http.disconnect"}

    async def take(self, count: int) -> None:
        for _ in range(count):
            async with asyncio.timeout(10):
                await self.taken.get()


async def test_a_client_that_leaves_pays_for_what_it_was_sent_and_nothing_more_is_made(app: App) -> None:
    headers, customer = app.key()
    before = len(app.model.model.chunks_started)
    client = Held(app, headers, steer(48), "stream=png")
    await client.take(1 + 5)  # the head, and five frames
    client.left.set()
    await client.serving
    (_, refund) = (await rows(app, customer))[1]
    assert 245 - refund in (25, 30), "the fifth, or a sixth that was on its way"
    assert len(app.model.model.chunks_started) - before == 1


async def test_a_slow_reader_is_not_run_ahead_of_and_a_very_slow_one_is_cut_off(app: App) -> None:
    headers, customer = app.key()
    before = len(app.model.model.chunks_started)
    client = Held(app, headers, steer(48), "stream=png")
    await client.take(3)
    for _ in range(20):
        await asyncio.sleep(0.005)
    assert len(app.model.model.chunks_started) - before == 1
    with pytest.raises(TimeoutError):
        await client.serving
    (_, refund) = (await rows(app, customer))[1]
    assert 245 - refund <= 5 * 5


async def test_a_first_chunk_that_breaks_is_an_ordinary_error_and_all_is_refunded(app: App) -> None:
    headers, customer = app.key()
    answer = await send(app, headers, steer(24, raises=0), stream="mp4")
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "ENGINE_FAILED"
    assert await rows(app, customer) == [("debit", -125), ("refund", 125)]


async def test_a_later_chunk_that_breaks_ends_the_answer_short_and_refunds_the_rest(app: App) -> None:
    headers, customer = app.key()
    answer = await send(app, headers, steer(24, raises=12), stream="mp4")
    assert answer.status_code == 200
    assert len(decode(answer.content)) == 13
    assert await rows(app, customer) == [("debit", -125), ("refund", 60)]


async def test_what_costs_more_than_the_balance_is_402_before_anything_is_sent(app: App) -> None:
    headers, customer = app.key(154)
    assert (await send(app, headers, stream="png")).status_code == 402
    assert app.ledger.rows(customer) == [("credit", 154)]


@pytest.mark.parametrize(
    ("path", "query", "more", "message"),
    [
        ("/v1/predict", {"stream": "gif"}, {}, "stream: Input should be 'mp4', 'jpeg' or 'png'"),
        ("/v1/predict", {"stream": "mp4"}, {"Idempotency-Key": "a"}, "Idempotency-Key: is not taken with stream"),
        ("/v1/predict/batch", {"stream": "mp4"}, {}, "stream: is of one rollout"),
        ("/v1/predict/batch", {}, {"Accept": "multipart/x-mixed-replace"}, "stream: is of one rollout"),
    ],
)
async def test_what_cannot_be_streamed_is_refused(
    app: App, path: str, query: dict[str, str], more: dict[str, str], message: str
) -> None:
    headers, customer = app.key()
    files = {"frame": GREY, "actions": steer()}
    answer = await app.http.post(path, headers=headers | more, files=files, params=query)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(message)
    assert app.ledger.rows(customer) == [("credit", 1_000_000)]


async def test_a_stream_may_be_quoted_first(app: App) -> None:
    headers, customer = app.key()
    assert (await send(app, headers, stream="mp4", dryRun="true")).json()["cost_mils"] == 155
    assert app.ledger.rows(customer) == [("credit", 1_000_000)]
