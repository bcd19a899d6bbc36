"""The chunk loop: a rollout, a batch, a stream and a session are this one generator, read at their own pace.

Each chunk starts from the last frame of the one before, or goes on from a stream's memory of it, and runs for all
candidates that still have actions. No chunk is begun before the one before it was taken: who reads slowly, or stops,
leaves the rest ungenerated. Knows neither money nor clients.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, replace
from functools import partial

import structlog

from deployments.errors import EngineFailed
from deployments.messages import (
    NO_MEMORY,
    NO_TERMS,
    Actions,
    ChunkDone,
    ChunkFailed,
    ChunkForgotten,
    ChunkForm,
    ChunkPiece,
    ChunkReport,
    ChunkRow,
    Frame,
    Frames,
    Goal,
    Memory,
    TicketTerms,
)
from deployments.model_client import ChunkTiming, ModelClient, OnPiece
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
    stream: str = ""
    """What replicas keep its context under, if its model streams; the plan's name unless it goes on from another."""
    memory: Memory = NO_MEMORY
    """Of the plan that it goes on from."""


@dataclass(frozen=True, slots=True)
class FinishedChunk:
    index: int
    outcomes: Mapping[int, ChunkDone]
    """By candidate; those without an outcome have ended, or were dropped."""
    timing: ChunkTiming
    memories: Mapping[int, Memory]
    """By candidate, of a model that streams: what the next chunk goes on from."""


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
    loop = _ChunkLoop(model, plan)
    while loop.goes_on:
        finished = await loop.run_chunk(await references(loop.index))
        yield finished
        loop.go_on_with(finished, survivors(finished))


async def streamed_chunks(model: ModelClient, plan: ChunkPlan) -> AsyncGenerator[ChunkPiece | FinishedChunk, None]:
    """Of a plan of one candidate: each chunk, after the pieces with its frames. Raises what `finished_chunks` does."""
    loop = _ChunkLoop(model, plan)
    while loop.goes_on:
        pieces: asyncio.Queue[ChunkPiece | None] = asyncio.Queue()
        running = asyncio.ensure_future(loop.run_chunk({}, pieces.put_nowait))
        running.add_done_callback(partial(_end, pieces))
        try:
            while (piece := await pieces.get()) is not None:
                yield piece
            finished = await running
        finally:
            if not running.done():
                running.cancel()
                await asyncio.wait([running])
        if not model.spec.piece_frames:
            yield _whole(finished, len(plan.candidates[0]) - loop.chunk * model.spec.chunk_size, model.spec.chunk_size)
        yield finished
        loop.go_on_with(finished, everyone(finished))


class _ChunkLoop:
    """Where a plan has got to."""

    def __init__(self, model: ModelClient, plan: ChunkPlan) -> None:
        self._model = model
        self._plan = plan
        self._shared = len(plan.start_frames) == 1
        starts = plan.start_frames * len(plan.candidates) if self._shared else plan.start_frames
        self._frames = dict(enumerate(starts))
        self._memories = dict.fromkeys(self._frames, plan.memory)
        self._started = time.monotonic()
        self.chunk = 0

    @property
    def index(self) -> int:
        """Of the next chunk, in its rollout."""
        return self._plan.first_chunk + self.chunk

    @property
    def goes_on(self) -> bool:
        return bool(self._running())

    async def run_chunk(self, references: Mapping[int, Frames], on_piece: OnPiece | None = None) -> FinishedChunk:
        model, plan = self._model, self._plan
        with span("chunk", {"dream.work": plan.name, "dream.chunk": self.index}):
            rows = self._rows(references, traceparent())
            report, timing = await model.run_chunk(
                f"{plan.name}/{self.index}",
                rows,
                self.index > 0,
                _terms_now(model, plan, self._running(), self.chunk, self._started),
                plan.permit,
                on_piece if model.spec.piece_frames else None,
            )
        outcomes, memories = {}, {}
        for candidate, row, outcome in zip(self._running(), rows, report.outcomes, strict=True):
            if isinstance(outcome, ChunkFailed | ChunkForgotten):
                why = outcome.reason if isinstance(outcome, ChunkFailed) else "its context was lost"
                log.error("row_failed", work=plan.name, candidate=candidate, why=why)
                raise EngineFailed(model.spec.slug, f"it raised on chunk {self.index} of candidate {candidate}")
            outcomes[candidate] = outcome
            memories[candidate] = _remembered(row.memory, outcome, report)
        return FinishedChunk(self.index, outcomes, timing, memories)

    def go_on_with(self, finished: FinishedChunk, candidates: Collection[int]) -> None:
        self._frames = {
            candidate: outcome.last_frame for candidate, outcome in finished.outcomes.items() if candidate in candidates
        }
        self._memories = {candidate: finished.memories[candidate] for candidate in self._frames}
        self.chunk += 1

    def _running(self) -> list[int]:
        done = self.chunk * self._model.spec.chunk_size
        return [candidate for candidate in self._frames if len(self._plan.candidates[candidate]) > done]

    def _rows(self, references: Mapping[int, Frames], parent: str) -> list[ChunkRow]:
        plan, size = self._plan, self._model.spec.chunk_size
        stream = (plan.stream or plan.name) if self._model.spec.piece_frames else ""
        return [
            ChunkRow(
                start_frame=self._frames[candidate],
                actions=plan.candidates[candidate][self.chunk * size : (self.chunk + 1) * size],
                seed=plan.seed,
                candidate=candidate if self._shared else 0,
                chunk=self.index,
                num_steps=plan.num_steps,
                guidance=plan.guidance,
                form=plan.form,
                goal=plan.goal,
                reference=references.get(candidate),
                traceparent=parent,
                stream=stream and f"{stream}/{candidate}",
                memory=self._memories[candidate],
            )
            for candidate in self._running()
        ]


def _end(pieces: "asyncio.Queue[ChunkPiece | None]", _: "asyncio.Future[FinishedChunk]") -> None:
    pieces.put_nowait(None)


def _remembered(memory: Memory, outcome: ChunkDone, report: ChunkReport) -> Memory:
    for traces in outcome.traces:
        memory = memory.after(traces, outcome.keep_traces)
    return replace(memory, replica_id=report.replica_id)


def _whole(finished: FinishedChunk, num_actions_left: int, chunk_size: int) -> ChunkPiece:
    """A chunk that was made whole, as its only piece."""
    (outcome,) = finished.outcomes.values()
    return ChunkPiece(0, 0, min(num_actions_left, chunk_size), outcome.video, outcome.pictures)


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
