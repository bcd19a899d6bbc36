"""The ledger against the simulation's dictionary, on real databases: teams, months, prices and provisioned units."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from benchmarks.ledger_oracle import Oracle
from billing.commands import (
    AddPrice,
    ChargeUnits,
    CloseStatement,
    Command,
    CreateKey,
    CustomerId,
    ExpireLeases,
    Grant,
    RequestId,
    Reserve,
    Reserved,
    SetCreditLine,
    SetMember,
    Settle,
    SetUnits,
    Transfer,
)
from billing.invariants import audit
from billing.money import Mils
from billing.price_terms import terms_of
from billing.prices import PriceVersion, Rate
from tests.billing.conftest import Clock, Desk
from tests.support.databases import Databases

NUM_CUSTOMERS = 4
MODEL = "m"
CUSTOMERS = st.integers(0, NUM_CUSTOMERS - 1).map(lambda n: CustomerId(f"cus_{n}"))
KEYS = st.integers(0, NUM_CUSTOMERS - 1).map(lambda n: f"key_{n}")
AMOUNTS = st.sampled_from([1, 100, 245, 1000])
PERIODS = st.sampled_from(["2026-12", "2027-01", "2027-02"])
VERSIONS = st.integers(1, 3)


def price(customer: str, version: int, since: float) -> AddPrice:
    terms = terms_of(PriceVersion(MODEL, version, since, (Rate("frame", version * 100_000),)))
    return AddPrice(MODEL, customer, version, since, terms)


def member(customer: CustomerId, parent: CustomerId, cap: int | None, period: str) -> SetMember:
    name = f"name {customer}"
    return SetMember(customer, name, parent, *((None, None) if cap is None else (Mils(cap), period)))  # type: ignore[arg-type]


# An id that is empty is filled in: every such command is new, and comes again only as it is.
COMMANDS: st.SearchStrategy[Command] = st.one_of(
    st.builds(
        lambda key, frames, mils, per: Reserve(
            RequestId(""), key, frames, Mils(mils), "", 60.0, model=MODEL, per_frames=per
        ),
        KEYS,
        st.sampled_from([1, 10, 49]),
        st.sampled_from([1, 5]),
        st.sampled_from([1, 3]),
    ),
    st.builds(lambda to, mils: Grant(to, Mils(mils), "", ""), CUSTOMERS, AMOUNTS),
    st.builds(lambda source, to, mils: Transfer("", source, to, Mils(mils), ""), CUSTOMERS, CUSTOMERS, AMOUNTS),
    st.builds(member, CUSTOMERS, CUSTOMERS, st.sampled_from([None, 0, 100, 500]), st.sampled_from(["day", "month"])),
    st.builds(SetCreditLine, CUSTOMERS, st.sampled_from([Mils(0), Mils(300)]), st.booleans()),
    st.builds(CloseStatement, CUSTOMERS, PERIODS),
    st.builds(price, st.just("") | CUSTOMERS, VERSIONS, st.sampled_from([10.0, 20.0])),
    st.builds(
        lambda customer, version, period, units: SetUnits(customer, MODEL, version, period, units, Mils(50), 30, 2),
        CUSTOMERS,
        VERSIONS,
        PERIODS,
        st.integers(0, 3),
    ),
    st.just(ChargeUnits()),
    st.just(ExpireLeases()),
)


class AccountsAgainstOracle(RuleBasedStateMachine):
    databases: Databases

    def __init__(self) -> None:
        super().__init__()
        self.resources = ExitStack()
        self.desk = Desk(self.resources.enter_context(self.databases.migrated()), Clock())
        self.oracle = Oracle()
        self.sent: list[Command] = []
        self.requests: list[Reserve] = []
        self.apply(
            [
                CreateKey(f"key_{n}", str(n) * 64, "abcd", f"name cus_{n}", f"cus_{n}", Mils(1000), 50.0, 200)  # type: ignore[arg-type]
                for n in range(NUM_CUSTOMERS)
            ]
        )

    def teardown(self) -> None:
        self.resources.close()

    def apply(self, commands: Sequence[Command]) -> None:
        answers = self.desk.ledger.apply(commands)
        for command, answer in zip(commands, answers, strict=True):
            wrong = self.oracle.disputes(command, answer, self.desk.clock.now)
            assert wrong is None, (command, answer, wrong)
            if isinstance(command, Reserve) and isinstance(answer, Reserved):
                self.requests.append(command)

    def named(self, command: Command) -> Command:
        self.sent.append(command)
        name = f"id_{len(self.sent)}"
        match command:
            case Reserve():
                command = replace(command, request_id=RequestId(name))
            case Grant():
                command = replace(command, public_id=name)
            case Transfer():
                command = replace(command, transfer_id=name)
        self.sent[-1] = command
        return command

    @rule(commands=st.lists(COMMANDS, min_size=1, max_size=6))
    def a_batch(self, commands: list[Command]) -> None:
        self.apply([self.named(command) for command in commands])

    @rule(number=st.integers(0, 200))
    def an_earlier_command_comes_again(self, number: int) -> None:
        if self.sent:
            self.apply([self.sent[number % len(self.sent)]] * 2)

    @rule(number=st.integers(0, 200), delivered=st.sampled_from([0, 1, 7, 49]))
    def a_request_is_settled(self, number: int, delivered: int) -> None:
        if self.requests:
            request = self.requests[number % len(self.requests)]
            self.apply([Settle(request.request_id, min(delivered, request.frames), "")])

    @rule(seconds=st.sampled_from([1.0, 61.0, 86_400.0, 20 * 86_400.0]))
    def time_goes_on(self, seconds: float) -> None:
        self.desk.clock.advance(seconds)

    @rule()
    def another_writer_takes_over(self) -> None:
        self.desk.ledger = self.desk.new_ledger()

    @invariant()
    def every_audit_is_empty(self) -> None:
        assert audit(self.desk.engine) == []

    @invariant()
    def balances_are_the_oracles(self) -> None:
        for customer, account in self.oracle.accounts.items():
            assert self.desk.reader.balance(CustomerId(customer)) == account.balance


def test_accounts_answer_as_the_oracle_does(databases: Databases):
    class Machine(AccountsAgainstOracle):
        pass

    Machine.databases = databases
    run_state_machine_as_test(
        Machine,
        settings=settings(
            max_examples=15 if databases.kind == "sqlite" else 4,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )
