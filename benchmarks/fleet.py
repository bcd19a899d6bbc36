"""A fleet under a trace, scaled by our policy, by the request rate alone, and by Ray Serve's default policy.

    python -m benchmarks.fleet [--trace step|poisson|diurnal|mpc|flash] [--gpus 250] [--plots DIRECTORY]

All policies see the same arrivals, the same boot times and the production scheduler with its bounded queue; Ray's
default also runs as it ships, with an unbounded queue. Ray's is the real function, driven through a real
`AutoscalingContext`. The oracle knows the trace: at every moment the least number of replicas that does the work which
arrives, booted ahead of time; its GPU-hours are a floor that no policy without foresight reaches.

The service times are an assumption of the scenario (`--step-fixed-ms`, `--step-row-ms`) unless measured ones are given;
figures are ratios between policies under the same assumption. `benchmarks/fleet_validation.py` compares the simulator
with a real cluster.

Prints one JSON line; `--plots` writes a picture per trace.
"""

import argparse
import gc
import json
import math
import random
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import numpy as np
from ray.serve import autoscaling_policy
from ray.serve._private.common import DeploymentID
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from benchmarks.fleet_simulator import SAMPLE_EVERY_S, Arrival, Fleet, Outcome, Service, Simulator
from deployments.autoscaling import Demand, DemandPolicy, ScalingTerms
from deployments.scheduler import SchedulerLimits

ROWS, CHUNKS = 8, 4
"""A planner's decision: 8 candidates of 49 frames."""
SLO = 2.5
"""Limit on a decision's latency, in times of one that is alone on an idle replica."""
MILS_PER_FRAME = 5
UNBOUNDED = 10**9


class OurPolicy:
    def __init__(self, terms: ScalingTerms) -> None:
        self._policy = DemandPolicy(terms)

    def target(self, now: float, demand: Demand, ongoing: int, ready: int, target: int) -> int:
        return self._policy.decide(now, demand, ready, target)


class RatePolicy:
    """The work that arrives over the work that a replica does, averaged as ours is; the backlog does not count."""

    def __init__(self, terms: ScalingTerms) -> None:
        self._policy = DemandPolicy(terms)

    def target(self, now: float, demand: Demand, ongoing: int, ready: int, target: int) -> int:
        return self._policy.decide(now, Demand(demand.offered_s, 0.0), ready, target)


class RayDefault:
    """`ray.serve`'s default policy with Serve's default windows and delays; only the clock is the simulation's."""

    def __init__(self, min_replicas: int, max_replicas: int) -> None:
        self._config = AutoscalingConfig(min_replicas=min_replicas, max_replicas=max_replicas)
        self._state: dict[str, Any] = {}
        self._ongoing: deque[tuple[float, int]] = deque()
        self._decide = autoscaling_policy._apply_autoscaling_config(
            autoscaling_policy._core_replica_queue_length_policy
        )

    def target(self, now: float, demand: Demand, ongoing: int, ready: int, target: int) -> int:
        self._ongoing.append((now, ongoing))
        while self._ongoing[0][0] < now - self._config.look_back_period_s:
            self._ongoing.popleft()
        context = AutoscalingContext(
            deployment_id=DeploymentID(name="model"),
            deployment_name="model",
            app_name="default",
            current_num_replicas=ready,
            target_num_replicas=target,
            running_replicas=[],
            total_num_requests=sum(count for _, count in self._ongoing) / len(self._ongoing),
            total_queued_requests=None,
            aggregated_metrics=None,
            raw_metrics=None,
            capacity_adjusted_min_replicas=self._config.min_replicas,
            capacity_adjusted_max_replicas=self._config.max_replicas,
            policy_state=self._state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=now,
            config=self._config,
        )
        with patch.object(autoscaling_policy, "time", SimpleNamespace(time=lambda: now)):
            decided, self._state = self._decide(context)
        return max(self._config.min_replicas, min(math.ceil(decided), self._config.max_replicas))


