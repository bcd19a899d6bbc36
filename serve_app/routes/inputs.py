"""What a paid request's files and fields say, decoded and checked: the request that the ingress runs."""

import asyncio
import hashlib
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from fastapi import Request

from billing.money import Mils
from billing.reader import KeyRecord
from deployments.errors import DeadlinePassed
from deployments.messages import Actions, Extras, Frame, Frames, Goal, ModelSpec, RolloutRequest, ServiceClass
from serve_app.context import Services
from serve_app.errors import InvalidRequest
from serve_app.routes.quotes import presented_quote
from serve_app.schemas import ActionsFormat, BatchParams, PredictParams, RolloutParams
from serve_app.uploads import decode_actions, decode_frames, decode_start_frame

MAX_IDEMPOTENCY_KEY = 256
MAX_LARGE_FRAMES = 4
"""Start frames of one request that may be of the largest size; of more, each may have its part of their pixels."""
FILE = {"type": "string", "format": "binary"}


def multipart(required: Sequence[str], **properties: Any) -> dict[str, Any]:
    """OpenAPI of a form that the route reads itself, so that it can check the key before the body."""
    schema = {"type": "object", "required": list(required), "properties": properties}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files of a request as they came, and the name that its frame has on this route.

    A frame that was uploaded before is an array already. There is one for all candidates, or one for each.
    """

    frame_field: str
    frames: Sequence[bytes | Frame]
    candidates: Sequence[bytes]
    actions_format: ActionsFormat
    goal: bytes | Frame | None = None
    ground_truth: bytes | None = None


@dataclass(frozen=True, slots=True)
class Decoded:
    start_frames: tuple[Frame, ...]
    resized: bool
    candidates: tuple[Actions, ...]
    goal: Frame | None
    ground_truth: Frames | None


NOTHING_MORE = BatchParams()
"""What is asked for on the routes that offer less than a batch."""


async def assemble(
    request: Request,
    parts: Services,
    caller: KeyRecord,
    model: ModelSpec,
    inputs: Inputs,
    params: RolloutParams | PredictParams,
    path: str = "",
) -> tuple[RolloutRequest, bool]:
    """Decode and check everything. The files are let go of here: only arrays live as long as the rollout.

    `path` leads to the fields of `params`, in messages about them.
    """
    batch = params if isinstance(params, BatchParams) else NOTHING_MORE
    _check_extras(parts, batch, inputs)
    if inputs.ground_truth is not None and not params.score:
        raise InvalidRequest("ground_truth", f"is what a score compares with; send {path}score=true beside it")
    num_steps = model.default_num_steps if params.num_steps is None else params.num_steps
    guidance = model.default_guidance if params.guidance is None else params.guidance
    check_denoising(model, num_steps, guidance, path)
    steps = num_steps
    if params.score:
        if inputs.ground_truth is None:
            steps += model.default_num_steps
        elif len(inputs.candidates) > 1:
            raise InvalidRequest("ground_truth", "is of one candidate; a score against it takes one `actions` part")
    most = parts.max_row_steps[model.slug]
    if steps * len(inputs.candidates) > most:
        raise InvalidRequest(
            f"{path}num_steps",
            f"{steps} steps of {len(inputs.candidates)} candidates are too many; steps x candidates up to {most}"
            " are accepted",
        )
    decoded = await asyncio.get_running_loop().run_in_executor(
        parts.decoders, _decode, parts, model, inputs, batch.horizon
    )
    rollout = RolloutRequest(
        request_id=request.state.request_id,
        key_id=caller.key_id,
        model=model.slug,
        start_frames=decoded.start_frames,
        candidates=decoded.candidates,
        seed=params.seed,
        num_steps=num_steps,
        guidance=guidance,
        payload_sha256="",
        idempotency_key=_idempotency_key(request),
        quote_id=presented_quote(request),
        service_class=_service_class(params),
        deadline_s=_deadline_s(request, model, params),
        extras=Extras(
            returns=batch.returns,
            goal=None if decoded.goal is None else Goal(decoded.goal, batch.metric or "mse"),
            keep=batch.prune or 1.0,
            best_clip=batch.best_clip,
            score=params.score,
            ground_truth=decoded.ground_truth,
        ),
    )
    price = await parts.prices.price(model, rollout.num_frames, caller.customer_id, rollout.service_class)
    _check_bounds(parts, model, batch, rollout, price.total_mils)
    return replace(rollout, payload_sha256=_digest(rollout), price=price), decoded.resized


def check_denoising(model: ModelSpec, num_steps: int, guidance: float = 0.0, path: str = "") -> None:
    """Refuse what other models take and this one does not."""
    if num_steps > (most := model.max_num_steps):
        raise InvalidRequest(f"{path}num_steps", f"is {num_steps}; {model.slug} takes 1 to {most}")
    if guidance > model.max_guidance:
        raise InvalidRequest(f"{path}guidance", f"is {guidance:g}; {model.slug} takes 0 to {model.max_guidance:g}")


def _check_extras(parts: Services, batch: BatchParams, inputs: Inputs) -> None:
    """Refuse what makes no sense without something else that is not there."""
    if inputs.goal is None:
        for field, is_set in (
            ("metric", batch.metric is not None),
            ("prune", batch.prune is not None),
            ("return", batch.returns == "scores"),
        ):
            if is_set:
                raise InvalidRequest(field, "needs a goal; send `goal_frame`, or `goal_frame_id`, beside it")
    if batch.metric == "lpips" and not parts.args.lpips_weights:
        raise InvalidRequest("metric", "lpips is not installed here; mse, psnr, ssim and latent are accepted")
    if batch.best_clip and batch.returns != "scores":
        raise InvalidRequest("best_clip", f"is part of return=scores; return={batch.returns} has every candidate")
    if batch.score and batch.prune is not None:
        raise InvalidRequest("score", "is of whole rollouts; it is not taken with prune")


def _check_bounds(parts: Services, model: ModelSpec, batch: BatchParams, rollout: RolloutRequest, price: Mils) -> None:
    """Refuse what would cost, or weigh, more than it may."""
    if batch.max_cost_mils is not None and rollout.quote_id:
        raise InvalidRequest("max_cost_mils", "is not taken with a quote, whose price binds already")
    if batch.max_cost_mils is not None and price > batch.max_cost_mils:
        raise InvalidRequest("max_cost_mils", f"is {batch.max_cost_mils}, and this request may cost {price} mils")
    height, width = model.resolution
    raw_bytes, most = rollout.num_frames * height * width * 3, parts.args.limits.max_raw_bytes
    if batch.returns == "npz" and raw_bytes > most:
        raise InvalidRequest("return", f"npz would be {raw_bytes} bytes of frames; up to {most} are accepted")


def _service_class(params: RolloutParams | PredictParams) -> ServiceClass:
    """Any key may ask to wait longer; none may ask to go before others."""
    if isinstance(params, PredictParams):
        return params.service_class
    return "batch" if params.mode == "async" else "standard"


def _deadline_s(request: Request, model: ModelSpec, params: RolloutParams | PredictParams) -> float | None:
    """What is left of the time since the request arrived. Raises DeadlinePassed if that is nothing."""
    if not isinstance(params, PredictParams) or params.deadline_ms is None:
        return None
    left_s = params.deadline_ms / 1e3 - (time.perf_counter() - request.state.arrived)
    if left_s <= 0:
        raise DeadlinePassed(model.slug)
    return float(left_s)


def _decode(parts: Services, model: ModelSpec, inputs: Inputs, horizon: int | None) -> Decoded:
    start_frames, resized = _start_frames(parts, model, inputs)
    goal = (
        None
        if inputs.goal is None
        else _picture(parts, model, inputs.goal, "goal_frame", parts.args.limits.max_image_pixels)[0]
    )
    actions = tuple(each[:horizon] for each in _actions(parts, model, inputs))
    ground_truth = None
    if inputs.ground_truth is not None:
        shape = (len(actions[0]), *model.resolution, 3)
        ground_truth = decode_frames(inputs.ground_truth, "ground_truth", shape)
    return Decoded(start_frames, resized, actions, goal, ground_truth)


def _start_frames(parts: Services, model: ModelSpec, inputs: Inputs) -> tuple[tuple[Frame, ...], bool]:
    count, most = len(inputs.frames), parts.args.limits.max_image_pixels
    pixels = min(most, MAX_LARGE_FRAMES * most // count)
    names = [inputs.frame_field if count == 1 else f"{inputs.frame_field}[{index}]" for index in range(count)]
    found = [_picture(parts, model, frame, name, pixels) for frame, name in zip(inputs.frames, names, strict=True)]
    return tuple(frame for frame, _ in found), any(resized for _, resized in found)


def _picture(
    parts: Services, model: ModelSpec, picture: bytes | Frame, field: str, max_pixels: int
) -> tuple[Frame, bool]:
    if isinstance(picture, bytes):
        return decode_start_frame(picture, field, model.resolution, max_pixels)
    if picture.shape[:2] != model.resolution:
        height, width = picture.shape[:2]
        raise InvalidRequest(f"{field}_id", f"is of {height}x{width}; upload it under the base URL of {model.slug}")
    return picture, False


def _actions(parts: Services, model: ModelSpec, inputs: Inputs) -> list[Actions]:
    limits, candidates = parts.args.limits, inputs.candidates
    fields = ["actions"] if len(candidates) == 1 else [f"actions[{index}]" for index in range(len(candidates))]
    if inputs.actions_format == "encoded":
        return [
            decode_actions(candidate, field, model.action_dim, limits.max_actions)
            for field, candidate in zip(fields, candidates, strict=True)
        ]
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
    return actions


def _digest(rollout: RolloutRequest) -> str:
    """What makes two requests the same work, by whichever route they came."""
    digest = hashlib.sha256(f"{rollout.model}\n{rollout.seed}\n{rollout.num_steps}\n{rollout.guidance}\n".encode())
    if len(rollout.start_frames) > 1:
        digest.update(f"{len(rollout.start_frames)} start frames\n".encode())
    for frame in rollout.start_frames:
        digest.update(frame.tobytes())
    for actions in rollout.candidates:
        digest.update(str(actions.shape).encode())
        digest.update(actions.tobytes())
    extras = rollout.extras
    if not extras.is_plain:
        digest.update(f"{extras.returns}\n{extras.keep}\n{extras.best_clip}\n{extras.score}\n".encode())
        if extras.goal is not None:
            digest.update(extras.goal.metric.encode())
            digest.update(extras.goal.frame.tobytes())
        if extras.ground_truth is not None:
            digest.update(extras.ground_truth.tobytes())
    return digest.hexdigest()


def _idempotency_key(request: Request) -> str:
    """The header's value, or empty if it is not sent."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return ""
    if not 1 <= len(key) <= MAX_IDEMPOTENCY_KEY or not key.isascii() or not key.isprintable():
        raise InvalidRequest("Idempotency-Key", f"is not 1 to {MAX_IDEMPOTENCY_KEY} printable ASCII characters")
    return key
