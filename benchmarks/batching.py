"""How well batches are made, and for whom: `python -m benchmarks.batching [scenario ...]`, one JSON line each.

Arrivals are open loop: a schedule is drawn first, and latency counts from the time at which a request was meant to be
sent. The systems under comparison get the same schedule at the same moments, beside each other in one process, so that
whatever else the machine does happens to all of them. The model is a stand-in that sleeps a + c*b per forward of b rows
with a/c = 3 and room for 8; figures of it say nothing of any real model's speed.

    arrivals    24 requests 25 ms apart, a model that takes 400 ms whatever the batch
    efficiency  what is completed at 0.9 of the model's best rate, and at more than it can do, over a bare loop
    goodput     what is finished within 2.5 t(8), as a share of what was asked for, at 0.8 and 1.2 of the best rate,
                and what could be by who knew all arrivals beforehand
    fairness    one customer who asks for ten times its share, nine who ask for a little more than theirs
    burst       ten times the usual load for five seconds
    overhead    processor time per request beyond the model's, with a model that takes none
"""

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.batching_systems import ROW, Greedy, Refusal, ServeBatch, Served, StandIn
from benchmarks.goodput_bound import most_in_time
from billing.commands import CustomerId
from deployments.batching import BatchProfile
from deployments.messages import TicketTerms

CAP = 8
SLO = 2.5
"""In forwards of a full batch."""
GOODPUT_SEEDS = (1, 2, 3)


@dataclass(frozen=True)
class Arrival:
    at_s: float
    rows: int = 1
    customer: str = ""


@dataclass(frozen=True)
class End:
    arrival: Arrival
    latency_s: float
    """From the time at which it was meant to be sent."""
    refused: bool = False
    retry_after_s: float | None = None


def affine(full_batch_s: float, ratio: float = 3.0) -> BatchProfile:
    """t(b) = a + c*b with a/c = `ratio` and t(8) = `full_batch_s`."""
    row_s = full_batch_s / (ratio + CAP)
    return BatchProfile(ratio * row_s, row_s)


def poisson(rate_per_s: float, duration_s: float, generator: random.Random, customer: str = "") -> list[Arrival]:
    arrivals, now = [], generator.expovariate(rate_per_s)
    while now < duration_s:
        arrivals.append(Arrival(now, 1, customer))
        now += generator.expovariate(rate_per_s)
    return arrivals


def half_in_groups(rows_per_s: float, duration_s: float, generator: random.Random, together: bool) -> list[Arrival]:
    """Half of the rows come singly and half in groups of 8: as a decision of 8 candidates, or as 8 requests at once."""
    singles = poisson(rows_per_s / 2, duration_s, generator)
    groups = poisson(rows_per_s / 2 / CAP, duration_s, generator)
    grouped = [Arrival(group.at_s, CAP if together else 1) for group in groups for _ in range(1 if together else CAP)]
    return sorted(singles + grouped, key=lambda arrival: arrival.at_s)


async def play(system: Any, arrivals: Sequence[Arrival], deadline_s: float | None = None) -> list[End]:
    """Send each arrival at its time; how each ended, in order. One second of silence before the first."""
    began = time.perf_counter() + 1.0

    async def one(arrival: Arrival) -> End:
        terms = TicketTerms(
            CustomerId(arrival.customer),
            deadline_s=None if deadline_s is None else began + arrival.at_s + deadline_s - time.perf_counter(),
        )
        try:
            await system.run([ROW] * arrival.rows, terms)
        except Refusal as refusal:
            return End(arrival, time.perf_counter() - began - arrival.at_s, True, refusal.retry_after_s)
        return End(arrival, time.perf_counter() - began - arrival.at_s)

    tasks = []
    await system.start()
    for arrival in arrivals:
        wait_s = began + arrival.at_s - time.perf_counter()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        tasks.append(asyncio.create_task(one(arrival)))
    ends = await asyncio.gather(*tasks)
    await system.stop()
    return ends


async def side_by_side(
    systems: Sequence[Any], arrivals: Sequence[Arrival], deadline_s: float | None = None
) -> dict[str, list[End]]:
    played = await asyncio.gather(*(play(system, arrivals, deadline_s) for system in systems))
    return {system.name: ends for system, ends in zip(systems, played, strict=True)}


def trio(profile: BatchProfile) -> list[Any]:
    return [
        Served(StandIn(profile), profile, CAP),
        ServeBatch(StandIn(profile), CAP),
        Greedy(StandIn(profile), CAP),
    ]


async def arrivals_scenario() -> dict[str, Any]:
    systems = trio(BatchProfile(0.4, 1e-9))
    ends = await side_by_side(systems, [Arrival(index * 0.025) for index in range(24)])
    return {
        system.name: {
            "batches": len(system.model.batches),
            "sizes": system.model.batches,
            "last_s": round(max(end.arrival.at_s + end.latency_s for end in ends[system.name]), 2),
        }
        for system in systems
    }


