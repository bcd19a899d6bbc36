"""The replica's engine: one thread that keeps the model busy with whatever rows are there.

`_step` tells the story: admit what has arrived, run one batched denoising step over all rows whatever their step, hand
finished rows on, to be decoded and encoded beside the next step; one that gives its frames in parts goes on meanwhile.
Rows join and leave between steps, so nobody waits for a batch to fill or to drain. A row that makes the model raise
fails alone; a row whose caller is gone leaves at the next step; a batch that does not fit into memory is run in halves,
and none is that large again.

Knows neither Ray nor asyncio: callers get `concurrent.futures.Future`s.
"""

import bisect
import math
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, cast, get_args

import numpy as np
import structlog

from deployments.batching import BatchProfile
from deployments.messages import (
    ChunkDone,
    ChunkFailed,
    ChunkForgotten,
    ChunkOutcome,
    ChunkPiece,
    ChunkReport,
    ChunkRow,
    Frames,
    ServiceClass,
)
from deployments.meter import Meter
from deployments.metrics import (
    ENGINE_BISECTIONS,
    ENGINE_OUT_OF_MEMORY,
    ENGINE_PLACES,
    ENGINE_ROWS_FAILED,
    ENGINE_STEP_ROWS,
    ENGINE_STEP_SECONDS,
)
from deployments.model import OUT_OF_MEMORY, Model
from deployments.presenter import FrameDistance, Presenter
from deployments.tracing import record_step
from deployments.world_model.errors import ContextLost

SERVICE_CLASSES: tuple[ServiceClass, ...] = get_args(ServiceClass)
"""The most urgent first."""

OnPiece = Callable[[ChunkPiece], None]

log = structlog.get_logger(__name__)


class _Report(Future[ChunkReport]):
    is_given_up = False
    """Cancelled, or too late; asked at every step, without the lock that `done` takes."""

    def cancel(self) -> bool:
        is_cancelled = super().cancel()
        self.is_given_up |= is_cancelled
        return is_cancelled


@dataclass(slots=True, eq=False)
class _Job:
    rows: tuple[ChunkRow, ...]
    report: _Report
    outcomes: list[ChunkOutcome | None]
    urgency: tuple[int, float, int]
    """Class, deadline, arrival: the least goes first."""
    deadline: float
    num_unsettled: int
    on_piece: OnPiece | None = None
    num_started: int = 0
    started_at: float = 0.0

    @property
    def num_waiting(self) -> int:
        return len(self.rows) - self.num_started


@dataclass(slots=True, eq=False)
class _Active:
    job: _Job
    index: int
    row: Any
    num_parts: int = 0
    """Handed on so far."""
    frames: list[Frames] = field(default_factory=list)
    """Of the parts that are decoded."""
    traces: list[tuple[bytes, ...]] = field(default_factory=list)
    """Of each of them."""
    keep_traces: int = 0
    pieces: dict[int, ChunkPiece] = field(default_factory=dict)
    """Those that are made, and wait for the ones before them."""
    num_told: int = 0
    is_done: bool = False
    """All its parts are decoded."""

    @property
    def chunk_row(self) -> ChunkRow:
        return self.job.rows[self.index]


@dataclass(frozen=True, slots=True)
class _Part:
    active: _Active
    index: int
    content: Any
    """What the model's `finish` takes: the row itself, or what it gave."""


MAX_FAILED_JOBS = 8
"""Jobs one after the other of which every row failed, before the model counts as broken and not its inputs."""


