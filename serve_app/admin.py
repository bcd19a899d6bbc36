"""How an operator's tool reaches the ledger, whether or not the cluster is running: one writer stays one writer.

While a cluster runs on this data directory it says so in `cluster.json`, and commands go to its ledger actor. Otherwise
the tool takes the fence itself for as long as it needs. If a cluster starts in that moment it takes the fence over, and
the tool's write is refused by the database rather than mixed in.
"""

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from sqlalchemy import Engine

from billing.commands import Command, Outcome
from billing.database import migrate, open_database
from billing.ledger import Ledger
from serve_app.settings import Settings

Apply = Callable[[Command], Outcome]


@dataclass(frozen=True, slots=True)
class ClusterFile:
    """Where the running cluster of a data directory is."""

    pid: int
    ray_address: str

    def write(self, data_dir: Path) -> None:
        path = data_dir / "cluster.json"
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(self)))
        partial.replace(path)

    @staticmethod
    def remove(data_dir: Path) -> None:
        (data_dir / "cluster.json").unlink(missing_ok=True)

    @staticmethod
    def read(data_dir: Path) -> "ClusterFile | None":
        """None if no cluster runs here; a file whose process is gone is what a killed cluster left behind."""
        try:
            cluster = ClusterFile(**json.loads((data_dir / "cluster.json").read_text()))
            os.kill(cluster.pid, 0)
        except (FileNotFoundError, ProcessLookupError, json.JSONDecodeError, TypeError):
            return None
        return cluster


def open_migrated(settings: Settings) -> Engine:
    """The ledger's database, made and migrated if need be.

    Raises:
        billing.errors.DatabaseUnusable: with one line that says why.
    """
    engine = open_database(settings.ledger_url)
    migrate(engine)
    return engine


@contextlib.contextmanager
def ledger_writer(settings: Settings) -> Iterator[Apply]:
    """A function that applies one command through whichever process is the writer."""
    cluster = ClusterFile.read(settings.data_dir)
    if cluster is not None:
        with _through_cluster(cluster) as apply:
            yield apply
    else:
        import time

        ledger = Ledger(open_migrated(settings), time.time)
        ledger.take_over()
        yield lambda command: ledger.apply([command])[0]


@contextlib.contextmanager
def _through_cluster(cluster: ClusterFile) -> Iterator[Apply]:
    import logging

    import ray

    from deployments.actors import NAMESPACE, ledger_handle

    ray.init(address=cluster.ray_address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
    try:
        ledger = ledger_handle()
        yield lambda command: ray.get(ledger.apply.remote([command]), timeout=30)[0]
    finally:
        ray.shutdown()
