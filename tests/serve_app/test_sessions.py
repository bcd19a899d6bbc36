"""Interactive sessions: what a socket is told, what its customer pays, and what bounds it."""

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import pytest_asyncio
from PIL import Image
from ray.exceptions import WorkerCrashedError
from sqlalchemy.exc import OperationalError

from billing.commands import CustomerId, KeyTerms, RequestId, SetCreditLine, SetKeyTerms, Settle
from billing.keys import token_sha256
from billing.money import Mils
from billing.reader import LedgerReader
from deployments import sessions
from deployments.messages import Frame
from serve_app.routes import sessions as routes
from serve_app.settings import Limits
from tests.support.app import App, running_app
from tests.support.models import RAISE, SLEEP_S, SteeredModel
from tests.support.payloads import actions, image_bytes, npy
from tests.support.sockets import connected

pytestmark = pytest.mark.asyncio(loop_scope="module")

GREY = image_bytes(Image.fromarray(np.full((64, 64, 3), 100, np.uint8)), "PNG")
RATE = 5


LIMITS = Limits(session_frames=200, max_sessions_per_customer=2, send_timeout_s=1.0)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[App]:
    async with running_app(tmp_path_factory.mktemp("sessions"), SteeredModel(Path(), "cpu"), LIMITS) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def fresh(tmp_path: Path) -> AsyncIterator[App]:
    """One that a test may count the chunks of, stop, or break."""
    async with running_app(tmp_path, SteeredModel(Path(), "cpu"), LIMITS) as running:
        yield running


async def create(app: App, headers: dict[str, str], **fields: Any) -> dict[str, Any]:
    data = {"model": "tiny-pusher", "num_steps": "1"} | {name: str(value) for name, value in fields.items()}
    answer = await app.http.post("/v1/sessions", headers=headers, files={"initial_frame": GREY}, data=data)
    assert answer.status_code == 200, answer.text
    envelope: dict[str, Any] = answer.json()
    return envelope


def socket_of(app: App, envelope: dict[str, Any], headers: dict[str, str]) -> Any:
    return connected(app.api, urlsplit(envelope["ws_url"]).path, headers)


def steer(speed: float, length: int = 12, **columns: float) -> list[list[float]]:
    values = actions(length)
    values[:, 0] = speed
    values[0, RAISE] = columns.get("raises", 0)
    values[:, SLEEP_S] = columns.get("sleep_s", 0)
    return values.tolist()


def picture(message: dict[str, Any]) -> Frame:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(message["data"]))))


async def settled(app: App, customer: CustomerId) -> list[tuple[str, int]]:
    """Rows after the first credit."""
    await asyncio.sleep(0)
    await app.services.ingress._reservations.settled()
    return app.ledger.rows(customer)[1:]


async def test_frames_arrive_in_order_and_what_was_not_streamed_is_refunded(app: App) -> None:
    headers, customer = app.key(10_000)
    envelope = await create(app, headers)
    assert (envelope["state"], envelope["frames_reserved"], envelope["reserved_mils"]) == ("created", 200, 1_000)
    assert envelope["ws_url"] == f"ws://cluster.test/v1/sessions/{envelope['id']}/stream"
    async with socket_of(app, envelope, headers) as socket:
        started = await socket.receive()
        assert (started["type"], started["chunk_size"], started["action_dim"]) == ("session_started", 12, 8)
        await socket.send(type="submit_actions", actions=steer(1, 24))
        messages = await socket.until("rollout_complete")
        frames = [message for message in messages if message["type"] == "frame"]
        assert [message["index"] for message in frames] == list(range(25))
        assert [picture(message)[0, 0, 0] for message in frames] == [100 + index for index in range(25)]
        billing = [message for message in messages if message["type"] == "billing"]
        assert billing[-1] | {"type": ""} == {
            "type": "",
            "frames_streamed": 25,
            "debited_mils": 125,
            "balance_mils": 10_000 - 125,
        }
        assert messages[-1]["frames_streamed_total"] == 25
        await socket.send(type="submit_actions", actions=steer(-2, 5))
        messages = await socket.until("rollout_complete")
        assert [picture(message)[0, 0, 0] for message in messages if message["type"] == "frame"] == [
            124 - 2 * index for index in range(1, 6)
        ], "it goes on from the last frame"
        assert (messages[-1]["frames_streamed"], messages[-1]["frames_streamed_total"]) == (5, 30)
        await socket.send(type="control", command="stop")
        last = (await socket.until("billing"))[-1]
        assert (last["debited_mils"], last["balance_mils"]) == (150, 9_850)
        assert await socket.close_code() == 1000
    assert await settled(app, customer) == [("debit", -1_000), ("refund", 850)]


