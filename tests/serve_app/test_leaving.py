"""A client may leave while its request waits for anything at all: whatever was held for it is given back."""

import asyncio
import itertools
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from typing import Any, Literal, get_args

import numpy as np
import pytest
import pytest_asyncio
from PIL import Image
from sqlalchemy import text

from deployments import sessions
from serve_app.settings import Limits
from tests.support.app import App, running_app
from tests.support.payloads import actions, image_bytes, npy
from tests.support.sockets import Message

pytestmark = pytest.mark.asyncio(loop_scope="module")

GREY = image_bytes(Image.fromarray(np.full((64, 64, 3), 100, np.uint8)), "PNG")
Headers = dict[str, str]
Cut = Literal["when it begins to wait", "when what it waits for is there"]
"""In the latter case the answer is lost on its way: what was asked for has been done."""


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[App]:
    limits = Limits(session_frames=50, max_sessions_per_customer=1_000, max_sessions=1_000)
    async with running_app(tmp_path_factory.mktemp("leaving"), limits=limits) as running:
        yield running


@types.coroutine
def canceled(work: Coroutine[Any, Any, Any], at_wait: int, cut: Cut) -> Generator[Any, Any, None]:
    """Drive `work` in this task, which is canceled at its `at_wait`-th wait, counted from 1.

    Raises:
        LookupError: it does not wait so often.
    """
    task = asyncio.current_task()
    assert task is not None
    error: BaseException | None = None
    for number in itertools.count(1):
        try:
            waited_for = work.send(None) if error is None else work.throw(error)
        except StopIteration:
            if number <= at_wait:
                raise LookupError from None
            return
        if number == at_wait:
            if cut == "when it begins to wait" or waited_for is None:
                asyncio.get_running_loop().call_soon(task.cancel)
            else:
                waited_for.add_done_callback(lambda _: task.cancel())
        error = None
        try:
            yield waited_for
        except BaseException as thrown:
            error = thrown


def rollout(app: App, headers: Headers) -> Coroutine[Any, Any, Any]:
    files = {"frame": GREY, "actions": npy(actions(24))}
    return app.http.post("/v1/predict", headers=headers, files=files)


def batch(app: App, headers: Headers) -> Coroutine[Any, Any, Any]:
    files = [("frame", GREY), *(("actions", npy(actions(12))) for _ in range(3))]
    return app.http.post("/v1/predict/batch", headers=headers, files=files)


def stream(app: App, headers: Headers) -> Coroutine[Any, Any, Any]:
    files = {"frame": GREY, "actions": npy(actions(24))}
    return app.http.post("/v1/predict", headers=headers, files=files, params={"stream": "png"})


def create_session(app: App, headers: Headers) -> Coroutine[Any, Any, Any]:
    data = {"model": "tiny-pusher"}
    return app.http.post("/v1/sessions", headers=headers, files={"initial_frame": GREY}, data=data)


async def connect_to_session(app: App, headers: Headers) -> None:
    """And read on until the server closes, as it does once nobody has submitted anything for a while."""
    path = (await create_session(app, headers)).json()["ws_url"].removeprefix("ws://cluster.test")
    scope = {
        "type": "websocket",
        "path": path,
        "query_string": b"",
        "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
    }
    from_client: asyncio.Queue[Message] = asyncio.Queue()
    from_client.put_nowait({"type": "websocket.connect"})

    async def to_client(_: Any) -> None:
        pass

    await app.api(scope, from_client.get, to_client)


def num_open(app: App) -> int:
    with app.ledger.database.connect() as connection:
        return int(connection.execute(text("SELECT count(*) FROM reservation WHERE state = 'open'")).scalar_one())


@pytest.mark.parametrize("cut", get_args(Cut))
@pytest.mark.parametrize("act", [rollout, batch, stream, create_session, connect_to_session])
async def test_leaving_at_any_wait_leaves_nothing_open(
    app: App, monkeypatch: pytest.MonkeyPatch, act: Callable[[App, Headers], Coroutine[Any, Any, Any]], cut: Cut
) -> None:
    monkeypatch.setattr(sessions, "CONNECT_WITHIN_S", 0.02)
    app.services.sessions.limits = sessions.SessionLimits(50, idle_s=0.02)
    headers, customer = app.key()
    for at_wait in itertools.count(1):
        try:
            await canceled(act(app, headers), at_wait, cut)
        except asyncio.CancelledError:
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
        except LookupError:
            break
    async with asyncio.timeout(20):
        while num_open(app) or app.services.ingress._reservations._open:  # noqa: ASYNC110 - what others do
            await asyncio.sleep(0.01)
    kinds = [kind for kind, _ in app.ledger.rows(customer)]
    assert kinds.count("debit") > 1, "some had begun"
