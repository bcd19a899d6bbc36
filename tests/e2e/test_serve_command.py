"""`make serve` as its user sees it: what it prints, keeps and refuses, and that it leaves nothing behind."""

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil

from billing.database import open_database
from billing.reader import LedgerReader
from tests.support.cluster import PATIENCE_S, SERVE_STAND_IN, Cluster, eventually, refused, running_cluster
from tests.support.models import SLEEP_S
from tests.support.payloads import actions, npy, png


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


def development_mils(data_dir: Path) -> int:
    """What is in the balance of the development key's customer, by the database."""
    database = open_database(f"sqlite:///{data_dir / 'ledger.db'}")
    development = LedgerReader(database).customer("development")
    database.dispose()
    assert development is not None
    return development.balance_mils


def test_a_cluster_stops_whole_keeps_key_and_balance_and_starts_again(cluster: Cluster) -> None:
    """One Ctrl-C finishes what runs; a second one refunds it instead, and answers its client.

    The last test of all that use this cluster.
    """
    first = cluster
    with first.http() as http:
        assert http.post("/v1/predict", files={"frame": png(), "actions": npy(actions())}).status_code == 200
        mils = http.get("/v1/billing/balance").json()["balance_mils"]
    started = psutil.Process(first.process.pid).children(recursive=True)
    assert first.stop() == 0
    _, alive = psutil.wait_procs(started, timeout=60)
    assert alive == []
    assert first.process.stdout is not None
    assert first.process.stdout.read() == "", "only the ready line goes to standard output"
    assert not (first.data_dir / "ray-address").exists()
    assert list((first.data_dir / "logs").iterdir())
    assert development_mils(first.data_dir) == mils
    with running_cluster(first.data_dir, SERVE_STAND_IN) as second:
        assert second.key == first.key
        with second.http() as http, ThreadPoolExecutor(1) as pool:
            assert http.get("/v1/billing/balance").json()["balance_mils"] == mils
            slow = actions(seed=1)
            slow[:, SLEEP_S] = 2.0
            running = pool.submit(http.post, "/v1/predict", files={"frame": png(), "actions": npy(slow)})
            eventually(lambda: http.get("/v1/billing/balance").json()["balance_mils"] == mils - 245)
            second.interrupt()
            second.interrupt()
            assert running.result(PATIENCE_S).status_code == 503
            assert second.process.wait(timeout=PATIENCE_S) == 0
    assert development_mils(first.data_dir) == mils
