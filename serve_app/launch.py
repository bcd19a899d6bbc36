"""`make serve`: a whole cluster on one machine, in the foreground, with a funded development key.

Progress goes to standard error; standard output gets one line, `ready URL key KEY`. Everything that it starts belongs
to this process: its own Ray, with its own ports and its own directory, ends with it and nothing else does.
"""

import contextlib
import logging
import math
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from billing.commands import Command, CreateKey, KeyCreated, Outcome
from billing.keys import is_token_shaped, mint_customer_id, mint_key_id, mint_token, token_sha256
from billing.money import Mils
from billing.reader import KeyRecord, LedgerReader
from serve_app.admin import holding, open_migrated, publishing
from serve_app.local_ray import prepare_ray_environment
from serve_app.no_auth import is_loopback
from serve_app.settings import ClusterArgs, Settings

DEV_CUSTOMER = "development"
DEV_CREDITS_MILS = Mils(250_000)
DEV_REFILL_PER_S, DEV_BURST = 50.0, 200
APPLICATION = "dream-engine"
DRAIN_TIMEOUT_S = 20.0
OBJECT_STORE_BYTES = 256 * 2**20
ANSWER_S = 0.5
"""Answers that were made while draining are on their way through the proxy for this long."""


class CannotStart(Exception):
    """What stands in the way, in one line."""


def run(settings: Settings, args: ClusterArgs) -> None:
    """Start the cluster of `args`, print the ready line, wait for SIGINT or SIGTERM, stop.

    Raises:
        CannotStart, serve_app.admin.DataDirectoryBusy, billing.errors.DatabaseUnusable: nothing is left running.
    """
    if settings.no_auth and not is_loopback(settings.host):
        raise CannotStart(f"NO_AUTH asks nobody for a key, so it listens on loopback only; HOST is {settings.host}")
    data_dir = prepare_data_dir(settings.data_dir)
    with contextlib.ExitStack() as stack:
        stack.enter_context(holding(data_dir))
        check_port(settings.host, settings.port)
        open_migrated(settings).dispose()
        token = development_token(settings)
        address = stack.enter_context(local_ray(data_dir, needed_cpus(args)))
        signals = StopSignals()
        stack.callback(_progress, "stopping")
        serve_application(settings, args, token_sha256(token) if settings.no_auth else "")
        stack.enter_context(publishing(data_dir, address))
        register_development_key(settings, token)
        if settings.no_auth:
            _progress(f"NO_AUTH: no key is asked for; every request is the customer {DEV_CUSTOMER}'s")
        print(f"ready {url(settings)} key {token}", flush=True)
        signals.wait()
        _progress("finishing what is running; Ctrl-C again refunds it instead")
        drain(signals)


class StopSignals:
    """SIGINT and SIGTERM: an interruption until the cluster is ready, then one wish to stop, then one to hurry."""

    def __init__(self) -> None:
        self._waiting = False
        self._received = 0
        for signum in (signal.SIGINT, signal.SIGTERM):
            signal.signal(signum, self._on_signal)

    def wait(self) -> None:
        """Return at the first signal."""
        self._waiting = True
        while not self._received:
            time.sleep(0.2)

    @property
    def hurry(self) -> bool:
        return self._received > 1

    def _on_signal(self, *_: object) -> None:
        self._received += 1
        if not self._waiting:
            raise KeyboardInterrupt


def drain(signals: StopSignals) -> None:
    """Let every ingress replica finish or refund what it runs, so that clients are answered before the port closes."""
    from ray import serve

    ingress = serve.get_app_handle(APPLICATION)
    try:
        with ThreadPoolExecutor(1) as pool:
            draining = pool.submit(ingress.broadcast("drain", DRAIN_TIMEOUT_S).results, timeout_s=DRAIN_TIMEOUT_S + 10)
            while not draining.done():
                time.sleep(0.1)
                if signals.hurry:
                    ingress.broadcast("drain", 0.0).results(timeout_s=10)
                    break
            draining.result()
    except Exception as error:  # stopping goes on; what was not settled is refunded when its lease runs out
        _progress(f"could not finish running work: {type(error).__name__}")
    time.sleep(ANSWER_S)


def needed_cpus(args: ClusterArgs) -> int:
    """Ray counts CPUs logically: as many as the deployments ask for, so that a small machine runs them all."""
    models = sum(model.num_cpus * model.max_replicas for model in args.models)
    return max(os.cpu_count() or 1, math.ceil(models + args.ingress_replicas))


def url(settings: Settings) -> str:
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{settings.port}"


def prepare_data_dir(data_dir: Path) -> Path:
    """The directory, made if need be, and really writable.

    Raises:
        CannotStart: it cannot be made or written.
    """
    try:
        data_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=data_dir):
            pass
    except OSError as error:
        raise CannotStart(f"DATA_DIR {data_dir} cannot be written: {error.strerror}") from None
    return data_dir


