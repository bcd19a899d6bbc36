"""A whole cluster in a process of its own, on a free port, with its own data directory."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import dream
import httpx
import psutil

from tests.support.app import ledgered

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 150.0
"""With a process that begins, or ends: seconds on a machine of one's own, minutes on one that others use."""
NUM_CUSTOMERS = 50
SERVE = (str(Path(sys.executable).with_name("dream-admin")), "serve")
SERVE_STAND_IN = (sys.executable, "-m", "tests.support.serve_stand_in")
WITH_FAKE_STRIPE = (sys.executable, "-m", "tests.fakestripe.beside")
"""Before another command: payments are on, against a fake Stripe that ends with it."""


@dataclass(frozen=True)
class Cluster:
    base_url: str
    key: str
    data_dir: Path
    process: subprocess.Popen[str]
    customers: list[str]
    """Keys of customers with $1 each, made before the cluster started."""

    def new_customer(self) -> str:
        """The key of a customer of its own, with $1, whom nobody has used."""
        return self.customers.pop()

    def client(self, **options: object) -> dream.Client:
        """The public client; every test that uses it closes it, since warnings are errors."""
        return dream.Client(api_key=self.key, base_url=self.base_url, **options)  # type: ignore[arg-type]

    def http(self) -> httpx.Client:
        return self.http_of(self.key)

    def http_of(self, key: str) -> httpx.Client:
        return httpx.Client(base_url=self.base_url, headers={"Authorization": f"Bearer {key}"}, timeout=PATIENCE_S)

    def admin(self, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """`dream-admin`, as an operator runs it beside this cluster."""
        return subprocess.run(
            [str(Path(sys.executable).with_name("dream-admin")), *arguments],
            env=environment(self.data_dir, port=1) | variables,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )

    def new_key(self, customer: str, dollars: str, *options: str) -> str:
        """A key of a customer of its own, minted by the operator's tool while the cluster runs."""
        made = self.admin("keys", "create", "--customer", customer, "--initial-credits", dollars, "--json", *options)
        assert made.returncode == 0, made.stderr
        key: str = json.loads(made.stdout)["key"]
        return key

    def processes(self, title: str) -> list[psutil.Process]:
        """The cluster's processes whose title contains `title`, such as `ServeReplica` or `LedgerActor`."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                if title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def progress(self) -> str:
        """What it has said on standard error."""
        return log_of(self.data_dir).read_text()

    def interrupt(self) -> None:
        """Ctrl-C as a terminal sends it: to the whole process group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def stop(self) -> int:
        """Ctrl-C, and wait."""
        self.interrupt()
        return self.process.wait(timeout=PATIENCE_S)


def eventually(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    """Wait for something that another process does; fails if it does not happen in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.05)


def log_of(data_dir: Path) -> Path:
    return data_dir.parent / f"{data_dir.name}.stderr"


def make_customers(data_dir: Path) -> list[str]:
    """As `dream-admin keys create` does without a cluster, but in one process: each call of the tool takes seconds."""
    data_dir.mkdir(parents=True, exist_ok=True)
    with ledgered(f"sqlite:///{data_dir / 'ledger.db'}") as ledger:
        return [ledger.create_key(10_000)[0] for _ in range(NUM_CUSTOMERS)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def environment(data_dir: Path, port: int) -> dict[str, str]:
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "DREAM_"))}
    inherited = ours | {name: value for name, value in os.environ.items() if name.startswith("RAY_SERVE_")}
    return inherited | {
        "DATA_DIR": str(data_dir),
        "PORT": str(port),
        "HOST": "127.0.0.1",
        "PYTHONPATH": str(ROOT),
    }


@contextlib.contextmanager
def running_cluster(data_dir: Path, command: Sequence[str] = SERVE) -> Iterator[Cluster]:
    """Start `command`, wait for its ready line, stop it at the end unless the test did."""
    port = free_port()
    customers = make_customers(data_dir)
    log = log_of(data_dir)
    with log.open("w") as stderr:
        process = subprocess.Popen(
            command,
            env=environment(data_dir, port),
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            start_new_session=True,
        )
    assert process.stdout is not None
    try:
        ready = process.stdout.readline().split()
        assert ready[:1] == ["ready"], f"the cluster did not start:\n{log.read_text()}"
        yield Cluster(ready[1], ready[3], data_dir, process, customers)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(timeout=PATIENCE_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        process.stdout.close()


def refused(data_dir: Path, port: int | None = None, **more: str) -> str:
    """The one line that `dream-admin serve` refuses with."""
    done = subprocess.run(
        SERVE,
        env=environment(data_dir, port or free_port()) | more,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    return lines[0]
