"""What is kept of a rollout: on a directory of this machine and on an object store the same promises hold."""

import itertools
import os
import time
from dataclasses import replace
from pathlib import Path

import fsspec
import pytest

from billing.commands import RequestId
from billing.money import Mils
from deployments.file_groups import open_file_groups
from deployments.messages import RolloutResult
from deployments.results import RECENT_TTL_S, ResultStore

REQUEST = RequestId("req_" + "0" * 32)
RESULT = RolloutResult(REQUEST, "m", (b"one", b"two"), 1_795_000_000.5, 98, Mils(490), 1.5, 2.5, 4.5)
_serial = itertools.count()


@pytest.fixture(params=["local", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://results-{next(_serial)}/kept"


@pytest.fixture
def store(url: str) -> ResultStore:
    return ResultStore(url, ttl_s=3_600)


def read(video: Path | bytes | None) -> bytes:
    assert video is not None
    return video if isinstance(video, bytes) else video.read_bytes()


@pytest.mark.parametrize("lasting", [True, False])
def test_a_stored_result_comes_back_as_it_was(store: ResultStore, lasting: bool) -> None:
    store.put(RESULT, lasting)
    assert store.get(REQUEST) == RESULT


def test_another_process_reads_what_one_stored(store: ResultStore, url: str) -> None:
    other = ResultStore(url, ttl_s=3_600)
    assert other.get(REQUEST) is None
    store.put(RESULT, lasting=True)
    assert other.get(REQUEST) == RESULT


def test_only_a_lasting_result_can_be_linked_to(store: ResultStore) -> None:
    one = replace(RESULT, videos=(b"one",))
    store.put(one, lasting=False)
    assert store.video(REQUEST) is None
    store.put(one, lasting=True)
    assert read(store.video(REQUEST)) == b"one"


def test_the_first_result_of_a_request_stands(store: ResultStore) -> None:
    store.put(RESULT, lasting=True)
    store.put(replace(RESULT, videos=(b"other",)), lasting=True)
    assert store.get(REQUEST) == RESULT


def test_a_result_is_there_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = ResultStore(tmp_path, ttl_s=3_600)

    def fails(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no space"):
        store.put(RESULT, lasting=True)
    assert store.get(REQUEST) is None
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_recent_result_is_one_file_that_is_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ResultStore(tmp_path, ttl_s=3_600)
    store.put(RESULT, lasting=False)
    (stored,) = (tmp_path / "recent").iterdir()
    assert stored.name == REQUEST
    stored.unlink()

    def fails(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "rename", fails)
    with pytest.raises(OSError, match="no space"):
        store.put(RESULT, lasting=False)
    assert list((tmp_path / "recent").iterdir()) == []


def test_a_result_that_an_object_store_took_only_half_of_is_not_there_and_can_be_stored_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    memory = fsspec.filesystem("memory")
    store = ResultStore(f"memory://results-{next(_serial)}", ttl_s=0)
    whole, writes = type(memory).pipe_file, itertools.count()

    def fails_at_the_third(self: object, path: str, value: bytes, **options: object) -> None:
        if next(writes) == 2:
            raise OSError("connection lost")
        whole(self, path, value, **options)

    monkeypatch.setattr(type(memory), "pipe_file", fails_at_the_third)
    with pytest.raises(OSError, match="connection lost"):
        store.put(RESULT, lasting=True)
    assert store.get(REQUEST) is None
    assert store.video(REQUEST) is None
    store.put(RESULT, lasting=True)
    assert store.get(REQUEST) == RESULT


def test_what_is_not_stored_is_none(store: ResultStore) -> None:
    assert store.get(REQUEST) is None
    assert store.video(REQUEST) is None


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "req_", f"{REQUEST}/x", REQUEST.upper(), f"{REQUEST}\n"])
def test_a_name_that_is_not_an_id_never_becomes_a_path(store: ResultStore, name: str) -> None:
    for use in (store.get, store.video):
        with pytest.raises(ValueError, match="not a request id"):
            use(RequestId(name))


def test_sweeping_deletes_what_has_expired_of_each_kind_and_only_that(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, ttl_s=3_600)
    young, recent = RequestId("req_" + "1" * 32), RequestId("req_" + "2" * 32)
    store.put(RESULT, lasting=True)
    store.put(replace(RESULT, request_id=young), lasting=True)
    store.put(replace(RESULT, request_id=recent), lasting=False)
    half_made = tmp_path / "recent" / f"{young}.0.partial"
    half_made.write_bytes(b"half")
    for path, age_s in (
        (tmp_path / "lasting" / REQUEST, 3_601),
        (tmp_path / "recent" / recent, RECENT_TTL_S + 1),
        (half_made, RECENT_TTL_S + 1),
    ):
        os.utime(path, (time.time() - age_s,) * 2)
    assert store.sweep() == 3
    assert not half_made.exists()
    assert store.get(REQUEST) is None
    assert store.get(recent) is None
    assert store.get(young) is not None


def test_sweeping_an_object_store_deletes_what_has_expired_and_what_was_left_half_made(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    url = f"memory://results-{next(_serial)}"
    store = ResultStore(url, ttl_s=3_600)
    store.put(RESULT, lasting=True)
    store.put(RESULT, lasting=False)
    fsspec.filesystem("memory").pipe_file(f"{url}/lasting/req_half/000.mp4", b"half")
    assert store.sweep() == 0
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + RECENT_TTL_S + 1)
    assert store.sweep() == 1
    assert store.get(REQUEST) == RESULT
    monkeypatch.setattr(time, "time", lambda: now + 3_601)
    assert store.sweep() == 2
    assert store.get(REQUEST) is None
    assert fsspec.filesystem("memory").find(url) == []


def test_a_url_that_nothing_here_can_read_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="nosuch"):
        open_file_groups("nosuch://bucket")
