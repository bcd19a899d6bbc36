"""What a planner asks of `predict/batch` beyond videos: scores, pruning, deadlines, bounds, and other forms."""

import io
import json
import tarfile
from collections.abc import AsyncIterator
from typing import Any

import httpx
import numpy as np
import pytest
import pytest_asyncio
from PIL import Image

from serve_app.settings import Limits
from tests.support.app import App, running_app
from tests.support.models import SLEEP_S, SteeredModel
from tests.support.payloads import actions, image_bytes, npy
from tests.support.video import decode

pytestmark = pytest.mark.asyncio(loop_scope="module")

GREY = np.full((64, 64, 3), 100, np.uint8)
SPEEDS = (0, 1, 2, -1)
"""Levels per frame of the candidates; the goal lies where the third one goes."""


def picture(level: int) -> bytes:
    return image_bytes(Image.fromarray(np.full((64, 64, 3), level, np.uint8)), "PNG")


def candidate(speed: float, length: int = 48, **columns: float) -> bytes:
    values = actions(length)
    values[:, 0] = speed
    if "sleep_s" in columns:
        values[:, SLEEP_S] = columns["sleep_s"]
    return npy(values)


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def app(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[App]:
    limits = Limits(max_raw_bytes=4 * 49 * 64 * 64 * 3)
    async with running_app(tmp_path_factory.mktemp("batch"), SteeredModel(None, "cpu"), limits) as running:  # type: ignore[arg-type]
        yield running


async def send(
    app: App, headers: dict[str, str], speeds: tuple[float, ...] = SPEEDS, *, goal: int | None = None, **fields: Any
) -> httpx.Response:
    files = [("frame", picture(100)), *[("actions", candidate(speed)) for speed in speeds]]
    if goal is not None:
        files.append(("goal_frame", picture(goal)))
    data = {"num_steps": "1"} | {name: str(value) for name, value in fields.items()}
    return await app.http.post("/v1/predict/batch", headers=headers, files=files, data=data)


def members(answer: httpx.Response) -> dict[str, bytes]:
    with tarfile.open(fileobj=io.BytesIO(answer.content)) as tar:
        return {each.name: tar.extractfile(each).read() for each in tar}  # type: ignore[union-attr]


async def test_a_plain_batch_is_answered_as_before(app: App) -> None:
    headers, _ = app.key()
    answer = await send(app, headers)
    assert list(members(answer)) == [f"rollout_{index:03d}.mp4" for index in range(4)]
    assert not {"x-dreamengine-candidate-frames", "x-dreamengine-best"} & set(answer.headers)


async def test_npz_is_the_raw_frames_of_each_candidate(app: App) -> None:
    headers, _ = app.key()
    answer = await send(app, headers, **{"return": "npz"})
    clips = np.load(io.BytesIO(answer.content))
    assert list(clips) == [f"rollout_{index:03d}" for index in range(4)]
    for name, speed in zip(clips, SPEEDS, strict=True):
        assert clips[name].dtype == np.uint8
        assert np.array_equal(clips[name][:, 5, 5, 0], 100 + speed * np.arange(49))


async def send_starts(app: App, headers: dict[str, str], levels: list[int], **fields: str) -> httpx.Response:
    """A start frame for each candidate; the second moves twice as fast as the first."""
    files = [("frame", picture(level)) for level in levels] + [("actions", candidate(speed)) for speed in (1, 2)]
    data = {"num_steps": "1", "return": "npz"} | fields
    return await app.http.post("/v1/predict/batch", headers=headers, files=files, data=data)


async def test_each_candidate_may_have_a_start_frame_of_its_own(app: App) -> None:
    headers, customer = app.key()
    clips = np.load(io.BytesIO((await send_starts(app, headers, [20, 40])).content))
    assert [clip[:, 5, 5, 0].tolist() for clip in clips.values()] == [[*range(20, 69)], [*range(40, 137, 2)]]
    assert app.ledger.rows(customer)[1:] == [("debit", -2 * 245)]


async def test_other_start_frames_are_other_work(app: App) -> None:
    headers, _ = app.key()
    named = headers | {"Idempotency-Key": "starts"}
    first = await send_starts(app, named, [20, 40])
    again = await send_starts(app, named, [20, 40])
    assert again.headers["X-DreamEngine-Request-Id"] == first.headers["X-DreamEngine-Request-Id"]
    assert (await send_starts(app, named, [20, 41])).json()["error"]["code"] == "IDEMPOTENCY_CONFLICT"
    assert (await send_starts(app, named, [20])).json()["error"]["code"] == "IDEMPOTENCY_CONFLICT"


async def test_start_frames_that_do_not_go_with_the_candidates_are_refused_by_name(app: App) -> None:
    headers, customer = app.key()
    answer = await send_starts(app, headers, [20, 40, 60])
    why = "frame: is there 3 times; one for all 2 `actions`, or one for each, is accepted"
    assert (answer.status_code, answer.json()["detail"]) == (422, why)
    files = [("frame", picture(1)), ("frame", b"GIF89a"), ("actions", candidate(0)), ("actions", candidate(1))]
    answer = await app.http.post("/v1/predict/batch", headers=headers, files=files)
    assert (answer.status_code, answer.json()["detail"].split(";")[0]) == (422, "frame[1]: is neither PNG nor JPEG")
    large = image_bytes(Image.new("RGB", (2048, 2049)), "PNG")
    files = [("frame", large)] * 16 + [("actions", candidate(0))] * 16
    answer = await app.http.post("/v1/predict/batch", headers=headers, files=files)
    assert answer.json()["detail"] == "frame[0]: has 2048x2049 pixels; at most 4194304 are accepted"
    assert app.ledger.rows(customer) == [("credit", 1_000_000)]


async def test_last_frames_are_pngs(app: App) -> None:
    headers, customer = app.key()
    files = members(await send(app, headers, **{"return": "last_frame"}))
    assert list(files) == [f"rollout_{index:03d}.png" for index in range(4)]
    levels = [np.asarray(Image.open(io.BytesIO(data)))[0, 0, 0] for data in files.values()]
    assert levels == [100, 148, 196, 52]
    assert app.ledger.rows(customer)[-1] == ("debit", -4 * 245)


@pytest.mark.parametrize(
    ("metric", "nearest", "farthest", "higher"),
    [("mse", 0.0, (144 / 255) ** 2, False), ("psnr", 100.0, 4.96, True), ("latent", 0.0, (144 / 255) ** 2, False)],
)
async def test_scores_say_how_near_each_candidate_ends_in_the_metrics_own_unit(
    app: App, metric: str, nearest: float, farthest: float, higher: bool
) -> None:
    headers, customer = app.key()
    answer = await send(app, headers, goal=196, metric=metric, **{"return": "scores"})
    body = answer.json()
    assert (body["best"], body["metric"], body["higher_is_better"]) == (2, metric, higher)
    assert body["candidates"][2] == {"index": 2, "score": pytest.approx(nearest), "frames": 49, "pruned": False}
    assert body["candidates"][3]["score"] == pytest.approx(farthest, abs=0.01)
    assert (body["frames"], body["cost_mils"]) == (196, 980)
    assert answer.headers["X-DreamEngine-Best"] == "2"
    assert app.ledger.rows(customer) == [("credit", 1_000_000), ("debit", -980)]


async def test_the_ssim_of_the_best_is_1(app: App) -> None:
    headers, _ = app.key()
    body = (await send(app, headers, goal=196, metric="ssim", **{"return": "scores"})).json()
    assert body["candidates"][body["best"]]["score"] == pytest.approx(1.0)
    assert body["best"] == 2


async def test_scores_may_come_with_the_best_clip_and_no_other(app: App) -> None:
    headers, _ = app.key()
    files = members(await send(app, headers, goal=196, best_clip="true", **{"return": "scores"}))
    assert list(files) == ["rollout_002.mp4", "scores.json"]
    assert len(decode(files["rollout_002.mp4"])) == 49
    assert json.loads(files["scores.json"])["best"] == 2


async def test_pruning_halves_the_field_and_what_was_not_made_is_not_charged(app: App) -> None:
    """8 candidates: 8 run the first chunk, 4 the second, 2 the third, 1 the last."""
    headers, customer = app.key()
    speeds = (0.0, 1.0, 2.0, -1.0, -2.0, 0.0, 1.0, -1.0)
    answer = await send(app, headers, speeds, goal=196, prune=0.5)
    frames = [25, 37, 49, 13, 13, 13, 25, 13]
    assert answer.headers["X-DreamEngine-Candidate-Frames"] == ",".join(map(str, frames))
    assert answer.headers["X-DreamEngine-Best"] == "2"
    assert [len(decode(video)) for video in members(answer).values()] == frames
    made = sum(frames)
    assert answer.headers["X-DreamEngine-Frames"] == str(made)
    assert answer.headers["X-DreamEngine-Estimated-Charge-USD"] == f"{made * 5 / 10_000:.4f}"
    await app.services.ingress.drain(0)
    app.services.ingress._draining = False
    assert app.ledger.rows(customer)[1:] == [("debit", -8 * 245), ("refund", (8 * 49 - made) * 5)]


async def test_pruned_candidates_are_marked_in_the_scores(app: App) -> None:
    headers, _ = app.key()
    body = (await send(app, headers, goal=196, prune=0.5, **{"return": "scores"})).json()
    assert [each["pruned"] for each in body["candidates"]] == [True, True, False, True]


async def test_a_horizon_runs_and_charges_only_the_first_actions(app: App) -> None:
    headers, customer = app.key()
    answer = await send(app, headers, horizon=10)
    assert [len(decode(video)) for video in members(answer).values()] == [11] * 4
    assert app.ledger.rows(customer)[-1] == ("debit", -4 * 11 * 5)


async def test_a_horizon_beyond_the_actions_changes_nothing(app: App) -> None:
    headers, _ = app.key()
    assert (await send(app, headers, horizon=1000)).headers["X-DreamEngine-Frames"] == "196"


async def test_a_price_above_its_bound_is_refused_and_exactly_at_it_runs(app: App) -> None:
    headers, customer = app.key()
    refused = await send(app, headers, max_cost_mils=979)
    assert refused.status_code == 422
    assert refused.json()["detail"] == "max_cost_mils: is 979, and this request may cost 980 mils"
    assert app.ledger.rows(customer) == [("credit", 1_000_000)]
    assert (await send(app, headers, max_cost_mils=980)).status_code == 200


async def test_a_deadline_that_passes_is_504_and_everything_is_refunded(app: App) -> None:
    headers, customer = app.key()
    files = [("frame", picture(100)), ("actions", candidate(0, sleep_s=0.1))]
    answer = await app.http.post(
        "/v1/predict/batch", headers=headers, files=files, data={"num_steps": "1", "deadline_ms": "150"}
    )
    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "DEADLINE_EXCEEDED"
    assert app.ledger.rows(customer)[1:] == [("debit", -245), ("refund", 245)]


async def test_a_deadline_counts_from_the_requests_arrival(app: App) -> None:
    """One that has passed when the body is read reserves nothing."""
    headers, customer = app.key()

    async def slowly() -> AsyncIterator[bytes]:
        request = app.http.build_request(
            "POST", "/v1/predict", files={"frame": picture(0), "actions": candidate(0)}, data={"deadline_ms": "1"}
        )
        body = request.read()
        headers["Content-Type"] = request.headers["content-type"]
        for start in range(0, len(body), 10):
            yield body[start : start + 10]

    body = [part async for part in slowly()]

    async def again() -> AsyncIterator[bytes]:
        for part in body:
            yield part

    answer = await app.http.post("/v1/predict", headers=headers, content=again())
    assert answer.status_code == 504
    assert app.ledger.rows(customer) == [("credit", 1_000_000)]


async def test_a_deadline_that_is_met_changes_nothing(app: App) -> None:
    headers, _ = app.key()
    assert (await send(app, headers, deadline_ms=60_000)).status_code == 200


@pytest.mark.parametrize(
    ("fields", "goal", "message"),
    [
        ({"return": "gif"}, None, "return: Input should be 'mp4', 'npz', 'last_frame' or 'scores'"),
        ({"return": "scores"}, None, "return: needs a goal"),
        ({"prune": 0.5}, None, "prune: needs a goal"),
        ({"metric": "mse"}, None, "metric: needs a goal"),
        ({"metric": "fid"}, 100, "metric: Input should be"),
        ({"metric": "lpips"}, 100, "metric: lpips is not installed here; mse, psnr, ssim and latent are accepted"),
        ({"prune": 1}, 100, "prune: "),
        ({"prune": 0}, 100, "prune: "),
        ({"prune": "nan"}, 100, "prune: "),
        ({"best_clip": "true"}, 100, "best_clip: is part of return=scores"),
        ({"horizon": 0}, None, "horizon: "),
        ({"max_cost_mils": 0}, None, "max_cost_mils: "),
        ({"deadline_ms": 0}, None, "deadline_ms: "),
        ({"deadline_ms": 600_001}, None, "deadline_ms: "),
        ({"score": "true", "prune": 0.5}, 100, "score: is of whole rollouts"),
        ({"frame_id": "frame_" + "0" * 32}, None, "frame_id: is not taken beside the file `frame`"),
    ],
)
async def test_what_cannot_be_given_is_refused_by_its_field_and_not_charged(
    app: App, fields: dict[str, Any], goal: int | None, message: str
) -> None:
    headers, customer = app.key()
    answer = await send(app, headers, goal=goal, **fields)
    assert answer.status_code == 422
    assert answer.json()["detail"].startswith(message)
    assert app.ledger.rows(customer) == [("credit", 1_000_000)]


async def test_more_raw_frames_than_one_answer_may_hold_are_refused(app: App) -> None:
    headers, _ = app.key()
    assert (await send(app, headers, **{"return": "npz"})).status_code == 200
    answer = await send(app, headers, (0, 0, 0, 0, 0), **{"return": "npz"})
    assert answer.json()["detail"].startswith("return: npz would be")


async def test_a_repetition_gets_the_first_scores_and_another_goal_is_other_work(app: App) -> None:
    headers, customer = app.key()
    first = await send(app, headers, goal=196, **{"return": "scores"})
    again = await send(app, headers, goal=196, **{"return": "scores"})
    other = await send(app, headers, goal=148, **{"return": "scores"})
    assert again.json() == first.json()
    assert (other.json()["best"], other.json()["id"] != first.json()["id"]) == (1, True)
    assert [kind for kind, _ in app.ledger.rows(customer)] == ["credit", "debit", "debit"]


class TestScore:
    """`score=true`: against the same rollout at full steps, or against what really happened."""

    async def test_full_steps_score_as_equal_and_fewer_are_compared_with_them(self, app: App) -> None:
        """The stand-in makes the same frames at any number of steps."""
        headers, customer = app.key()
        answer = await app.http.post(
            "/v1/rollouts",
            headers=headers,
            files={"start_frame": picture(100), "actions": candidate(1)},
            data={"params": json.dumps({"model": "tiny-pusher", "score": True, "num_steps": 1})},
        )
        envelope = answer.json()
        assert (envelope["psnr_db"], envelope["ssim"]) == (100.0, pytest.approx(1.0))
        assert "lpips" not in envelope
        assert answer.headers["X-DreamEngine-PSNR-dB"] == "100"
        assert app.ledger.rows(customer) == [("credit", 1_000_000), ("debit", -245)]

    async def test_a_ground_truth_is_compared_frame_by_frame(self, app: App) -> None:
        headers, _ = app.key()
        truth = np.stack([GREY + np.uint8(1 + index) for index in range(30)])
        truth[20:] += np.uint8(51)
        answer = await app.http.post(
            "/v1/predict",
            headers=headers,
            files={"frame": picture(100), "actions": candidate(1, 30), "ground_truth": npy(truth)},
            data={"score": "true"},
        )
        assert float(answer.headers["X-DreamEngine-PSNR-dB"]) == pytest.approx(-10 * np.log10(0.04 / 3), abs=1e-3)
        assert "x-dreamengine-lpips" not in answer.headers

    @pytest.mark.parametrize(
        ("truth", "fields", "message"),
        [
            (npy(np.zeros((29, 64, 64, 3), np.uint8)), {"score": "true"}, "ground_truth: has shape (29, 64, 64, 3)"),
            (npy(np.zeros((30, 64, 64, 3), np.float32)), {"score": "true"}, "ground_truth: has dtype <f4; a .npy file"),
            (b"junk", {"score": "true"}, "ground_truth: is not a .npy file"),
            (npy(np.zeros((30, 64, 64, 3), np.uint8))[:-1], {"score": "true"}, "ground_truth: has 368639 bytes"),
            (npy(np.zeros((30, 64, 64, 3), np.uint8)), {}, "ground_truth: is what a score compares with"),
        ],
    )
    async def test_a_ground_truth_that_does_not_fit_is_refused(
        self, app: App, truth: bytes, fields: dict[str, str], message: str
    ) -> None:
        headers, customer = app.key()
        files = {"frame": picture(100), "actions": candidate(1, 30), "ground_truth": truth}
        answer = await app.http.post("/v1/predict", headers=headers, files=files, data=fields)
        assert answer.status_code == 422
        assert answer.json()["detail"].startswith(message)
        assert app.ledger.rows(customer) == [("credit", 1_000_000)]


class TestUploadedFrames:
    async def upload(self, app: App, headers: dict[str, str], level: int = 100) -> Any:
        answer = await app.http.post("/v1/frames", headers=headers, files={"frame": picture(level)})
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def test_a_frame_is_sent_once_and_named_after_that(self, app: App) -> None:
        headers, customer = app.key()
        frame, goal = await self.upload(app, headers), await self.upload(app, headers, 148)
        assert (await self.upload(app, headers))["id"] == frame["id"]
        assert (frame["resolution"], frame["resized"]) == ([64, 64], False)
        answer = await app.http.post(
            "/v1/predict/batch",
            headers=headers,
            files=[("actions", candidate(speed)) for speed in SPEEDS],
            data={"frame_id": frame["id"], "goal_frame_id": goal["id"], "return": "scores"},
        )
        assert answer.json()["best"] == 1
        named = await app.http.post(
            "/v1/predict", headers=headers, files={"actions": candidate(1)}, data={"frame_id": frame["id"]}
        )
        sent = await app.http.post(
            "/v1/predict", headers=headers, files={"actions": candidate(1), "frame": picture(100)}
        )
        assert named.content == sent.content
        assert [kind for kind, _ in app.ledger.rows(customer)] == ["credit", "debit", "debit"], "the same work"

    async def test_another_customers_frame_is_not_known(self, app: App) -> None:
        mine, _ = app.key()
        theirs, _ = app.key()
        frame = await self.upload(app, theirs)
        for frame_id in (frame["id"], "frame_" + "0" * 32, "../../etc/passwd", ""):
            answer = await app.http.post(
                "/v1/predict", headers=mine, files={"actions": candidate(1)}, data={"frame_id": frame_id}
            )
            assert answer.status_code == 422
            assert answer.json()["detail"].startswith("frame_id: names no frame that is kept")

    async def test_a_frame_needs_a_key(self, app: App) -> None:
        assert (await app.http.post("/v1/frames", files={"frame": picture(0)})).status_code == 401
