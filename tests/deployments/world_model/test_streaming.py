from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest

from deployments.world_model import ChunkInput, InvalidInputError, WorldModel, WorldModelError
from deployments.world_model.causal import WINDOW, CausalWorldModel
from deployments.world_model.errors import ContextLost
from deployments.world_model.streaming import Part, StreamingWorldModel, StreamRow

Frames = np.ndarray


@dataclass(frozen=True)
class Memory:
    position: int = 0
    traces: tuple[bytes, ...] | None = ()


@dataclass(frozen=True, eq=False)
class StreamInput(ChunkInput):
    stream: str = ""
    memory: Memory = Memory()


@pytest.fixture
def model(small_model: WorldModel) -> StreamingWorldModel:
    return StreamingWorldModel(CausalWorldModel(small_model))


def given(chunk: int = 0, length: int = 12, index: int = 0, **changes: Any) -> StreamInput:
    generator = np.random.default_rng([index, chunk])
    valid = StreamInput(
        start_frame=np.random.default_rng(index).integers(0, 256, (64, 64, 3), dtype=np.uint8),
        actions=generator.uniform(-1, 1, (length, 8)).astype(np.float32),
        seed=100 + index,
        candidate=0,
        chunk=chunk,
        num_steps=2,
        guidance=0.0,
        stream=f"stream {index}",
    )
    return replace(valid, **changes)


def run(model: StreamingWorldModel, inputs: Sequence[StreamInput]) -> list[list[Part]]:
    rows = model.start(inputs)
    while left := [row for row in rows if not row.done]:
        model.step(left)
    return [parts_of(row) for row in rows]


def parts_of(row: StreamRow) -> list[Part]:
    parts = []
    while (part := row.take()) is not None:
        parts.append(part)
    return parts


def shown(model: StreamingWorldModel, parts: Sequence[Part]) -> Frames:
    return np.concatenate(model.finish(parts))


class Client:
    """Keeps what a stream's client keeps."""

    def __init__(self, model: StreamingWorldModel, index: int = 0) -> None:
        self.model, self.index = model, index
        self.memory = Memory()
        self.chunk = 0

    def next_input(self, length: int = 12) -> StreamInput:
        return given(self.chunk, length, self.index, memory=self.memory)

    def advance(self, length: int = 12) -> Frames:
        (parts,) = run(self.model, [self.next_input(length)])
        self.take(parts)
        return shown(self.model, parts)

    def take(self, parts: Sequence[Part]) -> None:
        self.chunk += 1
        for part in parts:
            traces = ((self.memory.traces or ()) + part.traces)[-part.keep_traces :] if part.traces else ()
            self.memory = Memory(self.memory.position + 1, traces)


def close(one: Frames, other: Frames) -> bool:
    return bool(np.abs(one.astype(int) - other).max() <= 1)


def test_chunk_after_chunk_gives_what_the_student_gives_in_one_go(model: StreamingWorldModel) -> None:
    client = Client(model)
    moves = np.concatenate([given(chunk).actions for chunk in range(4)])
    (whole,) = model.model.rollouts([given().start_frame], [moves], [100], num_steps=2)
    assert np.array_equal(np.concatenate([client.advance() for _ in range(4)]), whole[1:])


def test_each_latent_frame_is_ready_before_the_next_is_computed(model: StreamingWorldModel) -> None:
    """Two passes each, and one before that writes the frame before it."""
    (row,) = model.start([given()])
    ready = []
    while not row.done:
        model.step([row])
        ready.append(len(parts_of(row)))
    assert ready == [0, 0, 1, 0, 0, 1, 0, 0, 1, 0]


def test_a_context_that_was_lost_is_made_again_and_every_pixel_is_the_same(model: StreamingWorldModel) -> None:
    """Also when the traces no longer reach back to the start: beyond WINDOW x blocks nothing matters."""
    undisturbed, moved = Client(model), Client(model)
    blocks = model.config.dit.num_blocks
    for chunk in range(5):
        expected = undisturbed.advance()
        moved.model = StreamingWorldModel(model.model)  # another replica, which knows nothing
        assert np.array_equal(moved.advance(), expected), chunk
    assert moved.memory.traces is not None
    assert len(moved.memory.traces) == WINDOW * blocks < moved.memory.position


def test_one_trace_less_would_not_do(model: StreamingWorldModel) -> None:
    client = Client(model)
    for _ in range(4):
        client.advance()
    traces = client.memory.traces
    assert traces is not None
    fewer = replace(client.next_input(), memory=Memory(client.memory.position, traces[1:]), stream="x")
    ((first, *_),) = run(model, [client.next_input()])
    ((other, *_),) = run(StreamingWorldModel(model.model), [fewer])
    assert not np.array_equal(first.latents_CHW, other.latents_CHW)


