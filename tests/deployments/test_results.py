import os
import time
from pathlib import Path

import pytest

from deployments.results import ResultStore

ROLLOUT = "rollout_" + "0" * 32


def test_a_stored_video_is_there_whole(tmp_path: Path) -> None:
    store = ResultStore(tmp_path / "results", ttl_s=60)
    store.put(ROLLOUT, b"video")
    assert store.path(ROLLOUT).read_bytes() == b"video"
    assert [path.name for path in (tmp_path / "results").iterdir()] == [f"{ROLLOUT}.mp4"]


@pytest.mark.parametrize("name", ["", "../../etc/passwd", "rollout_", ROLLOUT + "/x", ROLLOUT.upper(), ROLLOUT + "\n"])
def test_a_name_that_is_not_an_id_never_becomes_a_path(tmp_path: Path, name: str) -> None:
    with pytest.raises(ValueError, match="not a rollout id"):
        ResultStore(tmp_path, ttl_s=60).path(name)


def test_sweeping_deletes_what_has_expired_and_only_that(tmp_path: Path) -> None:
    store = ResultStore(tmp_path, ttl_s=60)
    old, young = ROLLOUT, "rollout_" + "1" * 32
    for name in (old, young):
        store.put(name, b"video")
    os.utime(store.path(old), (time.time() - 61,) * 2)
    assert store.sweep() == 1
    assert not store.path(old).exists()
    assert store.path(young).exists()
