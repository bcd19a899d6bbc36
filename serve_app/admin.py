"""How an operator's tool reaches the ledger, whether or not the cluster is running: one writer stays one writer.

A cluster on this machine holds its data directory and says in `ray-address` where it is: commands then go to its ledger
actor. Otherwise the tool holds the directory and is the writer itself for as long as it needs. For a cluster that was
deployed with `serve deploy`, RAY_ADDRESS says where it is.
"""

import contextlib
import fcntl
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from sqlalchemy import Engine

from billing.commands import Command, Outcome
from billing.database import migrate, open_database
from billing.errors import DatabaseUnusable
from billing.ledger import Ledger
from serve_app.local_ray import prepare_ray_environment
from serve_app.settings import Settings

Apply = Callable[[Command], Outcome]

MAX_ATTEMPTS = 3
ATTEMPT_TIMEOUT_S = 20.0


class DataDirectoryBusy(Exception):
    """Another process holds this data directory: a cluster, or a tool that is writing."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir)
        self.data_dir = data_dir

    def __str__(self) -> str:
        return f"{self.data_dir} is in use: a cluster is already running, starting or stopping on it, or a dream-admin"


@contextlib.contextmanager
def holding(data_dir: Path) -> Iterator[None]:
    """Hold `data_dir` for this process alone; the kernel lets go of it however the process ends.

    Raises:
        DataDirectoryBusy: another process holds it.
    """
    with (data_dir / "lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataDirectoryBusy(data_dir) from None
        yield


def cluster_address(data_dir: Path) -> str | None:
    """Where the Ray of the cluster on `data_dir` is, as the cluster wrote it; says nothing about whether it lives."""
    try:
        return (data_dir / "ray-address").read_text().strip() or None
    except FileNotFoundError:
        return None


@contextlib.contextmanager
def publishing(data_dir: Path, ray_address: str) -> Iterator[None]:
    """Let `dream-admin` find this cluster while it runs."""
    path = data_dir / "ray-address"
    partial = path.with_suffix(".partial")
    partial.write_text(f"{ray_address}\n")
    partial.replace(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def open_migrated(settings: Settings) -> Engine:
    """The ledger's database, made and migrated if need be.

    Raises:
        billing.errors.DatabaseUnusable: with one line that says why.
    """
    engine = open_database(settings.ledger_url)
    migrate(engine)
    return engine


class ClusterUnreachable(Exception):
    """A cluster runs, but its ledger does not answer."""

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
        ClusterUnreachable: a cluster runs here, but its ledger cannot be reached.
        DataDirectoryBusy: a cluster is starting or stopping here.
        billing.errors.BillingError: the database cannot be used.
    """
    data_dir = settings.data_dir
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise DatabaseUnusable(f"DATA_DIR {data_dir} cannot be made: {error.strerror}") from None
    if settings.ray_address:
        with _through_cluster(settings.ray_address, settings) as apply:
            yield apply
        return
    try:
        with holding(data_dir):
            ledger = Ledger(open_migrated(settings), time.time)
            ledger.take_over()
            yield lambda command: ledger.apply([command])[0]
    except DataDirectoryBusy:
        address = cluster_address(data_dir)
        if address is None:
            raise
        with _through_cluster(address, settings) as apply:
            yield apply


@contextlib.contextmanager
def _through_cluster(ray_address: str, settings: Settings) -> Iterator[Apply]:
    prepare_ray_environment(settings.data_dir)
    import ray

    from deployments.actors import NAMESPACE, ledger_handle
    from deployments.ledger_client import apply_once

    def apply(command: Command) -> Outcome:
        """The same command again after a failure: its id makes that safe, and no outcome is lost with its answer."""
        for attempt in range(MAX_ATTEMPTS):
            try:
                return apply_once(ledger, command, ATTEMPT_TIMEOUT_S)
            except ray.exceptions.RayError:
                if attempt + 1 == MAX_ATTEMPTS:
                    raise
                time.sleep(1.0)
        raise AssertionError("unreachable: the last attempt returns or raises")

    try:
        ray.init(address=ray_address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR)
        ledger = ledger_handle(settings.ledger_url)
        yield apply
    except (ConnectionError, ValueError, ray.exceptions.RayError) as error:
        raise ClusterUnreachable(ray_address, type(error).__name__) from error
    finally:
        ray.shutdown()
