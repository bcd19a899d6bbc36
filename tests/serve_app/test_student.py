"""The causal student as it is served: frames leave while the rest of their chunk is computed, and are paid for then."""

import base64
import io
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from billing.commands import CustomerId
from deployments.video import Encoders, join_chunks
from deployments.world_model import pusher
from deployments.world_model.causal import SIGMAS, Cache
from deployments.world_model.streaming import StreamingWorldModel, StreamRow
from serve_app.catalog import CATALOG, DEFAULT_MODEL, PACKAGED_CHECKPOINTS, RUNNERS, STUDENT, model_spec
from serve_app.settings import Limits, Settings
from tests.support.app import App, running_app
from tests.support.payloads import image_bytes, npy
from tests.support.sockets import connected
from tests.support.video import decode

pytestmark = pytest.mark.asyncio(loop_scope="module")

START = pusher.render(pusher.reset(1, np.random.default_rng(3)))[0]
PICTURE = image_bytes(Image.fromarray(START), "PNG")
RATE = 5


class GatedStudent(StreamingWorldModel):
    """Computes as it does, but for steps that a test holds back and parts that it breaks."""

    def __init__(self, other: StreamingWorldModel) -> None:
        super().__init__(other.model)
        self.reset()

    def reset(self) -> None:
        self.steps = 0
        self.held = False
        self.permits = threading.Semaphore(0)
        self.fails_at: int | None = None

    def step(self, rows: Sequence[StreamRow]) -> None:
        if self.held:
            assert self.permits.acquire(timeout=20)
        self.steps += 1
        if self.steps == self.fails_at:
            raise ValueError("the input is poisoned")
        super().step(rows)

    def allow(self, steps: int) -> None:
        self.held = True
        self.permits.release(steps)

    def let_go(self) -> None:
        self.held = False
        self.permits.release(1000)


