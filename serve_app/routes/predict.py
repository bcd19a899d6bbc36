"""`/v1/predict` and `/v1/predict/batch`: rollouts on the active model, answered with their bytes."""

from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from billing.reader import KeyRecord
from deployments.messages import Frame, ModelSpec, RolloutRequest
from deployments.streaming import StreamForm
from serve_app.context import PayingCaller, Services, active_model, authenticate_for_work, services
from serve_app.errors import InvalidRequest
from serve_app.forms import Form, read_form
from serve_app.routes.answers import BATCH, MP4, batch_answer, result_headers
from serve_app.routes.frames import uploaded
from serve_app.routes.inputs import FILE, Inputs, assemble, multipart
from serve_app.routes.quotes import DryRun, as_json, estimate
from serve_app.routes.streams import asked_form, streamed
from serve_app.schemas import BatchParams, PredictParams

paid = APIRouter(tags=["rollouts"], dependencies=[Depends(authenticate_for_work)])


def knobs(schema: type[PredictParams]) -> dict[str, Any]:
    properties: dict[str, Any] = schema.model_json_schema()["properties"]
    return properties


@paid.post(
    "/v1/predict",
    response_class=Response,
    responses=MP4,
    openapi_extra=multipart(["actions"], frame=FILE, actions=FILE, ground_truth=FILE, **knobs(PredictParams)),
)
async def predict(
    request: Request,
    caller: PayingCaller,
    dry_run: DryRun = False,
    stream: Annotated[StreamForm | None, Query(description="Send frames as they are made")] = None,
) -> Response:
    """One rollout on the active model; the answer is its mp4."""
    parts, model = services(request), await active_model(request)
    form = await read_form(request, 8, parts.args.limits.body_timeout_s)
    form.only(files=("frame", "actions", "ground_truth"), fields=_names(PredictParams))
    params = form.fields(PredictParams)
    rollout = await _read(request, parts, caller, model, form, params, max_candidates=1)
    if dry_run:
        return as_json(await estimate(parts, caller, rollout))
    form_asked = asked_form(request, stream)
    if form_asked is not None:
        return await streamed(parts, rollout, form_asked)
    result = await parts.ingress.run(rollout)
    return Response(result.videos[0], media_type="video/mp4", headers=result_headers(result, caller))


@paid.post(
    "/v1/predict/batch",
    response_class=Response,
    responses=BATCH,
    openapi_extra=multipart(
        ["actions"],
        frame={"type": "array", "items": FILE, "description": "One for all `actions`, or one for each"},
        actions={"type": "array", "items": FILE},
        goal_frame=FILE,
        ground_truth=FILE,
        **knobs(BatchParams),
    ),
)
async def predict_batch(request: Request, caller: PayingCaller, dry_run: DryRun = False) -> Response:
    """K rollouts from one start frame or from one each, reserved and charged as one; a tar of K mp4s in order."""
    parts, model = services(request), await active_model(request)
    if asked_form(request, "mp4" if "stream" in request.query_params else None) is not None:
        raise InvalidRequest("stream", "is of one rollout; /v1/predict streams")
    most = parts.args.limits.max_candidates
    form = await read_form(request, 2 * most + 8, parts.args.limits.body_timeout_s)
    form.only(files=("frame", "actions", "goal_frame", "ground_truth"), fields=_names(BatchParams))
    params = form.fields(BatchParams)
    rollout = await _read(request, parts, caller, model, form, params, most)
    if dry_run:
        return as_json(await estimate(parts, caller, rollout))
    return batch_answer(rollout, await parts.ingress.run(rollout), caller)


async def _read(
    request: Request,
    parts: Services,
    caller: KeyRecord,
    model: ModelSpec,
    form: Form,
    params: PredictParams,
    max_candidates: int,
) -> RolloutRequest:
    goal_frame_id = params.goal_frame_id if isinstance(params, BatchParams) else None
    inputs = Inputs(
        frame_field="frame",
        frames=await _frames(parts, caller, form, params.frame_id),
        candidates=[form.file("actions")] if max_candidates == 1 else form.files("actions", max_candidates),
        actions_format=params.actions_format,
        goal=await uploaded(parts, caller, form, "goal_frame", goal_frame_id),
        ground_truth=form.optional_file("ground_truth"),
    )
    rollout, _ = await assemble(request, parts, caller, model, inputs, params)
    return rollout


async def _frames(parts: Services, caller: KeyRecord, form: Form, frame_id: str | None) -> Sequence[bytes | Frame]:
    """One for all candidates, or one for each."""
    count, num_candidates = form.count("frame"), form.count("actions")
    if frame_id is None and count > 1 and num_candidates > 1:
        if count != num_candidates:
            raise InvalidRequest(
                "frame", f"is there {count} times; one for all {num_candidates} `actions`, or one for each, is accepted"
            )
        return form.files("frame", count)
    frame = await uploaded(parts, caller, form, "frame", frame_id)
    return [form.file("frame") if frame is None else frame]


def _names(schema: type[PredictParams]) -> list[str]:
    return [field.alias or name for name, field in schema.model_fields.items()]
