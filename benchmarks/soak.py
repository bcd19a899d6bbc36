"""A real cluster under load whose clients hang up at random: `make soak`, or `python -m benchmarks.soak --minutes 10`.

Rollouts, batches, streams and sessions on a stand-in model that takes 3 + b ms per step; one in a hundred is aborted
after a random part of the time that it takes. When all is quiet again nothing may be left: no row in an engine, no
ticket at the scheduler, no open reservation, no session, no byte of a body and no task in the ingress, no mil that the
audits cannot explain, and no process that has grown. One JSON line; the exit status is 1 if anything is left, or if an
answer was an error of the server's.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from PIL import Image
from sqlalchemy import text
from websockets.asyncio.client import connect

from benchmarks.sleep_model import STEP_MS_VARIABLE
from billing import invariants
from billing.commands import Grant
from billing.database import READER_CACHE_KIB, WRITER_CACHE_KIB, open_database
from billing.keys import token_sha256
from billing.money import Mils
from billing.reader import LedgerReader
from serve_app.launch import check_port, development_token, local_ray, register_development_key
from serve_app.settings import Limits, ModelArgs, Settings

MODEL = "tiny-pusher"
NUM_ACTIONS = 24
QUIET_TIMEOUT_S = 120.0
"""A session that was created and never connected to is given up after a minute."""
MAX_GROWTH_MIB = 24.0
"""Of one process between a third of the run and its end: bounded histories fill up, leaks do not end. The ledger may
fill its pages' caches besides, the writer's and its audits'."""


def picture(generator: random.Random) -> bytes:
    frame = io.BytesIO()
    Image.fromarray(np.full((64, 64, 3), generator.randrange(256), np.uint8)).save(frame, "PNG")
    return frame.getvalue()


def body(generator: random.Random, candidates: int) -> dict[str, Any]:
    """A request unlike any other."""
    parts: list[tuple[str, Any]] = [("frame", ("frame.png", picture(generator)))]
    for _ in range(candidates):
        actions = io.BytesIO()
        np.save(actions, np.full((NUM_ACTIONS, 8), generator.random(), np.float32))
        parts.append(("actions", ("actions.npy", actions.getvalue())))
    return {"files": parts, "data": {"seed": str(generator.randrange(2**40))}}


async def rollout(http: httpx.AsyncClient, generator: random.Random) -> str:
    return f"{(await http.post('/v1/predict', **body(generator, 1))).status_code} rollout"


async def batch(http: httpx.AsyncClient, generator: random.Random) -> str:
    return f"{(await http.post('/v1/predict/batch', **body(generator, 4))).status_code} batch"


async def stream(http: httpx.AsyncClient, generator: random.Random) -> str:
    async with http.stream("POST", "/v1/predict", params={"stream": "png"}, **body(generator, 1)) as answer:
        return f"{answer.status_code} stream" if await answer.aread() else "empty stream"


async def session(http: httpx.AsyncClient, generator: random.Random) -> str:
    """Two submissions; half of the clients say that they leave, the others just do."""
    created = await http.post(
        "/v1/sessions", files={"initial_frame": picture(generator)}, data={"model": MODEL, "max_frames": "100"}
    )
    if created.status_code != 200:
        return f"{created.status_code} session"
    headers = {"Authorization": http.headers["Authorization"]}
    async with connect(created.json()["ws_url"], additional_headers=headers) as socket:
        for _ in range(2):
            await socket.send(json.dumps({"type": "submit_actions", "actions": [[0.5] * 8] * NUM_ACTIONS}))
            while (kind := json.loads(await socket.recv())["type"]) not in ("rollout_complete", "error"):
                pass
            if kind == "error":
                return "session error"
        if generator.random() < 0.5:
            await socket.send(json.dumps({"type": "control", "command": "stop"}))
            await socket.wait_closed()
    return "200 session"


KINDS = {rollout: 0.6, batch: 0.2, stream: 0.1, session: 0.1}
"""What clients do, and how often."""
ABORTS = "aborted"