async def test_the_frames_of_a_chunk_leave_before_the_next_one_is_computed(app: App) -> None:
    """The second chunk raises, and the first one's frames are there all the same, and paid for."""
    headers, customer = app.key(10_000)
    async with socket_of(app, await create(app, headers), headers) as socket:
        poisoned = steer(1, 24)
        poisoned[12][RAISE] = 1
        await socket.send(type="submit_actions", actions=poisoned)
        messages = await socket.until("error")
        assert sum(message["type"] == "frame" for message in messages) == 13
        assert messages[-1]["error"]["code"] == "ENGINE_FAILED"
        await socket.send(type="submit_actions", actions=steer(1))
        messages = await socket.until("rollout_complete")
        assert picture(messages[0])[0, 0, 0] == 113, "the session goes on from its last good frame"
        assert messages[-1]["frames_streamed_total"] == 25
    assert await settled(app, customer) == [("debit", -1_000), ("refund", 1_000 - 25 * RATE)]


async def test_the_same_seed_and_actions_give_the_same_rollout_as_predict(fresh: App) -> None:
    """Chunks are numbered through the whole session, which is what the noise is keyed by."""
    headers, _ = fresh.key(10_000)
    async with socket_of(fresh, await create(fresh, headers, seed=7), headers) as socket:
        for length in (12, 12):
            await socket.send(type="submit_actions", actions=steer(0, length))
            await socket.until("rollout_complete")
    assert fresh.model.model.chunks_started == [0, 1]


async def test_a_dropped_socket_settles(app: App) -> None:
    headers, customer = app.key(10_000)
    async with socket_of(app, await create(app, headers), headers) as socket:
        await socket.send(type="submit_actions", actions=steer(0))
        await socket.until("rollout_complete")
        await socket.drop()
    assert await settled(app, customer) == [("debit", -1_000), ("refund", 1_000 - 13 * RATE)]


async def test_a_slow_reader_pauses_generation_and_a_very_slow_one_is_closed(fresh: App) -> None:
    headers, customer = fresh.key(10_000)
    async with socket_of(fresh, await create(fresh, headers), headers) as socket:
        await socket.send(type="submit_actions", actions=steer(0, 120))
        await socket.until("frame")
        for _ in range(50):  # long enough for all ten chunks, if anything ran ahead
            await asyncio.sleep(0.01)
        assert len(fresh.model.model.chunks_started) <= 2 + sessions.QUEUED_CHUNKS
        await asyncio.sleep(LIMITS.send_timeout_s)
        assert await socket.close_code() == 4008
    (_, refund) = (await settled(fresh, customer))[1]
    assert refund >= 1_000 - 10 * RATE


async def test_an_idle_session_ends(fresh: App) -> None:
    headers, customer = fresh.key(10_000)
    fresh.services.sessions.limits = sessions.SessionLimits(200, idle_s=0.05)
    async with socket_of(fresh, await create(fresh, headers), headers) as socket:
        assert await socket.close_code() == 4000
    assert await settled(fresh, customer) == [("debit", -1_000), ("refund", 1_000)]


