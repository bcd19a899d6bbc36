import math
import random
import sys
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from billing.commands import CustomerId
from deployments.batching import BatchProfile
from deployments.messages import CallerId, ReplicaId, ServiceClass, Ticket, TicketId, TicketTerms
from deployments.room import BATCHES_AHEAD
from deployments.scheduler import (
    MAX_RETRY_AFTER_S,
    UNKNOWN_COST_PER_S,
    UNKNOWN_RATE_RETRY_AFTER_S,
    Grant,
    Overloaded,
    Refused,
    Scheduler,
    SchedulerLimits,
    TooLate,
)

LIMITS = SchedulerLimits(max_queued_rows=16, replica_timeout_s=5.0, grant_timeout_s=60.0)
ROW_S = BatchProfile(0.0, 1.0)
"""A second per row-step, whatever the batch."""


class Counted:
    """Counts the lines of Python that the scheduler runs, which no busy machine changes."""

    def __init__(self) -> None:
        self.lines = 0

    def __enter__(self) -> None:
        sys.settrace(self._trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def _trace(self, frame: Any, event: str, _: Any) -> Any:
        self.lines += event == "line"
        return self._trace


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def scheduler(clock: Clock) -> Scheduler:
    return Scheduler(clock, LIMITS)


def ticket(
    name: str,
    num_rows: int = 1,
    customer: str = "",
    service_class: ServiceClass = "standard",
    deadline_s: float | None = None,
    begun: bool = False,
    chunks_left: int = 1,
) -> Ticket:
    terms = TicketTerms(CustomerId(customer), service_class, deadline_s, chunks_left)
    return Ticket(TicketId(name), num_rows, begun, terms=terms)


def granted(answers: list[Grant | Refused]) -> list[str]:
    return [answer.ticket_id for answer in answers if isinstance(answer, Grant)]


def refused(answers: list[Grant | Refused]) -> list[str]:
    return [answer.ticket_id for answer in answers if isinstance(answer, Refused)]


def fill(scheduler: Scheduler, replica: str = "r", capacity: int = 8) -> None:
    """A replica that is as full as it may be."""
    scheduler.replica_alive(ReplicaId(replica), capacity)
    for index in range(BATCHES_AHEAD):
        scheduler.submit(ticket(f"{replica} is full {index}", capacity, begun=True))
    assert len(scheduler.dispatch()) == BATCHES_AHEAD


def drain(scheduler: Scheduler, replica: str = "r") -> None:
    for index in range(BATCHES_AHEAD):
        scheduler.complete(TicketId(f"{replica} is full {index}"))


def test_tickets_of_one_customer_are_granted_in_the_order_they_came(scheduler: Scheduler) -> None:
    scheduler.replica_alive(ReplicaId("r"), 1)
    for name in "abc":
        assert scheduler.submit(ticket(name)) is None
    assert granted(scheduler.dispatch()) == ["a", "b"]
    scheduler.complete(TicketId("a"))
    assert granted(scheduler.dispatch()) == ["c"]


class TestLimitsThatChange:
    def test_the_queues_bound_is_the_new_one(self, scheduler: Scheduler) -> None:
        fill(scheduler)
        assert scheduler.submit(ticket("waits", 16)) is None
        scheduler.limit(replace(LIMITS, max_queued_rows=32))
        assert scheduler.submit(ticket("waits too", 16)) is None
        scheduler.limit(LIMITS)
        assert isinstance(scheduler.submit(ticket("refused", 1)), Overloaded)

    def test_who_was_held_back_goes_on_when_its_bound_is_lifted(self, clock: Clock) -> None:
        scheduler = Scheduler(clock, SchedulerLimits(max_customer_rows=1))
        scheduler.replica_alive(ReplicaId("r"), 8)
        for name in "ab":
            scheduler.submit(ticket(name, customer="c"))
        assert granted(scheduler.dispatch()) == ["a"]
        scheduler.limit(SchedulerLimits())
        assert granted(scheduler.dispatch()) == ["b"]

    def test_shares_follow_the_new_weights_while_work_waits(self, clock: Clock) -> None:
        limits = SchedulerLimits(1000)
        scheduler = Scheduler(clock, limits)
        fill(scheduler, capacity=1)
        for index in range(40):
            for customer in ("one", "other"):
                scheduler.submit(ticket(f"{customer} {index}", customer=customer))
        scheduler.limit(replace(limits, customer_weights={CustomerId("one"): 3.0}))
        drain(scheduler)
        order: list[str] = []
        while len(order) < 40:
            names = granted(scheduler.dispatch())
            order += names
            for name in names:
                scheduler.complete(TicketId(name))
        assert 29 <= sum(name.startswith("one") for name in order) <= 31


def test_nothing_is_granted_before_a_replica_announces_itself(scheduler: Scheduler) -> None:
    scheduler.submit(ticket("a"))
    assert scheduler.dispatch() == []
    scheduler.replica_alive(ReplicaId("r"), 1)
    assert granted(scheduler.dispatch()) == ["a"]


def test_candidates_of_one_ticket_go_to_one_replica_together(scheduler: Scheduler) -> None:
    scheduler.replica_alive(ReplicaId("a"), 8)
    scheduler.replica_alive(ReplicaId("b"), 8)
    for name in ("one", "two"):
        scheduler.submit(ticket(name, 8))
    assert {answer.replica_id for answer in scheduler.dispatch() if isinstance(answer, Grant)} == {"a", "b"}


def test_a_replica_gets_its_next_batch_while_it_runs_one_but_none_beyond(scheduler: Scheduler) -> None:
    scheduler.replica_alive(ReplicaId("r"), 4)
    for name in ("runs", "next", "waits"):
        scheduler.submit(ticket(name, 4))
    assert granted(scheduler.dispatch()) == ["runs", "next"]


def test_a_batch_goes_to_an_idle_replica_before_any_gets_its_next(scheduler: Scheduler) -> None:
    for name in ("a", "b"):
        scheduler.replica_alive(ReplicaId(name), 4)
    for index in range(4):
        scheduler.submit(ticket(str(index), 4))
    replicas = [answer.replica_id for answer in scheduler.dispatch() if isinstance(answer, Grant)]
    assert (len(set(replicas[:2])), sorted(replicas)) == (2, ["a", "a", "b", "b"])


def test_a_ticket_wider_than_a_replica_runs_alone_on_it(scheduler: Scheduler) -> None:
    scheduler.replica_alive(ReplicaId("r"), 4)
    scheduler.submit(ticket("wide", 9))
    scheduler.submit(ticket("next"))
    assert granted(scheduler.dispatch()) == ["wide"]
    scheduler.complete(TicketId("wide"))
    assert granted(scheduler.dispatch()) == ["next"]


def test_a_narrow_ticket_does_not_overtake_a_wide_one(scheduler: Scheduler) -> None:
    scheduler.replica_alive(ReplicaId("r"), 4)
    scheduler.submit(ticket("running", 6))
    scheduler.dispatch()
    scheduler.submit(ticket("wide", 4))
    scheduler.submit(ticket("narrow", 1))
    assert scheduler.dispatch() == []


def test_only_tickets_that_agree_run_on_a_replica_at_a_time(scheduler: Scheduler) -> None:
    scheduler.replica_alive(ReplicaId("r"), 8)
    scheduler.submit(ticket("a")._replace(compatibility="bfloat16"))
    scheduler.submit(ticket("b")._replace(compatibility="float32"))
    assert granted(scheduler.dispatch()) == ["a"]
    scheduler.complete(TicketId("a"))
    assert granted(scheduler.dispatch()) == ["b"]


def test_rows_go_where_their_start_frame_is_encoded_while_that_costs_no_wait(scheduler: Scheduler) -> None:
    for name in ("a", "b"):
        scheduler.replica_alive(ReplicaId(name), 4)

    def replica_of(name: str, num_rows: int) -> str:
        scheduler.submit(ticket(name, num_rows)._replace(affinity="frame"))
        (answer,) = scheduler.dispatch()
        assert isinstance(answer, Grant)
        return answer.replica_id

    first = replica_of("first", 2)
    assert replica_of("fits", 2) == first
    assert replica_of("would wait", 1) != first


class TestStreams:
    """A stream's context is on one replica; making it again elsewhere takes 18 forwards of a second each."""

    @pytest.fixture
    def scheduler(self, clock: Clock) -> Scheduler:
        scheduler = Scheduler(clock, SchedulerLimits(max_queued_rows=1000, grant_timeout_s=1e9, replica_timeout_s=1e9))
        for name in ("a", "b"):
            scheduler.replica_alive(ReplicaId(name), 4, profile=ROW_S)
        return scheduler

    def replica_of(self, scheduler: Scheduler, name: str, num_steps: int = 5) -> str:
        chunk = Ticket(TicketId(name), 1, True, num_steps=num_steps, affinity="stream", affinity_steps=18)
        scheduler.submit(chunk)
        answers = {answer.ticket_id: answer for answer in scheduler.dispatch()}
        answer = answers[chunk.ticket_id]
        assert isinstance(answer, Grant)
        return answer.replica_id

    def test_each_chunk_goes_where_the_last_one_was_whatever_else_runs(
        self, clock: Clock, scheduler: Scheduler
    ) -> None:
        home, seen, present = self.replica_of(scheduler, "0"), set(), list[str]()
        scheduler.complete(TicketId("0"))
        for index in range(1, 200):
            scheduler.submit(ticket(f"other {index}", 1 + index % 2, "other")._replace(num_steps=4))
            present += [name for name in granted(scheduler.dispatch()) if name.startswith("other")]
            seen.add(self.replica_of(scheduler, str(index)))
            clock.now += 5
            scheduler.complete(TicketId(str(index)))
            if len(present) > 3:
                scheduler.complete(TicketId(present.pop(0)))
        assert seen == {home}

    @pytest.mark.parametrize(("num_steps", "stays"), [(4, True), (5, False)])
    def test_it_waits_no_longer_than_making_its_context_again_takes(
        self, scheduler: Scheduler, num_steps: int, stays: bool
    ) -> None:
        """For a batch of four rows: 16 s, or 20 s."""
        home = self.replica_of(scheduler, "0")
        scheduler.complete(TicketId("0"))
        batch = ticket("batch", 4, "other")._replace(num_steps=num_steps, affinity="stream")
        scheduler.submit(batch)
        assert scheduler.dispatch() == [Grant(batch.ticket_id, ReplicaId(home))]
        assert (self.replica_of(scheduler, "1") == home) == stays

    def test_it_does_not_wait_for_a_replica_that_has_its_next_batch_too(self, scheduler: Scheduler) -> None:
        home = self.replica_of(scheduler, "0")
        for name, num_rows in (("this batch", 3), ("next batch", 4)):
            scheduler.submit(ticket(name, num_rows, "other")._replace(affinity="stream", affinity_steps=99))
        assert {answer.replica_id for answer in scheduler.dispatch() if isinstance(answer, Grant)} == {home}
        assert self.replica_of(scheduler, "1") != home

    def test_it_goes_elsewhere_when_its_replica_is_gone(self, scheduler: Scheduler) -> None:
        home = self.replica_of(scheduler, "0")
        scheduler.replica_gone(ReplicaId(home))
        other = self.replica_of(scheduler, "1")
        assert other != home
        scheduler.replica_alive(ReplicaId(home), 4, profile=ROW_S)
        assert self.replica_of(scheduler, "2") == other, "it stays where it went"


def test_the_next_chunk_of_a_rollout_goes_before_a_new_rollout_of_its_customer(scheduler: Scheduler) -> None:
    fill(scheduler)
    scheduler.submit(ticket("new"))
    scheduler.submit(ticket("next chunk", begun=True))
    drain(scheduler)
    assert granted(scheduler.dispatch()) == ["next chunk", "new"]


def test_the_earlier_deadline_of_a_customer_goes_first(scheduler: Scheduler) -> None:
    fill(scheduler)
    scheduler.submit(ticket("none"))
    scheduler.submit(ticket("late", deadline_s=30.0))
    scheduler.submit(ticket("soon", deadline_s=20.0))
    drain(scheduler)
    assert granted(scheduler.dispatch()) == ["soon", "late", "none"]


class TestFairness:
    def test_a_customer_who_comes_late_does_not_wait_for_all_of_one_who_came_first(self, scheduler: Scheduler) -> None:
        fill(scheduler)
        for index in range(8):
            scheduler.submit(ticket(f"heavy {index}", 2, "heavy"))
        scheduler.submit(ticket("light", 2, "light"))
        drain(scheduler)
        assert granted(scheduler.dispatch()).index("light") <= 1

    @pytest.mark.parametrize("weight", [1.0, 3.0])
    def test_a_busy_model_is_shared_by_weight_not_by_how_much_is_asked_for(self, clock: Clock, weight: float) -> None:
        limits = SchedulerLimits(1000, customer_weights={CustomerId("light"): weight}, grant_timeout_s=1e9)
        scheduler = Scheduler(clock, limits)
        scheduler.replica_alive(ReplicaId("r"), 4)
        served = {"heavy": 0, "light": 0}
        names = iter(range(10_000))
        waiting = {"heavy": 0, "light": 0}
        for _ in range(500):
            for customer, depth in (("heavy", 50), ("light", 10)):
                while waiting[customer] < depth:
                    scheduler.submit(ticket(f"{customer} {next(names)}", 1, customer))
                    waiting[customer] += 1
            for name in granted(scheduler.dispatch()):
                served[name.split()[0]] += 1
                waiting[name.split()[0]] -= 1
                scheduler.complete(TicketId(name))
        assert served["light"] / served["heavy"] == pytest.approx(weight, rel=0.05)

    def test_what_one_does_not_use_is_lent_and_not_owed_back(self, scheduler: Scheduler) -> None:
        scheduler.replica_alive(ReplicaId("r"), 1)
        for index in range(100):  # alone, the heavy one gets everything
            scheduler.submit(ticket(f"alone {index}", 1, "heavy"))
            assert scheduler.dispatch() != []
            scheduler.complete(TicketId(f"alone {index}"))
        fill(scheduler)
        for index in range(4):
            scheduler.submit(ticket(f"heavy {index}", 1, "heavy"))
            scheduler.submit(ticket(f"light {index}", 1, "light"))
        drain(scheduler)
        order = [name.split()[0] for name in granted(scheduler.dispatch())]
        assert order.count("heavy") == 4
        assert order[:4].count("heavy") == 2  # from now on they take turns

    def test_a_full_queue_still_has_a_place_for_who_has_nothing_waiting(self, scheduler: Scheduler) -> None:
        assert scheduler.submit(ticket("heavy", 16, "heavy")) is None
        assert isinstance(scheduler.submit(ticket("more", 1, "heavy")), Overloaded)
        assert scheduler.submit(ticket("light", 8, "light")) is None
        assert isinstance(scheduler.submit(ticket("light too", 1, "light")), Overloaded)

    def test_no_crowd_makes_the_queue_longer_than_twice_its_bound(self, scheduler: Scheduler) -> None:
        for index in range(100):
            scheduler.submit(ticket(str(index), 5, f"customer {index}"))
        assert scheduler.status().queued_rows == 30

    def test_interactive_work_goes_before_the_rest_and_batch_work_is_never_starved(self, clock: Clock) -> None:
        scheduler = Scheduler(clock, SchedulerLimits(10_000))
        scheduler.replica_alive(ReplicaId("r"), 1)
        order = []
        classes: tuple[ServiceClass, ...] = ("batch", "standard", "interactive")
        for index in range(300):
            for service_class in classes:
                for number in range(BATCHES_AHEAD):  # each could use all there is
                    scheduler.submit(ticket(f"{service_class} {index} {number}", 1, "one", service_class))
            for name in granted(scheduler.dispatch()):
                order.append(name.split()[0])
                scheduler.complete(TicketId(name))
        assert order.index("interactive") <= BATCHES_AHEAD
        assert order.count("interactive") > 0.8 * len(order)
        assert order.count("batch") >= 0.01 * len(order)

    def test_a_customer_may_have_only_so_many_rows_running_and_others_go_on(self, clock: Clock) -> None:
        scheduler = Scheduler(clock, SchedulerLimits(max_customer_rows=2))
        scheduler.replica_alive(ReplicaId("r"), 8)
        for name in "abc":
            scheduler.submit(ticket(name, 1, "capped"))
        scheduler.submit(ticket("other", 1, "other"))
        assert sorted(granted(scheduler.dispatch())) == ["a", "b", "other"]
        scheduler.withdraw(TicketId("a"))
        assert granted(scheduler.dispatch()) == ["c"]

    def test_a_ticket_wider_than_its_customers_rows_runs_when_nothing_else_of_it_does(self, clock: Clock) -> None:
        scheduler = Scheduler(clock, SchedulerLimits(max_customer_rows=2))
        scheduler.replica_alive(ReplicaId("r"), 8)
        scheduler.submit(ticket("narrow", 1, "capped"))
        scheduler.submit(ticket("wide", 5, "capped"))
        assert granted(scheduler.dispatch()) == ["narrow"]
        scheduler.complete(TicketId("narrow"))
        assert granted(scheduler.dispatch()) == ["wide"]


class TestDeadlines:
    @pytest.fixture
    def scheduler(self, clock: Clock) -> Scheduler:
        scheduler = Scheduler(clock, LIMITS)
        scheduler.replica_alive(ReplicaId("r"), 4, profile=ROW_S)  # 4 rows: 4 s
        return scheduler

    def test_what_cannot_be_done_even_alone_is_refused_at_the_door(self, scheduler: Scheduler) -> None:
        assert scheduler.submit(ticket("no", 4, deadline_s=3.9)) == TooLate()
        assert scheduler.submit(ticket("two chunks", 2, deadline_s=3.9, chunks_left=2)) == TooLate()
        assert scheduler.submit(ticket("yes", 4, deadline_s=4.3)) is None

    def test_what_the_backlog_makes_late_is_refused_at_the_door_with_the_time_that_it_takes(
        self, scheduler: Scheduler
    ) -> None:
        for name in "abc":
            scheduler.submit(ticket(name, 4))
        scheduler.dispatch()
        refusal = scheduler.submit(ticket("late", 4, deadline_s=15.0))
        assert isinstance(refusal, Overloaded)
        assert refusal.retry_after_s == pytest.approx(12.0)
        assert scheduler.submit(ticket("in time", 4, deadline_s=17.0)) is None

    def test_what_has_become_too_late_is_refused_at_the_head_and_not_run(
        self, scheduler: Scheduler, clock: Clock
    ) -> None:
        fill(scheduler, capacity=4)
        scheduler.submit(ticket("hopeful", 2, deadline_s=20.0))
        clock.now = 18.5  # 1.5 s are left, and 2 rows take 2
        scheduler.replica_alive(ReplicaId("r"), 4, profile=ROW_S)
        drain(scheduler)
        assert refused(scheduler.dispatch()) == ["hopeful"]
        assert scheduler.status().running_rows == 0

    def test_a_deadline_that_passes_in_the_queue_is_told_at_once(self, scheduler: Scheduler, clock: Clock) -> None:
        fill(scheduler, capacity=4)
        scheduler.submit(ticket("hopeful", 1, deadline_s=12.0))
        clock.now = 12.1
        assert scheduler.expire() == [Refused(TicketId("hopeful"), TooLate())]

    def test_without_a_profile_a_deadline_is_refused_only_when_it_has_passed(self, clock: Clock) -> None:
        scheduler = Scheduler(clock, LIMITS)
        scheduler.replica_alive(ReplicaId("r"), 4)
        assert scheduler.submit(ticket("unknown", 4, deadline_s=0.1)) is None
        assert scheduler.submit(ticket("passed", 4, deadline_s=-0.1)) == TooLate()

    def test_a_light_customer_is_not_refused_for_the_backlog_of_a_heavy_one(self, scheduler: Scheduler) -> None:
        fill(scheduler, capacity=4)
        for index in range(4):
            scheduler.submit(ticket(f"heavy {index}", 4, "heavy"))
        assert isinstance(scheduler.submit(ticket("heavy late", 1, "heavy", deadline_s=20.0)), Overloaded)
        assert scheduler.submit(ticket("light", 1, "light", deadline_s=20.0)) is None


def test_a_full_queue_refuses_and_says_when_to_come_back(scheduler: Scheduler) -> None:
    scheduler.submit(ticket("a", 16))
    assert scheduler.submit(ticket("b", 1)) == Overloaded(UNKNOWN_RATE_RETRY_AFTER_S)
    assert scheduler.status().queued_rows == 16


def test_a_queue_with_exactly_enough_room_accepts(scheduler: Scheduler) -> None:
    scheduler.submit(ticket("a", 15))
    assert scheduler.submit(ticket("b", 1)) is None


def test_a_row_counts_by_its_steps(clock: Clock) -> None:
    scheduler = Scheduler(clock, SchedulerLimits(max_queued_rows=4, usual_steps=10))
    assert scheduler.submit(ticket("quick", 6)._replace(num_steps=5)) is None
    assert isinstance(scheduler.submit(ticket("slow", 1)._replace(num_steps=11)), Overloaded)
    assert scheduler.submit(ticket("usual", 1)._replace(num_steps=10)) is None


@pytest.mark.parametrize("row_s", [0.1, 1.0, 10.0])
def test_retry_after_is_the_backlog_over_what_the_replicas_can_do_and_has_a_ceiling(clock: Clock, row_s: float) -> None:
    scheduler = Scheduler(clock, LIMITS)
    scheduler.replica_alive(ReplicaId("r"), 1, profile=BatchProfile(0.0, row_s))
    for index in range(BATCHES_AHEAD):
        scheduler.submit(ticket(f"running {index}"))
    scheduler.dispatch()
    scheduler.submit(ticket("waiting", 16))
    refusal = scheduler.submit(ticket("refused"))
    assert isinstance(refusal, Overloaded)
    assert refusal.retry_after_s == pytest.approx(min(MAX_RETRY_AFTER_S, (16 + BATCHES_AHEAD) * row_s))


def test_retry_after_follows_what_is_measured_when_the_replicas_are_slower_than_they_said(clock: Clock) -> None:
    scheduler = Scheduler(clock, LIMITS)
    for index in range(100):
        scheduler.replica_alive(ReplicaId("r"), 1, profile=ROW_S)
        scheduler.submit(ticket(str(index)))
        scheduler.dispatch()
        clock.now += 2.0
        if index:
            scheduler.complete(TicketId(str(index - 1)))
    scheduler.submit(ticket("waiting", 15))
    refusal = scheduler.submit(ticket("refused", 2))
    assert isinstance(refusal, Overloaded)
    assert refusal.retry_after_s == pytest.approx(32, rel=0.2)


def test_the_wait_of_a_new_customer_is_told_while_a_rate_is_known(scheduler: Scheduler, clock: Clock) -> None:
    assert scheduler.status().wait_s is None
    scheduler.replica_alive(ReplicaId("r"), 4, profile=ROW_S)
    assert scheduler.status().wait_s == 0.0
    scheduler.submit(ticket("a", 4))
    scheduler.dispatch()
    clock.now = 1.0
    assert scheduler.status().wait_s == pytest.approx(3.0)


def test_demand_counts_what_was_refused_too_in_seconds_of_a_replica(scheduler: Scheduler) -> None:
    scheduler.replica_alive(ReplicaId("r"), 4, profile=ROW_S)
    scheduler.submit(ticket("a", 8))
    scheduler.dispatch()
    scheduler.submit(ticket("b", 16))
    scheduler.submit(ticket("refused", 4))
    demand = scheduler.demand()
    assert (demand.offered_s, demand.backlog_s) == (28.0, 24.0)


def test_a_rollout_that_has_begun_is_never_refused_for_room(scheduler: Scheduler) -> None:
    scheduler.submit(ticket("new", 16))
    assert isinstance(scheduler.submit(ticket("refused")), Overloaded)
    assert scheduler.submit(ticket("next chunk", 8, begun=True)) is None


@pytest.mark.parametrize("load", [1.2, 4.0])
def test_under_overload_hardly_a_chunk_is_run_that_is_not_paid_for(clock: Clock, load: float) -> None:
    """Rollouts of 20 chunks of 8 rows arrive faster than one replica can run them; a refused one gives up."""
    scheduler = Scheduler(clock, LIMITS)
    chunks, chunk_s, run, delivered, arrivals = 20, 1.0, 0, 0, 0.0
    progress: dict[str, int] = {}
    for tick in range(2_000):
        clock.now = tick * chunk_s
        scheduler.replica_alive(ReplicaId("r"), 8)
        arrivals += load / chunks
        while arrivals >= 1:
            arrivals -= 1
            if scheduler.submit(ticket(f"{tick}/{arrivals}", 8)) is None:
                progress[f"{tick}/{arrivals}"] = 0
        scheduler.expire()
        for name in granted(scheduler.dispatch()):
            scheduler.complete(TicketId(name))
            run += 1
            rollout = name.split("#")[0]
            progress[rollout] += 1
            if progress[rollout] == chunks:
                delivered += chunks
            else:
                follow = Ticket(TicketId(f"{rollout}#{progress[rollout]}"), 8, begun=True)
                assert scheduler.submit(follow) is None
    assert delivered / run >= 0.95


def test_what_is_kept_of_withdrawn_work_is_bounded_while_nothing_can_be_granted(clock: Clock) -> None:
    """Entries that are gone stay in the heaps until they surface, so the heaps are rebuilt before they matter."""
    scheduler = Scheduler(clock, LIMITS)
    fill(scheduler)
    scheduler.submit(ticket("first"))
    for index in range(5_000):
        scheduler.submit(ticket(str(index), 1, f"customer {index}"))
        scheduler.withdraw(TicketId(str(index)))
        scheduler.replica_alive(ReplicaId("r"), 8 + index % 2)
        scheduler.expire()
    (group,) = (group for group in scheduler._queue._classes.values() if group.num_tickets)
    assert max(len(scheduler._patience), len(group.order), len(group.flows), len(list(scheduler._by_room))) <= 200


def test_a_ticket_that_is_sent_twice_is_queued_once(scheduler: Scheduler) -> None:
    scheduler.submit(ticket("a", 8))
    assert scheduler.submit(ticket("a", 8)) is None
    assert scheduler.status().queued_rows == 8
    scheduler.replica_alive(ReplicaId("r"), 8)
    assert granted(scheduler.dispatch()) == ["a"]
    scheduler.submit(ticket("a", 8))
    assert scheduler.status().queued_rows == 0


def test_a_ticket_out_of_patience_leaves_the_queue_and_is_named(scheduler: Scheduler, clock: Clock) -> None:
    scheduler.submit(Ticket(TicketId("a"), 8, patience_s=10.0))
    scheduler.submit(Ticket(TicketId("b"), 8, patience_s=20.0))
    clock.now = 10.0
    assert scheduler.expire() == []
    clock.now = 10.1
    assert scheduler.expire() == [Refused(TicketId("a"), Overloaded(UNKNOWN_RATE_RETRY_AFTER_S))]
    assert scheduler.status().queued_rows == 8


def test_a_withdrawn_ticket_is_never_granted(scheduler: Scheduler) -> None:
    scheduler.submit(ticket("a", 3))
    scheduler.submit(ticket("b"))
    scheduler.withdraw(TicketId("a"))
    scheduler.replica_alive(ReplicaId("r"), 4)
    assert granted(scheduler.dispatch()) == ["b"]


def test_withdrawing_a_running_ticket_frees_its_room(scheduler: Scheduler) -> None:
    scheduler.replica_alive(ReplicaId("r"), 1)
    scheduler.submit(ticket("a", 2))
    scheduler.submit(ticket("b"))
    scheduler.dispatch()
    scheduler.withdraw(TicketId("a"))
    assert granted(scheduler.dispatch()) == ["b"]


def test_completing_twice_or_an_unknown_ticket_changes_nothing(scheduler: Scheduler) -> None:
    scheduler.replica_alive(ReplicaId("r"), 1)
    scheduler.submit(ticket("a", 2))
    scheduler.submit(ticket("b"))
    scheduler.dispatch()
    scheduler.complete(TicketId("a"))
    scheduler.complete(TicketId("a"))
    scheduler.withdraw(TicketId("never seen"))
    assert granted(scheduler.dispatch()) == ["b"]
    assert scheduler.status().running_rows == 1


def test_a_lost_replica_takes_its_grants_with_it_and_the_same_ticket_runs_elsewhere(scheduler: Scheduler) -> None:
    scheduler.replica_alive(ReplicaId("dies"), 1)
    scheduler.submit(ticket("a/0"))
    scheduler.dispatch()
    scheduler.replica_gone(ReplicaId("dies"))
    scheduler.replica_alive(ReplicaId("lives"), 1)
    scheduler.submit(ticket("a/1"))
    assert scheduler.dispatch() == [Grant(TicketId("a/1"), ReplicaId("lives"))]
    scheduler.complete(TicketId("a/0"))
    assert scheduler.status().running_rows == 1


def test_a_silent_replica_is_forgotten_after_its_timeout(scheduler: Scheduler, clock: Clock) -> None:
    scheduler.replica_alive(ReplicaId("r"), 1)
    clock.now = LIMITS.replica_timeout_s
    scheduler.expire()
    assert scheduler.status().replicas == 1
    clock.now += 0.1
    scheduler.expire()
    assert scheduler.status().replicas == 0


def test_a_grant_whose_ingress_vanished_is_taken_back(scheduler: Scheduler, clock: Clock) -> None:
    scheduler.replica_alive(ReplicaId("r"), 1)
    scheduler.submit(ticket("orphan", 2))
    scheduler.dispatch()
    scheduler.submit(Ticket(TicketId("waiting"), 1, patience_s=100.0))
    clock.now = LIMITS.grant_timeout_s + 1
    scheduler.replica_alive(ReplicaId("r"), 1)
    scheduler.expire()
    assert granted(scheduler.dispatch()) == ["waiting"]


class TestACallerThatDied:
    @pytest.fixture
    def scheduler(self, clock: Clock) -> Scheduler:
        """One of the dead caller's tickets runs, one waits; then two of a caller who lives."""
        scheduler = Scheduler(clock, LIMITS)
        scheduler.replica_alive(ReplicaId("r"), 4)
        for name, caller in (("runs", "dead"), ("runs too", "lives"), ("waits", "dead"), ("waits too", "lives")):
            scheduler.submit(ticket(name, 4)._replace(caller=CallerId(caller)))
        assert granted(scheduler.dispatch()) == ["runs", "runs too"]
        return scheduler

    def test_its_queued_tickets_leave_at_once_and_nobody_elses(self, scheduler: Scheduler) -> None:
        assert scheduler.caller_gone(CallerId("dead")) == ["waits"]
        assert scheduler.status().queued_rows == 4
        assert scheduler.demand().backlog_s == 12 / UNKNOWN_COST_PER_S

    def test_its_room_is_nobodys_until_the_replica_has_stopped_it(self, scheduler: Scheduler) -> None:
        scheduler.caller_gone(CallerId("dead"))
        assert scheduler.dispatch() == []
        assert scheduler.orphans_on(ReplicaId("r")) == ["runs"]
        assert scheduler.orphans_on(ReplicaId("another")) == []
        scheduler.withdraw(TicketId("runs"))
        assert scheduler.orphans_on(ReplicaId("r")) == []
        assert granted(scheduler.dispatch()) == ["waits too"]

    @pytest.mark.parametrize("end", ["done", "replica lost"])
    def test_what_ends_by_itself_is_no_orphan_any_more(self, scheduler: Scheduler, end: str) -> None:
        scheduler.caller_gone(CallerId("dead"))
        if end == "done":
            scheduler.complete(TicketId("runs"))
        else:
            scheduler.replica_gone(ReplicaId("r"))
            scheduler.replica_alive(ReplicaId("r"), 4)
        assert scheduler.orphans_on(ReplicaId("r")) == []
        assert granted(scheduler.dispatch()) == ["waits too"]

    def test_one_that_nobody_knows_changes_nothing(self, scheduler: Scheduler) -> None:
        assert scheduler.caller_gone(CallerId("unknown")) == []
        assert scheduler.orphans_on(ReplicaId("r")) == []


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of events: no ticket is lost, no replica has too much or idles, nobody is passed over for long."""

    MAX_CUSTOMER_ROWS = 12

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.scheduler = Scheduler(self.clock, replace(LIMITS, max_customer_rows=self.MAX_CUSTOMER_ROWS))
        self.next_ticket = 0
        self.waiting: dict[str, Ticket] = {}
        self.running: dict[str, tuple[Ticket, str]] = {}
        self.capacity: dict[str, int] = {}
        self.refused: set[str] = set()
        self.callers = ["caller 0", "caller 1"]
        self.passed_over: dict[str, float] = {}
        """Per waiting customer of the standard class: row-steps that others of it were granted meanwhile."""

    def dispatch(self) -> None:
        for answer in self.scheduler.dispatch():
            waited = self.waiting.pop(answer.ticket_id)
            if isinstance(answer, Refused):
                self.refused.add(answer.ticket_id)
                continue
            mine = self.rows_on(answer.replica_id)
            assert not mine or mine + waited.num_rows <= BATCHES_AHEAD * self.capacity[answer.replica_id]
            self.running[answer.ticket_id] = (waited, answer.replica_id)
            if waited.terms.service_class == "standard":
                for customer in {
                    other.terms.customer_id
                    for other in self.waiting.values()
                    if other.terms.service_class == "standard"
                }:
                    self.passed_over[customer] = self.passed_over.get(customer, 0) + waited.cost
                self.passed_over[waited.terms.customer_id] = 0
        present = {each.terms.customer_id for each in self.waiting.values()}
        self.passed_over = {name: cost for name, cost in self.passed_over.items() if name in present}

    def rows_on(self, replica: str) -> int:
        return sum(each.num_rows for each, where in self.running.values() if where == replica)

    @rule(
        num_rows=st.integers(1, 8),
        customer=st.sampled_from("xyz"),
        service_class=st.sampled_from(("interactive", "standard", "batch")),
        deadline_s=st.one_of(st.none(), st.floats(0.1, 50)),
        begun=st.booleans(),
        caller=st.integers(0, 1),
    )
    def submit(
        self,
        num_rows: int,
        customer: str,
        service_class: ServiceClass,
        deadline_s: float | None,
        begun: bool,
        caller: int,
    ) -> None:
        name = str(self.next_ticket)
        self.next_ticket += 1
        asked = ticket(name, num_rows, customer, service_class, deadline_s, begun)
        asked = asked._replace(caller=CallerId(self.callers[caller]))
        answer = self.scheduler.submit(asked)
        if answer is None:
            self.waiting[name] = asked
        elif isinstance(answer, Overloaded):
            assert not begun
            assert self.waiting or self.running
            assert 0 <= answer.retry_after_s <= MAX_RETRY_AFTER_S
        else:
            assert deadline_s is not None
        self.dispatch()

    @rule(replica=st.sampled_from("abc"), capacity=st.integers(1, 8))
    def announce(self, replica: str, capacity: int) -> None:
        self.scheduler.replica_alive(ReplicaId(replica), capacity, profile=BatchProfile(0.3, 0.1))
        self.capacity[replica] = capacity
        self.dispatch()

    @rule(replica=st.sampled_from("abc"))
    def lose(self, replica: str) -> None:
        self.scheduler.replica_gone(ReplicaId(replica))
        self.capacity.pop(replica, None)
        lost = [name for name, (_, where) in self.running.items() if where == replica]
        for name in lost:
            again = self.running.pop(name)[0]._replace(ticket_id=TicketId(f"{name} again"), begun=True)
            if again.caller not in self.callers:
                continue
            if self.scheduler.submit(again) is None:
                self.waiting[again.ticket_id] = again
        self.dispatch()

    @rule(data=st.data())
    def complete(self, data: st.DataObject) -> None:
        if self.running:
            name = data.draw(st.sampled_from(sorted(self.running)))
            self.scheduler.complete(TicketId(name))
            del self.running[name]
            self.dispatch()

    @rule(data=st.data())
    def withdraw(self, data: st.DataObject) -> None:
        known = sorted(self.running) + sorted(self.waiting)
        if known:
            name = data.draw(st.sampled_from(known))
            self.scheduler.withdraw(TicketId(name))
            self.running.pop(name, None)
            self.waiting.pop(name, None)
            self.dispatch()

    @rule(caller=st.integers(0, 1))
    def kill(self, caller: int) -> None:
        dead, self.callers[caller] = self.callers[caller], f"caller {self.next_ticket} in place of {caller}"
        queued = {name for name, each in self.waiting.items() if each.caller == dead}
        assert set(self.scheduler.caller_gone(CallerId(dead))) == queued
        self.waiting = {name: each for name, each in self.waiting.items() if name not in queued}
        self.dispatch()

    @rule(replica=st.sampled_from("abc"))
    def stop_orphans(self, replica: str) -> None:
        for ticket_id in self.scheduler.orphans_on(ReplicaId(replica)):
            self.scheduler.withdraw(ticket_id)
            del self.running[ticket_id]
        self.dispatch()

    @rule(seconds=st.floats(0.01, 3.0))
    def time_passes(self, seconds: float) -> None:
        self.clock.now += seconds
        for replica, capacity in self.capacity.items():
            self.scheduler.replica_alive(ReplicaId(replica), capacity, profile=BatchProfile(0.3, 0.1))
        for answer in self.scheduler.expire():
            assert self.waiting.pop(answer.ticket_id).terms.deadline_s is not None
            self.refused.add(answer.ticket_id)
        self.running = {
            name: entry for name, entry in self.running.items() if self.scheduler.granted(TicketId(name)) is not None
        }
        self.dispatch()

    @invariant()
    def no_ticket_is_lost(self) -> None:
        status = self.scheduler.status()
        assert status.queued_rows == sum(each.num_rows for each in self.waiting.values())
        assert status.running_rows == sum(each.num_rows for each, _ in self.running.values())
        for name, (_, replica) in self.running.items():
            assert self.scheduler.granted(TicketId(name)) == Grant(TicketId(name), ReplicaId(replica))

    @invariant()
    def orphans_are_what_runs_for_the_dead(self) -> None:
        for replica in "abc":
            mine = {name: each for name, (each, where) in self.running.items() if where == replica}
            orphans = {name for name, each in mine.items() if each.caller not in self.callers}
            assert set(self.scheduler.orphans_on(ReplicaId(replica))) == orphans

    @invariant()
    def totals_are_sums(self) -> None:
        replicas = list(self.scheduler._replicas.values())
        busy = [replica for replica in replicas if replica.running]
        assert {replica.replica_id for replica in self.scheduler._by_room} == set(self.capacity)
        for replica in replicas:
            assert replica.cost == sum(self.running[name][0].cost for name in replica.running)
            assert replica.rows == sum(self.running[name][0].num_rows for name in replica.running)
            assert replica.level == (bool(replica.running), replica.rows - replica.capacity_rows)
        assert self.scheduler._num_full == sum(replica.rows >= replica.capacity_rows for replica in replicas)
        assert self.scheduler._num_busy == len(busy)
        assert math.isclose(self.scheduler._cost_ahead, sum(each.cost_ahead for each in replicas), abs_tol=1e-6)
        assert math.isclose(self.scheduler._promised_per_s, sum(each.cost_per_s for each in replicas), abs_tol=1e-6)
        tickets = [*self.waiting.values(), *(each for each, _ in self.running.values())]
        assert self.scheduler._backlog_cost == sum(each.cost * each.terms.chunks_left for each in tickets)
        ends = [each.batch_ends_at for each in replicas if each.batch_ends_at is not None]
        left_s = sum(max(0.0, end - self.scheduler._clock()) for end in ends)
        assert math.isclose(self.scheduler._present_left_s(), left_s, abs_tol=1e-6)

    @invariant()
    def no_replica_idles_while_somebody_may_run(self) -> None:
        rows_of: dict[str, int] = {}
        for each, _ in self.running.values():
            rows_of[each.terms.customer_id] = rows_of.get(each.terms.customer_id, 0) + each.num_rows
        if any(not self.rows_on(replica) for replica in self.capacity):
            for each in self.waiting.values():
                running = rows_of.get(each.terms.customer_id, 0)
                assert running, "it could run, and a replica idles"
                assert running + each.num_rows > self.MAX_CUSTOMER_ROWS or any(
                    rows_of.get(other.terms.customer_id, 0) + other.num_rows > self.MAX_CUSTOMER_ROWS
                    for other in self.waiting.values()
                    if other.terms.customer_id == each.terms.customer_id
                )

    @invariant()
    def nobody_is_passed_over_for_long(self) -> None:
        """Three customers of equal weight, tickets of up to 8 rows: start-time fair queueing's bound, twice."""
        held = {
            name
            for name in "xyz"
            if sum(each.num_rows for each, _ in self.running.values() if each.terms.customer_id == name) + 8
            > self.MAX_CUSTOMER_ROWS
        }
        for name, cost in self.passed_over.items():
            assert name in held or cost <= 2 * 3 * 8


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_a_hundred_thousand_waiting_tickets_cost_little_more_each_than_a_thousand(clock: Clock) -> None:
    """Counted in comparisons and heap moves, not in seconds: what is touched per ticket grows with the logarithm."""
    calls = {1_000: 0, 100_000: 0}
    for size in calls:
        scheduler = Scheduler(clock, SchedulerLimits(max_queued_rows=10 * size, grant_timeout_s=1e9))
        generator = random.Random(0)
        for index in range(size):
            scheduler.submit(ticket(str(index), 1, f"customer {generator.randrange(size)}"))
        scheduler.replica_alive(ReplicaId("r"), 1)
        touched = Counted()
        with touched:
            for _ in range(200):
                for name in granted(scheduler.dispatch()):
                    scheduler.complete(TicketId(name))
                scheduler.expire()
        calls[size] = touched.lines
    assert calls[100_000] < 3 * calls[1_000]


def test_the_status_tells_what_was_done_lately_and_forgets_it_again() -> None:
    clock = Clock()
    scheduler = Scheduler(clock, SchedulerLimits())
    scheduler.replica_alive(ReplicaId("r"), 4, profile=ROW_S)
    for index in range(60):
        scheduler.submit(ticket(f"t{index}"))
        scheduler.dispatch()
        scheduler.complete(TicketId(f"t{index}"))
        clock.now += 1.0
    assert scheduler.status().recent_cost_per_s == pytest.approx(1 - math.exp(-2), rel=0.05)  # one a second
    assert scheduler.status().headroom_cost_per_s == pytest.approx(
        scheduler.status().cost_per_s - scheduler.status().recent_cost_per_s
    )
    clock.now += 300.0
    assert scheduler.status().recent_cost_per_s < 1e-3
