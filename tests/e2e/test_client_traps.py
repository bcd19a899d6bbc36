"""What the public client does that a server must be ready for: each trap was observed, each is a test."""

import asyncio
import dataclasses
import socket
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import dream
import httpx
import numpy as np
import pytest

from tests.support.cluster import Cluster, eventually
from tests.support.models import RAISE, SLEEP_S
from tests.support.payloads import actions, npy, png
from tests.support.video import decode

FRAME = np.full((64, 64, 3), 128, np.uint8)


@pytest.fixture
def customer(stand_in_cluster: Cluster) -> Iterator[dream.Client]:
    """A client of a new customer with $1."""
    key = stand_in_cluster.new_customer()
    with dream.Client(api_key=key, base_url=stand_in_cluster.base_url) as client:
        yield client


def slow(seconds_per_step: float, seed: int = 0) -> np.ndarray:
    values = actions(seed=seed)
    values[:, SLEEP_S] = seconds_per_step
    return values


def amounts(client: dream.Client) -> list[int]:
    """Signed mils of every row, oldest first."""
    return [row.amount_mils for row in reversed(client.billing.transactions())]


@pytest.mark.parametrize("base", ["", "/models/tiny-pusher", "/models/no-such-model"])
def test_an_unknown_model_is_never_a_404_which_the_client_would_send_again_to_the_default_model(
    customer: dream.Client, base: str
) -> None:
    known = customer.models.get("tiny-pusher").spec
    unknown = dream.ModelHandle(spec=dataclasses.replace(known, slug="no-such-model"), client=customer)
    customer._http.base_url = f"{customer.base_url}{base}"
    with pytest.raises(dream.ValidationError, match="no-such-model"):
        unknown.predict(start_frame=FRAME, actions=actions())
    customer._http.base_url = customer.base_url
    assert amounts(customer) == [10_000]


def test_an_inactive_model_is_not_a_404_either(customer: dream.Client) -> None:
    known = customer.models.get("dreamdojo-2b-g1").spec
    inactive = dream.ModelHandle(spec=dataclasses.replace(known, active=True), client=customer)
    with pytest.raises(dream.ValidationError, match="dreamdojo-2b-g1"):
        inactive.predict(start_frame=FRAME, actions=np.zeros((12, 384), np.float32))
    assert amounts(customer) == [10_000]


def test_a_rollout_that_the_client_gave_up_on_and_sent_again_is_charged_once(customer: dream.Client) -> None:
    """After its own time-out the client sends the work again to /v1/predict: the first is cancelled and refunded."""
    rollout = customer.models.get("tiny-pusher").predict(start_frame=FRAME, actions=slow(0.1), seed=1, timeout_s=0.5)
    assert len(decode(rollout.mp4_bytes())) == 49
    eventually(lambda: sum(amounts(customer)) == 10_000 - 245)
    assert sorted(amounts(customer)) == [-245, -245, 245, 10_000]


def test_a_rollout_whose_answer_was_lost_is_replayed_to_the_fallback_and_charged_once(
    customer: dream.Client,
) -> None:
    """The same payload by the same customer on either route, within the window: one run, one charge."""
    first = customer.models.get("tiny-pusher").predict(start_frame=FRAME, actions=actions(seed=2), seed=2)
    again = customer.predict(frame_bytes=_png(FRAME), actions_bytes=npy(actions(seed=2)), seed=2)
    assert again.mp4_bytes == first.mp4_bytes()
    assert first.id.removeprefix("rollout_") == again.request_id.removeprefix("req_")
    assert amounts(customer) == [10_000, -245]


def test_identical_requests_at_the_same_time_join_one_run(customer: dream.Client) -> None:
    def send(_: int) -> bytes:
        return customer.predict(frame_bytes=_png(FRAME), actions_bytes=npy(slow(0.02)), seed=3).mp4_bytes

    with ThreadPoolExecutor(6) as pool:
        videos = set(pool.map(send, range(6)))
    assert len(videos) == 1
    assert amounts(customer) == [10_000, -245]


