"""A rollout as clients see it, whatever it comes from: a finished result, or a job in any state."""

from billing.commands import RequestId
from billing.money import usd
from deployments.job_store import Job
from deployments.messages import RolloutResult
from serve_app.catalog import CATALOG
from serve_app.schemas import RolloutEnvelope, RolloutFailure, RolloutMetadata
from serve_app.signing import LinkSigner

PROVIDER = "dream-engine-cluster"
PROVIDER_NAME = "Dream Engine Cluster"
PREFIX = "rollout_"


def rollout_id(request_id: RequestId) -> str:
    return f"{PREFIX}{request_id.removeprefix('req_')}"


class Envelopes:
    """Knows how links are signed and for how long videos are kept."""

    def __init__(self, signer: LinkSigner, video_ttl_s: float) -> None:
        self._signer = signer
        self._video_ttl_s = video_ttl_s

    def of_result(
        self, result: RolloutResult, seed: int, start_frame_resized: bool | None, base_url: str
    ) -> RolloutEnvelope:
        cost_usd = usd(result.cost_mils)
        closeness = result.closeness
        created = int(result.created_at)
        envelope = self._envelope(result.request_id, result.model, created, result.num_frames, seed)
        return envelope.model_copy(
            update={
                "status": "succeeded",
                "engine_wall_ms": round(result.infer_ms, 3),
                "psnr_db": None if closeness is None else closeness.psnr_db,
                "ssim": None if closeness is None else closeness.ssim,
                "lpips": None if closeness is None else closeness.lpips,
                "cost_usd": cost_usd,
                "metadata": envelope.metadata.model_copy(
                    update={"cost": cost_usd, "start_frame_resized": start_frame_resized}
                ),
                **self._link(result.request_id, created, base_url),
            }
        )

    def of_job(self, job: Job) -> RolloutEnvelope:
        """There is a link once there is a video: of all frames, or of those before a cancellation."""
        envelope = self._envelope(job.request_id, job.model, int(job.created_at), job.delivered, job.seed)
        ended = job.finished_at is not None
        return envelope.model_copy(
            update={
                "status": job.state,
                "engine_wall_ms": round(job.infer_ms, 3),
                "psnr_db": job.psnr_db,
                "ssim": job.ssim,
                "lpips": job.lpips,
                "cost_usd": usd(job.captured),
                "error": RolloutFailure(code=job.error_code, message=job.error) if job.error_code else None,
                "metadata": envelope.metadata.model_copy(
                    update={
                        "cost": usd(job.captured) if ended else None,
                        "cost_estimate": None if ended else usd(job.amount),
                        "frames_requested": job.frames,
                        "start_frame_resized": job.start_frame_resized,
                    }
                ),
                **(self._link(job.request_id, int(job.finished_at or 0), job.base_url) if job.delivered else {}),
            }
        )

    def webhook_body(self, job: Job) -> bytes:
        return self.of_job(job).model_dump_json(exclude_none=True).encode()

    def _envelope(self, request_id: RequestId, model: str, created: int, frames: int, seed: int) -> RolloutEnvelope:
        return RolloutEnvelope(
            id=rollout_id(request_id),
            model=model,
            created=created,
            status="queued",
            frames=frames,
            resolution=CATALOG[model].spec.resolution,
            engine_wall_ms=0.0,
            cost_usd=0.0,
            seed=seed,
            metadata=RolloutMetadata(
                provider=PROVIDER, provider_name=PROVIDER_NAME, executed_model=model, upstream_id=request_id
            ),
        )

    def _link(self, request_id: RequestId, since: int, base_url: str) -> dict[str, str | int]:
        name, expires_at = rollout_id(request_id), since + int(self._video_ttl_s)
        signature = self._signer.sign(name, expires_at)
        url = f"{base_url}/v1/rollouts/{name}/video?expires={expires_at}&signature={signature}"
        return {"video_url": url, "video_url_expires_at": expires_at}