async def efficiency_scenario(duration_s: float) -> dict[str, Any]:
    profile = affine(0.11)
    best = profile.rows_per_s(CAP)
    result: dict[str, Any] = {"best_rows_per_s": round(best, 1)}
    for load in (0.9, 1.5):
        systems = [
            Served(StandIn(profile), profile, CAP, max_queued_rows=100_000),
            Greedy(StandIn(profile), CAP),
            ServeBatch(StandIn(profile), CAP),
        ]
        arrivals = poisson(load * best, duration_s, random.Random(0))
        ends = await side_by_side(systems, arrivals)
        rates = {name: len(each) / max(end.arrival.at_s + end.latency_s for end in each) for name, each in ends.items()}
        p50 = {name: statistics.median(end.latency_s for end in each) for name, each in ends.items()}
        result[f"load_{load}"] = {
            "rows_per_s": {name: round(rate, 2) for name, rate in rates.items()},
            "p50_ms": {name: round(1e3 * each, 1) for name, each in p50.items()},
            "served_over_direct": round(rates["served"] / rates["greedy"], 3),
            "serve_batch_over_direct": round(rates["serve_batch"] / rates["greedy"], 3),
            "served_over_best": round(rates["served"] / best, 3),
        }
    return result


async def goodput_scenario(duration_s: float) -> dict[str, Any]:
    """Of one seed all at once: the models sleep, so twelve of them hardly disturb each other. `clairvoyant`: see
    `goodput_bound`; of decisions, which count whole, nobody could finish that many."""
    profile = affine(0.44)
    deadline_s = SLO * profile.step_s(CAP)

    async def one(arrivals: Sequence[Arrival], clairvoyant: int) -> dict[str, Any]:
        systems = trio(profile)
        ends = await side_by_side(systems, arrivals, deadline_s)
        asked = sum(arrival.rows for arrival in arrivals)
        in_time = {
            name: sum(end.arrival.rows for end in each if not end.refused and end.latency_s <= deadline_s)
            for name, each in ends.items()
        }
        return {
            **{name: rows / asked for name, rows in in_time.items()},
            "clairvoyant": clairvoyant / asked,
            **{f"{system.name}_batch": statistics.mean(system.model.batches) for system in systems},
        }

    def schedule(load: float, together: bool, seed: int) -> tuple[Sequence[Arrival], int]:
        arrivals = half_in_groups(load * profile.rows_per_s(CAP), duration_s, random.Random(seed), together)
        at_s = [arrival.at_s for arrival in arrivals for _ in range(arrival.rows)]
        return arrivals, most_in_time(at_s, profile, CAP, deadline_s)

    cases = [(load, together) for together in (False, True) for load in (0.8, 1.2)]
    drawn = [[schedule(*case, seed) for case in cases] for seed in GOODPUT_SEEDS]  # before any clock runs
    by_seed = [await asyncio.gather(*(one(*each) for each in schedules)) for schedules in drawn]
    results = [
        {name: round(statistics.mean(run[name] for run in runs), 3) for name in runs[0]}
        | {f"{name}_by_seed": [round(run[name], 3) for run in runs] for name in ("served", "clairvoyant")}
        for runs in zip(*by_seed, strict=True)
    ]
    names = [f"{'decisions' if together else 'requests'}_{load}" for load, together in cases]
    return {"slo_s": deadline_s, **dict(zip(names, results, strict=True))}


async def fairness_scenario(duration_s: float) -> dict[str, Any]:
    profile = affine(0.055)
    best = profile.rows_per_s(CAP)
    share = best / 10
    generator = random.Random(2)
    arrivals = poisson(10 * share, duration_s, generator, "heavy")
    for index in range(9):
        arrivals += poisson(1.2 * share, duration_s, generator, f"light {index}")
    arrivals.sort(key=lambda arrival: arrival.at_s)
    system = Served(StandIn(profile), profile, CAP)
    ends = await play(system, arrivals)
    done = {"heavy": 0} | {f"light {index}": 0 for index in range(9)}
    warm_s = 2.0  # until the queue is full
    for end in ends:
        if not end.refused and warm_s <= end.arrival.at_s + end.latency_s <= duration_s:
            done[end.arrival.customer] += 1
    total = sum(done.values())
    jain = total**2 / (len(done) * sum(count**2 for count in done.values()))
    alone = Served(StandIn(profile), profile, CAP)
    lent = await play(alone, poisson(2 * best, duration_s / 2, random.Random(3), "heavy"))
    served_alone = sum(not end.refused and warm_s <= end.arrival.at_s + end.latency_s <= duration_s / 2 for end in lent)
    return {
        "least_light_over_share": round(min(done[name] for name in done if name != "heavy") * 10 / total, 3),
        "heavy_over_share": round(done["heavy"] * 10 / total, 3),
        "jain": round(jain, 4),
        "rows_per_s_over_best": round(total / (duration_s - warm_s) / best, 3),
        "alone_over_best": round(served_alone / (duration_s / 2 - warm_s) / best, 3),
    }


