"""`/v1/rollouts`: one rollout, answered with an envelope that links to its video."""

import asyncio
import time

import structlog
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse

from billing.commands import RequestId
from billing.reader import KeyRecord
from deployments.messages import ModelSpec, RolloutRequest, RolloutResult
from deployments.webhooks import check_url
from serve_app.context import ActiveSlug, Parts, PayingCaller, Services, authenticate_for_work, base_url
from serve_app.errors import ApiError, Forbidden, Gone, InvalidRequest, ModelRefused, NotFound
from serve_app.forms import read_form, validate
from serve_app.middleware import REQUEST_ID_HEADER
from serve_app.routes.answers import MP4, result_headers
from serve_app.routes.inputs import FILE, Inputs, assemble, multipart
from serve_app.routes.quotes import DryRun, as_json, estimate
from serve_app.schemas import Estimate, RolloutEnvelope, RolloutParams

log = structlog.get_logger(__name__)

router = APIRouter(tags=["rollouts"])
paid = APIRouter(tags=["rollouts"], dependencies=[Depends(authenticate_for_work)])
"""Whatever costs money. Each takes `DryRun`: a price that was asked for must never be charged instead."""


@paid.post(
    "/v1/rollouts",
    response_model=RolloutEnvelope | Estimate,
    response_model_exclude_none=True,
    responses={202: {"model": RolloutEnvelope}},
    openapi_extra=multipart(
        ["start_frame", "actions", "params"],
        start_frame=FILE,
        actions=FILE,
        ground_truth=FILE,
        params={"type": "string"},
    ),
)
async def create_rollout(
    request: Request,
    response: Response,
    parts: Parts,
    caller: PayingCaller,
    active: ActiveSlug,
    dry_run: DryRun = False,
) -> RolloutEnvelope | Response:
    """One rollout; the answer links to its video. `params` is JSON text with the fields of `RolloutParams`; with
    `"mode": "async"` the answer is 202 as soon as it is paid for and queued."""
    rollout, resized, params = await _read_rollout(request, parts, caller, active)
    if dry_run:
        return as_json(await estimate(parts, caller, rollout))
    if params.mode == "async":
        return await _queue(rollout, resized, params.webhook_url or "", request, response, parts, caller)
    result = await parts.ingress.run(rollout, lasting=True)
    return await _linked(result, rollout, resized, request, response, parts, caller)


async def _linked(
    result: RolloutResult,
    rollout: RolloutRequest,
    resized: bool,
    request: Request,
    response: Response,
    parts: Services,
    caller: KeyRecord,
) -> RolloutEnvelope:
    if result.request_id != rollout.request_id:  # perhaps another route's: then it was kept only for a repetition
        try:
            await asyncio.to_thread(parts.results.put, result, True)
        except OSError as error:
            log.error("link_not_stored", request_id=result.request_id, error=type(error).__name__)
            raise ApiError("the rollout was delivered before, but a link to it cannot be stored now") from error
    response.headers.update(result_headers(result, caller))
    return parts.envelopes.of_result(result, rollout.seed, resized, base_url(request, parts))


async def _queue(
    rollout: RolloutRequest,
    resized: bool,
    webhook_url: str,
    request: Request,
    response: Response,
    parts: Services,
    caller: KeyRecord,
) -> RolloutEnvelope:
    """202 until it has ended, however often it is sent."""
    base = base_url(request, parts)
    queued = await parts.jobs.jobs.submit(rollout, caller.customer_id, resized, base, webhook_url)
    if isinstance(queued, RolloutResult):  # it was sent before without mode=async
        return await _linked(queued, rollout, resized, request, response, parts, caller)
    envelope = parts.envelopes.of_job(queued)
    response.status_code = 202 if queued.finished_at is None else 200
    response.headers.update(
        {
            REQUEST_ID_HEADER: queued.request_id,
            "X-DreamEngine-Customer-Id": caller.customer_id,
            "X-DreamEngine-Model": queued.model,
            "Location": f"{base}/v1/rollouts/{envelope.id}",
        }
    )
    return envelope


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
) -> tuple[RolloutRequest, bool, RolloutParams]:
    """The validated request of `POST /v1/rollouts`, and whether its start frame had to be resized."""
    form = await read_form(request, 8, parts.args.limits.body_timeout_s)
    form.only(files=("start_frame", "actions", "ground_truth"), fields=("params",))
    params = validate(RolloutParams, form.field("params"), "params")
    model = _named_model(request, parts, active, params.model)
    if params.webhook_url is not None:
        if params.mode != "async":
            raise InvalidRequest("params.webhook_url", 'is for "mode": "async"; the answer to this request tells all')
        try:
            check_url(params.webhook_url, parts.args.webhook_loopback)
        except ValueError as error:
            raise InvalidRequest("params.webhook_url", str(error)) from None
    inputs = Inputs(
        "start_frame",
        [form.file("start_frame")],
        [form.file("actions")],
        params.actions_format,
        ground_truth=form.optional_file("ground_truth"),
    )
    rollout, resized = await assemble(request, parts, caller, model, inputs, params, "params.")
    return rollout, resized, params


def _named_model(request: Request, parts: Services, active: str, slug: str) -> ModelSpec:
    """A served model; under `/models/{slug}/` the one of the path. 422 and never 404, see `errors`."""
    model = parts.models.get(slug)
    if model is None:
        raise ModelRefused("params.model", f"{slug!r} is not served here; see /v1/models")
    if "base_model" in request.path_params and slug != active:
        raise ModelRefused("params.model", f"{slug!r} is not active under this base URL; {active!r} is")
    return model.spec
