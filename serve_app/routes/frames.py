"""`/v1/frames`: a start frame that is sent once, and named in the requests that begin from it."""

import asyncio
import math

from fastapi import APIRouter, Depends, Request

from billing.reader import KeyRecord
from deployments.messages import Frame
from serve_app.context import ActiveModel, Caller, Parts, Services, authenticate
from serve_app.errors import InvalidRequest
from serve_app.forms import Form, read_form
from serve_app.routes.inputs import FILE, multipart
from serve_app.schemas import UploadedFrame
from serve_app.uploads import decode_start_frame

router = APIRouter(tags=["frames"], dependencies=[Depends(authenticate)])


@router.post("/v1/frames", openapi_extra=multipart(["frame"], frame=FILE))
async def upload_frame(request: Request, parts: Parts, caller: Caller, model: ActiveModel) -> UploadedFrame:
    """Keep a frame, at the active model's resolution, for an hour at least; free. The same frame has the same id."""
    form = await read_form(request, 8, parts.args.limits.body_timeout_s)
    form.only(files=("frame",), fields=())
    frame, resized = await asyncio.get_running_loop().run_in_executor(
        parts.decoders,
        decode_start_frame,
        form.file("frame"),
        "frame",
        model.resolution,
        parts.args.limits.max_image_pixels,
    )
    frame_id, kept_until = await asyncio.to_thread(parts.frames.put, caller.customer_id, frame)
    return UploadedFrame(id=frame_id, resolution=model.resolution, resized=resized, expires_at=math.floor(kept_until))


async def uploaded(
    parts: Services, caller: KeyRecord, form: Form, field: str, frame_id: str | None
) -> bytes | Frame | None:
    """The picture that the form has as file `field`, or names in its `field_id`; None if it has neither."""
    if frame_id is None:
        return form.optional_file(field)
    if form.optional_file(field) is not None:
        raise InvalidRequest(f"{field}_id", f"is not taken beside the file `{field}`; send one of them")
    frame = await asyncio.to_thread(parts.frames.get, caller.customer_id, frame_id)
    if frame is None:
        raise InvalidRequest(f"{field}_id", "names no frame that is kept; upload it to /v1/frames again")
    return frame
