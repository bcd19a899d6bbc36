"""`/v1/predict` and `/v1/predict/batch`: rollouts on the active model, answered with their bytes."""

from fastapi import APIRouter, Depends, Request, Response

from billing.reader import KeyRecord
from deployments.messages import ModelSpec, RolloutRequest
from serve_app.context import ActiveModel, Caller, Parts, Services, authenticate
from serve_app.forms import read_form
from serve_app.routes.answers import MP4, TAR, result_headers, tar_of
from serve_app.routes.inputs import FILE, Inputs, assemble, multipart
from serve_app.routes.quotes import DryRun, as_json, estimate
from serve_app.schemas import PredictParams

KNOBS = PredictParams.model_json_schema()["properties"]

paid = APIRouter(tags=["rollouts"], dependencies=[Depends(authenticate)])


@paid.post(
    "/v1/predict",
    response_class=Response,
    responses=MP4,
    openapi_extra=multipart(["frame", "actions"], frame=FILE, actions=FILE, **KNOBS),
)
async def predict(
    request: Request, parts: Parts, caller: Caller, model: ActiveModel, dry_run: DryRun = False
) -> Response:
    """One rollout on the active model; the answer is its mp4."""
    rollout = await _read_predict(request, parts, caller, model, max_candidates=1)
    if dry_run:
        return as_json(await estimate(parts, caller, rollout))
    result = await parts.ingress.run(rollout)
    return Response(result.videos[0], media_type="video/mp4", headers=result_headers(result, caller))


@paid.post(
    "/v1/predict/batch",
    response_class=Response,
    responses=TAR,
    openapi_extra=multipart(["frame", "actions"], frame=FILE, actions={"type": "array", "items": FILE}, **KNOBS),
)
async def predict_batch(
    request: Request, parts: Parts, caller: Caller, model: ActiveModel, dry_run: DryRun = False
) -> Response:
    """K rollouts that share a start frame, reserved and charged as one; the answer is a tar of K mp4s in order."""
    rollout = await _read_predict(request, parts, caller, model, parts.args.limits.max_candidates)
    if dry_run:
        return as_json(await estimate(parts, caller, rollout))
    result = await parts.ingress.run(rollout)
    headers = result_headers(result, caller) | {"X-DreamEngine-Batch-Size": str(len(result.videos))}
    return Response(tar_of(result.videos), media_type="application/x-tar", headers=headers)


async def _read_predict(
    request: Request, parts: Services, caller: KeyRecord, model: ModelSpec, max_candidates: int
) -> RolloutRequest:
    """The validated request of `POST /v1/predict` and `/v1/predict/batch`."""
    form = await read_form(request, max_candidates + 8, parts.args.limits.body_timeout_s)
    form.only(files=("frame", "actions"), fields=PredictParams.model_fields)
    params = form.fields(PredictParams)
    frame = form.file("frame")
    candidates = [form.file("actions")] if max_candidates == 1 else form.files("actions", max_candidates)
    inputs = Inputs("frame", frame, candidates, params.actions_format)
    rollout, _ = await assemble(request, parts, caller, model, inputs, params, "num_steps")
    return rollout
