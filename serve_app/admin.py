"""How an operator's tool reaches the ledger, whether or not the cluster is running: one writer stays one writer.

While a cluster runs on this data directory it says so in `cluster.json`, and commands go to its ledger actor. Otherwise
the tool takes the fence itself for as long as it needs. If a cluster starts in that moment it takes the fence over, and
the tool's write is refused by the database rather than mixed in.
"""

import contextlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from sqlalchemy import Engine

from billing.commands import Command, Outcome
from billing.database import migrate, open_database
from billing.ledger import Ledger
from serve_app.local_ray import prepare_ray_environment
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


class ClusterUnreachable(Exception):
    """A cluster says that it runs here, but its ledger does not answer."""

    def __init__(self, ray_address: str, problem: str) -> None:
        super().__init__(ray_address, problem)
        self.ray_address = ray_address
        self.problem = problem

    def __str__(self) -> str:
        return f"the cluster at {self.ray_address} does not answer ({self.problem}); is it starting or stopping?"


@contextlib.contextmanager
def ledger_writer(settings: Settings) -> Iterator[Apply]:
    """A function that applies one command through whichever process is the writer.

    Raises:
        ClusterUnreachable: a cluster runs here, but its ledger cannot be reached; nothing was written meanwhile.
        billing.errors.BillingError: the database cannot be used, or a cluster that started took the fence over.
    """
    cluster = ClusterFile.read(settings.data_dir)
    if cluster is not None:
        with _through_cluster(cluster, settings.data_dir) as apply:
            yield apply
    else:
        ledger = Ledger(open_migrated(settings), time.time)
        ledger.take_over()
        yield lambda command: ledger.apply([command])[0]


@contextlib.contextmanager
def _through_cluster(cluster: ClusterFile, data_dir: Path) -> Iterator[Apply]:
    prepare_ray_environment(data_dir)
    import ray

    from deployments.actors import NAMESPACE, ledger_handle

    try:
        ray.init(address=cluster.ray_address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        ledger = ledger_handle()
        yield lambda command: ray.get(ledger.apply.remote([command]), timeout=30)[0]
    except (ConnectionError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterUnreachable(cluster.ray_address, type(error).__name__) from error
    finally:
        ray.shutdown()
