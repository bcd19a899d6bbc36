"""Sessions with the causal student whose replicas are killed: every pixel arrives as if nothing had happened.

    python -m benchmarks.stream_chaos [--sessions 4] [--submissions 10] [--quiet]

On a real cluster with two replicas of the student, sessions run one after the other; then the same sessions again, all
at once, beside plain rollouts of another customer unless it is to be quiet. In the middle of them the replica that has
done most of the work is killed with SIGKILL, and when a new one has joined, the other one too. A stream's context is
gone with its replica, and is made again elsewhere from the traces that its ingress keeps.

Prints one JSON line: frames compared and how many differ (rows that share a forward may round a pixel differently), the
caches' hits and misses before the first kill and at the end, what it took from actions to first frame, and what was
charged. Exit code 1 unless no pixel differs by more than one of 255 levels (by none at all, of one session that runs
alone) and exactly the frames were charged.
"""

import argparse
import asyncio
import base64
import io
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image
from websockets.asyncio.client import connect

from billing import invariants
from billing.database import open_database
from serve_app.catalog import STUDENT
from tests.support.cluster import Cluster, running_cluster
from tests.support.payloads import npy, png

SERVE_STUDENT = (sys.executable, "-m", "tests.support.serve_student")
REPLICA = f"model-{STUDENT}"
CHUNK = 12
MILS_PER_FRAME = 5
REPLACED_WITHIN_S = 60.0
HEARTBEAT_S = 1.5
"""After which a replica has said what it counted."""


class Steered:
    """One session: its frames, and the seconds from each submission to its first frame."""

    def __init__(self, base_url: str, key: str, seed: int, submissions: int, go_on: asyncio.Event) -> None:
        self._base_url, self._headers = base_url, {"Authorization": f"Bearer {key}"}
        self._seed, self._submissions, self._go_on = seed, submissions, go_on
        self.pause_at = 2 * submissions // 3
        """After so many submissions it waits to go on."""
        self.frames: list[np.ndarray] = []
        self.first_frame_s: list[float] = []

    async def run(self) -> None:
        data = {"model": STUDENT, "seed": str(self._seed), "max_frames": str(1 + CHUNK * self._submissions)}
        async with httpx.AsyncClient(base_url=self._base_url, headers=self._headers, timeout=60) as http:
            created = await http.post("/v1/sessions", files={"initial_frame": png()}, data=data)
            created.raise_for_status()
        actions = np.random.default_rng(self._seed).uniform(-1, 1, (self._submissions, CHUNK, 8))
        url = created.json()["ws_url"]
        async with connect(url, additional_headers=self._headers, max_size=2**20) as socket:
            for index, submission in enumerate(actions):
                if index == self.pause_at:
                    await self._go_on.wait()
                await socket.send(json.dumps({"type": "submit_actions", "actions": submission.tolist()}))
                sent, count = time.perf_counter(), len(self.frames)
                while (message := json.loads(await socket.recv()))["type"] != "rollout_complete":
                    assert message["type"] != "error", message
                    if message["type"] == "frame":
                        if len(self.frames) == count:
                            self.first_frame_s.append(time.perf_counter() - sent)
                        picture = Image.open(io.BytesIO(base64.b64decode(message["data"])))
                        self.frames.append(np.asarray(picture).astype(int))
            await socket.send(json.dumps({"type": "control", "command": "stop"}))
            async for _ in socket:  # until the server has settled and closes
                pass


async def load(base_url: str, key: str, first_seed: int) -> None:
    """Rollouts one after the other, until cancelled."""
    async with httpx.AsyncClient(base_url=base_url, headers={"Authorization": f"Bearer {key}"}, timeout=60) as http:
        seed = first_seed
        while True:
            actions = np.random.default_rng(seed).uniform(-1, 1, (CHUNK, 8)).astype(np.float32)
            parts = {"files": {"frame": png(), "actions": npy(actions)}, "data": {"seed": str(seed)}}
            await http.post("/v1/predict", **parts)  # type: ignore[arg-type]
            seed += 1


def caches(cluster: Cluster) -> dict[str, float]:
    secret = (cluster.data_dir / "metrics-secret").read_text().strip()
    text = httpx.get(f"{cluster.base_url}/metrics", headers={"Authorization": f"Bearer {secret}"}, timeout=10).text
    names = {f"dream_context_cache_{kind}_total": kind for kind in ("hits", "misses")}
    values = [line.split() for line in text.splitlines() if line.startswith(tuple(names))]
    return {names[name.split("{")[0]]: float(value) for name, value in values}


