"""The ledger against a dictionary: any sequence of batches, retries, conflicts, clock steps and take-overs."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from billing.commands import (
    Command,
    CreateKey,
    Credit,
    Credited,
    CreditLineSet,
    ExpireLeases,
    Grant,
    Granted,
    Heartbeat,
    HeartbeatDone,
    IdempotencyConflict,
    InsufficientCredits,
    KeyCreated,
    KeyRefused,
    KeyRevoked,
    LeasesExpired,
    Outcome,
    Rejected,
    Repeated,
    Reserve,
    Reserved,
    Reverse,
    Reversed,
    RevokeKey,
    SetCreditLine,
    Settle,
    Settled,
    UnknownCustomer,
    UnknownKey,
    UnknownPayment,
    UnknownReservation,
)
from billing.core.reservations import KEY_MEMORY_S
from billing.invariants import audit
from billing.keys import initial_grant_id
from billing.money import Mils
from tests.billing.conftest import GRACE_S, Clock, Desk
from tests.support.databases import Databases


class Oracle:
    """What the ledger promises, as slowly and plainly as it can be said. Rows are (kind, amount, id)."""

    def __init__(self) -> None:
        self.rows: dict[str, list[tuple[str, int, str]]] = {}
        self.names: dict[str, str] = {}
        self.keys: dict[str, dict[str, Any]] = {}
        self.requests: dict[str, dict[str, Any]] = {}
        self.credits: dict[str, tuple[str, Granted]] = {}
        self.payments: dict[str, dict[str, Any]] = {}
        self.debts: dict[str, int] = {}
        self.lines: dict[str, tuple[int, int, int]] = {}
        self.now = self.written_at = 0.0
        """The writer's own time, which does not run back, and that of the newest row."""

    def balance(self, customer: str) -> Mils:
        return Mils(sum(amount for _, amount, _ in self.rows[customer]))

    def tick(self, now: float) -> None:
        self.now = max(self.now, now)

    def write(self, customer: str, *row: Any) -> None:
        self.rows[customer].append(row)
        self.written_at = self.now

    def take_over(self, now: float) -> None:
        self.now = self.written_at
        for request in self.requests.values():
            request["lease"] = max(request["lease"], now + GRACE_S)

    def answer(self, command: Command, now: float) -> Outcome:
        match command:
            case Reserve(request_id, key_id, frames, rate, _, lease_s, name, payload, window_s):
                earlier = self.requests.get(request_id)
                if earlier is not None:
                    same = earlier["work"] == (key_id, frames, rate)
                    if earlier["sent"] and payload:
                        same &= earlier["sent"] == (name, payload)
                    return earlier["reserved"] if same else Rejected("")
                key = self.keys.get(key_id)
                if key is None or key["revoked"]:
                    return KeyRefused()
                customer, amount = key["customer"], Mils(frames * rate)
                repeated = self.repeated(customer, name, payload, self.now - window_s if window_s else None)
                if repeated is not None:
                    return repeated
                if amount > max(0, self.balance(customer) - self.floor(customer)):
                    return InsufficientCredits(self.balance(customer), amount, Mils(self.debts.get(customer, 0)))
                self.write(customer, "debit", -amount, request_id)
                reserved = Reserved(request_id, customer, amount, self.balance(customer))
                self.requests[request_id] = {
                    "work": (key_id, frames, rate),
                    "customer": customer,
                    "reserved": reserved,
                    "settled": None,
                    "lease": now + lease_s,
                    "at": self.now,
                    "sent": (name, payload) if payload else None,
                }
                return reserved
            case Settle(request_id, delivered, _):
                request = self.requests.get(request_id)
                if request is None:
                    return UnknownReservation(request_id)
                if delivered > request["work"][1]:
                    return Rejected("")
                return self.settle(request_id, delivered)
            case Heartbeat(request_ids, lease_s):
                renewed = 0
                for request_id in set(request_ids):
                    request = self.requests.get(request_id)
                    if request is not None and request["settled"] is None:
                        renewed += 1
                        request["lease"] = max(request["lease"], now + lease_s)
                return HeartbeatDone(renewed)
            case Grant(customer, amount, public_id, _):
                if public_id in self.credits:
                    owner, granted = self.credits[public_id]
                    return granted if (owner, granted.amount_mils) == (customer, amount) else Rejected("")
                if customer not in self.rows:
                    return UnknownCustomer(customer)
                return self.credit(customer, amount, public_id)
            case Credit(customer, amount, source, public_id, _, _):
                if source in self.payments:
                    payment = self.payments[source]
                    same = (payment["customer"], payment["credited"].amount_mils) == (customer, amount)
                    return payment["credited"] if same else Rejected("")
                if public_id in self.credits:
                    return Rejected("")
                if customer not in self.rows:
                    return UnknownCustomer(customer)
                granted = self.credit(customer, amount, public_id)
                credited = Credited(source, public_id, amount, granted.balance_after_mils)
                self.payments[source] = {"customer": customer, "credited": credited, "reversed": 0}
                return credited
            case Reverse(source, target, public_id, _, _):
                if source not in self.payments:
                    return UnknownPayment(source)
                payment = self.payments[source]
                customer, most = payment["customer"], payment["credited"].amount_mils
                change = min(target, most) - payment["reversed"]
                taken = min(change, max(0, self.balance(customer) - self.floor(customer)))
                if taken:
                    self.write(customer, "debit" if taken > 0 else "credit", -taken, public_id)
                self.debts[customer] = self.debts.get(customer, 0) + change - taken
                payment["reversed"] += change
                self.repay(customer, public_id)
                return Reversed(
                    source, customer, Mils(payment["reversed"]), self.balance(customer), Mils(self.debts[customer])
                )
            case SetCreditLine(customer, limit, overdue):
                if customer not in self.rows:
                    return UnknownCustomer(customer)
                if self.balance(customer) < -limit:
                    return Rejected("")
                before = self.lines.get(customer, (0, 0, 0))
                floor = 0 if overdue else -limit
                if before[:2] != (limit, floor):
                    self.lines[customer] = (limit, floor, before[2] + 1)
                    self.repay(customer, f"{customer}.line.{before[2] + 1}")
                return CreditLineSet(customer, limit, Mils(floor))
            case CreateKey(key_id, sha256, _, name, customer, credit):
                if key_id in self.keys:
                    key = self.keys[key_id]
                    return key["created"] if key["made_as"] == (sha256, name) else Rejected("")
                if any(key["made_as"][0] == sha256 for key in self.keys.values()):
                    return Rejected("")
                if credit and initial_grant_id(key_id) in self.credits:
                    return Rejected("")
                if name not in self.names:
                    if customer in self.rows:
                        return Rejected("")
                    self.names[name], self.rows[customer] = customer, []
                    self.written_at = self.now
                customer = self.names[name]
                if credit:
                    self.credit(customer, credit, initial_grant_id(key_id))
                created = KeyCreated(key_id, customer, self.balance(customer))
                self.keys[key_id] = {
                    "made_as": (sha256, name),
                    "customer": customer,
                    "created": created,
                    "revoked": False,
                }
                return created
            case RevokeKey(key_id):
                if key_id not in self.keys:
                    return UnknownKey(key_id)
                self.keys[key_id]["revoked"] = True
                return KeyRevoked(key_id, 0.0)
            case ExpireLeases():
                run_out = sorted(
                    (request["lease"], request_id)
                    for request_id, request in self.requests.items()
                    if request["settled"] is None and request["lease"] <= now
                )
                for _, request_id in run_out:
                    self.settle(request_id, 0)
                for request in self.requests.values():
                    if request["settled"] is not None and request["at"] <= now - KEY_MEMORY_S:
                        request["sent"] = None
                return LeasesExpired(tuple(request_id for _, request_id in run_out))

    def repeated(
        self, customer: str, name: str, payload: str, since: float | None
    ) -> Repeated | IdempotencyConflict | None:
        mine = [each for each in self.requests.values() if each["customer"] == customer and each["sent"]]
        if name:
            mine = [each for each in mine if each["sent"][0] == name]
            if mine and mine[-1]["sent"][1] != payload:
                return IdempotencyConflict(mine[-1]["reserved"].request_id)
        else:
            mine = [each for each in mine if each["sent"][1] == payload and since is not None]
            mine = [each for each in mine if each["settled"] is None or each["settled_at"] >= since]
        for each in reversed(mine):
            if each["settled"] is None:
                return Repeated(each["reserved"].request_id, "open", Mils(0), each["at"])
            if each["settled"].captured_mils:
                return Repeated(each["reserved"].request_id, "settled", each["settled"].captured_mils, each["at"])
        return None

    def settle(self, request_id: str, delivered: int) -> Settled:
        request = self.requests[request_id]
        if request["settled"] is None:
            customer, (_, frames, rate) = request["customer"], request["work"]
            if delivered < frames:
                self.write(customer, "refund", (frames - delivered) * rate, request_id)
                self.repay(customer, request_id)
            captured, refunded = Mils(delivered * rate), Mils((frames - delivered) * rate)
            request["settled_at"] = self.now
            request["settled"] = Settled(request_id, captured, refunded, self.balance(customer))
        return request["settled"]

    def floor(self, customer: str) -> int:
        return self.lines.get(customer, (0, 0, 0))[1]

    def repay(self, customer: str, public_id: str) -> None:
        amount = min(self.debts.get(customer, 0), self.balance(customer) - self.floor(customer))
        if amount > 0:
            self.write(customer, "debit", -amount, public_id)
            self.debts[customer] -= amount

    def credit(self, customer: str, amount: Mils, public_id: str) -> Granted:
        self.write(customer, "credit", amount, public_id)
        granted = Granted(public_id, amount, self.balance(customer))
        self.credits[public_id] = (customer, granted)
        self.repay(customer, public_id)
        return granted


