import os
import shutil
import threading
import traceback
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from deployments.checkpoints import CheckpointUnavailable, local_checkpoint
from deployments.world_model.rollout import WorldModel
from serve_app.catalog import PACKAGED_CHECKPOINTS

PACKAGED = PACKAGED_CHECKPOINTS["tiny-pusher"]


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def web() -> Iterator[str]:
    """The packaged checkpoints behind a real HTTP server."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(QuietHandler, directory=str(PACKAGED.parent)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_path_is_used_where_it_is(tmp_path: Path) -> None:
    assert local_checkpoint("/some/where", tmp_path) == Path("/some/where")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_behind_a_url_is_copied_once_and_loads(web: str, tmp_path: Path) -> None:
    copied = local_checkpoint(f"{web}/tiny-pusher", tmp_path)
    assert WorldModel.load(copied).config.name == "tiny-pusher"
    (copied / "model.safetensors").write_bytes(b"it would be overwritten if it were copied again")
    assert local_checkpoint(f"{web}/tiny-pusher", tmp_path) == copied
    assert (copied / "model.safetensors").stat().st_size < 100


def test_another_kind_of_file_system_works_as_well(tmp_path: Path) -> None:
    assert (local_checkpoint(f"file://{PACKAGED}", tmp_path) / "config.json").is_file()


def test_what_is_not_there_is_named_and_leaves_nothing_behind(web: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointUnavailable, match=r"config\.json of http://127"):
        local_checkpoint(f"{web}/no-such-model", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_that_is_not_what_its_config_names_is_not_kept(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(PACKAGED, source)
    weights = source / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1])
    cache = tmp_path / "cache"
    with pytest.raises(CheckpointUnavailable, match=r"model\.safetensors .* has sha256"):
        local_checkpoint(f"file://{source}", cache)
    assert list(cache.iterdir()) == []
    weights.write_bytes(whole)
    assert WorldModel.load(local_checkpoint(f"file://{source}", cache)).config.name == "tiny-pusher"


def test_what_a_killed_copy_left_is_swept_once_it_is_old(web: str, tmp_path: Path) -> None:
    old, young = tmp_path / "a.1.partial", tmp_path / "b.2.partial"
    for path in (old, young):
        path.mkdir()
    os.utime(old, (0, 0))
    local_checkpoint(f"{web}/tiny-pusher", tmp_path)
    assert not old.exists()
    assert young.exists()


def test_a_signed_url_is_refused_since_it_names_one_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointUnavailable, match="takes no query") as failure:
        local_checkpoint("https://example.test/model?signature=hidden", tmp_path)
    assert "hidden" not in str(failure.value)


def test_no_error_nor_its_traceback_shows_a_password(web: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointUnavailable) as failure:
        local_checkpoint(web.replace("http://", "http://user:hunter2@") + "/none", tmp_path)
    shown = "".join(traceback.format_exception(failure.value))
    assert "hunter2" not in shown.replace('"http://user:hunter2@"', "")
