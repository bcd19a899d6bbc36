"""A model that is scaled to zero: who may wait for its first replica, and what the others are told."""

import pytest

from deployments.autoscaling import DemandPolicy, ScalingTerms
from deployments.messages import ReplicaId, Ticket, TicketId, TicketTerms
from deployments.scheduler import Grant, Overloaded, Scheduler, SchedulerLimits

BOOT_S, BUDGET_S, JUST_BEGUN_S = 100.0, 30.0, 5.0


class Cold:
    """A scheduler that has been up for a while and has no replica."""

    def __init__(self, budget_s: float = BUDGET_S) -> None:
        self.now = 0.0
        limits = SchedulerLimits(boot_s=BOOT_S, cold_start_budget_s=budget_s, replica_timeout_s=JUST_BEGUN_S)
        self.scheduler = Scheduler(lambda: self.now, limits)
        self.now = 1000.0
        self.asked = 0

    def ask(self, begun: bool = False, deadline_s: float | None = None) -> object:
        """The refusal, or None if it is queued."""
        self.asked += 1
        terms = TicketTerms(deadline_s=deadline_s)
        return self.scheduler.submit(Ticket(TicketId(str(self.asked)), 1, begun, 60.0, terms=terms))


@pytest.fixture
def cold() -> Cold:
    return Cold()


def test_who_would_wait_longer_than_the_budget_is_told_when_the_replica_will_serve(cold: Cold) -> None:
    assert cold.ask() == Overloaded(BOOT_S)
    cold.now += 40
    assert cold.ask() == Overloaded(BOOT_S - 40)


def test_who_comes_within_the_budget_of_its_start_waits_and_is_served(cold: Cold) -> None:
    cold.ask()
    cold.now += BOOT_S - BUDGET_S - 0.001
    assert isinstance(cold.ask(), Overloaded)
    cold.now += 0.001
    assert cold.ask() is None
    cold.now += BUDGET_S
    cold.scheduler.replica_alive(ReplicaId("first"), 4)
    assert cold.scheduler.dispatch() == [Grant(TicketId("3"), ReplicaId("first"))]


def test_what_was_refused_makes_the_policy_ask_for_a_replica(cold: Cold) -> None:
    terms = ScalingTerms(0, 4, boot_s=BOOT_S, cold_start_budget_s=BUDGET_S)
    policy = DemandPolicy(terms)
    assert policy.decide(cold.now, cold.scheduler.demand(), ready=0, target=0) == 0
    assert isinstance(cold.ask(), Overloaded)
    cold.now += 1
    assert policy.decide(cold.now, cold.scheduler.demand(), ready=0, target=0) == 1


def test_a_deadline_before_the_start_is_refused_at_once(cold: Cold) -> None:
    cold.ask()
    cold.now += BOOT_S - 10
    assert cold.ask(deadline_s=9) == Overloaded(10)
    assert cold.ask(deadline_s=11) is None


def test_a_replica_that_is_overdue_is_waited_for_until_it_must_have_failed(cold: Cold) -> None:
    cold.ask()
    cold.now += 2 * BOOT_S
    assert cold.ask() is None
    cold.now += 0.001
    assert cold.ask() == Overloaded(BOOT_S)


def test_a_begun_rollout_waits_however_long_it_takes(cold: Cold) -> None:
    assert cold.ask(begun=True) is None


def test_once_a_replica_has_served_the_next_start_takes_its_whole_time_again(cold: Cold) -> None:
    cold.ask()
    cold.now += 50
    cold.scheduler.replica_alive(ReplicaId("first"), 4)
    cold.scheduler.replica_gone(ReplicaId("first"))
    assert cold.ask() == Overloaded(BOOT_S)


def test_a_scheduler_that_has_just_begun_waits_for_the_replicas_to_announce_themselves(cold: Cold) -> None:
    scheduler = Scheduler(lambda: cold.now, SchedulerLimits(boot_s=BOOT_S, cold_start_budget_s=BUDGET_S))
    assert scheduler.submit(Ticket(TicketId("early"), 1)) is None


def test_a_model_that_is_never_scaled_to_zero_keeps_its_requests_while_a_lost_replica_is_replaced() -> None:
    assert Cold(budget_s=0).ask() is None
