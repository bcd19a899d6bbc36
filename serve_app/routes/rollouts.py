"""The paid routes: validate, hand over to the ingress, and dress the result as each route's answer."""

import asyncio
import hashlib
import io
import tarfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import structlog
from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import FileResponse

from billing.commands import RequestId
from billing.money import usd
from billing.reader import KeyRecord
from deployments.messages import Actions, Frame, ModelSpec, RolloutRequest, RolloutResult
from serve_app.context import ActiveModel, ActiveSlug, Caller, Parts, Services, authenticate
from serve_app.errors import ApiError, Forbidden, Gone, InvalidRequest, ModelRefused, NotFound
from serve_app.forms import read_form, validate
from serve_app.middleware import REQUEST_ID_HEADER
from serve_app.routes.quotes import PROVIDER, DryRun, as_json, estimate, presented_quote
from serve_app.schemas import ActionsFormat, Estimate, PredictParams, RolloutEnvelope, RolloutMetadata, RolloutParams
from serve_app.uploads import decode_actions, decode_start_frame

MAX_IDEMPOTENCY_KEY = 256
PROVIDER_NAME = "Dream Engine Cluster"

FILE = {"type": "string", "format": "binary"}
KNOBS = PredictParams.model_json_schema()["properties"]
MP4: dict[int | str, dict[str, Any]] = {200: {"content": {"video/mp4": {"schema": FILE}}}}
TAR: dict[int | str, dict[str, Any]] = {200: {"content": {"application/x-tar": {"schema": FILE}}}}


def multipart(required: Sequence[str], **properties: Any) -> dict[str, Any]:
    """OpenAPI of a form that the route reads itself, so that it can check the key before the body."""
    schema = {"type": "object", "required": list(required), "properties": properties}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


log = structlog.get_logger(__name__)

router = APIRouter(tags=["rollouts"])
paid = APIRouter(tags=["rollouts"], dependencies=[Depends(authenticate)])
"""Whatever costs money. Each takes `DryRun`: a price that was asked for must never be charged instead."""


@paid.post(
    "/v1/rollouts",
    openapi_extra=multipart(
        ["start_frame", "actions", "params"], start_frame=FILE, actions=FILE, params={"type": "string"}
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
    response.headers.update(_headers(result, caller))
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
    return Response(result.videos[0], media_type="video/mp4", headers=_headers(result, caller))


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
    headers = _headers(result, caller) | {"X-DreamEngine-Batch-Size": str(len(result.videos))}
    return Response(_tar(result.videos), media_type="application/x-tar", headers=headers)


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
    form.only(files=("start_frame", "actions"), fields=("params",))
    params = validate(RolloutParams, form.field("params"), "params")
    model = _named_model(request, parts, active, params.model)
    if params.mode == "async":
        raise InvalidRequest("params.mode", "async rollouts are not offered by this version; sync is accepted")
    if params.webhook_url is not None:
        raise InvalidRequest("params.webhook_url", "webhooks are not offered by this version; nothing was run")
    if params.score:
        raise InvalidRequest("params.score", "scores are not offered by this version; false is accepted")
    inputs = Inputs("start_frame", form.file("start_frame"), [form.file("actions")], params.actions_format)
    return await _assemble(request, parts, caller, model, inputs, params, "params.num_steps")


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
    rollout, _ = await _assemble(request, parts, caller, model, inputs, params, "num_steps")
    return rollout


def _named_model(request: Request, parts: Services, active: str, slug: str) -> ModelSpec:
    """A served model; under `/models/{slug}/` the one of the path. 422 and never 404, see `errors`."""
    model = parts.models.get(slug)
    if model is None:
        raise ModelRefused("params.model", f"{slug!r} is not served here; see /v1/models")
    if "base_model" in request.path_params and slug != active:
        raise ModelRefused("params.model", f"{slug!r} is not active under this base URL; {active!r} is")
    return model.spec


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files of a request as they came, and the name that its frame has on this route."""

    frame_field: str
    frame: bytes
    candidates: Sequence[bytes]
    actions_format: ActionsFormat


async def _assemble(
    request: Request,
    parts: Services,
    caller: KeyRecord,
    model: ModelSpec,
    inputs: Inputs,
    params: RolloutParams | PredictParams,
    steps_field: str,
) -> tuple[RolloutRequest, bool]:
    """Decode and check everything. The files are let go of here: only arrays live as long as the rollout."""
    num_steps = model.default_num_steps if params.num_steps is None else params.num_steps
    most = parts.max_row_steps[model.slug]
    if num_steps * len(inputs.candidates) > most:
        raise InvalidRequest(
            steps_field,
            f"{num_steps} steps of {len(inputs.candidates)} candidates are too many; steps x candidates up to {most}"
            " are accepted",
        )
    start_frame, actions, resized = await asyncio.get_running_loop().run_in_executor(
        parts.decoders, _decode, parts, model, inputs
    )
    guidance = model.default_guidance if params.guidance is None else params.guidance
    rollout = RolloutRequest(
        request_id=request.state.request_id,
        key_id=caller.key_id,
        model=model.slug,
        start_frame=start_frame,
        candidates=tuple(actions),
        seed=params.seed,
        num_steps=num_steps,
        guidance=guidance,
        payload_sha256=_digest(model.slug, params.seed, num_steps, guidance, start_frame, actions),
        idempotency_key=_idempotency_key(request),
        quote_id=presented_quote(request),
    )
    return rollout, resized


def _decode(parts: Services, model: ModelSpec, inputs: Inputs) -> tuple[Frame, list[Actions], bool]:
    limits, candidates = parts.args.limits, inputs.candidates
    start_frame, resized = decode_start_frame(
        inputs.frame, inputs.frame_field, model.resolution, limits.max_image_pixels
    )
    fields = ["actions"] if len(candidates) == 1 else [f"actions[{index}]" for index in range(len(candidates))]
    if inputs.actions_format == "encoded":
        actions = [
            decode_actions(candidate, field, model.action_dim, limits.max_actions)
            for field, candidate in zip(fields, candidates, strict=True)
        ]
        return start_frame, actions, resized
    robot = parts.commands.get(model.slug)
    if robot is None:
        raise InvalidRequest("actions_format", f"{model.slug} takes encoded actions only")
    actions = []
    for field, candidate in zip(fields, candidates, strict=True):
        commands = decode_actions(candidate, field, robot.num_dimensions, limits.max_actions + 2)
        try:
            actions.append(robot.actions(commands))
        except ValueError as error:
            raise InvalidRequest(field, str(error)) from None
    return start_frame, actions, resized


def _digest(
    model: str, seed: int, num_steps: int, guidance: float, start_frame: Frame, candidates: Sequence[Actions]
) -> str:
    """What makes two requests the same work, by whichever route they came."""
    digest = hashlib.sha256(f"{model}\n{seed}\n{num_steps}\n{guidance}\n".encode())
    digest.update(start_frame.tobytes())
    for actions in candidates:
        digest.update(str(actions.shape).encode())
        digest.update(actions.tobytes())
    return digest.hexdigest()


def _idempotency_key(request: Request) -> str:
    """The header's value, or empty if it is not sent."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return ""
    if not 1 <= len(key) <= MAX_IDEMPOTENCY_KEY or not key.isascii() or not key.isprintable():
        raise InvalidRequest("Idempotency-Key", f"is not 1 to {MAX_IDEMPOTENCY_KEY} printable ASCII characters")
    return key


def _rollout_id(request_id: RequestId) -> str:
    return f"rollout_{request_id.removeprefix('req_')}"


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