@pytest.fixture(scope="module")
def packaged() -> StreamingWorldModel:
    return StreamingWorldModel.load(PACKAGED_CHECKPOINTS[STUDENT])


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def served(packaged: StreamingWorldModel, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[App]:
    directory, limits = tmp_path_factory.mktemp("student"), Limits(session_frames=200)
    async with running_app(directory, GatedStudent(packaged), limits, slug=STUDENT) as running:
        yield running


@pytest.fixture
def app(served: App) -> Iterator[App]:
    served.model.model.reset()
    yield served
    served.model.model.let_go()


def moves(length: int, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (length, 8)).astype(np.float32)


def alone(packaged: StreamingWorldModel, values: np.ndarray, seed: int = 7) -> np.ndarray:
    """What the student gives in one go, outside any server."""
    (frames,) = packaged.model.rollouts([START], [values], [seed], num_steps=1)
    return np.asarray(frames)


async def session_of(app: App, headers: dict[str, str], **fields: Any) -> Any:
    data = {"model": STUDENT, "seed": "7"} | {name: str(value) for name, value in fields.items()}
    answer = await app.http.post("/v1/sessions", headers=headers, files={"initial_frame": PICTURE}, data=data)
    assert answer.status_code == 200, answer.text
    return connected(app.api, urlsplit(answer.json()["ws_url"]).path, headers)


async def submit(socket: Any, values: np.ndarray) -> None:
    await socket.send(type="submit_actions", actions=values.tolist())


def shown(messages: Sequence[dict[str, Any]]) -> np.ndarray:
    """The frames among them, uint8 (F, H, W, 3)."""
    pictures = [base64.b64decode(message["data"]) for message in messages if message["type"] == "frame"]
    return np.stack([np.asarray(Image.open(io.BytesIO(picture))) for picture in pictures])


async def settled(app: App, customer: CustomerId) -> list[int]:
    await app.services.ingress._reservations.settled()
    return [amount for _, amount in app.ledger.rows(customer)[1:]]


async def test_the_first_latent_frame_leaves_before_the_rest_of_its_chunk_is_computed(
    app: App, packaged: StreamingWorldModel
) -> None:
    """Two passes: one that writes the start frame, one for the first four frames."""
    model, (headers, customer) = app.model.model, app.key(10_000)
    values = moves(12)
    async with await session_of(app, headers) as socket:
        await socket.receive()
        model.allow(steps=2)
        await submit(socket, values)
        first = [await socket.receive() for _ in range(5)]
        assert model.steps == 2
        model.let_go()
        rest = await socket.until("rollout_complete")
        assert model.steps == 1 + 3 * 2
        assert [message["index"] for message in first + rest if message["type"] == "frame"] == list(range(13))
        assert np.array_equal(shown(first + rest), alone(packaged, values))
        assert [message["frames_streamed"] for message in rest if message["type"] == "billing"] == [13]
    assert await settled(app, customer) == [-1_000, 1_000 - 13 * RATE]


async def test_submissions_of_whole_latent_frames_give_one_unbroken_rollout_whatever_is_forgotten(
    app: App, packaged: StreamingWorldModel
) -> None:
    values = moves(76)
    headers, _ = app.key(10_000)
    contexts, seen = app.model.model.context_cache, []
    misses = contexts.misses
    async with await session_of(app, headers) as socket:
        await socket.receive()
        for length, first in ((12, 0), (4, 12), (36, 16), (4, 52), (20, 56)):
            await submit(socket, values[first : first + length])
            seen += await socket.until("rollout_complete")
            for stream in list(contexts._contexts):
                contexts.put(stream, -1, Cache())
    assert np.array_equal(shown(seen), alone(packaged, values))
    assert contexts.misses - misses == 4


async def test_after_a_latent_frame_in_part_a_session_begins_anew_from_the_last_frame_it_showed(
    app: App, packaged: StreamingWorldModel
) -> None:
    values = moves(6)
    headers, _ = app.key(10_000)
    async with await session_of(app, headers) as socket:
        await socket.receive()
        await submit(socket, values)
        before = shown(await socket.until("rollout_complete"))
        assert len(before) == 7
        await submit(socket, moves(4, seed=2))
        after = shown(await socket.until("rollout_complete"))
    session = packaged.model.begin([before[-1]], [7], num_steps=1)
    session.index = 2  # the noise goes on
    assert np.array_equal(after, session.advance([moves(4, seed=2)])[0])


async def test_a_chunk_that_fails_in_its_middle_keeps_and_charges_what_was_shown_and_goes_on_from_there(
    app: App, packaged: StreamingWorldModel
) -> None:
    values = moves(12)
    model, (headers, customer) = app.model.model, app.key(10_000)
    async with await session_of(app, headers) as socket:
        await socket.receive()
        model.allow(steps=4)  # of 7: two latent frames
        await submit(socket, values)
        messages = [await socket.receive() for _ in range(9)]
        model.fails_at = 5
        model.let_go()
        assert (await socket.receive())["error"]["code"] == "ENGINE_FAILED"
        await submit(socket, values[8:])
        rest = await socket.until("rollout_complete")
        assert rest[-1]["frames_streamed_total"] == 13
        assert np.array_equal(shown(messages + rest), alone(packaged, values))
    assert await settled(app, customer) == [-1_000, 1_000 - 13 * RATE]


async def test_a_client_that_leaves_in_the_middle_of_a_chunk_pays_for_the_frames_it_was_sent(app: App) -> None:
    model, (headers, customer) = app.model.model, app.key(10_000)
    async with await session_of(app, headers) as socket:
        await socket.receive()
        model.allow(steps=2)
        await submit(socket, moves(48))
        for _ in range(5):
            await socket.receive()
        await socket.drop()
        model.let_go()
    debit, refund = await settled(app, customer)
    assert (debit, 1_000 - refund) == (-1_000, 5 * RATE)
    assert model.steps <= 3, "its row left the batch"


@pytest.mark.parametrize("form", ["png", "mp4"])
async def test_a_rollout_streamed_over_http_sends_each_latent_frame_too(
    app: App, packaged: StreamingWorldModel, form: str
) -> None:
    """A fragment for each, so that what has come can be played."""
    headers, customer = app.key(10_000)
    values = moves(18)
    files = {"frame": PICTURE, "actions": npy(values)}
    answer = await app.http.post(
        "/v1/predict", headers=headers, files=files, data={"seed": "7"}, params={"stream": form}
    )
    expected = alone(packaged, np.concatenate((values, values[-1:], values[-1:])))[:19]
    if form == "png":
        parts = [part.split(b"\r\n\r\n", 1)[1] for part in answer.content.split(b"--frame")[1:-1]]
        assert np.array_equal([np.asarray(Image.open(io.BytesIO(part))) for part in parts], expected)
    else:
        assert answer.content.count(b"moof") == 5
        pieces = [expected[:5], expected[5:9], expected[9:13], expected[13:17], expected[17:]]
        whole = join_chunks([Encoders((64, 64), 10).encode(piece) for piece in pieces], 10, 19)
        assert np.array_equal(decode(answer.content), decode(whole))
    assert await settled(app, customer) == [-19 * RATE]


async def test_a_batch_of_candidates_goes_on_from_each_ones_own_frames(app: App, packaged: StreamingWorldModel) -> None:
    headers, _ = app.key(10_000)
    candidates = [moves(24, seed) for seed in range(3)]
    files = [("frame", PICTURE), *(("actions", npy(values)) for values in candidates)]
    answer = await app.http.post("/v1/predict/batch", headers=headers, files=files, data={"seed": "7", "return": "npz"})
    assert answer.status_code == 200, answer.text
    assert alone(packaged, candidates[0]).tobytes()[-3000:] in answer.content


@pytest.mark.parametrize(
    ("path", "data", "message"),
    [
        ("/v1/predict", {"num_steps": "5"}, "num_steps: is 5; tiny-pusher-student takes 1 to 4"),
        ("/v1/predict", {"guidance": "2"}, "guidance: is 2; tiny-pusher-student takes 0 to 0"),
        ("/v1/sessions", {"model": STUDENT, "num_steps": "5"}, "num_steps: is 5; tiny-pusher-student takes 1 to 4"),
        ("/v1/sessions", {"model": STUDENT, "guidance": "2"}, "guidance: is 2"),
    ],
)
async def test_what_a_student_cannot_do_is_refused_and_costs_nothing(
    app: App, path: str, data: dict[str, str], message: str
) -> None:
    headers, customer = app.key(10_000)
    files = {"initial_frame": PICTURE} if "model" in data else {"frame": PICTURE, "actions": npy(moves(4))}
    answer = await app.http.post(path, headers=headers, files=files, data=data)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(message)
    assert app.ledger.rows(customer) == [("credit", 10_000)]


async def test_a_step_count_of_a_submission_is_checked_too(app: App) -> None:
    headers, _ = app.key(10_000)
    async with await session_of(app, headers) as socket:
        await socket.receive()
        await socket.send(type="submit_actions", actions=moves(4).tolist(), num_steps=5)
        assert (await socket.receive())["error"]["message"].startswith("num_steps: is 5")


async def test_it_is_served_beside_the_default_model_once_it_is_named(
    packaged: StreamingWorldModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODEL_CHECKPOINTS", f'{{"{STUDENT}": ""}}')
    assert [model.slug for model in Settings().cluster_args().models] == [DEFAULT_MODEL, STUDENT]
    spec = model_spec(CATALOG[STUDENT])
    assert RUNNERS[CATALOG[STUDENT].spec.runner].endswith("streaming:StreamingWorldModel.load")
    assert (spec.max_num_steps, spec.max_guidance) == (len(SIGMAS), 0.0)
    assert (spec.piece_frames, spec.chunk_size) == (packaged.config.temporal_compression, packaged.config.chunk_size)