async def test_a_session_that_nobody_connects_to_is_refunded(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sessions, "CONNECT_WITHIN_S", 0.02)
    headers, customer = app.key(10_000)
    envelope = await create(app, headers)
    await asyncio.sleep(0.1)
    assert await settled(app, customer) == [("debit", -1_000), ("refund", 1_000)]
    async with socket_of(app, envelope, headers) as socket:
        assert (await socket.receive())["type"] == "error"
        assert await socket.close_code() == 4004


async def test_delete_ends_a_session_where_it_streams_and_says_what_it_cost_as_often_as_asked(app: App) -> None:
    headers, customer = app.key(10_000)
    envelope = await create(app, headers)
    path = f"/v1/sessions/{envelope['id']}"
    assert (await app.http.get(path, headers=headers)).json()["state"] == "created"
    async with socket_of(app, envelope, headers) as socket:
        await socket.send(type="submit_actions", actions=steer(0))
        await socket.until("rollout_complete")
        assert (await app.http.get(path, headers=headers)).json()["state"] == "streaming"
        deleting = asyncio.create_task(app.http.delete(path, headers=headers))
        assert await socket.close_code() == 1000
        closed = (await deleting).json()
    assert (closed["state"], closed["frames_streamed"], closed["cost_mils"]) == ("closed", 13, 65)
    assert (await app.http.delete(path, headers=headers)).json() == closed
    assert app.ledger.rows(customer)[1:] == [("debit", -1_000), ("refund", 935)]


async def test_delete_before_anybody_connects_refunds_it_all(app: App) -> None:
    headers, customer = app.key(10_000)
    envelope = await create(app, headers)
    closed = await app.http.delete(f"/v1/sessions/{envelope['id']}", headers=headers)
    assert (closed.json()["state"], closed.json()["cost_mils"]) == ("closed", 0)
    assert app.ledger.rows(customer)[1:] == [("debit", -1_000), ("refund", 1_000)]


async def test_another_customers_session_is_not_known(app: App) -> None:
    mine, _ = app.key(10_000)
    theirs, _ = app.key(10_000)
    envelope = await create(app, theirs)
    for method in ("GET", "DELETE"):
        assert (await app.http.request(method, f"/v1/sessions/{envelope['id']}", headers=mine)).status_code == 404
    async with socket_of(app, envelope, mine) as socket:
        assert (await socket.receive())["error"]["code"] == "INVALID_REQUEST"
        assert await socket.close_code() == 4004
    assert (await app.http.get(f"/v1/sessions/{envelope['id']}", headers=theirs)).json()["state"] == "created"


@pytest.mark.parametrize(
    "headers", [{}, {"Authorization": "Bearer dre_x"}, {"Authorization": "Bearer dre_" + "a" * 43}]
)
async def test_a_socket_without_a_good_key_is_told_so_and_closed(app: App, headers: dict[str, str]) -> None:
    good, _ = app.key(10_000)
    async with socket_of(app, await create(app, good), headers) as socket:
        assert (await socket.receive())["error"]["code"] == "AUTHENTICATION_FAILED"
        assert await socket.close_code() == 4001


async def test_a_key_that_may_only_read_neither_steers_nor_ends_a_session(app: App) -> None:
    headers, customer = app.key(10_000)
    envelope = await create(app, headers)
    key = app.ledger.reader.key_by_token_hash(token_sha256(headers["Authorization"].removeprefix("Bearer ")))
    assert key is not None
    app.ledger.apply(SetKeyTerms(key.key_id, KeyTerms(scope="read")))
    async with socket_of(app, envelope, headers) as socket:
        assert "may read" in (await socket.receive())["error"]["message"]
        assert await socket.close_code() == 4001
    refused = await app.http.delete(f"/v1/sessions/{envelope['id']}", headers=headers)
    assert (refused.status_code, await settled(app, customer)) == (403, [("debit", -1_000)])
    seen = await app.http.get(f"/v1/sessions/{envelope['id']}", headers=headers)
    assert seen.json()["state"] == "created"


