"""An evaluation as a researcher runs it, killed twice; and what it costs over a bare loop: `make evaluate-proof`.

    python -m benchmarks.evaluation [--episodes 512] [--kills 2] [--rounds 3] [--round-episodes 272]

First: recordings of the true simulator go through `ray job submit -- python -m serve_app.jobs.evaluate` on a cluster
with the packaged tiny-pusher, HTTP and the ledger. The job's driver is killed with SIGKILL at random moments and
submitted again. Every episode must be in the report once and paid for once, and no audit may find anything.

Then its throughput, in turns on the same cluster, each with one torch thread per process and batches of 16 rows:

- `cluster`: what a worker of the job does. Reads the files, sends them over HTTP, gets raw frames, pays, compares every
  frame by PSNR and SSIM, writes a record per episode and some clips.
- `actors`: the same worker with the model in its own process, as `--checkpoint` does it.
- `bare_evaluation`: one process that reads the same files, calls the model, compares every frame by PSNR and SSIM, and
  keeps the figures in memory; one after the other.
- `bare_model`: only the calls of the model, with all inputs in memory.

Prints one JSON line: medians over rounds of episodes/s, ratios of `cluster` and `actors` over both bare loops (medians
of the rounds' own ratios); what each took of the processors, in ms per episode, by kind of process: where other work
has the cores, that is steadier than the clock; and of `cluster` the rows per forward of the engine, and the part of the
time in which it was in one. The exit status is 1 unless the first part held.
"""

import argparse
import contextlib
import json
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text

from billing import invariants
from billing.commands import Grant
from billing.database import open_database
from billing.keys import token_sha256
from billing.money import Mils
from billing.reader import LedgerReader
from deployments.world_model import pusher
from serve_app.catalog import PACKAGED_CHECKPOINTS
from serve_app.jobs.episodes import list_episodes
from serve_app.launch import development_token, local_ray, register_development_key
from serve_app.settings import Settings

ROOT = Path(__file__).resolve().parents[1]
MODEL = "tiny-pusher"
NUM_ACTIONS = 48
MILS_PER_EPISODE = 5 * (1 + NUM_ACTIONS)
BATCH = 16
KINDS = {
    "Worker": "worker",
    "Bare": "bare",
    ":model-": "replica",
    ":ingress": "ingress",
    "ProxyActor": "proxy",
    "SchedulerActor": "scheduler",
    "LedgerActor": "ledger",
}
"""What a process of Ray's has in its title, and what it is called here."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def write_episodes(root: Path, count: int) -> Path:
    root.mkdir()
    generator = np.random.default_rng(0)
    state = pusher.reset(count, generator)
    moves = pusher.random_actions(state, NUM_ACTIONS, generator)
    states = pusher.simulate(state, moves)
    video = np.stack([pusher.render(each) for each in states], axis=1)
    actions = np.zeros((count, NUM_ACTIONS, 8), np.float32)
    actions[..., :2] = moves
    for index in range(count):
        np.savez(root / f"e{index:04d}.npz", frames=video[index], actions=actions[index])
    return root


def fund(settings: Settings, key: str) -> None:
    from deployments.actors import ledger_handle
    from deployments.ledger_client import apply_once

    database = open_database(settings.ledger_url)
    customer = LedgerReader(database).key_by_token_hash(token_sha256(key))
    database.dispose()
    assert customer is not None
    grant = Grant(customer.customer_id, Mils(10**7), "adm_evaluation", "evaluation")
    apply_once(ledger_handle(settings.ledger_url), grant, timeout_s=30)


class Jobs:
    """`ray job submit`, from outside the cluster."""

    def __init__(self, address: str, arguments: list[str], directory: Path) -> None:
        # Ray does not hand a job the path of the token that this cluster asks for.
        token = {name: os.environ[name] for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH")}
        self._command = ["job", "submit", "--address", address, "--working-dir", str(directory)]
        self._command += ["--runtime-env-json", json.dumps({"env_vars": token}), "--"]
        self._command += [sys.executable, "-m", "serve_app.jobs.evaluate", *arguments]
        self._log = directory.parent / "jobs.log"

    def submit(self) -> subprocess.Popen[bytes]:
        program = str(Path(sys.executable).with_name("ray"))
        with self._log.open("ab") as log:
            return subprocess.Popen([program, *self._command], stdout=log, stderr=log)

    def log(self) -> str:
        return self._log.read_text()[-3000:]


def killed_and_resumed(jobs: Jobs, out: Path, episodes: int, kills: int, chance: random.Random) -> dict[str, Any]:
    """Submit until it is done; the first `kills` times kill the driver at a random number of finished episodes."""
    points = sorted(chance.randrange(episodes // 20, episodes) for _ in range(kills))
    killed_at = []
    for point in points:
        submitted = jobs.submit()
        while finished(out) < point:
            if submitted.poll() is not None:
                raise SystemExit(f"a job ended by itself:\n{jobs.log()}")
            time.sleep(0.05)
        (driver,) = drivers()
        driver.kill()
        submitted.wait(timeout=60)
        time.sleep(chance.uniform(0, 1))
        killed_at.append(finished(out))
    started = time.monotonic()
    if jobs.submit().wait(timeout=600):
        raise SystemExit(f"the last job failed:\n{jobs.log()}")
    return {"killed_at": killed_at, "last_job_s": round(time.monotonic() - started, 1)}


def finished(out: Path) -> int:
    return len(list((out / "episodes").glob("*.json")))


def drivers() -> list[psutil.Process]:
    """The job's own process on the cluster, which the submitting command is not."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if process.cmdline()[1:3] == ["-m", "serve_app.jobs.evaluate"]:
                found.append(process)
    return found


