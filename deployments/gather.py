"""One request's chunks, run to their end and gathered into what it asked for."""

import asyncio
import io
import math
from collections.abc import Collection, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from deployments.chunk_loop import (
    ChunkPlan,
    FinishedChunk,
    References,
    Survivors,
    everyone,
    finished_chunks,
    no_references,
)
from deployments.messages import (
    ChunkDone,
    ChunkForm,
    Closeness,
    Frame,
    Frames,
    ModelSpec,
    RolloutRequest,
    TicketTerms,
)
from deployments.model_client import ModelClient
from deployments.presenter import exact_png
from deployments.video import join_chunks


@dataclass(frozen=True, slots=True)
class Gathered:
    outputs: tuple[bytes, ...]
    """Per candidate, as `RolloutResult.videos`."""
    candidate_frames: tuple[int, ...]
    distances: tuple[float, ...]
    closeness: Closeness | None
    queue_ms: float
    infer_ms: float


async def roll_out(
    model: ModelClient, request: RolloutRequest, terms: TicketTerms, permit: asyncio.Event | None = None
) -> Gathered:
    """All chunks of all candidates that are not pruned on the way; with a `permit`, not before it is set. Raises what
    `finished_chunks` does."""
    finished: list[FinishedChunk] = []
    await run_chunks(model, request, terms, finished, permit)
    return await gather(model, request, finished)


async def run_chunks(
    model: ModelClient,
    request: RolloutRequest,
    terms: TicketTerms,
    finished: list[FinishedChunk],
    permit: asyncio.Event | None = None,
) -> None:
    """Append each chunk to `finished`, which so holds what was made even if this raises or is cancelled."""
    plan = replace(plan_of(request, terms), form=form_of(request, model.spec), permit=permit)
    if permit is not None:  # should that be withdrawn, its tickets are not mistaken for those that follow
        plan = replace(plan, name=f"{plan.name}/early")
    extras = request.extras
    survivors: Survivors = everyone if extras.keep == 1 else lambda chunk: nearest(chunk, extras.keep)
    async with AsyncExitStack() as stack:
        references = await _references(stack, model, request, plan)
        chunks = await stack.enter_async_context(aclosing(finished_chunks(model, plan, survivors, references)))
        async for chunk in chunks:
            finished.append(chunk)


async def gather(model: ModelClient, request: RolloutRequest, finished: Sequence[FinishedChunk]) -> Gathered:
    """What the request asked for of one chunk or more, of all of them or of those before an end."""
    extras, size = request.extras, model.spec.chunk_size
    done: list[list[ChunkDone]] = [[] for _ in request.candidates]
    for chunk in finished:
        for candidate, outcome in chunk.outcomes.items():
            done[candidate].append(outcome)
    frames = tuple(
        1 + min(len(actions), size * len(parts)) for actions, parts in zip(request.candidates, done, strict=True)
    )
    distances = tuple(parts[-1].distance for parts in done if parts[-1].distance is not None)
    outputs = partial(_outputs, request, done, frames, distances, model.spec)
    return Gathered(
        outputs=outputs() if form_of(request, model.spec) == "mp4" else await asyncio.to_thread(outputs),
        candidate_frames=frames,
        distances=distances,
        closeness=_mean_closeness(done, frames, size) if extras.score else None,
        queue_ms=sum(chunk.timing.queue_ms for chunk in finished),
        infer_ms=sum(chunk.timing.infer_ms for chunk in finished),
    )


def plan_of(request: RolloutRequest, terms: TicketTerms) -> ChunkPlan:
    return ChunkPlan(
        name=request.request_id,
        start_frames=request.start_frames,
        candidates=request.candidates,
        seed=request.seed,
        num_steps=request.num_steps,
        guidance=request.guidance,
        form=request.extras.form,
        goal=request.extras.goal,
        terms=terms,
    )


