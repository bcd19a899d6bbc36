"""What the paid routes answer with, beside JSON."""

import io
import tarfile
from collections.abc import Sequence
from typing import Any

from billing.money import usd
from billing.reader import KeyRecord
from deployments.messages import RolloutResult
from serve_app.middleware import REQUEST_ID_HEADER
from serve_app.routes.inputs import FILE

MP4: dict[int | str, dict[str, Any]] = {200: {"content": {"video/mp4": {"schema": FILE}}}}
TAR: dict[int | str, dict[str, Any]] = {200: {"content": {"application/x-tar": {"schema": FILE}}}}


def result_headers(result: RolloutResult, caller: KeyRecord) -> dict[str, str]:
    return {
        REQUEST_ID_HEADER: result.request_id,
        "X-DreamEngine-Engine-Wall-Ms": f"{result.infer_ms:.3f}",
        "X-DreamEngine-Estimated-Charge-USD": f"{usd(result.cost_mils):.4f}",
        "X-DreamEngine-Customer-Id": caller.customer_id,
        "X-DreamEngine-Frames": str(result.num_frames),
        "X-DreamEngine-Model": result.model,
    }


def tar_of(videos: Sequence[bytes]) -> bytes:
    """Uncompressed, `rollout_000.mp4` and on: clients sort the members by name."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as tar:
        for index, video in enumerate(videos):
            member = tarfile.TarInfo(f"rollout_{index:03d}.mp4")
            member.size = len(video)
            tar.addfile(member, io.BytesIO(video))
    return output.getvalue()