async def test_a_rollout_is_no_session(app: App) -> None:
    headers, _ = app.key(10_000)
    files = {"frame": GREY, "actions": npy(actions(1))}
    answer = await app.http.post("/v1/predict", headers=headers, files=files)
    rollout = answer.headers["X-DreamEngine-Request-Id"].removeprefix("req_")
    await app.services.ingress._reservations.settled()
    assert (await app.http.get(f"/v1/sessions/session_{rollout}", headers=headers)).status_code == 404
    assert (await app.http.get("/v1/sessions/session_..%2f1", headers=headers)).status_code == 404


async def test_a_session_has_one_connection(app: App) -> None:
    headers, _ = app.key(10_000)
    envelope = await create(app, headers)
    async with socket_of(app, envelope, headers) as first:
        await first.receive()
        async with socket_of(app, envelope, headers) as second:
            assert "connected" in (await second.receive())["error"]["message"]
            assert await second.close_code() == 4009
        await first.send(type="ping")
        assert (await first.receive())["type"] == "pong"


async def test_a_customer_has_so_many_sessions_and_an_ended_one_counts_no_more(app: App) -> None:
    headers, customer = app.key(10_000)
    first, _ = [await create(app, headers) for _ in range(2)]
    data = {"model": "tiny-pusher"}
    refused = await app.http.post("/v1/sessions", headers=headers, files={"initial_frame": GREY}, data=data)
    assert refused.status_code == 429
    assert refused.headers["Retry-After"] == "10"
    assert sum(kind == "debit" for kind, _ in app.ledger.rows(customer)) == 2
    await app.http.delete(f"/v1/sessions/{first['id']}", headers=headers)
    await asyncio.sleep(0.01)
    await create(app, headers)


async def test_the_budget_is_what_the_balance_covers_and_a_chunk_at_least(app: App) -> None:
    rich, _ = app.key(10_000)
    some, _ = app.key(13 * RATE + 2)
    poor, customer = app.key(13 * RATE - 1)
    assert (await create(app, rich, max_frames=50))["frames_reserved"] == 50
    assert (await create(app, some))["frames_reserved"] == 13
    data = {"model": "tiny-pusher"}
    refused = await app.http.post("/v1/sessions", headers=poor, files={"initial_frame": GREY}, data=data)
    assert refused.status_code == 402
    assert refused.json()["detail"]["requested_mils"] == 13 * RATE
    assert app.ledger.rows(customer) == [("credit", 13 * RATE - 1)]


async def test_the_budget_of_a_postpaid_customer_is_what_its_credit_line_covers(app: App) -> None:
    headers, customer = app.key(0)
    app.ledger.apply(SetCreditLine(customer, Mils(17 * RATE)))
    assert (await create(app, headers))["frames_reserved"] == 17


async def test_what_the_budget_does_not_cover_is_not_run_and_exactly_the_rest_is(app: App) -> None:
    headers, customer = app.key(10_000)
    async with socket_of(app, await create(app, headers, max_frames=30), headers) as socket:
        await socket.receive()
        await socket.send(type="submit_actions", actions=steer(0, 30))
        error = (await socket.receive())["error"]
        assert error["code"] == "INVALID_REQUEST"
        assert "30 frames of its budget left and this needs 31" in error["message"]
        await socket.send(type="submit_actions", actions=steer(0, 29))
        assert (await socket.until("rollout_complete"))[-1]["frames_streamed_total"] == 30
    assert await settled(app, customer) == [("debit", -150)]


