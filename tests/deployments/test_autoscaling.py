"""The scaling policy, without Ray and with a clock that the test owns."""

import pytest

from deployments.autoscaling import Demand, DemandPolicy, ScalingTerms

TERMS = ScalingTerms(min_replicas=1, max_replicas=1000, boot_s=240, drain_s=60, safety=0, window_s=30, calm_s=180)


class Cluster:
    """A policy asked once a second; what was asked for serves after `boot_s`, and offered work grows with `load`."""

    def __init__(self, terms: ScalingTerms, replicas: int = 1) -> None:
        self.policy = DemandPolicy(terms)
        self.terms = terms
        self.now = 0.0
        self.offered = 0.0
        self.backlog = 0.0
        self.target = self.ready = replicas
        self.booting: list[float] = []

    def run(self, seconds: int, load: float, backlog: float | None = None) -> list[int]:
        targets = []
        for _ in range(seconds):
            self.now += 1
            self.offered += load
            self.backlog = max(0.0, self.backlog + load - self.ready) if backlog is None else backlog
            self.ready += sum(at <= self.now for at in self.booting)
            self.booting = [at for at in self.booting if at > self.now]
            target = self.policy.decide(self.now, Demand(self.offered, self.backlog), self.ready, self.target)
            have = self.ready + len(self.booting)
            self.booting += [self.now + self.terms.boot_s] * max(0, target - have)
            for _ in range(max(0, have - target)):
                if self.booting:
                    self.booting.pop()
                else:
                    self.ready -= 1
            self.target = target
            targets.append(target)
        return targets


def test_a_steady_load_gets_its_own_number_of_replicas_and_the_square_root_to_spare() -> None:
    terms = ScalingTerms(min_replicas=1, max_replicas=1000, safety=1.0)
    assert Cluster(terms, 100).run(600, load=100.0, backlog=0)[-1] == 110


def test_replicas_that_are_booting_are_not_asked_for_again() -> None:
    """Ray's default grows for as long as the load per running replica is high: ten times the need, here."""
    targets = Cluster(TERMS, 10).run(240, load=50.0, backlog=0)
    assert max(targets) == 50


def test_a_backlog_asks_for_what_works_it_off_in_time_and_no_longer() -> None:
    cluster = Cluster(TERMS, 10)
    assert cluster.run(300, load=10.0, backlog=0)[-1] == 10
    assert cluster.run(1, load=10.0, backlog=600.0)[-1] == 20
    assert cluster.run(1, load=10.0, backlog=0)[-1] == 10


def test_a_backlog_that_spare_replicas_will_have_done_by_then_asks_for_none() -> None:
    cluster = Cluster(TERMS, 20)
    cluster.run(300, load=20.0, backlog=0)
    assert cluster.run(60, load=15.0, backlog=600.0)[-1] == 20


def test_replicas_stay_through_a_lull_shorter_than_the_calm_time_and_go_after_it() -> None:
    cluster = Cluster(TERMS, 40)
    cluster.run(300, load=40.0, backlog=0)
    assert min(cluster.run(150, load=0.0, backlog=0)) == 40
    assert cluster.run(120, load=0.0, backlog=0)[-1] == 1


def test_a_policy_that_has_just_started_takes_nothing_away() -> None:
    """The controller restarted: it must not forget what the replicas are for."""
    assert min(Cluster(TERMS, 40).run(170, load=5.0, backlog=0)) == 40


def test_a_scheduler_that_restarts_does_not_look_like_a_fall_of_the_load() -> None:
    cluster = Cluster(TERMS, 40)
    cluster.run(300, load=40.0, backlog=0)
    cluster.offered = 0.0
    assert min(cluster.run(100, load=40.0, backlog=0)) >= 39


def test_the_number_stays_within_the_bounds() -> None:
    terms = ScalingTerms(min_replicas=3, max_replicas=5)
    assert set(Cluster(terms, 3).run(400, load=100.0)) <= {3, 4, 5}
    assert Cluster(terms, 5).run(600, load=0.0)[-1] == 3


def test_a_model_with_a_cold_start_budget_goes_to_zero_when_idle_and_comes_back_for_one_request() -> None:
    terms = ScalingTerms(min_replicas=0, max_replicas=4, cold_start_budget_s=30, idle_s=600, calm_s=60)
    cluster = Cluster(terms, 2)
    assert min(cluster.run(500, load=0.0, backlog=0)) == 1
    assert cluster.run(200, load=0.0, backlog=0)[-1] == 0
    assert cluster.run(1, load=1.0)[-1] == 1


def test_zero_replicas_without_a_cold_start_budget_are_refused() -> None:
    with pytest.raises(ValueError, match="cold-start budget"):
        ScalingTerms(min_replicas=0, max_replicas=4)


def test_replicas_that_customers_pay_for_are_kept_without_any_work_up_to_the_ceiling() -> None:
    terms = ScalingTerms(min_replicas=0, max_replicas=8, cold_start_budget_s=30, idle_s=60, calm_s=60)
    policy = DemandPolicy(terms)
    idle = [policy.decide(float(second), Demand(0.0, 0.0), 3, 3, promised=3) for second in range(300)]
    assert idle[-1] == 3
    assert policy.decide(300.0, Demand(0.0, 0.0), 3, 3, promised=9) == 8
    assert policy.decide(301.0, Demand(0.0, 0.0), 8, 8, promised=0) == 0


def test_promised_replicas_are_part_of_what_the_load_needs_and_not_on_top_of_it() -> None:
    policy, offered = DemandPolicy(TERMS), 0.0
    for second in range(300):
        offered += 10.0
        target = policy.decide(float(second), Demand(offered, 0.0), 10, 10, promised=4)
    assert target == 10
