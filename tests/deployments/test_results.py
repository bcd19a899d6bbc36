import os
import time
from dataclasses import replace
from pathlib import Path

import pytest

from billing.commands import RequestId
from billing.money import Mils
from deployments.messages import RolloutResult
from deployments.results import RECENT_TTL_S, ResultStore

REQUEST = RequestId("req_" + "0" * 32)
RESULT = RolloutResult(REQUEST, "m", (b"one", b"two"), 1_795_000_000.5, 98, Mils(490), 1.5, 2.5, 4.5)


@pytest.fixture
def store(tmp_path: Path) -> ResultStore:
    return ResultStore(tmp_path, ttl_s=3_600)


@pytest.mark.parametrize("lasting", [True, False])
def test_a_stored_result_comes_back_as_it_was(store: ResultStore, lasting: bool) -> None:
    store.put(RESULT, lasting)
    assert store.get(REQUEST) == RESULT


def test_only_a_lasting_result_can_be_linked_to(store: ResultStore) -> None:
    store.put(RESULT, lasting=False)
    assert store.video(REQUEST) is None
    store.put(RESULT, lasting=True)
    path = store.video(REQUEST)
    assert path is not None
    assert path.read_bytes() == b"one"


def test_the_first_result_of_a_request_stands(store: ResultStore) -> None:
    store.put(RESULT, lasting=True)
    store.put(replace(RESULT, videos=(b"other",)), lasting=True)
    assert store.get(REQUEST) == RESULT


def test_a_result_is_there_whole_or_not_at_all(
    store: ResultStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="no space"):
        store.put(RESULT, lasting=True)
    assert store.get(REQUEST) is None
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_what_is_not_stored_is_none(store: ResultStore) -> None:
    assert store.get(REQUEST) is None


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "req_", f"{REQUEST}/x", REQUEST.upper(), f"{REQUEST}\n"])
def test_a_name_that_is_not_an_id_never_becomes_a_path(store: ResultStore, name: str) -> None:
    for use in (store.get, store.video):
        with pytest.raises(ValueError, match="not a request id"):
            use(RequestId(name))


def test_sweeping_deletes_what_has_expired_of_each_kind_and_only_that(store: ResultStore, tmp_path: Path) -> None:
    young, recent = RequestId("req_" + "1" * 32), RequestId("req_" + "2" * 32)
    store.put(RESULT, lasting=True)
    store.put(replace(RESULT, request_id=young), lasting=True)
    store.put(replace(RESULT, request_id=recent), lasting=False)
    for path, age_s in ((tmp_path / "lasting" / REQUEST, 3_601), (tmp_path / "recent" / recent, RECENT_TTL_S + 1)):
        os.utime(path, (time.time() - age_s,) * 2)
    assert store.sweep() == 2
    assert store.get(REQUEST) is None
    assert store.get(recent) is None
    assert store.get(young) is not None