def test_another_customers_identical_payload_is_its_own_run(stand_in_cluster: Cluster, customer: dream.Client) -> None:
    payload = {"frame_bytes": _png(FRAME), "actions_bytes": npy(actions(seed=4)), "seed": 4}
    key = stand_in_cluster.new_customer()
    with dream.Client(api_key=key, base_url=stand_in_cluster.base_url) as other:
        assert customer.predict(**payload).request_id != other.predict(**payload).request_id
        assert amounts(customer) == amounts(other) == [10_000, -245]


def test_a_burst_wider_than_the_model_is_queued_since_the_client_does_not_retry_rollouts(
    customer: dream.Client,
) -> None:
    """24 rollouts at once on a replica of 16 rows: the client would raise at the first 429 or 503."""
    model = customer.models.get("tiny-pusher")

    def send(seed: int) -> int:
        return model.predict(start_frame=FRAME, actions=slow(0.005, seed=seed), seed=seed).frames

    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(send, range(24))) == [49] * 24
    assert sum(amounts(customer)) == 10_000 - 24 * 245


def test_the_video_url_is_fetched_without_a_key(customer: dream.Client) -> None:
    rollout = customer.models.get("tiny-pusher").predict(start_frame=FRAME, actions=actions(seed=5), seed=5)
    answer = httpx.get(rollout.video_url)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "video/mp4"
    assert answer.content == rollout.mp4_bytes()
    part = httpx.get(rollout.video_url, headers={"Range": "bytes=0-99"})
    assert (part.status_code, len(part.content)) == (206, 100)


def test_a_video_url_that_was_tampered_with_opens_nothing(customer: dream.Client) -> None:
    rollout = customer.models.get("tiny-pusher").predict(start_frame=FRAME, actions=actions(seed=6), seed=6)
    url = httpx.URL(rollout.video_url)
    for change in ({"signature": "0" * 64}, {"expires": str(rollout.video_url_expires_at + 1)}):
        assert httpx.get(url.copy_merge_params(change)).status_code == 403
    other = rollout.video_url.replace(rollout.id, "rollout_" + "0" * 32)
    assert httpx.get(other).status_code == 403


def test_a_402_fills_both_shapes_that_clients_parse(stand_in_cluster: Cluster) -> None:
    key = stand_in_cluster.new_key("broke", "0.0001")
    answer = httpx.post(
        f"{stand_in_cluster.base_url}/v1/predict",
        headers={"Authorization": f"Bearer {key}"},
        files={"frame": png(), "actions": npy(actions())},
    )
    assert answer.status_code == 402
    assert answer.json()["detail"] | {"message": ""} == {
        "balance_mils": 1,
        "requested_mils": 245,
        "balance_cents": 0,
        "requested_cents": 3,
        "message": "",
    }
    assert answer.json()["error"]["code"] == "INSUFFICIENT_BALANCE"


def test_an_async_rollout_of_the_client_shows_no_frames_and_is_found_by_its_id(customer: dream.Client) -> None:
    """The client has no method to ask for it; its id is what a caller polls with."""
    queued = customer.models.get("tiny-pusher").predict(start_frame=FRAME, actions=actions(seed=8), mode="async")
    assert (queued.frames, queued.cost_usd, queued.video_url) == (0, 0.0, "")

    def rollout() -> dream.Rollout:
        return dream.Rollout.from_json_envelope(customer._http.get(f"/v1/rollouts/{queued.id}").json())

    eventually(lambda: bool(rollout().video_url))
    assert rollout().frames == 49
    assert len(decode(rollout().mp4_bytes())) == 49
    assert amounts(customer) == [10_000, -245]


def test_calls_that_name_no_model_say_which_one_ran(stand_in_cluster: Cluster) -> None:
    with stand_in_cluster.http() as http:
        parts = {"frame": png(), "actions": npy(actions(seed=7))}
        assert http.post("/v1/predict", files=parts).headers["X-DreamEngine-Model"] == "tiny-pusher"
        large = {"frame": png(480, 640), "actions": npy(actions(12, 384))}
        answer = http.post("/models/dreamdojo-2b-gr1/v1/predict", files=large)
        assert answer.headers["X-DreamEngine-Model"] == "dreamdojo-2b-gr1"
        assert answer.headers["X-DreamEngine-Frames"] == "13"
        assert decode(answer.content)[0].shape == (480, 640, 3)


