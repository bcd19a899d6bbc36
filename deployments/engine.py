"""The replica's engine: one thread that keeps the model busy with whatever rows are there.

`step` tells the story: admit what has arrived, run one batched denoising step over all rows whatever their step, hand
finished rows to the encoder. Rows join and leave between steps, so nobody waits for a batch to fill or to drain. A row
that makes the model raise fails alone; a row whose caller is gone leaves at the next step.

Knows neither Ray nor asyncio: callers get `concurrent.futures.Future`s.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from deployments.messages import ChunkFailed, ChunkOutcome, ChunkReport, ChunkRow, Frame
from deployments.presenter import FrameDistance, Presenter


class Model(Protocol):
    """What a world model offers the engine. A row is the model's own object; the engine reads only its `done`."""

    def start(self, inputs: Sequence[Any]) -> list[Any]:
        """One row per input; an input has the fields of `ChunkRow`."""

    def step(self, rows: Sequence[Any]) -> None:
        """One denoising step of every row in one forward. Raising must leave the rows as they were."""

    def finish(self, rows: Sequence[Any]) -> list[Frame]:
        """uint8 (n, H, W, 3) per row: the frames after its start frame."""


@dataclass(slots=True, eq=False)
class _Job:
    rows: tuple[ChunkRow, ...]
    report: Future[ChunkReport]
    outcomes: list[ChunkOutcome | None]
    started_at: float = 0.0


@dataclass(slots=True, eq=False)
class _Active:
    job: _Job
    index: int
    row: Any


MAX_FAILED_JOBS = 8
"""Jobs one after the other of which every row failed, before the model counts as broken and not its inputs."""


class Engine:
    """Runs chunk rows on one model. `submit` from any thread; everything else happens on the engine's own.

    `max_rows` bounds every forward; a wider job runs a part at a time. `stall_s` is how long one call of the model may
    take before the engine counts as hung.
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
    ) -> None:
        self._model = model
        self._presenter = Presenter(model, resolution, fps, lpips)
        self._max_rows = max_rows
        self._stall_s = stall_s
        self._clock = clock
        self._called_at: float | None = None
        self._failed_jobs = 0
        self._arrived: deque[_Job] = deque()
        self._active: list[_Active] = []
        self._wake = threading.Condition()
        self._stopping = False
        self._encoders = ThreadPoolExecutor(encoders, thread_name_prefix="encode")
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, rows: Sequence[ChunkRow]) -> Future[ChunkReport]:
        """Run `rows`; cancelling the future takes them out of the batch at the next step."""
        job = _Job(tuple(rows), Future(), [None] * len(rows))
        with self._wake:
            if self._stopping:
                raise RuntimeError("the engine has stopped")
            self._arrived.append(job)
            self._wake.notify()
        return job.report

    def healthy(self) -> bool:
        """False once the thread has ended, a call of the model hangs, or every job has failed lately."""
        called_at = self._called_at
        hangs = called_at is not None and self._clock() - called_at > self._stall_s
        return self._thread.is_alive() and not hangs and self._failed_jobs < MAX_FAILED_JOBS

    def stop(self) -> None:
        """Finish what is running, take nothing more."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()
        self._encoders.shutdown()

    def _run(self) -> None:
        try:
            while self._wait_for_work():
                self._step()
        finally:  # stopped, or a defect of ours: nobody may wait for ever
            with self._wake:
                self._stopping = True
                left = [*self._arrived, *(active.job for active in self._active)]
            for job in left:
                if not job.report.done():
                    job.report.set_exception(RuntimeError("the engine has stopped"))

    def _wait_for_work(self) -> bool:
        with self._wake:
            while not self._arrived and not self._active:
                if self._stopping:
                    return False
                self._wake.wait()
        return True

    def _step(self) -> None:
        self._drop_cancelled()
        self._admit()
        self._advance([active for active in self._active if not active.row.done][: self._max_rows])
        finished = [active for active in self._active if active.row.done]
        self._active = [active for active in self._active if not active.row.done]
        self._finish(finished)

    def _drop_cancelled(self) -> None:
        self._active = [active for active in self._active if not active.job.report.cancelled()]

    def _admit(self) -> None:
        """Take waiting jobs whole, in order, while they fit; a job wider than the engine starts when it is empty."""
        while True:
            with self._wake:
                if not self._arrived:
                    return
                job = self._arrived[0]
                gone = job.report.cancelled()
                if not gone and self._active and len(self._active) + len(job.rows) > self._max_rows:
                    return
                self._arrived.popleft()
            if gone:
                continue
            job.started_at = time.perf_counter()
            for first in range(0, len(job.rows), self._max_rows):
                part = job.rows[first : first + self._max_rows]
                for index, started in enumerate(self._each(self._model.start, part), start=first):
                    if isinstance(started, Exception):
                        self._settle(job, index, ChunkFailed(_reason(started)))
                    else:
                        self._active.append(_Active(job, index, started))

    def _advance(self, active: list[_Active]) -> None:
        if not active:
            return
        try:
            self._call(self._model.step, [each.row for each in active])
        except Exception as error:
            if len(active) == 1:
                self._active.remove(active[0])
                self._settle(active[0].job, active[0].index, ChunkFailed(_reason(error)))
                return
            # One row may have poisoned the batch: find it by running each alone. Rows change only when a step succeeds.
            for each in active:
                self._advance([each])

    def _finish(self, finished: list[_Active]) -> None:
        for active, frames in zip(
            finished, self._each(self._model.finish, [active.row for active in finished]), strict=True
        ):
            if isinstance(frames, Exception):
                self._settle(active.job, active.index, ChunkFailed(_reason(frames)))
            else:
                self._encoders.submit(self._encode, active, frames)

    def _encode(self, active: _Active, frames: Frame) -> None:
        try:
            outcome: ChunkOutcome = self._presenter.present(active.job.rows[active.index], frames)
        except Exception as error:
            outcome = ChunkFailed(_reason(error))
        self._settle(active.job, active.index, outcome)

    def _settle(self, job: _Job, index: int, outcome: ChunkOutcome) -> None:
        """Called from the engine's thread and the encoders'; whoever settles the last row completes the job."""
        with self._wake:
            job.outcomes[index] = outcome
            outcomes = tuple(outcome for outcome in job.outcomes if outcome is not None)
            if len(outcomes) == len(job.outcomes):
                failed = all(isinstance(outcome, ChunkFailed) for outcome in outcomes)
                self._failed_jobs = self._failed_jobs + 1 if failed else 0
        if len(outcomes) == len(job.outcomes) and job.report.set_running_or_notify_cancel():
            job.report.set_result(ChunkReport(outcomes, (time.perf_counter() - job.started_at) * 1e3))

    def _each(self, function: Any, items: Sequence[Any]) -> list[Any]:
        """`function` over all `items` at once, or one by one where that raises: results and exceptions in order."""
        if not items:
            return []
        try:
            results = list(self._call(function, items))
            if len(results) != len(items):
                raise RuntimeError(f"the model answered {len(results)} of {len(items)} rows")
        except Exception as error:
            if len(items) == 1:
                return [error]
            return [result for item in items for result in self._each(function, [item])]
        return results

    def _call(self, function: Any, items: Sequence[Any]) -> Any:
        """One call of the model, watched by `healthy`."""
        self._called_at = self._clock()
        try:
            return function(items)
        finally:
            self._called_at = None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