def check_port(host: str, port: int) -> None:
    """Raises CannotStart unless `host:port` can be listened on now."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise CannotStart(f"cannot listen on {host}:{port}: {error.strerror}; set PORT or HOST") from None


@contextlib.contextmanager
def local_ray(data_dir: Path, num_cpus: int, dashboard_port: int = 0) -> Iterator[str]:
    """A Ray of our own on free ports, in a directory of its own; yields its address. `ray job submit` needs its
    dashboard, which there is only with a port for it."""
    prepare_ray_environment(data_dir)
    _progress("starting Ray")
    import ray

    from deployments.actors import NAMESPACE

    directory = tempfile.mkdtemp(prefix="dream-")  # short: it holds Unix sockets, whose paths are bounded
    try:
        context = ray.init(
            address="local",
            namespace=NAMESPACE,
            include_dashboard=bool(dashboard_port),
            dashboard_port=dashboard_port or None,
            num_cpus=num_cpus,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=OBJECT_STORE_BYTES,
            _temp_dir=directory,
        )
        _progress(f"logs are in {directory}/session_latest/logs")
        yield str(context.address_info["gcs_address"])
    finally:
        ray.shutdown()
        keep_logs(Path(directory), data_dir / "logs")
        remove_directory(directory)


def keep_logs(ray_directory: Path, logs: Path) -> None:
    """The logs of the last run, in place of those of the run before."""
    shutil.rmtree(logs, ignore_errors=True)
    with contextlib.suppress(OSError, shutil.Error):
        shutil.copytree(ray_directory / "session_latest" / "logs", logs)


def remove_directory(directory: str) -> None:
    """Ray's last processes may still write their logs while they end."""
    for _ in range(20):
        shutil.rmtree(directory, ignore_errors=True)
        if not os.path.exists(directory):
            return
        time.sleep(0.1)


def serve_application(settings: Settings, args: ClusterArgs, open_to: str = "") -> None:
    """Deploy the application and return when it answers. `open_to`: see `build`.

    Raises:
        CannotStart: there are not the GPUs it needs, or a deployment did not become healthy.
    """
    import ray
    from ray import serve

    from serve_app.build import application

    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    _progress("starting Serve")
    gpus = ray.cluster_resources().get("GPU", 0)
    needed = sum(model.num_gpus * model.min_replicas for model in args.models)
    if needed > gpus:
        raise CannotStart(f"the models need {needed:g} GPUs and Ray finds {gpus:g}; set MODEL_DEVICE=cpu")
    serve.start(http_options={"host": settings.host, "port": settings.port, "request_timeout_s": None})
    _progress(f"loading {', '.join(model.slug for model in args.models)}")
    try:
        serve.run(application(args, open_to), name=APPLICATION, route_prefix="/", blocking=False)
    except RuntimeError:
        raise CannotStart(_why_unhealthy()) from None


def _why_unhealthy() -> str:
    """The last line of the first deployment's message that has one: what its constructor raised."""
    from ray import serve

    for name, deployment in serve.status().applications[APPLICATION].deployments.items():
        lines = [line.strip() for line in deployment.message.splitlines() if line.strip()]
        if lines:
            return f"{name} cannot start: {lines[-1]}"
    return "the application did not become healthy"


def development_token(settings: Settings) -> str:
    """The development customer's key, kept in `dev-key`: minted at first, and anew once it was revoked."""
    path = settings.data_dir / "dev-key"
    token = path.read_text().strip() if path.exists() else ""
    if is_token_shaped(token):
        known = _known(settings, token)
        if known is None or not known.revoked:
            return token
    token = mint_token()
    partial = path.with_suffix(".partial")
    partial.touch(mode=0o600)
    partial.write_text(token + "\n")
    partial.replace(path)
    return token


def register_development_key(settings: Settings, token: str) -> None:
    """Make the key known to the ledger, with credits, if it is not."""
    if _known(settings, token) is not None:
        return
    outcome = _apply(
        settings,
        CreateKey(
            key_id=mint_key_id(),
            sha256=token_sha256(token),
            last4=token[-4:],
            customer_name=DEV_CUSTOMER,
            customer_id=mint_customer_id(),
            initial_credits_mils=DEV_CREDITS_MILS,
            refill_per_s=DEV_REFILL_PER_S,
            burst=DEV_BURST,
        ),
    )
    assert isinstance(outcome, KeyCreated)


def _known(settings: Settings, token: str) -> KeyRecord | None:
    engine = open_migrated(settings)
    try:
        return LedgerReader(engine).key_by_token_hash(token_sha256(token))
    finally:
        engine.dispose()


def _apply(settings: Settings, command: Command) -> Outcome:
    from deployments.actors import ledger_handle
    from deployments.ledger_client import apply_once

    return apply_once(ledger_handle(settings.ledger_url), command, timeout_s=30)


def _progress(what: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {what}", file=sys.stderr, flush=True)
