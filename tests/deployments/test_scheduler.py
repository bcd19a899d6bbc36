import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from deployments.messages import ReplicaId, TicketId
from deployments.scheduler import (
    MAX_RETRY_AFTER_S,
    RATE_WINDOW_S,
    Grant,
    Overloaded,
    Scheduler,
    SchedulerLimits,
    Ticket,
)

LIMITS = SchedulerLimits(max_queued_rows=16, replica_timeout_s=5.0, grant_timeout_s=60.0)


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


def ticket(name: str, num_rows: int = 1) -> Ticket:
    return Ticket(TicketId(name), num_rows)


def granted(grants: list[Grant]) -> list[str]:
    return [grant.ticket_id for grant in grants]


def test_tickets_are_granted_in_the_order_they_came(scheduler: Scheduler) -> None:
    scheduler.replica_alive(ReplicaId("r"), 2)
    for name in "abc":
        assert scheduler.submit(ticket(name)) is None
    assert granted(scheduler.dispatch()) == ["a", "b"]
    scheduler.complete(TicketId("a"))
    assert granted(scheduler.dispatch()) == ["c"]


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
    assert {grant.replica_id for grant in scheduler.dispatch()} == {"a", "b"}


def test_a_ticket_wider_than_a_replica_runs_alone_on_it(scheduler: Scheduler) -> None:
    scheduler.replica_alive(ReplicaId("r"), 4)
    scheduler.submit(ticket("wide", 9))
    scheduler.submit(ticket("next"))
    assert granted(scheduler.dispatch()) == ["wide"]
    scheduler.complete(TicketId("wide"))
    assert granted(scheduler.dispatch()) == ["next"]


def test_a_narrow_ticket_does_not_overtake_a_wide_one(scheduler: Scheduler) -> None:
    scheduler.replica_alive(ReplicaId("r"), 4)
    scheduler.submit(ticket("running", 2))
    scheduler.dispatch()
    scheduler.submit(ticket("wide", 4))
    scheduler.submit(ticket("narrow", 1))
    assert scheduler.dispatch() == []


def test_a_full_queue_refuses_and_says_when_to_come_back(scheduler: Scheduler) -> None:
    scheduler.submit(ticket("a", 16))
    refusal = scheduler.submit(ticket("b", 1))
    assert isinstance(refusal, Overloaded)
    assert refusal.retry_after_s >= 1
    assert scheduler.status().queued_rows == 16


def test_a_queue_with_exactly_enough_room_accepts(scheduler: Scheduler) -> None:
    scheduler.submit(ticket("a", 15))
    assert scheduler.submit(ticket("b", 1)) is None


def test_retry_after_follows_the_measured_rate_and_has_a_ceiling(clock: Clock) -> None:
    waits = []
    for row_s in (0.1, 1.0, 10.0):
        scheduler = Scheduler(clock, LIMITS)
        for index in range(50):
            scheduler.replica_alive(ReplicaId("r"), 1)
            scheduler.submit(ticket(str(index)))
            scheduler.dispatch()
            clock.now += row_s
            scheduler.complete(TicketId(str(index)))
        scheduler.submit(ticket("running"))
        scheduler.dispatch()
        scheduler.submit(ticket("waiting", 16))
        refusal = scheduler.submit(ticket("refused"))
        assert isinstance(refusal, Overloaded)
        waits.append(refusal.retry_after_s)
    assert waits[0] == 2
    assert 16 <= waits[1] <= 17
    assert waits[2] == MAX_RETRY_AFTER_S


def test_a_rollout_that_has_begun_is_never_refused_and_goes_first(scheduler: Scheduler) -> None:
    scheduler.submit(ticket("new", 16))
    assert isinstance(scheduler.submit(ticket("refused")), Overloaded)
    assert scheduler.submit(Ticket(TicketId("next chunk"), 8, begun=True)) is None
    scheduler.replica_alive(ReplicaId("r"), 24)
    assert granted(scheduler.dispatch()) == ["next chunk", "new"]


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


def test_what_is_remembered_of_completed_work_is_bounded_without_any_refusal(
    scheduler: Scheduler, clock: Clock
) -> None:
    for index in range(1_000):
        clock.now = float(index)
        scheduler.replica_alive(ReplicaId("r"), 1)
        scheduler.submit(ticket(str(index)))
        scheduler.dispatch()
        scheduler.complete(TicketId(str(index)))
    assert len(scheduler._completed) <= RATE_WINDOW_S + 1


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
    assert scheduler.expire() == ["a"]
    assert scheduler.status().queued_rows == 8


def test_a_withdrawn_ticket_is_never_granted(scheduler: Scheduler) -> None:
    scheduler.submit(ticket("a", 3))
    scheduler.submit(ticket("b"))
    scheduler.withdraw(TicketId("a"))
    scheduler.replica_alive(ReplicaId("r"), 4)
    assert granted(scheduler.dispatch()) == ["b"]


def test_withdrawing_a_running_ticket_frees_its_room(scheduler: Scheduler) -> None:
    scheduler.replica_alive(ReplicaId("r"), 1)
    scheduler.submit(ticket("a"))
    scheduler.submit(ticket("b"))
    scheduler.dispatch()
    scheduler.withdraw(TicketId("a"))
    assert granted(scheduler.dispatch()) == ["b"]


def test_completing_twice_or_an_unknown_ticket_changes_nothing(scheduler: Scheduler) -> None:
    scheduler.replica_alive(ReplicaId("r"), 1)
    scheduler.submit(ticket("a"))
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
    scheduler.submit(ticket("orphan"))
    scheduler.dispatch()
    scheduler.submit(Ticket(TicketId("waiting"), 1, patience_s=100.0))
    clock.now = LIMITS.grant_timeout_s + 1
    scheduler.replica_alive(ReplicaId("r"), 1)
    scheduler.expire()
    assert granted(scheduler.dispatch()) == ["waiting"]


class SchedulerMachine(RuleBasedStateMachine):
    """Any order of events keeps the counts right and leaves no replica idle while somebody waits."""

    def __init__(self) -> None:
        super().__init__()
        self.clock = Clock()
        self.scheduler = Scheduler(self.clock, LIMITS)
        self.next_ticket = 0
        self.waiting: dict[str, int] = {}
        self.running: dict[str, int] = {}

    def dispatch(self) -> None:
        for name in granted(self.scheduler.dispatch()):
            self.running[name] = self.waiting.pop(name)

    @rule(num_rows=st.integers(1, 8))
    def submit(self, num_rows: int) -> None:
        name = str(self.next_ticket)
        self.next_ticket += 1
        if self.scheduler.submit(ticket(name, num_rows)) is None:
            self.waiting[name] = num_rows
        else:
            assert sum(self.waiting.values()) + num_rows > LIMITS.max_queued_rows
        self.dispatch()

    @rule(replica=st.sampled_from("abc"), capacity=st.integers(1, 8))
    def announce(self, replica: str, capacity: int) -> None:
        self.scheduler.replica_alive(ReplicaId(replica), capacity)
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

    @invariant()
    def counts_agree(self) -> None:
        status = self.scheduler.status()
        assert status.queued_rows == sum(self.waiting.values())
        assert status.running_rows == sum(self.running.values())

    @invariant()
    def no_replica_idles_while_somebody_waits(self) -> None:
        status = self.scheduler.status()
        assert not (self.waiting and status.replicas and not self.running)


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=40, stateful_step_count=30, deadline=None)
