"""What the payments actor measures of Stripe's books and of its inbox."""

from pathlib import Path

from billing.payments.commands import EventHint, ReceiveEvents
from deployments.payments.actor import PaymentsActor
from tests.support.payments import open_till


async def test_a_days_difference_and_the_age_of_what_waits_are_measured(tmp_path: Path) -> None:
    async with open_till(tmp_path) as till:
        actor = PaymentsActor(till.payments.config, "", None, b"secret")
        actor._payments = till.payments
        await actor._reconcile_yesterday()
        assert await actor.metrics() == {
            ("dream_stripe_difference_cents", ()): (0.0,),
            ("dream_stripe_inbox_age_seconds", ()): (0.0,),
        }
        till.ledger.apply(
            ReceiveEvents((EventHint("evt_1", "checkout.session.completed", till.clock(), "cs_1"),), "webhook")
        )
        till.clock.advance(90.0)
        await actor._reconcile_yesterday()
        assert (await actor.metrics())["dream_stripe_inbox_age_seconds", ()] == (90.0,)
