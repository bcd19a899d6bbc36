"""The chunk loop: a rollout, a batch, a stream and a session are this one generator, read at their own pace.

Each chunk starts from the last frame of the one before, and runs for all candidates that still have actions. Nothing
runs ahead of its reader: who reads slowly, or stops, leaves the rest ungenerated. Knows neither money nor clients.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass

import structlog

from deployments.errors import EngineFailed
from deployments.messages import (
    NO_TERMS,
    Actions,
    ChunkDone,
    ChunkFailed,
    ChunkForm,
    ChunkRow,
    Frame,
    Frames,
    Goal,
    TicketTerms,
)
from deployments.model_client import ChunkTiming, ModelClient
from deployments.tracing import span, traceparent

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class ChunkPlan:
    """What to generate: K candidates."""

    name: str
    """Names its tickets: no two plans may share it."""
    start_frames: tuple[Frame, ...]
    """One that all candidates share, whose noise differs; or one for each, which is as it would be alone."""
    candidates: tuple[Actions, ...]
    seed: int
    num_steps: int
    guidance: float
    first_chunk: int = 0
    """Chunks that were generated before this plan from the same seed; it goes on with their numbers."""
    form: ChunkForm = "h264"
    goal: Goal | None = None
    terms: TicketTerms = NO_TERMS
    """For whom it runs; a deadline counts from its start, and the chunks left are counted here."""
    permit: asyncio.Event | None = None
    """Nothing runs before it is set, though its first chunk may queue."""


@dataclass(frozen=True, slots=True)
class FinishedChunk:
    index: int
    outcomes: Mapping[int, ChunkDone]
    """By candidate; those without an outcome have ended, or were dropped."""
    timing: ChunkTiming


Survivors = Callable[[FinishedChunk], Collection[int]]
"""Which candidates go on after a chunk; the others are never generated further."""
References = Callable[[int], Awaitable[Mapping[int, Frames]]]
"""What a chunk's frames should be, by candidate: awaited before that chunk runs."""


def everyone(finished: FinishedChunk) -> Collection[int]:
    return finished.outcomes.keys()


async def no_references(_: int) -> Mapping[int, Frames]:
    return {}


async def finished_chunks(
    model: ModelClient, plan: ChunkPlan, survivors: Survivors = everyone, references: References = no_references
) -> AsyncGenerator[FinishedChunk, None]:
    """Chunk after chunk, until no candidate is left. Close it (`contextlib.aclosing`) when you stop before its end.

    Raises:
        ModelOverloaded: the model had no room in time.
        DeadlinePassed: the plan's deadline has passed, or can no longer be met.
        EngineFailed: a replica, or the model on one of the rows, broke.
    """
    size = model.spec.chunk_size
    shared = len(plan.start_frames) == 1
    starts = plan.start_frames * len(plan.candidates) if shared else plan.start_frames
    frames = dict(enumerate(starts))
    chunk, started = 0, time.monotonic()
    while running := {
        candidate: frame for candidate, frame in frames.items() if len(plan.candidates[candidate]) > chunk * size
    }:
        reference = await references(plan.first_chunk + chunk)
        with span("chunk", {"dream.work": plan.name, "dream.chunk": plan.first_chunk + chunk}):
            parent = traceparent()
            rows = [
                ChunkRow(
                    start_frame=frame,
                    actions=plan.candidates[candidate][chunk * size : (chunk + 1) * size],
                    seed=plan.seed,
                    candidate=candidate if shared else 0,
                    chunk=plan.first_chunk + chunk,
                    num_steps=plan.num_steps,
                    guidance=plan.guidance,
                    form=plan.form,
                    goal=plan.goal,
                    reference=reference.get(candidate),
                    traceparent=parent,
                )
                for candidate, frame in running.items()
            ]
            begun = plan.first_chunk + chunk > 0
            report, timing = await model.run_chunk(
                f"{plan.name}/{plan.first_chunk + chunk}",
                rows,
                begun,
                _terms_now(model, plan, running, chunk, started),
                plan.permit,
            )
        outcomes = {}
        for candidate, outcome in zip(running, report.outcomes, strict=True):
            if isinstance(outcome, ChunkFailed):
                log.error("row_failed", work=plan.name, candidate=candidate, why=outcome.reason)
                where = f"chunk {plan.first_chunk + chunk} of candidate {candidate}"
                raise EngineFailed(model.spec.slug, f"it raised on {where}")
            outcomes[candidate] = outcome
        finished = FinishedChunk(plan.first_chunk + chunk, outcomes, timing)
        yield finished
        go_on = survivors(finished)
        frames = {candidate: outcome.last_frame for candidate, outcome in outcomes.items() if candidate in go_on}
        chunk += 1


def _terms_now(
    model: ModelClient, plan: ChunkPlan, candidates: Collection[int], chunk: int, started: float
) -> TicketTerms:
    """The plan's terms as of this chunk: the time that is left, and the chunks of the longest candidate."""
    longest = max(len(plan.candidates[candidate]) for candidate in candidates)
    deadline_s = plan.terms.deadline_s
    return plan.terms._replace(
        deadline_s=None if deadline_s is None else deadline_s - (time.monotonic() - started),
        chunks_left=-(-longest // model.spec.chunk_size) - chunk,
    )