class Engine:
    """Runs chunk rows on one model. `submit` from any thread; everything else happens on the engine's own.

    `max_rows` bounds every forward; without a `profile` that is also how many rows it waits to have. `stall_s` is how
    long one call of the model may take before the engine counts as hung.
    """

    def __init__(
        self,
        model: Model,
        resolution: tuple[int, int],
        fps: int,
        max_rows: int,
        encoders: int = 2,
        stall_s: float = 120.0,
        clock: Callable[[], float] = time.monotonic,
        lpips: FrameDistance | None = None,
        profile: BatchProfile | None = None,
        slug: str = "",
        meter: Meter | None = None,
        forwards: Callable[[ChunkRow], int] = lambda row: row.num_steps,
    ) -> None:
        """`forwards`: how many steps a row takes."""
        self._model = model
        self._forwards = forwards
        self._slug = slug
        self._meter = meter or Meter()
        for rare in (ENGINE_BISECTIONS, ENGINE_OUT_OF_MEMORY, ENGINE_ROWS_FAILED):
            # Prometheus sees no increase in a series that begins with its first event.
            self._meter.count(rare, slug, by=0)
        self._presenter = Presenter(model, resolution, fps, lpips)
        self._profile = profile
        self._max_rows = max_rows
        self.cap = max_rows if profile is None else profile.cap(max_rows)
        """Rows worth one forward. Only whole jobs exceed it, up to `max_rows`."""
        self._stall_s = stall_s
        self._clock = clock
        self._calls: dict[int, float] = {}
        """By thread, since when it has been inside the model."""
        self._failed_jobs = 0
        self._num_jobs = 0
        self._waiting: list[_Job] = []
        """By urgency; a job stays until its last row has started."""
        self._active: list[_Active] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="decode")
        self._encoders = ThreadPoolExecutor(encoders, thread_name_prefix="encode")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        rows: Sequence[ChunkRow],
        service_class: ServiceClass = "standard",
        deadline_s: float | None = None,
        on_piece: OnPiece | None = None,
    ) -> Future[ChunkReport]:
        """Run `rows`; cancelling the future takes them out of the batch at the next step.

        A job that cannot be done within `deadline_s` any more is given up: its report has no outcomes. `on_piece` is
        told each row's frames in order as they are made, from any of the engine's threads; the report then has none.
        """
        assert on_piece is None or all(row.goal is None and row.reference is None for row in rows)
        deadline = math.inf if deadline_s is None else self._clock() + deadline_s
        with self._wake:
            if self._stopping:
                raise RuntimeError("the engine has stopped")
            self._num_jobs += 1
            urgency = (SERVICE_CLASSES.index(service_class), deadline, self._num_jobs)
            job = _Job(tuple(rows), _Report(), [None] * len(rows), urgency, deadline, len(rows), on_piece)
            bisect.insort(self._waiting, job, key=_urgency)
            self._wake.notify()
        return job.report

    def healthy(self) -> bool:
        """False once the thread has ended, a call of the model hangs, or every job has failed lately."""
        now = self._clock()
        hangs = any(now - called_at > self._stall_s for called_at in list(self._calls.values()))
        return self._thread.is_alive() and not hangs and self._failed_jobs < MAX_FAILED_JOBS

    @property
    def num_rows(self) -> int:
        """Waiting and in the batch; those being decoded have left it."""
        with self._wake:
            return sum(job.num_waiting for job in self._waiting) + len(self._active)

    def stop(self) -> None:
        """Finish what is running, take nothing more."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()
        self._decoder.shutdown()
        self._encoders.shutdown()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._step()
        finally:  # stopped, or a defect of ours: nobody may wait for ever
            with self._wake:
                self._stopping = True
                left = [*self._waiting, *(active.job for active in self._active)]
            for job in left:
                if not job.report.done():
                    job.report.set_exception(RuntimeError("the engine has stopped"))

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not self._waiting and not self._active:
                if self._stopping:
                    return False
                self._wake.wait()
        return True

    def _step(self) -> None:
        self._active = [active for active in self._active if _is_wanted(active)]  # not cancelled, failed or too late
        self._admit()
        running = [active for active in self._active if not active.row.done]
        for first in range(0, len(running), self._max_rows):
            self._advance(running[first : first + self._max_rows])
        parts = [part for active in self._active for part in _take(active)]
        finished = [active for active in self._active if active.row.done]
        if len(finished) == len(self._active):
            self._active = []
        elif finished:
            self._active = [active for active in self._active if not active.row.done]
        if parts or finished:
            self._decoder.submit(self._finish, parts, finished)

    def _admit(self) -> None:
        """Start waiting rows while the batch has room, and give up what can no longer be done in time."""
        with self._wake:
            now = self._clock()
            for job in [job for job in self._waiting if job.report.is_given_up or self._is_hopeless(job, now)]:
                self._waiting.remove(job)
                job.report.is_given_up = True
                if job.report.set_running_or_notify_cancel():
                    job.report.set_result(ChunkReport((), 0.0))
            joining = self._choose(now)
            for job, num_rows in joining:
                if num_rows == job.num_waiting:
                    self._waiting.remove(job)
        places = []
        for job, num_rows in joining:
            job.started_at = job.started_at or time.perf_counter()
            places += [(job, index) for index in range(job.num_started, job.num_started + num_rows)]
            job.num_started += num_rows
        for (job, index), started in zip(
            places, self._each(self._model.start, [job.rows[index] for job, index in places]), strict=True
        ):
            if isinstance(started, ContextLost):
                self._settle(job, index, ChunkForgotten())
            elif isinstance(started, Exception):
                self._settle(job, index, ChunkFailed(_reason(started)))
            else:
                self._active.append(_Active(job, index, started))

    def _choose(self, now: float) -> list[tuple[_Job, int]]:
        """Who joins the next forward, and with how many rows: the most urgent, until the batch is full.

        A job that the full batch would make late waits, even if a smaller one would save it: where many wait, saving
        the tightest would cost more of the others.
        """
        candidates = list(self._waiting)
        while True:
            num_rows, joining = len(self._active), list[tuple[_Job, int]]()
            for job in candidates:
                rows = job.num_waiting
                if num_rows + rows > (self._max_rows if num_rows < self.cap else self.cap):
                    rows = max(0, self.cap - num_rows)
                if rows:
                    joining.append((job, rows))
                    num_rows += rows
            timed = ((job, rows) for job, rows in joining if job.deadline < math.inf)
            late = next((job for job, rows in timed if self._is_late(job, rows, num_rows, now)), None)
            if late is None or len(candidates) == 1:
                return joining
            candidates.remove(late)

    def _is_hopeless(self, job: _Job, now: float) -> bool:
        return job.deadline < math.inf and self._is_late(
            job, job.num_waiting, min(self._max_rows, job.num_waiting), now
        )

    def _is_late(self, job: _Job, num_joining: int, batch: int, now: float) -> bool:
        """Whether `job` misses its deadline if so many of its rows join a batch of that size, and the rest the next."""
        rounds = 1 if num_joining == job.num_waiting else 2
        step_s = 0.0 if self._profile is None else self._profile.step_s(batch)
        return now + rounds * self._forwards(job.rows[0]) * step_s > job.deadline

    def _advance(self, active: list[_Active]) -> None:
        """One step of each. Where that raises, of each half: what remains alone and still raises has failed."""
        if not active:
            return
        try:
            started, started_ns = time.perf_counter(), time.time_ns()
            self._call(self._model.step, [each.row for each in active])
            self._meter.observe(ENGINE_STEP_SECONDS, self._slug, value=time.perf_counter() - started)
            traceparents = (each.job.rows[each.index].traceparent for each in active)
            record_step(traceparents, started_ns, time.time_ns(), len(active))
            self._meter.observe(ENGINE_STEP_ROWS, self._slug, value=len(active))
            self._meter.count(ENGINE_PLACES, self._slug, by=max(self.cap, len(active)))
        except Exception as error:  # the rows are as they were
            if len(active) == 1:
                self._active.remove(active[0])
                self._settle(active[0].job, active[0].index, ChunkFailed(_reason(error)))
                return
            half = len(active) // 2
            self._meter.count(ENGINE_BISECTIONS, self._slug)
            if isinstance(error, OUT_OF_MEMORY):
                self._meter.count(ENGINE_OUT_OF_MEMORY, self._slug)
                self._max_rows = self.cap = min(self.cap, half)
                log.warning("out_of_memory", rows=len(active), cap=self.cap)
            self._advance(active[:half])
            self._advance(active[half:])

    def _finish(self, parts: Sequence[_Part], finished: Sequence[_Active]) -> None:
        """Decode, beside the next step; then complete the rows of which nothing is left to decode."""
        for part, frames in zip(parts, self._each(self._model.finish, [part.content for part in parts]), strict=True):
            active = part.active
            if isinstance(frames, Exception):
                self._settle(active.job, active.index, ChunkFailed(_reason(frames)))
                continue
            active.frames.append(frames)
            is_whole = part.content is active.row
            active.traces.append(() if is_whole else getattr(part.content, "traces", ()))
            active.keep_traces = 0 if is_whole else getattr(part.content, "keep_traces", 0)
            if active.job.on_piece is not None:
                self._encoders.submit(self._present_piece, part, frames)
        for active in finished:
            if active.job.outcomes[active.index] is not None:
                continue
            if active.job.on_piece is not None:
                active.is_done = True
                self._tell(active)
            elif _shows_nothing(active.chunk_row):
                self._present(active)
            else:
                self._encoders.submit(self._encode, active)

    def _encode(self, active: _Active) -> None:
        self._present(active)
        self._presenter.prepare()

    def _present(self, active: _Active) -> None:
        frames = active.frames[0] if len(active.frames) == 1 else np.concatenate(active.frames)
        try:
            traces = tuple(active.traces)
            outcome: ChunkOutcome = self._presenter.present(active.chunk_row, frames, traces, active.keep_traces)
        except Exception as error:
            outcome = ChunkFailed(_reason(error))
        self._settle(active.job, active.index, outcome)

    def _present_piece(self, part: _Part, frames: Frames) -> None:
        active, row = part.active, part.active.chunk_row
        try:
            video, pictures = self._presenter.present_piece(row, frames, part.index)
        except Exception as error:
            self._settle(active.job, active.index, ChunkFailed(_reason(error)))
            return
        traces, keep_traces = active.traces[part.index], active.keep_traces
        last_frame = None if traces else np.array(frames[-1])
        piece = ChunkPiece(active.index, part.index, len(frames), video, pictures, traces, keep_traces, last_frame)
        with self._wake:
            active.pieces[part.index] = piece
        self._tell(active)
        self._presenter.prepare()

    def _tell(self, active: _Active) -> None:
        """Pieces in their order, as far as they are made; once all are told, the row is settled."""
        with self._wake:
            on_piece, outcome = active.job.on_piece, active.job.outcomes[active.index]
            assert on_piece is not None
            while outcome is None and (piece := active.pieces.pop(active.num_told, None)) is not None:
                active.num_told += 1
                on_piece(piece)
            if outcome is None and active.is_done and active.num_told == active.num_parts:
                last_frame = np.array(active.frames[-1][-1])
                done = ChunkDone(b"", last_frame, traces=tuple(active.traces), keep_traces=active.keep_traces)
                self._settle(active.job, active.index, done)

    def _settle(self, job: _Job, index: int, outcome: ChunkOutcome) -> None:
        """Called from every thread of the engine; whoever settles the last row completes the job."""
        if isinstance(outcome, ChunkFailed):
            self._meter.count(ENGINE_ROWS_FAILED, self._slug)
        with self._wake:
            if job.outcomes[index] is not None:
                return
            job.outcomes[index] = outcome
            job.num_unsettled -= 1
            if job.num_unsettled:
                return
            outcomes = cast(tuple[ChunkOutcome, ...], tuple(job.outcomes))
            if isinstance(outcome, ChunkDone) or any(isinstance(each, ChunkDone) for each in outcomes):
                self._failed_jobs = 0
            elif all(isinstance(each, ChunkFailed) for each in outcomes):
                self._failed_jobs += 1
        if job.report.set_running_or_notify_cancel():
            job.report.set_result(ChunkReport(outcomes, (time.perf_counter() - job.started_at) * 1e3))

    def _each(self, function: Any, items: Sequence[Any]) -> list[Any]:
        """`function` over all `items` at once, or by halves where that raises: results and exceptions in order."""
        if not items:
            return []
        try:
            results = list(self._call(function, items))
            if len(results) != len(items):
                raise RuntimeError(f"the model answered {len(results)} of {len(items)} rows")
        except Exception as error:
            if len(items) == 1:
                return [error]
            half = len(items) // 2
            return self._each(function, items[:half]) + self._each(function, items[half:])
        return results

    def _call(self, function: Any, items: Sequence[Any]) -> Any:
        """One call of the model, watched by `healthy`."""
        thread = threading.get_ident()
        self._calls[thread] = self._clock()
        try:
            return function(items)
        finally:
            del self._calls[thread]


def _is_wanted(active: _Active) -> bool:
    return not active.job.report.is_given_up and active.job.outcomes[active.index] is None


def _take(active: _Active) -> list[_Part]:
    """What of the row is ready to be decoded and has not been taken."""
    take = getattr(active.row, "take", None)
    whole = [active.row] if active.row.done else []
    contents = whole if take is None else list(iter(take, None))
    parts = [_Part(active, active.num_parts + offset, content) for offset, content in enumerate(contents)]
    active.num_parts += len(parts)
    return parts


def _shows_nothing(row: ChunkRow) -> bool:
    return row.form == "none" and row.goal is None and row.reference is None


def _urgency(job: _Job) -> tuple[int, float, int]:
    return job.urgency


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
