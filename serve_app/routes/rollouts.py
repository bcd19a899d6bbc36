"""`/v1/rollouts`: one rollout, answered with an envelope that links to its video."""

import asyncio
import time

import structlog
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse

from billing.commands import RequestId
from billing.money import usd
from billing.reader import KeyRecord
from deployments.messages import ModelSpec, RolloutRequest
from serve_app.context import ActiveSlug, Caller, Parts, Services, authenticate
from serve_app.errors import ApiError, Forbidden, Gone, InvalidRequest, ModelRefused, NotFound
from serve_app.forms import read_form, validate
from serve_app.routes.answers import MP4, result_headers, scores_of
from serve_app.routes.inputs import FILE, Inputs, assemble, multipart
from serve_app.routes.quotes import PROVIDER, DryRun, estimate
from serve_app.schemas import Estimate, RolloutEnvelope, RolloutMetadata, RolloutParams

PROVIDER_NAME = "Dream Engine Cluster"

log = structlog.get_logger(__name__)

router = APIRouter(tags=["rollouts"])
paid = APIRouter(tags=["rollouts"], dependencies=[Depends(authenticate)])
"""Whatever costs money. Each takes `DryRun`: a price that was asked for must never be charged instead."""


@paid.post(
    "/v1/rollouts",
    openapi_extra=multipart(
        ["start_frame", "actions", "params"],
        start_frame=FILE,
        actions=FILE,
        ground_truth=FILE,
        params={"type": "string"},
    ),
)
async def create_rollout(
    request: Request, response: Response, parts: Parts, caller: Caller, active: ActiveSlug, dry_run: DryRun = False
) -> RolloutEnvelope | Estimate:
    """One rollout; the answer links to its video. `params` is JSON text with the fields of `RolloutParams`."""
    rollout, resized = await _read_rollout(request, parts, caller, active)
    if dry_run:
        return await estimate(parts, caller, rollout)
    result = await parts.ingress.run(rollout, lasting=True)
    if result.request_id != rollout.request_id:  # perhaps another route's: then it was kept only for a repetition
        try:
            await asyncio.to_thread(parts.results.put, result, True)
        except OSError as error:
            log.error("link_not_stored", request_id=result.request_id, error=type(error).__name__)
            raise ApiError("the rollout was delivered before, but a link to it cannot be stored now") from error
    rollout_id = _rollout_id(result.request_id)
    response.headers.update(result_headers(result, caller))
    created = int(result.created_at)
    expires_at = created + int(parts.results.ttl_s)
    cost_usd = usd(result.cost_mils)
    return RolloutEnvelope(
        id=rollout_id,
        model=result.model,
        created=created,
        status="succeeded",
        frames=result.num_frames,
        resolution=parts.models[result.model].spec.resolution,
        engine_wall_ms=round(result.infer_ms, 3),
        **scores_of(result),
        cost_usd=cost_usd,
        video_url=_video_url(request, parts, rollout_id, expires_at),
        video_url_expires_at=expires_at,
        seed=rollout.seed,
        metadata=RolloutMetadata(
            provider=PROVIDER,
            provider_name=PROVIDER_NAME,
            executed_model=result.model,
            upstream_id=result.request_id,
            cost=cost_usd,
            start_frame_resized=resized,
        ),
    )


@router.get("/v1/rollouts/{rollout_id}/video", response_class=FileResponse, responses=MP4)
async def get_video(rollout_id: str, expires: int, signature: str, parts: Parts) -> Response:
    """The video behind a rollout's `video_url`: the signature is the permission, no key is sent."""
    if not parts.signer.is_valid(rollout_id, expires, signature):
        raise Forbidden("signature: does not match this link; use a rollout's video_url unchanged")
    if time.time() > expires:
        raise Gone("expires: this link has expired; run the rollout again")
    request_id = RequestId(f"req_{rollout_id.removeprefix('rollout_')}")
    video = await asyncio.to_thread(parts.results.video, request_id)
    if video is None:
        raise NotFound("this video is no longer stored")
    if isinstance(video, bytes):
        headers = {"Content-Disposition": f'inline; filename="{rollout_id}.mp4"'}
        return Response(video, media_type="video/mp4", headers=headers)
    return FileResponse(video, media_type="video/mp4", filename=f"{rollout_id}.mp4", content_disposition_type="inline")


async def _read_rollout(
    request: Request, parts: Services, caller: KeyRecord, active: str
) -> tuple[RolloutRequest, bool]:
    """The validated request of `POST /v1/rollouts`, and whether its start frame had to be resized."""
    form = await read_form(request, 8, parts.args.limits.body_timeout_s)
    form.only(files=("start_frame", "actions", "ground_truth"), fields=("params",))
    params = validate(RolloutParams, form.field("params"), "params")
    model = _named_model(request, parts, active, params.model)
    if params.mode == "async":
        raise InvalidRequest("params.mode", "async rollouts are not offered by this version; sync is accepted")
    if params.webhook_url is not None:
        raise InvalidRequest("params.webhook_url", "webhooks are not offered by this version; nothing was run")
    inputs = Inputs(
        "start_frame",
        form.file("start_frame"),
        [form.file("actions")],
        params.actions_format,
        ground_truth=form.optional_file("ground_truth"),
    )
    return await assemble(request, parts, caller, model, inputs, params, "params.")


def _named_model(request: Request, parts: Services, active: str, slug: str) -> ModelSpec:
    """A served model; under `/models/{slug}/` the one of the path. 422 and never 404, see `errors`."""
    model = parts.models.get(slug)
    if model is None:
        raise ModelRefused("params.model", f"{slug!r} is not served here; see /v1/models")
    if "base_model" in request.path_params and slug != active:
        raise ModelRefused("params.model", f"{slug!r} is not active under this base URL; {active!r} is")
    return model.spec


def _rollout_id(request_id: RequestId) -> str:
    return f"rollout_{request_id.removeprefix('req_')}"


def _video_url(request: Request, parts: Services, rollout_id: str, expires_at: int) -> str:
    base = parts.args.public_url.rstrip("/") or str(request.base_url).rstrip("/")
    signature = parts.signer.sign(rollout_id, expires_at)
    return f"{base}/v1/rollouts/{rollout_id}/video?expires={expires_at}&signature={signature}"