async def load(url: str, key: str, until: float, connections: int, abort: float, seed: int) -> Counter[str]:
    """Each connection sends its next request when it has its answer, or has hung up."""
    ends: Counter[str] = Counter()

    async def one_connection(generator: random.Random) -> None:
        async with httpx.AsyncClient(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as http:
            while time.monotonic() < until:
                (act,) = generator.choices([*KINDS], [*KINDS.values()])
                patience_s = generator.uniform(0.0, 0.15) if generator.random() < abort else None
                try:
                    async with asyncio.timeout(patience_s):
                        ends[await act(http, generator)] += 1
                except TimeoutError:
                    ends[ABORTS] += 1

    await asyncio.gather(*(one_connection(random.Random(f"{seed}/{index}")) for index in range(connections)))
    return ends


def memory_mib() -> dict[str, float]:
    """Resident memory of the processes that hold our code, by title and id."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            title = " ".join(process.cmdline())[:60]
            if title.startswith("ray::"):
                found[f"{title.removeprefix('ray::').split('(')[0]} {process.pid}"] = process.memory_info().rss / 2**20
    return found


def allowed_growth_mib(process: str) -> float:
    caches_kib = WRITER_CACHE_KIB + READER_CACHE_KIB if process.startswith("LedgerActor") else 0
    return MAX_GROWTH_MIB + caches_kib / 2**10


def left_over(serve: Any, database: Any, url: str, key: str) -> dict[str, Any]:
    status = httpx.get(f"{url}/v1/status", headers={"Authorization": f"Bearer {key}"}).json()["models"][MODEL]
    with database.connect() as connection:
        open_reservations = connection.execute(text("SELECT count(*) FROM reservation WHERE state = 'open'")).scalar()
    rows = serve.get_deployment_handle(f"model-{MODEL}", "soak").broadcast("num_rows").results(timeout_s=10)
    held = serve.get_app_handle("soak").broadcast("held").results(timeout_s=10)
    return {
        "scheduler_rows": status["running_rows"] + status["queued_rows"],
        "engine_rows": sum(rows),
        "open_reservations": open_reservations,
        **{name: sum(each[name] for each in held) for name in held[0]},
    }


def num_tasks(serve: Any) -> int:
    """Of the ingress replicas; the fewest of several looks, since the probe's own are among them."""
    looks = []
    for _ in range(10):
        looks.append(sum(serve.get_app_handle("soak").broadcast("num_tasks").results(timeout_s=10)))
        time.sleep(0.2)
    return min(looks)


def soak(serve: Any, settings: Settings, arguments: argparse.Namespace) -> dict[str, Any]:
    from deployments.actors import ledger_handle
    from deployments.ledger_client import apply_once

    url, key = f"http://{settings.host}:{settings.port}", development_token(settings)
    register_development_key(settings, key)
    database = open_database(settings.ledger_url)
    customer = LedgerReader(database).key_by_token_hash(token_sha256(key))
    assert customer is not None
    grant = Grant(customer.customer_id, Mils(10**9), "adm_soak", "soak")
    apply_once(ledger_handle(settings.ledger_url), grant, timeout_s=30)

    def part(minutes: float, seed: int) -> Counter[str]:
        until = time.monotonic() + 60 * minutes
        return asyncio.run(load(url, key, until, arguments.connections, arguments.abort, seed))

    ends = part(arguments.minutes / 3, 0)
    quiet_tasks, before = num_tasks(serve), memory_mib()
    ends += part(arguments.minutes * 2 / 3, 1)
    patience = time.monotonic() + QUIET_TIMEOUT_S
    while any((left := left_over(serve, database, url, key)).values()) and time.monotonic() < patience:
        time.sleep(0.5)
    growth = {name: round(mib - before[name], 1) for name, mib in memory_mib().items() if name in before}
    tasks = num_tasks(serve) - quiet_tasks
    violations = invariants.audit(database)
    balance = LedgerReader(database).balance(customer.customer_id)
    with database.connect() as connection:
        rows = connection.execute(text("SELECT coalesce(sum(amount), 0) FROM entry")).scalar()
    database.dispose()
    drift_mils = balance - int(rows or 0)
    failed = sum(count for end, count in ends.items() if not end.startswith(("200", "429", "503", ABORTS)))
    grown = any(mib > allowed_growth_mib(name) for name, mib in growth.items())
    return {
        "clean": not (any(left.values()) or tasks > 0 or drift_mils or violations or grown or failed),
        "ends": dict(ends),
        **left,
        "tasks_more": tasks,
        "drift_mils": drift_mils,
        "violations": [violation.name for violation in violations],
        "growth_mib": dict(sorted(growth.items(), key=lambda entry: -entry[1])[:6]),
        "processes_replaced": len(set(before) - set(memory_mib())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--abort", type=float, default=0.01)
    parser.add_argument("--port", type=int, default=8127)
    arguments = parser.parse_args()
    os.environ[STEP_MS_VARIABLE] = "3,1"
    with tempfile.TemporaryDirectory(prefix="soak-") as directory:
        settings = Settings(data_dir=Path(directory), port=arguments.port)
        model = ModelArgs(slug=MODEL, checkpoint="", runner="benchmarks.sleep_model:SleepModel")
        args = settings.cluster_args().model_copy(update={"models": (model,), "limits": Limits()})
        check_port(settings.host, settings.port)
        with local_ray(settings.data_dir, num_cpus=4):  # sets what Ray reads when imported, so its users come after
            from ray import serve

            from serve_app.build import build

            serve.start(http_options={"host": settings.host, "port": settings.port})
            serve.run(build(args), name="soak", route_prefix="/")
            result = soak(serve, settings, arguments)
    print(json.dumps({"benchmark": "soak", **result, "minutes": arguments.minutes, "abort": arguments.abort}))
    sys.exit(0 if result["clean"] else 1)


if __name__ == "__main__":
    main()
