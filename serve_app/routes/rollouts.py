"""The paid routes: validate, hand over to the ingress, and dress the result as each route's answer."""

import asyncio
import hashlib
import io
import tarfile
import time
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.responses import FileResponse

from billing.money import usd
from billing.reader import KeyRecord
from deployments.messages import Actions, Frame, ModelSpec, RolloutRequest, RolloutResult
from serve_app.context import ActiveModel, ActiveSlug, Caller, Parts, Services
from serve_app.errors import Forbidden, Gone, InvalidRequest, ModelRefused, NotFound
from serve_app.forms import read_form, validate
from serve_app.middleware import REQUEST_ID_HEADER
from serve_app.schemas import PredictParams, RolloutEnvelope, RolloutMetadata, RolloutParams
from serve_app.uploads import decode_actions, decode_start_frame

PROVIDER = "dream-engine-cluster"
PROVIDER_NAME = "Dream Engine Cluster"
ROLLOUT_ID = "rollout_{}"

FILE = {"type": "string", "format": "binary"}
KNOBS = PredictParams.model_json_schema()["properties"]
MP4: dict[int | str, dict[str, Any]] = {200: {"content": {"video/mp4": {"schema": FILE}}}}
TAR: dict[int | str, dict[str, Any]] = {200: {"content": {"application/x-tar": {"schema": FILE}}}}


def multipart(required: Sequence[str], **properties: Any) -> dict[str, Any]:
    """OpenAPI of a form that the route reads itself, so that it can check the key before the body."""
    schema = {"type": "object", "required": list(required), "properties": properties}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


async def refuse_unoffered(
    request: Request,
    _: Caller,
    dry_run: Annotated[bool, Query(alias="dryRun", description="Not offered yet: refused, never run")] = False,
) -> None:
    """A promise that this version does not keep is refused; ignoring it could cost the caller money."""
    if dry_run:
        raise InvalidRequest("dryRun", "quotes are not offered by this version; nothing was run")
    if "idempotency-key" in request.headers:
        raise InvalidRequest("Idempotency-Key", "is not offered by this version; nothing was run")


router = APIRouter(tags=["rollouts"])
paid = APIRouter(tags=["rollouts"], dependencies=[Depends(refuse_unoffered)])


@paid.post(
    "/v1/rollouts",
    openapi_extra=multipart(
        ["start_frame", "actions", "params"], start_frame=FILE, actions=FILE, params={"type": "string"}
    ),
)
async def create_rollout(request: Request, parts: Parts, caller: Caller, active: ActiveSlug) -> RolloutEnvelope:
    """One rollout; the answer links to its video. `params` is JSON text with the fields of `RolloutParams`."""
    form = await read_form(request, 8, parts.args.limits.body_timeout_s)
    form.only(files=("start_frame", "actions"), fields=("params",))
    params = validate(RolloutParams, form.field("params"), "params")
    model = _named_model(request, parts, active, params)
    if params.mode == "async":
        raise InvalidRequest("params.mode", "async rollouts are not offered by this version; sync is accepted")
    if params.webhook_url is not None:
        raise InvalidRequest("params.webhook_url", "webhooks are not offered by this version; nothing was run")
    if params.score:
        raise InvalidRequest("params.score", "scores are not offered by this version; false is accepted")
    frame, actions = form.file("start_frame"), [form.file("actions")]
    result, resized = await _run(request, parts, caller, model, "start_frame", frame, actions, params)
    rollout_id = ROLLOUT_ID.format(result.request_id.removeprefix("req_"))
    await asyncio.to_thread(parts.results.put, rollout_id, result.videos[0])
    now = int(time.time())
    expires_at = now + int(parts.results.ttl_s)
    cost_usd = usd(result.cost_mils)
    return RolloutEnvelope(
        id=rollout_id,
        model=model.slug,
        created=now,
        status="succeeded",
        frames=result.num_frames,
        resolution=model.resolution,
        engine_wall_ms=round(result.infer_ms, 3),
        cost_usd=cost_usd,
        video_url=_video_url(request, parts, rollout_id, expires_at),
        video_url_expires_at=expires_at,
        seed=params.seed,
        metadata=RolloutMetadata(
            provider=PROVIDER,
            provider_name=PROVIDER_NAME,
            executed_model=model.slug,
            upstream_id=result.request_id,
            cost=cost_usd,
            start_frame_resized=resized,
        ),
    )


@paid.post(
    "/v1/predict",
    response_class=Response,
    responses=MP4,
    openapi_extra=multipart(["frame", "actions"], frame=FILE, actions=FILE, **KNOBS),
)
async def predict(request: Request, parts: Parts, caller: Caller, model: ActiveModel) -> Response:
    """One rollout on the active model; the answer is its mp4."""
    form = await read_form(request, 8, parts.args.limits.body_timeout_s)
    form.only(files=("frame", "actions"), fields=PredictParams.model_fields)
    params = form.fields(PredictParams)
    result, _ = await _run(request, parts, caller, model, "frame", form.file("frame"), [form.file("actions")], params)
    return Response(result.videos[0], media_type="video/mp4", headers=_headers(result, caller))


@paid.post(
    "/v1/predict/batch",
    response_class=Response,
    responses=TAR,
    openapi_extra=multipart(["frame", "actions"], frame=FILE, actions={"type": "array", "items": FILE}, **KNOBS),
)
async def predict_batch(request: Request, parts: Parts, caller: Caller, model: ActiveModel) -> Response:
    """K rollouts that share a start frame, reserved and charged as one; the answer is a tar of K mp4s in order."""
    limits = parts.args.limits
    form = await read_form(request, limits.max_candidates + 8, limits.body_timeout_s)
    form.only(files=("frame", "actions"), fields=PredictParams.model_fields)
    params = form.fields(PredictParams)
    candidates = form.files("actions", limits.max_candidates)
    result, _ = await _run(request, parts, caller, model, "frame", form.file("frame"), candidates, params)
    headers = _headers(result, caller) | {"X-DreamEngine-Batch-Size": str(len(result.videos))}
    return Response(_tar(result.videos), media_type="application/x-tar", headers=headers)


@router.get("/v1/rollouts/{rollout_id}/video", response_class=FileResponse, responses=MP4)
async def get_video(rollout_id: str, expires: int, signature: str, parts: Parts) -> FileResponse:
    """The video behind a rollout's `video_url`: the signature is the permission, no key is sent."""
    if not parts.signer.is_valid(rollout_id, expires, signature):
        raise Forbidden("signature: does not match this link; use a rollout's video_url unchanged")
    path = parts.results.path(rollout_id)
    if time.time() > expires:
        raise Gone("expires: this link has expired; run the rollout again")
    if not path.is_file():
        raise NotFound("this video is no longer stored")
    return FileResponse(path, media_type="video/mp4", filename=f"{rollout_id}.mp4", content_disposition_type="inline")


def _named_model(request: Request, parts: Services, active: str, params: RolloutParams) -> ModelSpec:
    """The model that `params` names, which must be the active one: 422 and never 404, see `errors`."""
    model = parts.models.get(params.model)
    if model is None:
        raise ModelRefused("params.model", f"{params.model!r} is not served here; see /v1/models")
    if "base_model" in request.path_params and params.model != active:
        raise ModelRefused("params.model", f"{params.model!r} is not active under this base URL; {active!r} is")
    return model.spec


async def _run(
    request: Request,
    parts: Services,
    caller: KeyRecord,
    model: ModelSpec,
    frame_field: str,
    frame: bytes,
    candidates: Sequence[bytes],
    params: RolloutParams | PredictParams,
) -> tuple[RolloutResult, bool]:
    """Decode and validate everything, then run it unless an identical request of this customer just did."""
    start_frame, actions, resized = await asyncio.get_running_loop().run_in_executor(
        parts.decoders, _decode, parts, model, frame_field, frame, candidates
    )
    rollout = RolloutRequest(
        request_id=request.state.request_id,
        customer_id=caller.customer_id,
        key_id=caller.key_id,
        model=model.slug,
        start_frame=start_frame,
        candidates=tuple(actions),
        seed=params.seed,
        num_steps=model.default_num_steps if params.num_steps is None else params.num_steps,
        guidance=model.default_guidance if params.guidance is None else params.guidance,
    )
    result = await parts.replays.run(_digest(rollout), lambda: parts.ingress.run(rollout))
    return result, resized


def _decode(
    parts: Services, model: ModelSpec, frame_field: str, frame: bytes, candidates: Sequence[bytes]
) -> tuple[Frame, list[Actions], bool]:
    limits = parts.args.limits
    start_frame, resized = decode_start_frame(frame, frame_field, model.resolution, limits.max_image_pixels)
    fields = ["actions"] if len(candidates) == 1 else [f"actions[{index}]" for index in range(len(candidates))]
    actions = [
        decode_actions(candidate, field, model.action_dim, limits.max_actions)
        for field, candidate in zip(fields, candidates, strict=True)
    ]
    return start_frame, actions, resized


def _digest(rollout: RolloutRequest) -> str:
    """What makes two requests the same work for the same customer, by whichever route they came."""
    digest = hashlib.sha256(
        f"{rollout.customer_id}\n{rollout.model}\n{rollout.seed}\n{rollout.num_steps}\n{rollout.guidance}\n".encode()
    )
    digest.update(rollout.start_frame.tobytes())
    for actions in rollout.candidates:
        digest.update(str(actions.shape).encode())
        digest.update(actions.tobytes())
    return digest.hexdigest()


def _headers(result: RolloutResult, caller: KeyRecord) -> dict[str, str]:
    return {
        REQUEST_ID_HEADER: result.request_id,
        "X-DreamEngine-Engine-Wall-Ms": f"{result.infer_ms:.3f}",
        "X-DreamEngine-Estimated-Charge-USD": f"{usd(result.cost_mils):.4f}",
        "X-DreamEngine-Customer-Id": caller.customer_id,
        "X-DreamEngine-Frames": str(result.num_frames),
        "X-DreamEngine-Model": result.model,
    }


def _tar(videos: Sequence[bytes]) -> bytes:
    """Uncompressed, `rollout_000.mp4` and on: clients sort the members by name."""
    output = io.BytesIO()
    with tarfile.open(fileobj=output, mode="w") as tar:
        for index, video in enumerate(videos):
            member = tarfile.TarInfo(f"rollout_{index:03d}.mp4")
            member.size = len(video)
            tar.addfile(member, io.BytesIO(video))
    return output.getvalue()


def _video_url(request: Request, parts: Services, rollout_id: str, expires_at: int) -> str:
    base = parts.args.public_url.rstrip("/") or str(request.base_url).rstrip("/")
    signature = parts.signer.sign(rollout_id, expires_at)
    return f"{base}/v1/rollouts/{rollout_id}/video?expires={expires_at}&signature={signature}"
