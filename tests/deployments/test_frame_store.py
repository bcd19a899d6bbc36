from pathlib import Path

import numpy as np
import pytest

from billing.commands import CustomerId
from deployments import frame_store
from deployments.file_groups import open_file_groups
from deployments.frame_store import FrameStore
from deployments.messages import Frame

ONE, OTHER = CustomerId("cus_1"), CustomerId("cus_2")


def frame(level: int) -> Frame:
    return np.full((64, 64, 3), level, np.uint8)


@pytest.fixture
def store(tmp_path: Path) -> FrameStore:
    return FrameStore(open_file_groups(str(tmp_path)))


def test_another_process_reads_what_one_stored(store: FrameStore, tmp_path: Path) -> None:
    frame_id, _ = store.put(ONE, frame(7))
    read = FrameStore(open_file_groups(str(tmp_path))).get(ONE, frame_id)
    assert read is not None
    assert np.array_equal(read, frame(7))


def test_a_frame_is_named_by_its_pixels_and_its_shape(store: FrameStore) -> None:
    assert store.put(ONE, frame(7))[0] == store.put(OTHER, frame(7))[0]
    assert store.put(ONE, frame(7))[0] != store.put(ONE, frame(7).reshape(32, 128, 3))[0]


def test_only_its_customer_has_it(store: FrameStore) -> None:
    frame_id, _ = store.put(ONE, frame(7))
    assert store.get(OTHER, frame_id) is None


def test_a_customer_keeps_so_many_and_the_oldest_goes(store: FrameStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frame_store, "MAX_FRAMES", 3)
    ids = [store.put(ONE, frame(level))[0] for level in range(4)]
    others = store.put(OTHER, frame(0))[0]
    assert [store.get(ONE, each) is not None for each in ids] == [False, True, True, True]
    assert store.get(OTHER, others) is not None


def test_memory_holds_no_more_than_its_bound_and_the_rest_is_read_again(
    store: FrameStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frame_store, "MAX_CACHED_BYTES", 3 * frame(0).nbytes)
    ids = [store.put(ONE, frame(level))[0] for level in range(8)]
    assert store._cached_bytes == 3 * frame(0).nbytes
    for level, each in enumerate(ids):
        read = store.get(ONE, each)
        assert read is not None
        assert read[0, 0, 0] == level


def test_what_is_past_its_time_is_swept(store: FrameStore, monkeypatch: pytest.MonkeyPatch) -> None:
    frame_id, kept_until = store.put(ONE, frame(1))
    assert store.sweep() == 0
    monkeypatch.setattr(frame_store, "TTL_S", -1.0)
    assert store.sweep() == 1
    monkeypatch.setattr(store, "_cache", type(store._cache)())
    assert store.get(ONE, frame_id) is None
    assert kept_until > 0


def test_a_frame_that_is_uploaded_again_late_is_kept_anew(store: FrameStore, monkeypatch: pytest.MonkeyPatch) -> None:
    frame_id, first = store.put(ONE, frame(1))
    now = frame_store.time.time
    monkeypatch.setattr(frame_store.time, "time", lambda: now() + frame_store.TTL_S * 0.75)
    again, second = store.put(ONE, frame(1))
    assert again == frame_id
    assert second > first + frame_store.TTL_S / 2
    assert store.get(ONE, frame_id) is not None


@pytest.mark.parametrize("name", ["frame_1", "", "../frame_" + "0" * 32, "frame_" + "g" * 32])
def test_what_is_no_frames_id_is_no_path(store: FrameStore, name: str) -> None:
    assert store.get(ONE, name) is None
