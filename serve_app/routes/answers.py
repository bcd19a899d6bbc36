"""What the paid routes answer with, beside JSON."""

import io
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from typing import Any, assert_never

from fastapi import Response

from billing.money import usd
from billing.reader import KeyRecord
from deployments.messages import RolloutRequest, RolloutResult, decibels
from serve_app.middleware import REQUEST_ID_HEADER
from serve_app.routes.inputs import FILE
from serve_app.schemas import CandidateScore, Scores

MP4: dict[int | str, dict[str, Any]] = {200: {"content": {"video/mp4": {"schema": FILE}}}}
BATCH: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {
            "application/x-tar": {"schema": FILE},
            "application/zip": {"schema": FILE},
            "application/json": {"schema": Scores.model_json_schema()},
        }
    }
}
SCORE_HEADERS = {
    "psnr_db": "X-DreamEngine-PSNR-dB",
    "ssim": "X-DreamEngine-SSIM",
    "lpips": "X-DreamEngine-LPIPS",
}


def result_headers(result: RolloutResult, caller: KeyRecord) -> dict[str, str]:
    return {
        REQUEST_ID_HEADER: result.request_id,
        "X-DreamEngine-Engine-Wall-Ms": f"{result.infer_ms:.3f}",
        "X-DreamEngine-Estimated-Charge-USD": f"{usd(result.cost_mils):.4f}",
        "X-DreamEngine-Customer-Id": caller.customer_id,
        "X-DreamEngine-Frames": str(result.num_frames),
        "X-DreamEngine-Model": result.model,
    } | {SCORE_HEADERS[name]: f"{value:.6g}" for name, value in scores_of(result).items()}


def scores_of(result: RolloutResult) -> dict[str, float]:
    """The scores that were asked for; a metric whose weights are not installed is absent."""
    closeness = result.closeness
    if closeness is None:
        return {}
    scores = {"psnr_db": closeness.psnr_db, "ssim": closeness.ssim, "lpips": closeness.lpips}
    return {name: value for name, value in scores.items() if value is not None}


def batch_answer(rollout: RolloutRequest, result: RolloutResult, caller: KeyRecord) -> Response:
    """What each candidate was asked for, in the form that fits it, and in headers what is true of all of them."""
    headers = result_headers(result, caller) | {"X-DreamEngine-Batch-Size": str(len(result.videos))}
    extras = rollout.extras
    if not extras.is_plain:
        headers["X-DreamEngine-Candidate-Frames"] = ",".join(map(str, result.candidate_frames))
    if extras.goal is not None:
        headers["X-DreamEngine-Candidate-Scores"] = ",".join(f"{each:.6g}" for each in _goal_scores(rollout, result))
        headers["X-DreamEngine-Best"] = str(result.best)
    match extras.returns:
        case "mp4":
            content, media_type = tar_of(_named(result.videos, "mp4")), "application/x-tar"
        case "npz":
            content, media_type = _zip(_named(result.videos, "npy")), "application/zip"
        case "last_frame":
            content, media_type = tar_of(_named(result.videos, "png")), "application/x-tar"
        case "scores":
            content, media_type = _scores(rollout, result).model_dump_json().encode(), "application/json"
            if extras.best_clip:
                best = {f"rollout_{result.best:03d}.mp4": result.videos[result.best]}
                content, media_type = tar_of(best | {"scores.json": content}), "application/x-tar"
        case _:
            assert_never(extras.returns)
    return Response(content, media_type=media_type, headers=headers)


def _scores(rollout: RolloutRequest, result: RolloutResult) -> Scores:
    assert rollout.extras.goal is not None
    metric = rollout.extras.goal.metric
    return Scores(
        id=result.request_id,
        model=result.model,
        metric=metric,
        higher_is_better=metric in ("psnr", "ssim"),
        best=result.best,
        candidates=[
            CandidateScore(index=index, score=score, frames=frames, pruned=frames <= len(actions))
            for index, (score, frames, actions) in enumerate(
                zip(_goal_scores(rollout, result), result.candidate_frames, rollout.candidates, strict=True)
            )
        ],
        frames=result.num_frames,
        cost_mils=result.cost_mils,
        cost_usd=usd(result.cost_mils),
        engine_wall_ms=round(result.infer_ms, 3),
    )


def _goal_scores(rollout: RolloutRequest, result: RolloutResult) -> list[float]:
    """Distances in the metric's own unit, as its name promises."""
    assert rollout.extras.goal is not None
    match rollout.extras.goal.metric:
        case "psnr":
            return [decibels(distance) for distance in result.distances]
        case "ssim":
            return [1 - distance for distance in result.distances]
        case "mse" | "lpips" | "latent":
            return list(result.distances)
        case _:
            assert_never(rollout.extras.goal.metric)


def _named(files: Sequence[bytes], suffix: str) -> dict[str, bytes]:
    """`rollout_000` and on: clients sort by name."""
    return {f"rollout_{index:03d}.{suffix}": content for index, content in enumerate(files)}


def tar_of(files: Mapping[str, bytes]) -> bytes:
    """Uncompressed."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return output.getvalue()


def _zip(files: Mapping[str, bytes]) -> bytes:
    """Uncompressed; of .npy files it is what `numpy.load` calls an .npz."""
    output = io.BytesIO()
    with zipfile.ZipFile(output, "w", zipfile.ZIP_STORED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return output.getvalue()