def one_of(prefix: str, count: int) -> st.SearchStrategy[str]:
    """Few ids, so that retries and conflicts are common."""
    return st.integers(0, count - 1).map(lambda n: f"{prefix}_{n}")


REQUESTS, KEYS, CUSTOMERS = one_of("req", 12), one_of("key", 4), one_of("cus", 3)
LEASES = st.sampled_from([1.0, 30.0, 60.0])
FRAMES = st.sampled_from([1, 2, 10, 49])
COMMANDS: st.SearchStrategy[Command] = st.one_of(
    st.builds(Reserve, REQUESTS, KEYS, FRAMES, st.sampled_from([1, 5, 5, 5]), st.just("predict"), LEASES),
    st.builds(
        Reserve,
        REQUESTS,
        KEYS,
        FRAMES,
        st.just(5),
        st.just("predict"),
        LEASES,
        st.sampled_from(["", "name_0", "name_1"]),
        st.sampled_from(["a" * 64, "b" * 64]),
        st.sampled_from([0.0, 1.0, 60.0]),
    ),
    st.builds(Settle, REQUESTS, st.integers(0, 50), st.sampled_from(["", "engine_failed"])),
    st.builds(Heartbeat, st.lists(REQUESTS, max_size=4).map(tuple), LEASES),
    st.builds(
        Grant,
        CUSTOMERS,
        st.sampled_from([1, 245, 1000]),
        one_of("adm", 3) | KEYS.map(initial_grant_id),
        st.just("grant"),
    ),
    st.builds(
        CreateKey,
        KEYS,
        st.integers(0, 3).map(lambda n: str(n) * 64),
        st.just("abcd"),
        one_of("name", 3),
        CUSTOMERS,
        st.sampled_from([0, 245, 1000]),
        st.just(50.0),
        st.just(200),
    ),
    st.builds(
        Credit,
        CUSTOMERS,
        st.sampled_from([245, 1000]),
        one_of("stripe", 3),
        one_of("evt", 4) | one_of("adm", 3),
        st.just("top-up"),
    ),
    st.builds(Reverse, one_of("stripe", 3), st.sampled_from([0, 100, 245, 2000]), one_of("evt", 4), st.just("refund")),
    st.builds(SetCreditLine, CUSTOMERS, st.sampled_from([0, 100, 500]), st.booleans()),
    st.builds(RevokeKey, KEYS),
    st.just(ExpireLeases()),
)