async def test_too_many_submissions_at_once_are_refused_and_the_others_run(app: App) -> None:
    headers, _ = app.key(10_000)
    async with socket_of(app, await create(app, headers), headers) as socket:
        await socket.receive()
        for _ in range(8):
            await socket.send(type="submit_actions", actions=steer(0, 1, sleep_s=0.05))
        seen: list[str] = []
        while seen.count("rollout_complete") + seen.count("error") < 8:
            seen.append((await socket.receive())["type"])
        assert 4 <= seen.count("rollout_complete") <= 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "message: Invalid JSON"),
        ("[]", "message: "),
        ('{"type": "dance"}', "message: "),
        ('{"type": "control", "command": "faster"}', "control.command: "),
        ('{"type": "submit_actions"}', "actions: Field required"),
        ('{"type": "submit_actions", "actions": []}', "actions: has 0 actions; 1 to 1200 are accepted"),
        ('{"type": "submit_actions", "actions": [[1, 2]]}', "actions: has rows of another length; (T, 8) is accepted"),
        ('{"type": "submit_actions", "actions": [[1, 2, 3, 4, 5, 6, 7, 1e39]]}', "actions: has values that are not"),
        ('{"type": "submit_actions", "actions": [[1, 2, 3, 4, 5, 6, 7, "x"]]}', "actions.0.7: "),
        ('{"type": "submit_actions", "actions": [[1, 2, 3, 4, 5, 6, 7, NaN]]}', "actions"),
        ('{"type": "submit_actions", "actions": [[0,0,0,0,0,0,0,0]], "seed": -1}', "seed: "),
        ('{"type": "submit_actions", "actions": [[0,0,0,0,0,0,0,0]], "num_steps": 0}', "num_steps: "),
        ('{"type": "submit_actions", "actions": [[0,0,0,0,0,0,0,0]], "sede": 1}', "sede: "),
    ],
)
async def test_a_bad_message_is_answered_by_its_field_and_the_session_goes_on(
    app: App, text: str, message: str
) -> None:
    headers, customer = app.key(10_000)
    async with socket_of(app, await create(app, headers), headers) as socket:
        await socket.receive()
        await socket.send_text(text)
        answer = await socket.receive()
        assert answer["error"]["code"] == "INVALID_REQUEST"
        assert answer["error"]["message"].startswith(message), answer
        await socket.send(type="ping")
        assert (await socket.receive())["type"] == "pong"
    assert await settled(app, customer) == [("debit", -1_000), ("refund", 1_000)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "unknown"}, "model: 'unknown' is not served here"),
        ({"max_frames": 1}, "max_frames: "),
        ({"seed": -1}, "seed: "),
        ({"fps": 10}, "fps: is not a part of this request"),
        ({"initial_frame_id": "frame_1"}, "initial_frame_id: is not taken beside the file"),
    ],
)
async def test_a_bad_session_is_refused_by_its_field_and_nothing_is_reserved(
    app: App, fields: dict[str, Any], message: str
) -> None:
    headers, customer = app.key(10_000)
    data = {"model": "tiny-pusher"} | {name: str(value) for name, value in fields.items()}
    answer = await app.http.post("/v1/sessions", headers=headers, files={"initial_frame": GREY}, data=data)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(message)
    assert app.ledger.rows(customer) == [("credit", 10_000)]


async def test_an_uploaded_frame_begins_a_session_and_a_quote_names_its_price(app: App) -> None:
    headers, _ = app.key(10_000)
    frame = (await app.http.post("/v1/frames", headers=headers, files={"frame": GREY})).json()["id"]
    data = {"model": "tiny-pusher", "initial_frame_id": frame, "max_frames": "40"}
    quote = await app.http.post("/v1/sessions", headers=headers, files={"x": b""}, data=data, params={"dryRun": "true"})
    assert quote.status_code == 422, "an unknown part is refused in a dry run too"
    form = {name: (None, value) for name, value in data.items()}
    quote = await app.http.post("/v1/sessions", headers=headers, files=form, params={"dryRun": "true"})
    assert quote.json()["cost_mils"] == 200
    envelope = await app.http.post(
        "/v1/sessions", headers=headers | {"X-DreamEngine-Quote-Id": quote.json()["quote_id"]}, files=form
    )
    assert envelope.json()["reserved_mils"] == 200