def _png(frame: np.ndarray) -> bytes:
    from PIL import Image

    from tests.support.payloads import image_bytes

    return image_bytes(Image.fromarray(frame), "PNG")


# The client's own way to open a socket has become a deprecated one.
@pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning")
class TestSessions:
    """The public client's `sessions`, over Serve's own proxy."""

    def test_it_streams_steers_and_is_charged_for_what_it_streamed(self, customer: dream.Client) -> None:
        with customer.sessions.create(model="tiny-pusher", initial_frame=FRAME, seed=0) as session:
            frames = list(session.submit_actions(actions()))
            assert len(frames) == 49
            assert [int(frame[0, 0, 0]) for frame in frames] == [128 + index for index in range(49)]
            more = list(session.submit_actions(actions(12)))
            assert [int(frame[0, 0, 0]) for frame in more] == [177 + index for index in range(12)]
            assert session.envelope["frames_streamed"] == 61
            assert session.envelope["billing"]["debited_mils"] == 61 * 5
            assert session.envelope["billing"]["balance_mils"] == 10_000 - 61 * 5
        eventually(lambda: sum(amounts(customer)) == 10_000 - 61 * 5)

    def test_the_first_chunk_is_there_before_the_second_is_computed(self, customer: dream.Client) -> None:
        """The second chunk raises: what arrived before it did not wait for it."""
        poisoned = actions(24)
        poisoned[12, RAISE] = 1
        with customer.sessions.create(model="tiny-pusher", initial_frame=FRAME) as session:
            stream = session.submit_actions(poisoned)
            assert len([next(stream) for _ in range(13)]) == 13
            with pytest.raises(RuntimeError, match="ENGINE_FAILED"):
                next(stream)
        eventually(lambda: sum(amounts(customer)) == 10_000 - 13 * 5)

    def test_a_frame_whose_png_would_break_the_clients_1_mib_comes_as_jpeg(self, customer: dream.Client) -> None:
        noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
        with customer.sessions.create(model="dreamdojo-2b-gr1", initial_frame=noise) as session:
            frames = list(session.submit_actions(np.zeros((2, 384), np.float32)))
        assert [frame.shape for frame in frames] == [(480, 640, 3)] * 3
        assert np.abs(frames[0].astype(int) - noise).mean() < 60, "two such noises differ by 85"

    def test_a_dropped_socket_settles(self, customer: dream.Client) -> None:
        session = customer.sessions.create(model="tiny-pusher", initial_frame=FRAME)
        stream = session.submit_actions(slow(0.05))
        next(stream)
        session._ws.socket.shutdown(socket.SHUT_RDWR)
        eventually(lambda: len(amounts(customer)) == 3)
        charged = 10_000 - sum(amounts(customer))
        assert 5 <= charged < 49 * 5
        stream.close()
        session.close()
        assert 10_000 - sum(amounts(customer)) == charged

    def test_an_async_session_that_the_client_cannot_open_is_given_back(self, stand_in_cluster: Cluster) -> None:
        """Client 0.5.0 fails before it connects, with websockets of today: the budget comes back with its DELETE."""
        key = stand_in_cluster.new_customer()

        async def attempt() -> None:
            async with dream.AsyncClient(api_key=key, base_url=stand_in_cluster.base_url) as client:
                session = await client.sessions.create(model="tiny-pusher", initial_frame=FRAME)
                with pytest.raises((TypeError, ImportError, AttributeError)):
                    async for _ in session.submit_actions(actions()):
                        pass
                await session.close()

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # of the client's, about its websockets
            asyncio.run(attempt())
        with dream.Client(api_key=key, base_url=stand_in_cluster.base_url) as client:
            rows = amounts(client)
            assert (len(rows), sum(rows)) == (3, 10_000)

    def test_a_session_without_credits_is_402_before_any_work(self, stand_in_cluster: Cluster) -> None:
        key = stand_in_cluster.new_key("penniless", "0.0001")
        with dream.Client(api_key=key, base_url=stand_in_cluster.base_url) as client:
            with pytest.raises(Exception, match=r"402|balance") as refusal:
                client.sessions.create(model="tiny-pusher", initial_frame=FRAME)
            assert isinstance(refusal.value, dream.DreamError | httpx.HTTPStatusError)
            assert amounts(client) == [1]