def form_of(request: RolloutRequest, model: ModelSpec) -> ChunkForm:
    """What replicas make of its frames. Video that is never joined is made an mp4 there, beside the model."""
    is_one_chunk = max(len(actions) for actions in request.candidates) <= model.chunk_size
    return "mp4" if request.extras.form == "h264" and is_one_chunk else request.extras.form


def nearest(chunk: FinishedChunk, keep: float) -> Collection[int]:
    """The share `keep` of the candidates whose last frames are nearest the goal, at least one; ties by position."""
    distances = {candidate: outcome.distance for candidate, outcome in chunk.outcomes.items()}
    order = sorted(distances, key=lambda candidate: (distances[candidate], candidate))
    return order[: math.ceil(keep * len(order))]


async def _references(
    stack: AsyncExitStack, model: ModelClient, request: RolloutRequest, plan: ChunkPlan
) -> References:
    """What a score compares with: the ground truth that came with the request, or the same work at full steps."""
    extras, size = request.extras, model.spec.chunk_size
    if not extras.score:
        return no_references
    if extras.ground_truth is not None:
        truth = extras.ground_truth

        async def given(chunk: int) -> Mapping[int, Frames]:
            return {0: truth[chunk * size : (chunk + 1) * size]}

        return given
    base_plan = replace(plan, name=f"{plan.name}/base", num_steps=model.spec.default_num_steps, form="raw", goal=None)
    base = await stack.enter_async_context(aclosing(finished_chunks(model, base_plan)))

    async def generated(_: int) -> Mapping[int, Frames]:
        chunk = await anext(base)
        return {
            candidate: outcome.frames for candidate, outcome in chunk.outcomes.items() if outcome.frames is not None
        }

    return generated


def _outputs(
    request: RolloutRequest,
    done: Sequence[Sequence[ChunkDone]],
    frames: Sequence[int],
    distances: Sequence[float],
    model: ModelSpec,
) -> tuple[bytes, ...]:
    form, fps = form_of(request, model), model.fps
    match request.extras.returns:
        case "mp4":
            return tuple(_mp4(parts, form, fps, count) for parts, count in zip(done, frames, strict=True))
        case "npz":
            starts = request.start_frames if len(request.start_frames) > 1 else request.start_frames * len(done)
            return tuple(_npy(start, parts) for start, parts in zip(starts, done, strict=True))
        case "last_frame":
            return tuple(exact_png(parts[-1].last_frame) for parts in done)
        case "scores":
            best = min(range(len(done)), key=distances.__getitem__) if request.extras.best_clip else None
            return tuple(
                _mp4(parts, form, fps, count) if index == best else b""
                for index, (parts, count) in enumerate(zip(done, frames, strict=True))
            )


def _mp4(parts: Sequence[ChunkDone], form: ChunkForm, fps: int, num_frames: int) -> bytes:
    if form == "mp4":
        return parts[0].video
    return join_chunks([part.video for part in parts], fps, num_frames)


def _npy(start_frame: Frame, parts: Sequence[ChunkDone]) -> bytes:
    """uint8 (1 + T, H, W, 3), the start frame first."""
    frames = [part.frames for part in parts if part.frames is not None]
    output = io.BytesIO()
    np.save(output, np.concatenate([start_frame[None], *frames]))
    return output.getvalue()


def _mean_closeness(done: Sequence[Sequence[ChunkDone]], frames: Sequence[int], size: int) -> Closeness:
    """Over all frames of all candidates but the start frames; a short last chunk counts by its frames."""
    measured = [
        (part.closeness, min(size, count - 1 - index * size))
        for parts, count in zip(done, frames, strict=True)
        for index, part in enumerate(parts)
        if part.closeness is not None
    ]
    total = sum(weight for _, weight in measured)
    lpips = [closeness.lpips * weight for closeness, weight in measured if closeness.lpips is not None]
    return Closeness(
        mse=sum(closeness.mse * weight for closeness, weight in measured) / total,
        ssim=sum(closeness.ssim * weight for closeness, weight in measured) / total,
        lpips=sum(lpips) / total if len(lpips) == len(measured) else None,
    )