async def test_a_server_that_stops_settles_and_says_so(fresh: App) -> None:
    headers, customer = fresh.key(10_000)
    async with socket_of(fresh, await create(fresh, headers), headers) as socket:
        await socket.send(type="submit_actions", actions=steer(0))
        await socket.until("rollout_complete")
        draining = asyncio.create_task(fresh.services.sessions.drain())
        assert await socket.close_code() == 1012
        await draining
    assert await settled(fresh, customer) == [("debit", -1_000), ("refund", 1_000 - 13 * RATE)]


async def test_a_directory_that_restarted_learns_of_the_session_again(
    fresh: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "POLL_S", 0.01)
    headers, _ = fresh.key(10_000)
    envelope = await create(fresh, headers)
    async with socket_of(fresh, envelope, headers) as socket:
        await socket.receive()
        fresh.services.sessions._directory._target._live.clear()
        await asyncio.sleep(0.1)
        deleting = asyncio.create_task(fresh.http.delete(f"/v1/sessions/{envelope['id']}", headers=headers))
        assert await socket.close_code() == 1000
        assert (await deleting).json()["state"] == "closed"


async def test_a_large_message_is_refused(app: App, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routes, "MAX_MESSAGE_BYTES", 100)
    headers, _ = app.key(10_000)
    async with socket_of(app, await create(app, headers), headers) as socket:
        await socket.receive()
        await socket.send_text(json.dumps({"type": "submit_actions", "actions": steer(0)}))
        assert (await socket.receive())["error"]["message"].startswith("message: has")


class Away:
    """A session directory that cannot be asked: in vain, or so that only its answer is lost."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, app: App, method: str, after: bool, times: int = 1_000) -> None:
        directory = app.services.sessions._directory._target
        self._real = getattr(directory, method)
        self._after = after
        self._times = times
        monkeypatch.setattr(directory, method, self)

    async def __call__(self, *arguments: Any) -> Any:
        if not self._times:
            return await self._real(*arguments)
        self._times -= 1
        if self._after:
            await self._real(*arguments)
        raise WorkerCrashedError


async def nobody_renews(app: App) -> None:
    """What is open still is given back when its lease ends; nobody holds it any longer than that."""
    async with asyncio.timeout(10):
        while app.services.ingress._reservations._open:  # noqa: ASYNC110 - of tasks that nobody waits for
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("at", ["before it is connected to", "while it is"])
async def test_a_session_whose_lease_has_ended_streams_nothing(
    fresh: App, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """Its ingress died, say: the money is given back, and the directory still knows the session."""
    headers, customer = fresh.key(10_000)
    envelope = await create(fresh, headers)
    expired = Settle(RequestId(envelope["id"].replace("session_", "req_")), 0, "lease expired")
    if at == "before it is connected to":
        fresh.ledger.apply(expired)
    else:
        directory = fresh.services.sessions._directory._target
        claim = directory.claim

        async def claimed_too_late(*arguments: Any) -> Any:
            await asyncio.to_thread(fresh.ledger.apply, expired)
            return await claim(*arguments)

        monkeypatch.setattr(directory, "claim", claimed_too_late)
    async with socket_of(fresh, envelope, headers) as socket:
        assert (await socket.receive())["type"] == "error"
        assert await socket.close_code() == 4004
    await nobody_renews(fresh)
    assert fresh.ledger.rows(customer)[1:] == [("debit", -1_000), ("refund", 1_000)]
    assert fresh.model.model.chunks_started == []


async def test_a_session_whose_lease_ends_while_it_streams_is_ended(
    fresh: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its process was frozen, say, for longer than that."""
    monkeypatch.setattr(sessions, "POLL_S", 0.01)
    headers, customer = fresh.key(10_000)
    envelope = await create(fresh, headers)
    async with socket_of(fresh, envelope, headers) as socket:
        await socket.send(type="submit_actions", actions=steer(0))
        await socket.until("rollout_complete")
        request_id = RequestId(envelope["id"].replace("session_", "req_"))
        await asyncio.to_thread(fresh.ledger.apply, Settle(request_id, 0, "lease expired"))
        assert await socket.close_code() == 1012
    assert await settled(fresh, customer) == [("debit", -1_000), ("refund", 1_000)]


