"""A paid rollout whose frames leave as soon as they exist. No chunk is begun ahead of whoever reads it.

What was sent is kept when it ends, however it ends; the rest of what was reserved is given back.
"""

import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Literal

from billing.commands import Reserved
from deployments.chunk_loop import streamed_chunks
from deployments.gather import plan_of
from deployments.messages import ChunkPiece, RolloutRequest, TicketTerms
from deployments.model_client import ModelClient
from deployments.reservations import Reservations
from deployments.status import Outcome, Sample
from deployments.status_client import StatusClient
from deployments.video import fragment

StreamForm = Literal["mp4", "jpeg", "png"]
"""A fragmented mp4, a fragment for what is made at a time; or pictures one by one."""


@dataclass(frozen=True, slots=True)
class Piece:
    content: bytes
    num_frames: int


class RolloutStream:
    """Read `pieces`, say `sent` of each once it has left, and `finish`."""

    def __init__(
        self,
        model: ModelClient,
        request: RolloutRequest,
        reserved: Reserved,
        form: StreamForm,
        reservations: Reservations,
        status: StatusClient,
        on_finish: Callable[[], None],
    ) -> None:
        self.request = request
        self.reserved = reserved
        self.form = form
        self.frames_sent = 0
        self._model = model
        self._reservations = reservations
        self._status = status
        self._on_finish = on_finish
        self._started = time.perf_counter()
        self._queue_ms = self._infer_ms = 0.0
        self._is_finished = False

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """In order. Raises what `streamed_chunks` does."""
        terms = TicketTerms(self.reserved.customer_id, self.request.service_class, self.request.deadline_s)
        plan = replace(plan_of(self.request, terms), form="h264" if self.form == "mp4" else self.form)
        num_frames = num_fragments = 0
        async with aclosing(streamed_chunks(self._model, plan)) as made:
            async for each in made:
                if not isinstance(each, ChunkPiece):
                    self._queue_ms += each.timing.queue_ms
                    self._infer_ms += each.timing.infer_ms
                    continue
                for picture in each.pictures:
                    yield Piece(picture, 1)
                if self.form == "mp4":
                    count = each.num_frames + (num_frames == 0)
                    yield Piece(fragment(each.video, self._model.spec.fps, num_frames, num_fragments), count)
                    num_frames += count
                    num_fragments += 1

    def sent(self, piece: Piece) -> None:
        self.frames_sent += piece.num_frames

    def finish(self, failure: BaseException | None = None) -> None:
        """Settle what was sent, once; from a task of its own, so a client that left takes nothing with it."""
        if self._is_finished:
            return
        self._is_finished = True
        self._on_finish()
        whole = self.frames_sent == self.request.num_frames
        reason = "" if whole else "stream ended early" if failure is None else "stream failed"
        self._reservations.settle_later(self.request.request_id, self.frames_sent, reason)
        outcome: Outcome = "succeeded" if whole else "canceled" if failure is None else "failed"
        total_ms = (time.perf_counter() - self._started) * 1e3
        self._status.add(
            Sample(self.request.model, outcome, self.frames_sent, self._queue_ms, self._infer_ms, total_ms)
        )