class LedgerAgainstOracle(RuleBasedStateMachine):
    databases: Databases

    def __init__(self) -> None:
        super().__init__()
        self.resources = ExitStack()
        self.desk = Desk(self.resources.enter_context(self.databases.migrated()), Clock())
        self.oracle = Oracle()
        # A funded key from the start: without one, most sequences would only collect refusals.
        self.apply([CreateKey("key_0", "0" * 64, "abcd", "name_0", "cus_0", Mils(1000), 50.0, 200)])

    def teardown(self) -> None:
        self.resources.close()

    def apply(self, commands: Sequence[Command]) -> None:
        self.oracle.tick(self.desk.clock.now)
        expected = [self.oracle.answer(command, self.desk.clock.now) for command in commands]
        answers = self.desk.ledger.apply(commands)
        for command, answer, right in zip(commands, answers, expected, strict=True):
            match right:
                case Rejected():
                    assert isinstance(answer, Rejected), (command, answer)
                case KeyRevoked():
                    assert isinstance(answer, KeyRevoked), (command, answer)
                case _:
                    assert answer == right, command

    @rule(command=COMMANDS)
    def one_command(self, command: Command) -> None:
        self.apply([command])

    @rule(commands=st.lists(COMMANDS, min_size=2, max_size=8))
    def a_batch(self, commands: list[Command]) -> None:
        self.apply(commands)

    @rule(command=COMMANDS)
    def a_retry_of_a_retry(self, command: Command) -> None:
        self.apply([command, command])
        self.apply([command])

    @rule(seconds=st.sampled_from([0.5, 1.0, 29.5, 30.0, 61.0, -10.0, KEY_MEMORY_S]))
    def the_clock_steps(self, seconds: float) -> None:
        self.desk.clock.advance(seconds)

    @rule()
    def another_writer_takes_over(self) -> None:
        self.desk.ledger = self.desk.new_ledger()
        self.oracle.take_over(self.desk.clock.now)

    @invariant()
    def every_audit_is_empty(self) -> None:
        assert audit(self.desk.engine) == []

    @invariant()
    def customers_see_what_the_oracle_remembers(self) -> None:
        for customer, rows in self.oracle.rows.items():
            seen = self.desk.reader.transactions(customer, 200)
            assert [(row.kind, row.amount_mils, row.public_id) for row in reversed(seen)] == rows[-200:]
            assert self.desk.reader.balance(customer) == self.oracle.balance(customer)

    @invariant()
    def reservations_are_as_open_as_the_oracle_remembers(self) -> None:
        for request_id, request in self.oracle.requests.items():
            record = self.desk.reader.reservation(request_id)
            assert record is not None
            assert (record.state == "open") == (request["settled"] is None)
            if record.state == "open":
                assert record.lease_until == request["lease"]


def test_the_ledger_answers_as_the_oracle_does(databases: Databases):
    class Machine(LedgerAgainstOracle):
        pass

    Machine.databases = databases
    run_state_machine_as_test(
        Machine,
        settings=settings(
            # The same code decides on both; PostgreSQL takes five times as long for each example.
            max_examples=40 if databases.kind == "sqlite" else 12,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