def wait_until(condition: Any, timeout_s: float = 300.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            raise SystemExit("it did not happen in time")
        time.sleep(0.05)


def books(settings: Settings, out: Path, episodes: int) -> dict[str, Any]:
    """What the report says, and what the ledger says once nothing is open any more."""
    from pyarrow import parquet

    report = parquet.read_table(out / "episodes.parquet").to_pylist()
    ids = Counter(row["episode_id"] for row in report)
    reported: Counter[str] = Counter()
    for row in report:
        reported[row["request_id"]] += round(row["cost_usd"] * 10_000)
    summary = json.loads((out / "summary.json").read_text())["dataset"]
    database = open_database(settings.ledger_url)
    try:

        def rows(where: str) -> int:
            with database.connect() as connection:
                return int(connection.execute(text(f"SELECT count(*) FROM reservation WHERE {where}")).scalar_one())

        wait_until(lambda: rows("state = 'open'") == 0, 60)
        with database.connect() as connection:
            query = text("SELECT request_id, captured FROM reservation WHERE captured > 0")
            paid = {request_id: int(mils) for request_id, mils in connection.execute(query)}
        refunded = rows("state <> 'open' AND captured = 0")
        violations = len(invariants.audit(database))
    finally:
        database.dispose()
    found = {
        "episodes": len(ids),
        "most_often": max(ids.values(), default=0),
        "bad": summary["bad"],
        "left": summary["left"],
        "reported_usd": summary["cost_usd"],
        "paid_requests": len(paid),
        "paid_mils": sum(paid.values()),
        "paid_as_reported": paid == reported,
        "refunded_requests": refunded,
        "audit_violations": violations,
    }
    expected = {
        "episodes": episodes,
        "most_often": 1,
        "bad": 0,
        "left": 0,
        "reported_usd": round(episodes * MILS_PER_EPISODE / 10_000, 4),
        "paid_mils": episodes * MILS_PER_EPISODE,
        "paid_as_reported": True,
        "audit_violations": 0,
    }
    return found | {"held": all(found[name] == value for name, value in expected.items())}


class Bare:
    """The loops without a service."""

    def __init__(self, files: list[str]) -> None:
        import torch

        from serve_app.jobs.rollouts import LocalRoller

        self._roller = LocalRoller(str(PACKAGED_CHECKPOINTS[MODEL]), "cpu", None)
        self._files = files
        self._episodes = [read(file) for file in files]
        self.threads = torch.get_num_threads()

    def num_threads(self) -> int:
        return self.threads

    def model(self, seed: int) -> None:
        for first in range(0, len(self._episodes), BATCH):
            work = [(frames[0], actions) for frames, actions in self._episodes[first : first + BATCH]]
            self._roller.generate(work, seed)

    def evaluation(self, seed: int) -> None:
        """Reading, model and comparison."""
        from deployments.world_model.metrics import psnr_per_frame, ssim_per_frame

        figures = []
        for first in range(0, len(self._files), BATCH):
            episodes = [read(file) for file in self._files[first : first + BATCH]]
            videos = self._roller.generate([(frames[0], actions) for frames, actions in episodes], seed)
            for video, (frames, _) in zip(videos, episodes, strict=True):
                psnr = psnr_per_frame(video[1:], frames[1:])
                figures.append((psnr, ssim_per_frame(video[1:], frames[1:])))


class Worker:
    """As Ray Data runs an `Evaluator`: its calls in threads. Ray would give it one loop, for its coroutines."""

    def __init__(self, plan: Any, key: str) -> None:
        from serve_app.jobs.evaluator import Evaluator

        self._evaluator = Evaluator(plan, key)

    def run(self, group: dict[str, str]) -> list[str]:
        statuses: list[str] = self._evaluator({name: [value] for name, value in group.items()})["status"]
        return statuses


def processor_s() -> Counter[str]:
    """Seconds of processor time so far, by kind of process, of the cluster and of what works on it."""
    used: Counter[str] = Counter()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            title = (process.cmdline() or [process.name()])[0].removeprefix("ray::")
            kind = next((name for part, name in KINDS.items() if part in title), "others")
            used[kind] += times.user + times.system
    return used


def engine_figures(settings: Settings) -> tuple[float, float, float]:
    """Forwards so far, their rows, and the seconds that they took."""
    secret = (settings.data_dir / "metrics-secret").read_text().strip()
    page = httpx.get(
        f"http://{settings.host}:{settings.port}/metrics", headers={"Authorization": f"Bearer {secret}"}, timeout=10.0
    )
    samples = {
        sample.name: sample.value
        for family in text_string_to_metric_families(page.raise_for_status().text)
        for sample in family.samples
        if sample.labels.get("model") == MODEL
    }
    rows, seconds = "dream_engine_step_rows", "dream_engine_step_seconds"
    return samples[f"{rows}_count"], samples[f"{rows}_sum"], samples[f"{seconds}_sum"]


def settled_engine(settings: Settings) -> tuple[float, float, float]:
    """Replicas say every second what they measured."""
    time.sleep(1.5)
    return engine_figures(settings)


def read(file: str) -> tuple[np.ndarray, np.ndarray]:
    with np.load(file) as arrays:
        return arrays["frames"], arrays["actions"]


def throughput(settings: Settings, key: str, data: Path, rounds: int, count: int, concurrency: int) -> dict[str, Any]:
    import ray

    from serve_app.jobs.evaluator import Plan, row_of

    refs = list_episodes(str(data))[:count]
    files = [ref.url for ref in refs]
    bare = ray.remote(Bare).options(num_cpus=1).remote(files[BATCH:])
    figures: dict[str, list[float]] = {name: [] for name in ("cluster", "actors", "bare_evaluation", "bare_model")}
    processor: dict[str, list[Counter[str]]] = {name: [] for name in figures}
    engine: list[tuple[float, float]] = []

    def measured(name: str, work: Callable[[], None]) -> float:
        used, started = processor_s(), time.perf_counter()
        work()
        took_s = time.perf_counter() - started
        processor[name].append(processor_s() - used)
        return took_s

    def evaluate(name: str, where: dict[str, str], seed: int) -> float:
        """As a worker of the job, which has started and has opened its connection."""
        with tempfile.TemporaryDirectory() as out:
            plan = Plan(
                run=str(seed),
                out=out,
                url=f"http://{settings.host}:{settings.port}",
                device="cpu",
                seed=seed,
                num_steps=None,
                max_actions=NUM_ACTIONS,
                concurrency=concurrency,
                patience_s=60.0,
                lpips_weights="",
                lpips_sha256="",
                **where,
            )
            worker = ray.remote(Worker).options(num_cpus=1, max_concurrency=plan.calls).remote(plan, key)
            groups = [refs[first : first + plan.rows] for first in range(BATCH, count, plan.rows)]

            def work() -> None:
                done = Counter(chain(*ray.get([worker.run.remote(row_of(group)) for group in groups])))
                assert done == {"ok": count - BATCH}, done

            ray.get(worker.run.remote(row_of(refs[:BATCH])))
            before = settled_engine(settings)
            took_s = measured(name, work)
            forwards, rows, seconds = np.subtract(settled_engine(settings), before)
            if forwards:
                engine.append((rows / forwards, seconds / took_s))
            ray.kill(worker)
        return took_s

    def loop(name: str, method: Any, seed: int) -> float:
        return measured(name, lambda: ray.get(method.remote(seed)))

    local = {"model": "", "checkpoint": str(PACKAGED_CHECKPOINTS[MODEL])}
    runs: dict[str, Callable[[int], float]] = {
        "cluster": lambda seed: evaluate("cluster", {"model": MODEL, "checkpoint": ""}, seed),
        "bare_evaluation": lambda seed: loop("bare_evaluation", bare.evaluation, seed),
        "actors": lambda seed: evaluate("actors", local, seed),
        "bare_model": lambda seed: loop("bare_model", bare.model, seed),
    }
    ray.get(bare.evaluation.remote(0))
    for round_index in range(rounds):
        for name, run in runs.items():
            figures[name].append((count - BATCH) / run(1000 + round_index))
            print(f"round {round_index} {name} {figures[name][-1]:.2f}/s", file=sys.stderr, flush=True)
    return {
        "episodes_per_s": {name: round(statistics.median(values), 2) for name, values in figures.items()},
        "ratio": {
            f"{name}_over_{loop}": round(
                statistics.median(a / b for a, b in zip(figures[name], figures[loop], strict=True)), 3
            )
            for name in ("cluster", "actors")
            for loop in ("bare_evaluation", "bare_model")
        },
        "processor_ms_per_episode": {
            name: {
                kind: round(statistics.median(each[kind] for each in used) * 1e3 / (count - BATCH), 2)
                for kind in (*dict.fromkeys(KINDS.values()), "others")
                if any(each[kind] for each in used)
            }
            for name, used in processor.items()
        },
        "engine": {
            name: round(statistics.median(values), 2)
            for name, values in zip(("rows_per_forward", "busy"), zip(*engine, strict=True), strict=True)
        },
        "load": [round(each, 1) for each in os.getloadavg()],
        "torch_threads": ray.get(bare.num_threads.remote()),
        "rounds": rounds,
        "round_episodes": count - BATCH,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--episodes", type=int, default=512)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--round-episodes", type=int, default=272)
    parser.add_argument("--concurrency", type=int, default=48)
    parser.add_argument("--seed", type=int, default=None, help="of the moments of the kills; another each time without")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the cluster ends with it
    seed = random.randrange(2**32) if arguments.seed is None else arguments.seed
    report: dict[str, Any] = {"benchmark": "evaluation", "seed": seed}
    with tempfile.TemporaryDirectory(prefix="evaluation-") as directory:
        root = Path(directory)
        settings = Settings(data_dir=root / "data", port=free_port())
        settings.data_dir.mkdir()
        data = write_episodes(root / "episodes", max(arguments.episodes, arguments.round_episodes))
        dashboard_port = free_port()
        # sets what Ray reads when imported, so its users come after
        with local_ray(settings.data_dir, num_cpus=6, dashboard_port=dashboard_port):
            import ray
            from ray import serve

            from serve_app.build import build

            serve.start(http_options={"host": settings.host, "port": settings.port, "request_timeout_s": None})
            serve.run(build(settings.cluster_args()), name="evaluation", route_prefix="/")
            key = development_token(settings)
            register_development_key(settings, key)
            fund(settings, key)
            if arguments.episodes:
                code = root / "code"
                for package in ("serve_app", "deployments", "billing"):
                    shutil.copytree(ROOT / package, code / package, ignore=shutil.ignore_patterns("__pycache__"))
                out = root / "out"
                options = ["--dataset", data, "--model", MODEL, "--out", out, "--limit", arguments.episodes]
                options += ["--url", f"http://{settings.host}:{settings.port}", "--max-cost", 20]
                options += ["--key-file", settings.data_dir / "dev-key", "--concurrency", arguments.concurrency]
                jobs = Jobs(f"http://127.0.0.1:{dashboard_port}", [str(each) for each in options], code)
                chance = random.Random(seed)
                report |= killed_and_resumed(jobs, out, arguments.episodes, arguments.kills, chance)
                report |= books(settings, out, arguments.episodes)
                print(json.dumps(report), file=sys.stderr, flush=True)
            if arguments.rounds:
                report |= throughput(
                    settings, key, data, arguments.rounds, arguments.round_episodes, arguments.concurrency
                )
            report |= {"ray": ray.__version__, "python": platform.python_version(), "cores": os.cpu_count()}
    print(json.dumps(report))
    sys.exit(0 if report.get("held", True) else 1)


if __name__ == "__main__":
    main()
