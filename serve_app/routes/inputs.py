"""What a paid request's files and fields say, decoded and checked: the request that the ingress runs."""

import asyncio
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from billing.reader import KeyRecord
from deployments.messages import Actions, Frame, ModelSpec, RolloutRequest
from serve_app.context import Services
from serve_app.errors import InvalidRequest
from serve_app.routes.quotes import presented_quote
from serve_app.schemas import ActionsFormat, PredictParams, RolloutParams
from serve_app.uploads import decode_actions, decode_start_frame

MAX_IDEMPOTENCY_KEY = 256
FILE = {"type": "string", "format": "binary"}


def multipart(required: Sequence[str], **properties: Any) -> dict[str, Any]:
    """OpenAPI of a form that the route reads itself, so that it can check the key before the body."""
    schema = {"type": "object", "required": list(required), "properties": properties}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": schema}}}}


@dataclass(frozen=True, slots=True)
class Inputs:
    """The files of a request as they came, and the name that its frame has on this route."""

    frame_field: str
    frame: bytes
    candidates: Sequence[bytes]
    actions_format: ActionsFormat


async def assemble(
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