def test_a_context_that_should_be_here_and_is_not_is_said_so(model: StreamingWorldModel) -> None:
    client = Client(model)
    client.advance()
    following = client.next_input()
    trusting = replace(following, memory=Memory(client.memory.position, None))
    run(model, [trusting])
    with pytest.raises(ContextLost, match="stream 0"):
        model.start([trusting])  # it has gone on since
    assert (model.context_cache.hits, model.context_cache.misses) == (1, 1)
    run(model, [following])


def test_streams_side_by_side_are_streams_alone(model: StreamingWorldModel) -> None:
    """Whatever their lengths: the first has more latent frames before it than the window holds, the last none."""
    alone, together = [Client(model, index) for index in range(3)], [Client(model, index) for index in range(3)]
    for each in alone, together:
        for index, client in enumerate(each):
            for _ in range(2 - index):
                client.advance(8)
    expected = [client.advance() for client in alone]
    for client, parts in zip(together, run(model, [client.next_input() for client in together]), strict=True):
        assert close(shown(model, parts), expected[client.index])


def test_candidates_of_one_start_frame_differ_by_their_noise(model: StreamingWorldModel) -> None:
    (first,), (second,) = (run(model, [given(length=4, candidate=candidate)])[0] for candidate in (0, 1))
    assert not np.array_equal(first.latents_CHW, second.latents_CHW)


def test_a_latent_frame_asked_for_in_part_is_trimmed_and_nothing_goes_on_from_it(model: StreamingWorldModel) -> None:
    client, whole = Client(model), given(length=6)
    moves = np.concatenate([whole.actions, whole.actions[-1:].repeat(2, axis=0)])
    (parts,) = run(model, [whole])
    assert [part.num_frames for part in parts] == [4, 2]
    assert np.array_equal(shown(model, parts), model.model.rollouts([whole.start_frame], [moves], [100], 2)[0][1:7])
    client.take(parts)
    assert client.memory == Memory(2, ())
    client.advance()
    assert client.memory.position == 5


def test_the_caches_bytes_are_bounded_and_the_least_recently_used_goes(model: StreamingWorldModel) -> None:
    cache, clients = model.context_cache, [Client(model, index) for index in range(4)]
    clients[0].advance()
    size = cache.num_bytes
    config = model.config.dit
    assert size == WINDOW * config.num_blocks * 2 * 16 * config.width * 4
    cache.max_bytes = 3 * size
    for client in (clients[1], clients[2], clients[0], clients[3]):
        client.advance()
        assert cache.num_bytes <= 3 * size
    kept = [cache.get(f"stream {client.index}", client.memory.position) is not None for client in clients]
    assert kept == [True, False, True, True]
    cache.max_bytes = size - 1
    clients[0].advance()
    assert cache.num_bytes == 0
    clients[0].advance()


def test_a_step_that_raises_leaves_every_row_as_it_was(
    model: StreamingWorldModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    early, late = Client(model, 0), Client(model, 1)
    late.advance()
    rows = model.start([early.next_input(), late.next_input()])
    predict = model._predict

    def fails_for_the_second(group: Sequence[StreamRow]) -> Any:
        if group[0] is rows[1]:
            raise MemoryError
        return predict(group)

    monkeypatch.setattr(model, "_predict", fails_for_the_second)
    with pytest.raises(MemoryError):
        model.step(rows)
    assert len(rows[0].cache.frames) == 0
    assert len(rows[0].unwritten) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 5}, "num_steps: 5 is outside 1..4"),
        ({"guidance": 1.0}, "guidance: 1 must be 0"),
        ({"actions": np.zeros((13, 8), np.float32)}, "actions: 13 rows"),
        ({"memory": Memory(3, (b"1234",))}, "memory: has a trace of 1 values"),
        ({"memory": Memory(2**32)}, "memory: position"),
    ],
)
def test_what_it_cannot_run_is_refused_by_its_field(
    model: StreamingWorldModel, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        model.start([given(**changes)])


def test_latents_that_are_not_finite_become_no_frame(model: StreamingWorldModel) -> None:
    ((part, *_),) = run(model, [given()])
    with pytest.raises(WorldModelError, match="not all are finite"):
        model.finish([part, replace(part, latents_CHW=part.latents_CHW * float("nan"))])
