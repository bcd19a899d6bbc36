"""A client may leave while its request waits for anything at all: whatever was held for it is given back."""

import asyncio
import contextlib
import itertools
import os
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import pytest_asyncio
from PIL import Image
from sqlalchemy import text

from deployments import sessions
from serve_app.settings import Limits
from tests.support.app import App, running_app
from tests.support.cuts import Moment, left_at
from tests.support.jobs import queue
from tests.support.payloads import actions, image_bytes, npy
from tests.support.sockets import Message

pytestmark = pytest.mark.asyncio(loop_scope="module")

GREY = image_bytes(Image.fromarray(np.full((64, 64, 3), 100, np.uint8)), "PNG")
Headers = dict[str, str]
SEEDS = itertools.count()


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[App]:
    limits = Limits(session_frames=50, max_sessions_per_customer=1_000, max_sessions=1_000)
    async with running_app(tmp_path_factory.mktemp("leaving"), limits=limits) as running:
        yield running


def unlike_any_other() -> dict[str, str]:
    return {"seed": str(next(SEEDS))}


def rollout(app: App, headers: Headers) -> Coroutine[Any, Any, Any]:
    files = {"frame": GREY, "actions": npy(actions(24))}
    return app.http.post("/v1/predict", headers=headers, files=files, data=unlike_any_other())


def rollout_sent_again(app: App, headers: Headers) -> Coroutine[Any, Any, Any]:
    """Which joins the first, or is answered with its result."""
    return app.http.post("/v1/predict", headers=headers, files={"frame": GREY, "actions": npy(actions(24))})


def batch(app: App, headers: Headers) -> Coroutine[Any, Any, Any]:
    files = [("frame", GREY), *(("actions", npy(actions(12))) for _ in range(3))]
    return app.http.post("/v1/predict/batch", headers=headers, files=files, data=unlike_any_other())


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


async def close_session(app: App, headers: Headers) -> None:
    session_id = (await create_session(app, headers)).json()["id"]
    await app.http.delete(f"/v1/sessions/{session_id}", headers=headers)


def upload_frame(app: App, headers: Headers) -> Coroutine[Any, Any, Any]:
    return app.http.post("/v1/frames", headers=headers, files={"frame": GREY})


def queue_rollout(app: App, headers: Headers) -> Coroutine[Any, Any, Any]:
    return queue(app, headers, seed=next(SEEDS))


async def cancel_rollout(app: App, headers: Headers) -> None:
    """While it waits: it is the process that was asked which gives back what it held."""
    rollout_id = (await queue_rollout(app, headers)).json()["id"]
    await app.http.delete(f"/v1/rollouts/{rollout_id}", headers=headers)


def left_behind(app: App) -> dict[str, Any]:
    """What is held of clients now, by where."""
    parts = app.services
    with app.ledger.database.connect() as connection:
        reservations = connection.execute(text("SELECT request_id FROM reservation WHERE state = 'open'"))
        jobs = connection.execute(text("SELECT request_id FROM rollout_job WHERE finished_at IS NULL"))
        held = {"open reservations": [*reservations], "jobs": [*jobs]}
    held |= {
        "renewed leases": parts.ingress._reservations._open,
        "running requests": parts.ingress._running,
        "sessions": parts.sessions._connected,
        "known sessions": parts.sessions._directory._target._live,
        "bytes of bodies": app.api.state.held_bodies.num_bytes,
        "rows of the engine": app.model.engine.num_rows,
        "files": files_of_requests(parts.args.data_dir / "results"),
    }
    return {where: what for where, what in held.items() if what}


def files_of_requests(results: Path) -> list[str]:
    """Half-made ones, and inputs of jobs. Others may be moved while this looks."""
    found = [os.path.join(place, name) for place, *names in os.walk(results) for name in itertools.chain(*names)]
    return [each for each in found if ".partial" in each or "inputs/" in each]


async def quiet(app: App, num_tasks: int) -> None:
    """Fails if something of a client's is still there after a while, or one more task than there were."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(10):
            while left_behind(app) or len(asyncio.all_tasks()) > num_tasks:  # noqa: ASYNC110 - what others do
                await asyncio.sleep(0.01)
    assert left_behind(app) == {}
    assert len(asyncio.all_tasks()) <= num_tasks, asyncio.all_tasks()


PAID = (rollout, batch, stream, create_session, connect_to_session, close_session, queue_rollout, cancel_rollout)


@pytest.mark.parametrize("moment", get_args(Moment))
@pytest.mark.parametrize("act", [*PAID, rollout_sent_again, upload_frame])
async def test_leaving_at_any_wait_leaves_nothing_behind(
    app: App, monkeypatch: pytest.MonkeyPatch, act: Callable[[App, Headers], Coroutine[Any, Any, Any]], moment: Moment
) -> None:
    monkeypatch.setattr(sessions, "CONNECT_WITHIN_S", 0.02)
    app.services.sessions.limits = sessions.SessionLimits(50, idle_s=0.02)
    jobs = app.services.jobs.jobs
    limits = jobs._limits
    if act is cancel_rollout:
        jobs._limits = replace(limits, at_once=0)
    headers, customer = app.key()
    await act(app, headers)  # what is kept for the next time is there from now on, or it would wait once less each time
    num_tasks = len(asyncio.all_tasks())
    at_wait = 1
    while await left_at(act(app, headers), at_wait, moment):
        at_wait += 1
    jobs._limits = limits
    await quiet(app, num_tasks)
    kinds = [kind for kind, _ in app.ledger.rows(customer)]
    assert (act in PAID) == (kinds.count("debit") > 2), "some had begun, beside the first and the last"