def rate_of(trace: str, gpus: int, duration_s: float, t: float) -> float:
    """The load at time `t`, in replicas' worth of work; `gpus` at its highest."""
    match trace:
        case "poisson":
            return gpus * 0.8
        case "step":  # a tenth, ten times as much, a tenth
            return gpus * (1.0 if 1 / 6 <= t / duration_s < 5 / 6 else 0.1)
        case "diurnal":
            return gpus * (0.55 - 0.45 * math.cos(2 * math.pi * t / duration_s))
        case "mpc":  # experiments that start and stop together, ten minutes each
            return gpus * (0.9 if int(t // 600) % 2 else 0.3)
        case "flash":  # five minutes of ten times the load
            return gpus * (1.0 if 0.4 * duration_s <= t < 0.4 * duration_s + 300 else 0.1)
    raise ValueError(f"no trace is called {trace!r}")


def arrivals(trace: str, gpus: int, duration_s: float, service: Service, seed: int) -> Iterator[Arrival]:
    """A Poisson process whose rate follows the trace, by thinning."""
    chance = random.Random(seed)
    decision_s = ROWS * CHUNKS * service.row_chunk_s
    highest = gpus / decision_s
    t = 0.0
    while (t := t + chance.expovariate(highest)) < duration_s:
        if chance.random() * gpus < rate_of(trace, gpus, duration_s, t):
            yield Arrival(t, ROWS, CHUNKS)


def oracle_gpu_hours(trace: str, gpus: int, duration_s: float, boot_s: float) -> float:
    """Of a fleet that is always just large enough, and pays for booting; a gap shorter than a boot is kept through."""
    needed = np.array([math.ceil(rate_of(trace, gpus, duration_s, t) - 1e-9) for t in range(int(duration_s))])
    seconds = 0.0
    for level in range(1, int(needed.max()) + 1):
        on = np.concatenate([[0], (needed >= level).astype(int), [0]])
        starts, ends = np.flatnonzero(np.diff(on) == 1), np.flatnonzero(np.diff(on) == -1)
        gaps = starts[1:] - ends[:-1]
        kept = gaps < boot_s
        seconds += (ends - starts).sum() + gaps[kept].sum() + boot_s * ((~kept).sum() + (starts[0] > 0))
    return seconds / 3600


def summary(outcome: Outcome, limit_s: float, took_s: float, gpu_usd_per_hour: float) -> dict[str, float]:
    late = outcome.late(limit_s)
    times = np.array(outcome.latencies or [math.nan])
    return {
        "requests": outcome.requests,
        "late_or_refused_share": round(late / max(outcome.requests, 1), 4),
        "refused_share": round(outcome.refused / max(outcome.requests, 1), 4),
        "failed": outcome.failed,
        "p50_s": round(float(np.percentile(times, 50)), 2),
        "p99_s": round(float(np.percentile(times, 99)), 2),
        "gpu_hours": round(outcome.gpu_s / 3600, 1),
        "peak_replicas": outcome.peak_replicas,
        "revenue_usd": round(outcome.frames * MILS_PER_FRAME / 1e4),
        "gpu_usd": round(outcome.gpu_s / 3600 * gpu_usd_per_hour),
        "events_per_cpu_s": round(outcome.events / took_s),
    }


def plot(outcomes: dict[str, Outcome], path: Path, gpu_usd_per_hour: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(5, 1, figsize=(10, 15), sharex=True)
    for index, (name, outcome) in enumerate(outcomes.items()):
        rows, color = outcome.series, f"C{index}"
        hours = [row["t_s"] / 3600 for row in rows]
        revenue = np.array([row["frames"] for row in rows]) * MILS_PER_FRAME / 1e4
        cost = np.cumsum([row["ready"] + row["booting"] for row in rows]) * SAMPLE_EVERY_S / 3600 * gpu_usd_per_hour
        axes[0].plot(hours, [row["ready"] + row["booting"] for row in rows], color, label=name)
        axes[1].plot(hours, [row["p50_s"] for row in rows], f"{color}:")
        axes[1].plot(hours, [row["p99_s"] for row in rows], color)
        axes[2].plot(hours, [row["ongoing"] for row in rows], color)
        axes[3].plot(hours, [row["refused"] + row["failed"] for row in rows], color)
        axes[4].plot(hours, revenue, color)
        axes[4].plot(hours, cost, f"{color}:")
    for axis, title in zip(
        axes,
        (
            "GPUs, booting ones included",
            "latency of decisions answered in the last 10 s: p99, dotted p50, s",
            "requests queued or running",
            "refused or refunded so far",
            "revenue so far, dotted what the GPUs cost, USD",
        ),
        strict=True,
    ):
        axis.set_title(title, fontsize=9)
    axes[0].legend(fontsize=8)
    axes[-1].set_xlabel("hours")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", default="step", choices=["step", "poisson", "diurnal", "mpc", "flash"])
    parser.add_argument("--gpus", type=int, default=250, help="replicas' worth of work at the trace's highest")
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--boot-s", type=float, default=240.0)
    parser.add_argument("--step-fixed-ms", type=float, default=30.0)
    parser.add_argument("--step-row-ms", type=float, default=10.0)
    parser.add_argument("--num-steps", type=int, default=10)
    parser.add_argument("--max-rows", type=int, default=16)
    parser.add_argument("--lost-per-hour", type=float, default=0.0, help="chance that a replica is reclaimed")
    parser.add_argument("--gpu-usd-per-hour", type=float, default=3.0)
    parser.add_argument("--policies", default="ours,rate,ray_default,ray_default_unbounded")
    parser.add_argument("--deadlines", action="store_true", help="every request states the limit as its deadline")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plots", type=Path)
    args = parser.parse_args()

    service = Service(
        args.step_fixed_ms / 1e3, args.step_row_ms / 1e3, args.num_steps, args.max_rows, 0.05, 0.005, 0.02
    )
    duration_s = args.hours * 3600
    limit_s = SLO * service.decision_s(ROWS, CHUNKS)
    first = max(1, math.ceil(rate_of(args.trace, args.gpus, duration_s, 0.0) * 1.2))
    ceiling = 8 * args.gpus
    fleet = Fleet((0.9 * args.boot_s, 1.1 * args.boot_s), first, ceiling, args.lost_per_hour)
    terms = ScalingTerms(min_replicas=1, max_replicas=ceiling, boot_s=args.boot_s)
    bounded = SchedulerLimits(args.gpus * args.max_rows, args.num_steps, replica_timeout_s=math.inf)
    rate_terms = ScalingTerms(min_replicas=1, max_replicas=ceiling, boot_s=args.boot_s, safety=0.0)
    policies = {
        "ours": (OurPolicy(terms), bounded),
        "rate": (RatePolicy(rate_terms), bounded),
        "ray_default": (RayDefault(1, ceiling), bounded),
        "ray_default_unbounded": (
            RayDefault(1, ceiling),
            SchedulerLimits(UNBOUNDED, args.num_steps, replica_timeout_s=math.inf),
        ),
    }
    outcomes, report = {}, {}
    gc.freeze()  # Ray's modules are not looked through again and again
    for name in args.policies.split(","):
        policy, limits = policies[name]
        started = time.process_time()
        simulator = Simulator(service, fleet, limits, policy, args.seed, limit_s if args.deadlines else None)
        outcome = simulator.run(arrivals(args.trace, args.gpus, duration_s, service, args.seed), duration_s)
        outcomes[name] = outcome
        report[name] = summary(outcome, limit_s, time.process_time() - started, args.gpu_usd_per_hour)
    oracle = oracle_gpu_hours(args.trace, args.gpus, duration_s, args.boot_s)
    for figures in report.values():
        figures["gpu_hours_of_oracle"] = round(figures["gpu_hours"] / oracle, 3)
    if args.plots:
        plot(outcomes, args.plots / f"fleet-{args.trace}.png", args.gpu_usd_per_hour)
    settings = {name: value for name, value in vars(args).items() if name != "plots"}
    print(
        json.dumps(
            {
                "benchmark": "fleet",
                **settings,
                "service": asdict(service),
                "limit_s": round(limit_s, 2),
                "oracle_gpu_hours": round(oracle, 1),
                "policies": report,
            }
        )
    )


if __name__ == "__main__":
    main()
