"""Whatever the order, the number and the moment in which news of a payment comes, the balance ends the same."""

import asyncio
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from billing.commands import CustomerId
from billing.payments.commands import Topup
from deployments.payments import sweeps
from tests.fakestripe.state import BANK, GOOD
from tests.support.payments import Till, open_till

Act = Callable[[Till, Topup], None]


def _pay(till: Till, topup: Topup) -> None:
    till.fake.state.pay_session(topup.session_id, GOOD)


def _pay_by_bank(till: Till, topup: Topup) -> None:
    till.fake.state.pay_session(topup.session_id, BANK)


def _bank_succeeds(till: Till, topup: Topup) -> None:
    till.fake.state.settle_bank(topup.session_id, succeeds=True)


def _bank_fails(till: Till, topup: Topup) -> None:
    till.fake.state.settle_bank(topup.session_id, succeeds=False)


def _intent(till: Till, topup: Topup) -> str:
    session = till.fake.state.get("checkout.session", topup.session_id)
    return str(session["payment_intent"])


def _refund(cents: int) -> Act:
    def refund(till: Till, topup: Topup) -> None:
        till.fake.state.create_refund({"payment_intent": _intent(till, topup), "amount": cents})

    return refund


def _refund_fails(till: Till, topup: Topup) -> None:
    refund = next(each for each in till.fake.state.all("refund") if each["payment_intent"] == _intent(till, topup))
    till.fake.state.fail_refund(refund["id"])


def _dispute(till: Till, topup: Topup) -> None:
    till.fake.state.open_dispute(_intent(till, topup), 1_000)


def _disputed(till: Till, topup: Topup) -> str:
    dispute = next(each for each in till.fake.state.all("dispute") if each["payment_intent"] == _intent(till, topup))
    return str(dispute["id"])


def _withdraw(till: Till, topup: Topup) -> None:
    till.fake.state.withdraw_dispute(_disputed(till, topup))


def _lose(till: Till, topup: Topup) -> None:
    till.fake.state.close_dispute(_disputed(till, topup), won=False)


def _win(till: Till, topup: Topup) -> None:
    till.fake.state.close_dispute(_disputed(till, topup), won=True)


STORIES: dict[str, tuple[tuple[Act, ...], int]] = {
    "paid": ((_pay,), 250_000),
    "refunded in parts": ((_pay, _refund(300), _refund(500)), 170_000),
    "a refund that failed": ((_pay, _refund(300), _refund(500), _refund_fails), 220_000),
    "a dispute that was lost": ((_pay, _dispute, _withdraw, _lose), 150_000),
    "a dispute that was won": ((_pay, _dispute, _withdraw, _win), 250_000),
    "a dispute that was won, then a refund": ((_pay, _dispute, _withdraw, _win, _refund(2_500)), 0),
    "a refund, then a dispute that was lost": ((_pay, _refund(400), _dispute, _withdraw, _lose), 110_000),
    "a bank debit": ((_pay_by_bank, _bank_succeeds, _refund(100)), 240_000),
    "a bank debit that failed": ((_pay_by_bank, _bank_fails), 0),
}
"""What happens at Stripe to a payment of $25.00, and the mils that it leaves."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Any], Any]]:
    """Runs a coroutine function on one till that all examples share."""
    with asyncio.Runner() as runner:
        opening = open_till(tmp_path_factory.mktemp("till"))
        till = runner.run(opening.__aenter__())
        yield lambda example: runner.run(example(till))
        runner.run(opening.__aexit__(None, None, None))


async def tell(till: Till, story: tuple[Act, ...], seed: int, sweeps_only: bool) -> CustomerId:
    """The story happens; in between, whatever was sent so far is delivered in any order, twice, together or not at
    all, and sweeps look. At the end either everything has been delivered, or one sweep has run."""
    chance = random.Random(seed)
    customer = till.customer()
    topup = await till.payments.topup(customer, 2_500, "http://cluster.test")
    first = len(till.fake.state.events)

    async def hear() -> None:
        sent = till.fake.state.events[first:]
        for _ in range(chance.randrange(3)):
            match chance.randrange(5):
                case 0 if sent:
                    await till.receive(*chance.choices(sent, k=chance.randrange(1, 4)))
                case 1:
                    await till.payments.drain()
                case 2:
                    await sweeps.sweep_events(till.payments)
                case 3:
                    await sweeps.sweep_objects(till.payments, older_than_s=0)
                case 4 if sent:
                    await till.receive(*chance.sample(sent, k=len(sent)))
                    await asyncio.gather(
                        till.payments.drain(), *(till.payments.look(topup.topup_id) for _ in range(chance.randrange(3)))
                    )

    for act in story:
        await hear()
        act(till, topup)
        till.clock.advance(1)
    await hear()
    if sweeps_only:
        await sweeps.sweep_events(till.payments)
    else:
        for event in chance.sample(till.fake.state.events[first:], k=len(till.fake.state.events) - first):
            await till.receive(event)
            if chance.random() < 0.5:
                await till.payments.drain()
        await till.payments.drain()
    return customer


@settings(max_examples=2)
@given(seed=st.integers(0, 2**32), sweeps_only=st.booleans())
@pytest.mark.parametrize("story", STORIES)
def test_every_order_of_a_payments_events_ends_in_the_same_balance(
    run: Callable[[Any], Any], story: str, seed: int, sweeps_only: bool
) -> None:
    acts, expected = STORIES[story]

    async def example(till: Till) -> None:
        customer = await tell(till, acts, seed, sweeps_only)
        assert till.balance(customer) == expected
        times_credited = till.ledger.rows(customer).count(("credit", 250_000))  # a reinstatement is smaller
        assert times_credited == (0 if story == "a bank debit that failed" else 1)
        assert till.payments.reader.ledger_mismatches() == []

    run(example)
