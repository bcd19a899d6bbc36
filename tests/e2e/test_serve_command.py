"""`make serve` as its user sees it: what it prints, keeps and refuses, and that it leaves nothing behind."""

import socket
import stat
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from billing.database import open_database
from billing.reader import LedgerReader
from tests.support.cluster import SERVE, SERVE_STAND_IN, Cluster, environment, eventually, free_port, running_cluster
from tests.support.models import SLEEP_S
from tests.support.payloads import actions, npy, png


def refused(data_dir: Path, port: int | None = None, **more: str) -> str:
    """The one line that `dream-admin serve` refuses with."""
    done = subprocess.run(
        SERVE,
        env=environment(data_dir, port or free_port()) | more,
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_a_port_in_use_is_one_clear_line_and_exit_code_2(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"cannot listen on 127.0.0.1:{port}" in refused(tmp_path / "data", port)


def test_a_data_directory_that_cannot_be_written_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a directory")
    assert "cannot be written" in refused(tmp_path / "file" / "data")


def test_a_broken_database_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "ledger.db").write_text("this is not a database, however long it is" * 100)
    assert "ledger.db" in refused(tmp_path)
    assert "postgresql" in refused(tmp_path, DATABASE_URL="postgresql+psycopg://u:secret@127.0.0.1:1/x").lower()


def test_a_refusal_never_shows_the_databases_password(tmp_path: Path) -> None:
    assert "secret" not in refused(tmp_path, DATABASE_URL="postgresql+psycopg://u:secret@127.0.0.1:1/x")


@pytest.mark.parametrize(("name", "value"), [("PORT", "eighty"), ("PORT", "0"), ("DEFAULT_MODEL", "unknown")])
def test_a_setting_that_cannot_be_is_one_clear_line(tmp_path: Path, name: str, value: str) -> None:
    assert name.replace("_", " ").lower() in refused(tmp_path, **{name: value}).replace("_", " ").lower()


def test_a_second_cluster_on_the_same_data_is_refused(cluster: Cluster) -> None:
    assert "already running" in refused(cluster.data_dir)


def test_two_clusters_run_beside_each_other(cluster: Cluster, stand_in_cluster: Cluster) -> None:
    for each in (cluster, stand_in_cluster):
        assert httpx.get(f"{each.base_url}/healthz").json() == {"status": "ok"}
    assert cluster.base_url != stand_in_cluster.base_url


def test_the_development_key_is_kept_for_its_owner_only(cluster: Cluster) -> None:
    path = cluster.data_dir / "dev-key"
    assert path.read_text() == f"{cluster.key}\n"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_cluster_stops_whole_keeps_key_and_balance_and_starts_again(tmp_path: Path) -> None:
    """One Ctrl-C finishes what runs; a second one refunds it instead, and answers its client."""
    data_dir = tmp_path / "data"
    with running_cluster(data_dir, SERVE_STAND_IN) as first:
        with first.http() as http:
            assert http.post("/v1/predict", files={"frame": png(), "actions": npy(actions())}).status_code == 200
        started = psutil.Process(first.process.pid).children(recursive=True)
        assert first.stop() == 0
        _, alive = psutil.wait_procs(started, timeout=10)
        assert alive == []
        assert first.process.stdout is not None
        assert first.process.stdout.read() == "", "only the ready line goes to standard output"
    assert not (data_dir / "ray-address").exists()
    assert list((data_dir / "logs").iterdir())
    with running_cluster(data_dir, SERVE_STAND_IN) as second:
        assert second.key == first.key
        with second.http() as http, ThreadPoolExecutor(1) as pool:
            assert http.get("/v1/billing/balance").json()["balance_mils"] == 250_000 - 245
            slow = actions(seed=1)
            slow[:, SLEEP_S] = 2.0
            running = pool.submit(http.post, "/v1/predict", files={"frame": png(), "actions": npy(slow)})
            eventually(lambda: http.get("/v1/billing/balance").json()["balance_mils"] == 250_000 - 2 * 245)
            second.interrupt()
            second.interrupt()
            assert running.result(60).status_code == 503
            assert second.process.wait(timeout=150) == 0
    refunded = LedgerReader(open_database(f"sqlite:///{data_dir / 'ledger.db'}"))
    development = refunded.customer("development")
    assert development is not None
    assert development.balance_mils == 250_000 - 245
