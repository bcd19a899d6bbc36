"""The one loop that rollouts, streams and sessions share."""

from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from deployments.chunk_loop import ChunkPlan, FinishedChunk, finished_chunks
from deployments.errors import EngineFailed
from deployments.messages import ChunkRow
from tests.support.app import App
from tests.support.models import RAISE
from tests.support.payloads import actions

START = np.full((64, 64, 3), 100, np.uint8)


def plan_of(*lengths: int, first_chunk: int = 0) -> ChunkPlan:
    return ChunkPlan("work", (START,), tuple(actions(length) for length in lengths), 0, 1, 0.0, first_chunk)


async def test_a_candidate_that_ends_leaves_the_others_running(app: App) -> None:
    async with aclosing(finished_chunks(app.model, plan_of(12, 30))) as chunks:  # type: ignore[arg-type]
        assert [sorted(chunk.outcomes) async for chunk in chunks] == [[0, 1], [1], [1]]


async def test_only_survivors_are_generated_further(app: App) -> None:
    def survivors(chunk: FinishedChunk) -> list[int]:
        return sorted(chunk.outcomes)[: len(chunk.outcomes) // 2]

    async with aclosing(finished_chunks(app.model, plan_of(48, 48, 48, 48), survivors)) as chunks:  # type: ignore[arg-type]
        assert [sorted(chunk.outcomes) async for chunk in chunks] == [[0, 1, 2, 3], [0, 1], [0]]


async def test_candidates_of_one_start_differ_in_their_noise_and_those_of_their_own_are_as_they_are_alone(
    app: App, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[int, int, int]] = []
    run_chunk = app.model.run_chunk

    async def listen(name: str, rows: Sequence[ChunkRow], *more: Any) -> Any:
        asked.extend((row.chunk, int(row.start_frame[0, 0, 0]), row.candidate) for row in rows)
        return await run_chunk(name, rows, *more)

    monkeypatch.setattr(app.model, "run_chunk", listen)
    shared = plan_of(12, 24)
    for plan in (shared, replace(shared, start_frames=(START, START + 50))):
        async with aclosing(finished_chunks(app.model, plan)) as chunks:  # type: ignore[arg-type]
            assert [sorted(chunk.outcomes) async for chunk in chunks] == [[0, 1], [1]]
    assert asked == [(0, 100, 0), (0, 100, 1), (1, 112, 1), (0, 100, 0), (0, 150, 0), (1, 162, 0)]


async def test_nothing_is_generated_ahead_of_the_reader(app: App) -> None:
    async with aclosing(finished_chunks(app.model, plan_of(48))) as chunks:  # type: ignore[arg-type]
        await anext(chunks)
    assert app.model.model.chunks_started == [0]


async def test_a_plan_that_goes_on_numbers_its_chunks_after_the_ones_before(app: App) -> None:
    async with aclosing(finished_chunks(app.model, plan_of(24, first_chunk=3))) as chunks:  # type: ignore[arg-type]
        assert [chunk.index async for chunk in chunks] == [3, 4]
    assert app.model.model.chunks_started == [3, 4]


async def test_a_row_that_fails_ends_the_plan_and_is_named(app: App) -> None:
    plan = plan_of(24, 24)
    plan.candidates[1][12, RAISE] = 1
    async with aclosing(finished_chunks(app.model, plan)) as chunks:  # type: ignore[arg-type]
        await anext(chunks)
        with pytest.raises(EngineFailed, match="chunk 1 of candidate 1"):
            await anext(chunks)
