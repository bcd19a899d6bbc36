"""What the paid routes answer when all is well."""

from pathlib import Path

import httpx
import numpy as np
import pytest

from deployments.file_groups import open_file_groups
from tests.support.app import App
from tests.support.payloads import actions, npy, png
from tests.support.video import decode

PARAMS = '{"model": "tiny-pusher", "seed": 7}'


async def rollout(app: App, headers: dict[str, str]) -> httpx.Response:
    files = {"start_frame": png(), "actions": npy(actions())}
    return await app.http.post("/v1/rollouts", headers=headers, files=files, data={"params": PARAMS})


async def test_an_envelope_holds_what_the_client_reads_and_links_to_the_video(app: App) -> None:
    headers, _ = app.key()
    answer = await rollout(app, headers)
    envelope = answer.json()
    assert envelope["id"].startswith("rollout_")
    assert (envelope["object"], envelope["model"], envelope["status"]) == ("rollout", "tiny-pusher", "succeeded")
    assert (envelope["frames"], envelope["resolution"], envelope["seed"]) == (49, [64, 64], 7)
    assert envelope["cost_usd"] == envelope["metadata"]["cost"] == 0.0245
    assert envelope["metadata"]["executed_model"] == answer.headers["X-DreamEngine-Model"] == "tiny-pusher"
    assert envelope["metadata"]["upstream_id"] == answer.headers["X-DreamEngine-Request-Id"]
    assert not {"psnr_db", "ssim", "lpips"} & set(envelope)
    video = await app.http.get(envelope["video_url"])
    assert len(decode(video.content)) == 49


async def test_a_replay_names_the_first_request_everywhere(app: App) -> None:
    headers, customer = app.key()
    first, again = await rollout(app, headers), await rollout(app, headers)
    assert again.json()["id"] == first.json()["id"]
    assert again.headers["X-DreamEngine-Request-Id"] == first.headers["X-DreamEngine-Request-Id"]
    assert app.ledger.rows(customer) == [("credit", 1_000_000), ("debit", -245)]


async def test_a_video_that_the_legacy_route_made_can_be_linked_to(app: App) -> None:
    headers, customer = app.key()
    files = {"frame": png(), "actions": npy(actions())}
    legacy = await app.http.post("/v1/predict", headers=headers, files=files, data={"seed": "7"})
    linked = await rollout(app, headers)
    assert (await app.http.get(linked.json()["video_url"])).content == legacy.content
    assert app.ledger.rows(customer) == [("credit", 1_000_000), ("debit", -245)]


async def test_a_rollout_whose_video_cannot_be_stored_is_refunded_before_it_is_answered(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    def disk_full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(app.services.results, "put", disk_full)
    headers, customer = app.key()
    answer = await rollout(app, headers)
    assert answer.status_code == 500
    assert "space" not in answer.text
    assert app.ledger.rows(customer) == [("credit", 1_000_000), ("debit", -245), ("refund", 245)]


async def test_a_video_that_is_kept_in_an_object_store_is_served_by_the_same_link(
    app: App, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.services.results, "_groups", open_file_groups(f"memory://{tmp_path.name}"))
    headers, _ = app.key()
    envelope = (await rollout(app, headers)).json()
    video = await app.http.get(envelope["video_url"])
    assert video.headers["Content-Type"] == "video/mp4"
    assert len(decode(video.content)) == 49


async def test_a_batch_says_its_cost_once_and_its_size(app: App) -> None:
    headers, _ = app.key()
    parts = [("frame", png()), *[("actions", npy(actions(seed=seed))) for seed in range(3)]]
    answer = await app.http.post("/v1/predict/batch", headers=headers, files=parts)
    assert answer.headers["X-DreamEngine-Batch-Size"] == "3"
    assert answer.headers["X-DreamEngine-Frames"] == "147"
    assert answer.headers["X-DreamEngine-Estimated-Charge-USD"] == "0.0735"


@pytest.mark.parametrize("path", ["v1/models", "v1/specs", "v1/status", "healthz", "v1/billing/balance"])
async def test_nothing_is_served_under_a_model_that_there_is_not(app: App, path: str) -> None:
    headers, _ = app.key()
    assert (await app.http.get(f"/models/tiny-pusher/{path}", headers=headers)).status_code == 200
    answer = await app.http.get(f"/models/no-such-model/{path}", headers=headers)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "MODEL_NOT_FOUND"


async def test_more_steps_than_a_replica_finishes_in_time_are_refused_by_what_is_accepted(app: App) -> None:
    """Steps x candidates up to 1,024: exactly as many pass, one more does not, on each route by its own field."""
    headers, customer = app.key()

    def candidates(count: int) -> list[tuple[str, bytes]]:
        return [("frame", png()), *[("actions", npy(actions(1)))] * count]

    exact = await app.http.post("/v1/predict/batch", headers=headers, files=candidates(16), data={"num_steps": "64"})
    assert exact.status_code == 200, exact.text
    refused_batch = await app.http.post(
        "/v1/predict/batch", headers=headers, files=candidates(16), data={"num_steps": "65"}
    )
    assert refused_batch.status_code == 422
    assert refused_batch.json()["detail"].startswith("num_steps: 65 steps of 16 candidates are too many")
    assert app.ledger.rows(customer) == [("credit", 1_000_000), ("debit", -16 * 2 * 5)]


async def test_commands_are_taken_where_the_model_knows_its_robot_and_refused_elsewhere(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Robot:
        """Doubles what it is told, and drops the command before the start frame."""

        num_dimensions = 8

        def actions(self, commands: np.ndarray) -> np.ndarray:
            if len(commands) != 13:
                raise ValueError(f"{len(commands)} rows, must be 13")
            return commands[1:] * 2

    headers, customer = app.key()
    send = {"headers": headers, "data": {"actions_format": "commands"}}
    refused = await app.http.post("/v1/predict", files={"frame": png(), "actions": npy(actions(13))}, **send)
    assert refused.json()["detail"] == "actions_format: tiny-pusher takes encoded actions only"
    monkeypatch.setitem(app.services.commands, "tiny-pusher", Robot())  # type: ignore[arg-type]
    too_many = await app.http.post("/v1/predict", files={"frame": png(), "actions": npy(actions(14))}, **send)
    assert too_many.json()["detail"] == "actions: 14 rows, must be 13"
    answer = await app.http.post("/v1/predict", files={"frame": png(), "actions": npy(actions(13))}, **send)
    assert answer.headers["X-DreamEngine-Frames"] == "13"
    assert app.ledger.rows(customer) == [("credit", 1_000_000), ("debit", -65)]


async def test_an_idempotency_key_gets_the_first_answer_and_refuses_another_payload(app: App) -> None:
    headers, customer = app.key()
    headers["Idempotency-Key"] = "0f8fad5b-d9cb-469f-a165-70867728950e"
    first, again = await rollout(app, headers), await rollout(app, headers)
    assert again.json() | {"video_url": ""} == first.json() | {"video_url": ""}
    assert (await app.http.get(again.json()["video_url"])).status_code == 200
    other = await app.http.post("/v1/predict", headers=headers, files={"frame": png(), "actions": npy(actions(12))})
    assert other.status_code == 422
    assert other.json()["error"]["code"] == "IDEMPOTENCY_CONFLICT"
    assert app.ledger.rows(customer) == [("credit", 1_000_000), ("debit", -245)]
