"""The fleet simulator's arithmetic, where it can be done by hand."""

import math

import pytest

from benchmarks.fleet import OurPolicy, RayDefault, oracle_gpu_hours
from benchmarks.fleet_simulator import Arrival, Fleet, Service, Simulator
from deployments.autoscaling import ScalingTerms
from deployments.scheduler import SchedulerLimits

SERVICE = Service(step_fixed_s=0.1, step_row_s=0.05, num_steps=10, max_rows=16, finish_s=0.2, hop_s=0.1, outside_s=0.5)
LIMITS = SchedulerLimits(max_queued_rows=10_000, replica_timeout_s=math.inf)


def simulator(replicas: int, **options: object) -> Simulator:
    return Simulator(SERVICE, Fleet((10.0, 10.0), replicas, 100), LIMITS, None, **options)  # type: ignore[arg-type]


def test_a_decision_that_is_alone_takes_its_steps_and_what_lies_between() -> None:
    outcome = simulator(1).run([Arrival(1.0, 8, 3)], 100.0)
    # Three chunks of ten steps of 0.1 + 8 x 0.05 s, each decoded in 0.2 s, with a hop between them.
    assert outcome.latencies == [pytest.approx(3 * (5.0 + 0.2) + 2 * 0.1 + 0.5)]
    assert outcome.latencies == [pytest.approx(SERVICE.decision_s(8, 3))]
    assert outcome.frames == 8 * 37


def test_decisions_share_batches_and_wait_when_there_is_no_room() -> None:
    outcome = simulator(1).run([Arrival(1.0, 8, 1)] * 3, 100.0)
    full_batch_s, half_batch_s = 10 * 0.9, 10 * 0.5
    first, second, third = sorted(outcome.latencies)
    assert (first, second) == (pytest.approx(full_batch_s + 0.7), pytest.approx(full_batch_s + 0.7))
    assert third == pytest.approx(full_batch_s + half_batch_s + 0.7)


def test_a_lost_replica_costs_its_chunks_a_second_run_and_no_decision() -> None:
    fleet = Fleet((10.0, 10.0), 4, 100, lost_per_hour=60.0)
    terms = ScalingTerms(min_replicas=4, max_replicas=8, boot_s=10.0)
    run = Simulator(SERVICE, fleet, LIMITS, OurPolicy(terms), seed=1)
    outcome = run.run([Arrival(20.0 * index, 8, 2) for index in range(30)], 600.0)
    assert outcome.requests == 30
    assert outcome.failed + len(outcome.latencies) == 30
    assert max(outcome.latencies) > SERVICE.decision_s(8, 2) + 1.0


def test_replicas_are_paid_for_from_their_boot_to_their_end() -> None:
    outcome = simulator(3).run([Arrival(1.0, 8, 1)], 100.0)
    assert outcome.gpu_s == pytest.approx(300.0)


def test_a_request_with_a_deadline_that_cannot_be_met_is_refused_and_not_run() -> None:
    outcome = simulator(1, deadline_s=6.0).run([Arrival(1.0, 8, 3)], 100.0)
    assert (outcome.refused, outcome.latencies, outcome.frames) == (1, [], 0)


def test_the_oracle_pays_for_work_and_boots_and_nothing_else() -> None:
    # 10 replicas throughout, 90 more for two thirds of an hour, each booted for 240 s.
    assert oracle_gpu_hours("step", 100, 3600, 240.0) == pytest.approx((10 * 3600 + 90 * (2400 + 240)) / 3600)


def test_rays_default_is_the_real_one_and_grows_with_requests_per_running_replica() -> None:
    policy, targets = RayDefault(1, 1000), []
    for second in range(120):
        targets.append(policy.target(float(second), None, 40, 10, 10))  # type: ignore[arg-type]
    assert targets[0] == 10  # it waits 30 s before it grows
    assert max(targets) == 20  # 40 requests at 2 to a replica