async def test_a_session_of_a_model_that_is_not_served_here_any_more_is_given_back(
    fresh: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers, customer = fresh.key(10_000)
    envelope = await create(fresh, headers)
    monkeypatch.setattr(fresh.services.sessions, "_models", {})
    async with socket_of(fresh, envelope, headers) as socket:
        assert await socket.close_code() == 4004
    await nobody_renews(fresh)
    assert await settled(fresh, customer) == [("debit", -1_000), ("refund", 1_000)]


@pytest.mark.parametrize("after", [False, True])
async def test_no_lease_is_renewed_of_a_session_that_could_not_be_claimed(
    fresh: App, monkeypatch: pytest.MonkeyPatch, after: bool
) -> None:
    headers, _ = fresh.key(10_000)
    envelope = await create(fresh, headers)
    Away(monkeypatch, fresh, "claim", after)
    async with socket_of(fresh, envelope, headers) as socket:
        assert (await socket.receive())["error"]["code"] == "ENGINE_FAILED"
        assert await socket.close_code() == 1011
    await nobody_renews(fresh)


async def test_a_second_socket_that_fails_takes_nothing_from_the_first(
    fresh: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers, customer = fresh.key(10_000)
    envelope = await create(fresh, headers)
    async with socket_of(fresh, envelope, headers) as first:
        await first.receive()
        Away(monkeypatch, fresh, "claim", after=True)
        async with socket_of(fresh, envelope, headers) as second:
            assert await second.close_code() == 1011
        assert len(fresh.services.ingress._reservations._open) == 1
        await first.send(type="submit_actions", actions=steer(0))
        await first.until("rollout_complete")
    assert await settled(fresh, customer) == [("debit", -1_000), ("refund", 1_000 - 13 * RATE)]


async def test_no_lease_is_renewed_of_a_session_whose_claim_is_not_heard_of(
    fresh: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    Away(monkeypatch, fresh, "wait_claimed", after=False)
    headers, _ = fresh.key(10_000)
    await create(fresh, headers)
    await nobody_renews(fresh)


async def test_a_session_hears_of_its_end_though_the_directory_was_away(
    fresh: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "RETRY_S", 0.01)
    Away(monkeypatch, fresh, "wait_closing", after=False, times=3)
    headers, _ = fresh.key(10_000)
    envelope = await create(fresh, headers)
    async with socket_of(fresh, envelope, headers) as socket:
        await socket.receive()
        deleting = asyncio.create_task(fresh.http.delete(f"/v1/sessions/{envelope['id']}", headers=headers))
        assert await socket.close_code() == 1000
        assert (await deleting).json()["state"] == "closed"


async def test_a_session_streams_on_while_the_balance_cannot_be_asked_for(
    fresh: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers, customer = fresh.key(10_000)
    async with socket_of(fresh, await create(fresh, headers), headers) as socket:
        await socket.receive()

        def away(*_: Any) -> Any:
            raise OperationalError("", {}, Exception("away"))

        monkeypatch.setattr(LedgerReader, "balance", away)
        await socket.send(type="submit_actions", actions=steer(0, 24))
        messages = await socket.until("rollout_complete")
        assert [message["type"] for message in messages].count("frame") == 25
        assert "billing" not in [message["type"] for message in messages]
        await socket.send(type="control", command="stop")
        assert await socket.close_code() == 1000
    assert await settled(fresh, customer) == [("debit", -1_000), ("refund", 1_000 - 25 * RATE)]