async def kill_both(cluster: Cluster, running: list[Steered], pause_at: int, go_on: asyncio.Event) -> dict[str, float]:
    """The busier replica in the middle of the work; the other one when there are two again. The caches before that."""
    replicas = cluster.processes(REPLICA)
    used = {process.pid: process.cpu_times().user for process in replicas}
    await reached(running, pause_at // 2)
    await asyncio.sleep(HEARTBEAT_S)
    before = await asyncio.to_thread(caches, cluster)
    busier = max(replicas, key=lambda process: process.cpu_times().user - used[process.pid])
    busier.kill()
    await reached(running, pause_at)
    async with asyncio.timeout(REPLACED_WITHIN_S):
        while len(cluster.processes(REPLICA)) < 2 or await replicas_ready(cluster) < 2:  # noqa: ASYNC110 - a poll
            await asyncio.sleep(0.2)
    go_on.set()
    await reached(running, pause_at + 1)
    for process in replicas:
        if process.pid != busier.pid:
            process.kill()
    return before


async def reached(running: list[Steered], submissions: int) -> None:
    while any(len(each.first_frame_s) < submissions for each in running):  # noqa: ASYNC110 - a poll
        await asyncio.sleep(0.01)


async def replicas_ready(cluster: Cluster) -> int:
    async with httpx.AsyncClient(base_url=cluster.base_url, timeout=10) as http:
        return int((await http.get("/v1/status")).json()["models"][STUDENT]["replicas"])


async def compare(cluster: Cluster, num_sessions: int, submissions: int, quiet: bool) -> dict[str, Any]:
    key, other_key = cluster.new_customer(), cluster.new_customer()
    go_on, at_once = asyncio.Event(), asyncio.Event()
    at_once.set()
    undisturbed = [Steered(cluster.base_url, key, seed, submissions, at_once) for seed in range(num_sessions)]
    for session in undisturbed:
        await session.run()
    disturbed = [Steered(cluster.base_url, key, seed, submissions, go_on) for seed in range(num_sessions)]
    loading = asyncio.create_task(asyncio.sleep(0) if quiet else load(cluster.base_url, other_key, 1_000))
    killing = asyncio.create_task(kill_both(cluster, disturbed, disturbed[0].pause_at, go_on))
    await asyncio.gather(*(session.run() for session in disturbed))
    before = await killing
    loading.cancel()
    await asyncio.wait([loading])
    differences = [
        int(np.abs(ours - theirs).max())
        for one, other in zip(undisturbed, disturbed, strict=True)
        for ours, theirs in zip(one.frames, other.frames, strict=True)
    ]
    await asyncio.sleep(HEARTBEAT_S)
    with cluster.http_of(key) as http:
        rows = http.get("/v1/billing/transactions", params={"limit": 200}).json()["transactions"]
    alone_s = [seconds for session in undisturbed for seconds in session.first_frame_s[1:]]
    beside_s = [seconds for session in disturbed for seconds in session.first_frame_s[1:]]
    return {
        "frames": len(differences),
        "frames_that_differ": sum(difference > 0 for difference in differences),
        "most_levels": max(differences),
        "caches_before_a_kill": before,
        "caches": await asyncio.to_thread(caches, cluster),
        "alone_first_frame_ms_p50": round(float(np.median(alone_s)) * 1e3, 1),
        "first_frame_ms_p50": round(float(np.median(beside_s)) * 1e3, 1),
        "first_frame_ms_most": round(max(beside_s) * 1e3, 1),
        "charged_mils": -sum(row["amount_mils"] for row in rows if row["kind"] != "credit"),
        "owed_mils": 2 * MILS_PER_FRAME * len(differences),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sessions", type=int, default=4)
    parser.add_argument("--submissions", type=int, default=10, help="of a chunk each, per session")
    parser.add_argument("--quiet", action="store_true", help="nobody else; with one session every pixel is the same")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="stream-chaos-") as directory:
        data_dir = Path(directory) / "data"
        with running_cluster(data_dir, SERVE_STUDENT) as cluster:
            result = asyncio.run(compare(cluster, arguments.sessions, arguments.submissions, arguments.quiet))
        database = open_database(f"sqlite:///{data_dir / 'ledger.db'}")
        violations = len(invariants.audit(database))
        database.dispose()
    most_levels = 0 if arguments.quiet and arguments.sessions == 1 else 1
    held = result["most_levels"] <= most_levels and result["charged_mils"] == result["owed_mils"] and not violations
    load_average = round(os.getloadavg()[0], 1)
    print(
        json.dumps(
            {
                "benchmark": "stream_chaos",
                "sessions": arguments.sessions,
                "submissions": arguments.submissions,
                "quiet": arguments.quiet,
                **result,
                "audit_violations": violations,
                "load": load_average,
                "held": held,
            }
        )
    )
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
