"""The ledger as a cluster has it: an actor that several processes call at once, and how soon a killed one is back.

    python -m benchmarks.ledger_actor [--seconds 5] [--processes 2 4] [--waiting 128] [--kills 5] [--databases ...]

The physics. A call of an actor costs both sides some 600 us whatever is in it, so a call per command is bounded by the
calls, at about 2,000/s, whatever the ledger could do. Commands that wait in one process are therefore sent as one
message through a channel, as an ingress replica does, and what is left is the ledger's own cost, and pickling.

A waiting caller reserves, waits for the answer, settles, waits, and begins again: one rollout. Beside it, in the same
run, the same callers with a call of the actor for each command. Recovery: 10,000 reservations are open, the actor's
process is killed with SIGKILL, and the clock runs from there to the next reservation that is acknowledged.

Prints one JSON line per database. Starts a Ray of its own, on free ports, and ends it.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks.ledger import FRAMES, RATE, database, flush_cost, make_wallets, percentiles, version
from billing.commands import Command, KeyId, Outcome, Reserve, Reserved, Settle, Settled
from billing.invariants import audit
from billing.keys import mint_request_id
from billing.ledger import Ledger
from deployments.ledger_wire import pack, unpack_outcomes
from serve_app.launch import local_ray

NUM_WALLETS = 1_000
OPEN_RESERVATIONS = 10_000
LEASE_S = 600.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement")
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--waiting", type=int, default=128, help="callers, over all processes")
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--databases", nargs="+", default=["sqlite", "postgresql"], choices=["sqlite", "postgresql"])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dream-") as data_dir, local_ray(Path(data_dir), num_cpus=2):
        import ray  # only now: it reads its settings when it is imported

        from deployments import actors

        for kind in arguments.databases:
            with database(kind) as (engine, directory):
                url = engine.url.render_as_string(hide_password=False)
                ledger = Ledger(engine, time.time)
                ledger.take_over()
                keys = [key_id for key_id, _ in make_wallets(ledger, NUM_WALLETS)]
                hot = [key_id for key_id, _ in make_wallets(ledger, 1)]
                actor = actors.start_ledger(url, {})
                result = {
                    "benchmark": "ledger actor",
                    "database": version(engine),
                    "ray": ray.__version__,
                    "python": platform.python_version(),
                    "cores": os.cpu_count(),
                    "load_1m": round(os.getloadavg()[0], 1),
                    "flush_ms": flush_cost(directory),
                    "waiting_callers": arguments.waiting,
                    "coalesced": {
                        f"{len(each)} wallets, {processes} processes": throughput(url, each, processes, arguments)
                        for processes in arguments.processes
                        for each in (keys, hot)
                    },
                    "a_call_each": throughput(url, keys, arguments.processes[0], arguments, coalesced=False),
                }
                if arguments.kills:
                    result["back_after_s"] = asyncio.run(recovery(actor, keys, arguments.kills))
                assert (violations := audit(engine)) == [], violations
                ray.kill(actor)
                print(json.dumps(result), flush=True)


def throughput(
    url: str, keys: Sequence[KeyId], count: int, arguments: argparse.Namespace, coalesced: bool = True
) -> dict[str, Any]:
    import ray

    remote = ray.remote(Callers).options(num_cpus=0)
    processes = [remote.remote(url, keys, coalesced) for _ in range(count)]
    each = arguments.waiting // count
    ray.get([process.ready.remote() for process in processes])
    writer = psutil.Process(_pid_of_actor())
    before, started = sum(writer.cpu_times()[:2]), time.perf_counter()
    runs = ray.get([process.run.remote(each, arguments.seconds) for process in processes])
    cpu = (sum(writer.cpu_times()[:2]) - before) / (time.perf_counter() - started)
    for process in processes:
        ray.kill(process)
    rollouts = sum(rollouts for rollouts, _, _ in runs)
    return {
        "rollouts_per_s": round(rollouts / arguments.seconds),
        "reserve_ms": percentiles([took for _, latencies, _ in runs for took in latencies]),
        "commands_per_call": round(2 * rollouts / sum(calls for _, _, calls in runs), 1),
        "writer_cores": round(cpu, 2),
        "writer_cpu_us_per_rollout": round(cpu * arguments.seconds / rollouts * 1e6, 1),
    }


class Callers:
    """One process with callers that wait, such as an ingress replica."""

    def __init__(self, url: str, keys: Sequence[KeyId], coalesced: bool) -> None:
        from deployments import actors

        self._keys = keys
        self._coalesced = coalesced
        self._actor = actors.ledger_handle(url)
        self._calls = 0

    async def ready(self) -> None:
        await self._actor.apply.remote(pack([Settle(mint_request_id(), 0, "")]))

    async def run(self, waiting: int, seconds: float) -> tuple[int, list[float], int]:
        """Rollouts, milliseconds that reserves took, calls that were made."""
        from deployments.ledger_client import LedgerClient, calls_of

        through_channel = calls_of(self._actor)

        async def call(commands: list[Command]) -> list[Outcome]:
            self._calls += 1
            return await through_channel(commands)

        async def alone(command: Command) -> Outcome:
            self._calls += 1
            (outcome,) = unpack_outcomes(await self._actor.apply.remote(pack([command])))
            return outcome

        client = LedgerClient(call)
        client.start()
        took: list[float] = []
        ends = time.perf_counter() + seconds
        apply = client.apply if self._coalesced else alone
        callers = [self._roll_out(apply, index, ends, took) for index in range(waiting)]
        rollouts = sum(await asyncio.gather(*callers))
        await client.stop()
        return rollouts, took, self._calls

    async def _roll_out(
        self, apply: Callable[[Command], Awaitable[Outcome]], index: int, ends: float, took: list[float]
    ) -> int:
        rollouts = 0
        while (begun := time.perf_counter()) < ends:
            key = self._keys[(index * 7919 + rollouts * 104_729) % len(self._keys)]
            command = Reserve(mint_request_id(), key, FRAMES, RATE, "predict · tiny-pusher · 49 frames", LEASE_S)
            outcome = await apply(command)
            took.append((time.perf_counter() - begun) * 1e3)
            assert isinstance(outcome, Reserved), outcome
            outcome = await apply(Settle(command.request_id, FRAMES, ""))
            assert isinstance(outcome, Settled), outcome
            rollouts += 1
        return rollouts


async def recovery(actor: Any, keys: Sequence[KeyId], kills: int) -> dict[str, Any]:
    """Seconds from SIGKILL to the next acknowledged reservation, with many of them open."""
    from deployments import ledger_client

    client = ledger_client.connect(actor)
    client.start()

    def reserve(number: int) -> Reserve:
        return Reserve(mint_request_id(), keys[number % len(keys)], FRAMES, RATE, "recovery", LEASE_S)

    opened = await asyncio.gather(*(client.submit(reserve(number)) for number in range(OPEN_RESERVATIONS)))
    assert all(isinstance(outcome, Reserved) for outcome in opened)
    took = []
    for number in range(kills):
        psutil.Process(_pid_of_actor()).kill()
        killed = time.perf_counter()
        outcome = await client.apply(reserve(number))
        took.append(time.perf_counter() - killed)
        assert isinstance(outcome, Reserved), outcome
    await client.stop()
    return {
        "open_reservations": OPEN_RESERVATIONS,
        "kills": kills,
        "median": round(statistics.median(took), 2),
        "worst": round(max(took), 2),
    }


def _pid_of_actor() -> int:
    (pid,) = [
        process.pid
        for process in psutil.Process().children(recursive=True)
        if "ray::LedgerActor" in " ".join(process.cmdline())
    ]
    return pid


if __name__ == "__main__":
    main()