async def burst_scenario(repeats: int) -> dict[str, Any]:
    profile = affine(0.88)
    best, deadline_s = profile.rows_per_s(CAP), SLO * profile.step_s(CAP)
    totals = {"accepted": 0, "met": 0, "rejected": 0, "right": 0}
    answers_s, errors = [], []

    async def once(seed: int) -> None:
        generator = random.Random(seed)
        arrivals = poisson(0.5 * best, 15.0, generator)
        arrivals += [Arrival(5.0 + each.at_s) for each in poisson(4.5 * best, 5.0, generator)]
        arrivals.sort(key=lambda arrival: arrival.at_s)
        system = Watched(StandIn(profile), profile, CAP)
        ends = await play(system, arrivals, deadline_s)
        for end in ends:
            if end.retry_after_s is not None:
                totals["rejected"] += 1
                answers_s.append(end.latency_s)
            else:
                totals["accepted"] += 1
                totals["met"] += not end.refused and end.latency_s <= deadline_s
        for said_s, true_s in system.waits():
            errors.append(abs(said_s / true_s - 1))
            totals["right"] += abs(said_s / true_s - 1) <= 0.3

    for first in range(0, repeats, 4):  # their models sleep, so four at a time disturb each other little
        await asyncio.gather(*(once(seed) for seed in range(first, min(repeats, first + 4))))
    return {
        **totals,
        "met_share": round(totals["met"] / totals["accepted"], 4),
        "rejection_ms": {
            "p50": round(1e3 * statistics.median(answers_s), 2),
            "p99": round(1e3 * statistics.quantiles(answers_s, n=100)[-1], 2),
            "max": round(1e3 * max(answers_s), 2),
        },
        "retry_after_right_share": round(totals["right"] / max(1, len(errors)), 3),
        "retry_after_error_median": round(statistics.median(errors), 3),
        "judged": len(errors),
        "slo_s": round(deadline_s, 2),
    }


class Watched(Served):
    """Remembers, of each refusal, what waited and ran then, and when that had been done."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._done = [(time.perf_counter(), 0)]
        self._refusals: list[tuple[float, float, int]] = []

    async def run(self, rows: Sequence[Any], terms: TicketTerms = TicketTerms()) -> None:
        try:
            await super().run(rows, terms)
        except Refusal as refusal:
            if refusal.retry_after_s is not None:
                status = await self.scheduler.status()
                ahead = status.queued_rows + status.running_rows
                self._refusals.append((time.perf_counter(), refusal.retry_after_s, self._done[-1][1] + ahead))
            else:
                self._count(len(rows))
            raise
        self._count(len(rows))

    def _count(self, rows: int) -> None:
        self._done.append((time.perf_counter(), self._done[-1][1] + rows))

    def waits(self) -> list[tuple[float, float]]:
        """(said, true) seconds of each refusal until the work before it was done."""
        found = []
        for at, said_s, until in self._refusals:
            done_at = next((when for when, count in self._done if count >= until), None)
            if done_at is not None and done_at > at:
                found.append((said_s, done_at - at))
        return found


async def overhead_scenario(items: int) -> dict[str, Any]:
    """Closed loop of c callers over a model that takes no time; the process's own time, so others do not count."""
    nothing = BatchProfile(0.0, 1e-12)
    makers: dict[str, Callable[[], Any]] = {
        "served": lambda: Served(StandIn(nothing), nothing, CAP),
        "serve_batch": lambda: ServeBatch(StandIn(nothing), CAP, wait_s=0.0),
        "greedy": lambda: Greedy(StandIn(nothing), CAP),
    }
    result: dict[str, Any] = {}
    for callers in (8, 64):
        spent: dict[str, list[float]] = {name: [] for name in makers}
        for _ in range(3):
            for name, make in makers.items():
                system = make()
                await system.start()
                left = iter(range(items))

                async def caller(system: Any = system, left: Any = left) -> None:
                    for _ in left:
                        await system.run([ROW])

                began = time.process_time()
                await asyncio.gather(*(caller() for _ in range(callers)))
                spent[name].append((time.process_time() - began) / items)
                await system.stop()
        result[f"c{callers}"] = {name: round(1e6 * statistics.median(each), 1) for name, each in spent.items()}
    return {"us_per_item": result}


SCENARIOS: dict[str, Callable[[argparse.Namespace], Any]] = {
    "arrivals": lambda _: arrivals_scenario(),
    "efficiency": lambda args: efficiency_scenario(args.seconds),
    "goodput": lambda args: goodput_scenario(2 * args.seconds),
    "fairness": lambda args: fairness_scenario(args.seconds),
    "burst": lambda args: burst_scenario(args.repeats),
    "overhead": lambda args: overhead_scenario(args.items),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("scenarios", nargs="*", default=list(SCENARIOS), help=", ".join(SCENARIOS))
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--items", type=int, default=4000)
    arguments = parser.parse_args()
    for name in arguments.scenarios:
        load_before = os.getloadavg()[0]
        result = asyncio.run(SCENARIOS[name](arguments))
        machine = {"python": platform.python_version(), "cores": os.cpu_count(), "load": round(load_before, 1)}
        print(json.dumps({"benchmark": f"batching.{name}", **result, **machine}), flush=True)


if __name__ == "__main__":
    main()
