"""A month of payments in a simulated world, in which every part fails: at the end the books agree to the cent.

    python -m benchmarks.payments_simulation --customers 200 --days 30 --seed 1

The real service and ledger run against the fake Stripe on a real port. Customers top up by card and by bank, spend,
are charged automatically or invoiced, are refunded, dispute; requests to Stripe fail in every way it has; webhooks are
lost, doubled, late and stale. Every day the books are compared as in production; at the end every day is once more,
and each customer's money is summed on Stripe's own side and on the ledger's. Prints one JSON line; the exit code is 1
if anything differs.
"""

import argparse
import asyncio
import json
import logging
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import structlog

from billing.commands import CreditLineSet, CustomerId, Reserve, Reserved, SetCreditLine, Settle
from billing.keys import mint_request_id
from billing.money import MILS_PER_CENT, Mils
from deployments.payments import events, invoices, sweeps
from deployments.payments.errors import PaymentError
from tests.fakestripe.server import WEBHOOK_SECRET
from tests.fakestripe.state import BANK, DECLINED, DECLINED_LATER, GOOD, INSUFFICIENT, SUSPICIOUS, Refused
from tests.support.payments import BASE_URL, START, Till, open_till

DAY_S = 86_400
STEPS_PER_DAY = 6
SECRET = b"simulation" * 4
CARDS = (GOOD,) * 12 + (BANK, BANK, SUSPICIOUS, DECLINED, INSUFFICIENT)


class World:
    def __init__(self, till: Till, customers: int, seed: int) -> None:
        self.till = till
        self.chance = random.Random(seed)
        self.customers = [till.customer() for _ in range(customers)]
        self.postpaid = self.customers[1::4]
        self.happened: Counter[str] = Counter()
        with till.ledger.database.connect() as connection:
            rows = connection.exec_driver_sql("SELECT customer_id, key_id FROM api_key").all()
        self.keys = {row[0]: row[1] for row in rows}

    async def set_up(self) -> None:
        till = self.till

        async def webhook(request: httpx.Request) -> httpx.Response:
            try:
                signature = request.headers["stripe-signature"]
                hint = events.verified(request.content, signature, (WEBHOOK_SECRET,), till.clock())
            except events.NotAnEvent:
                return httpx.Response(400)
            await till.receive_hint(hint)
            return httpx.Response(200)

        await till.fake.webhooks.client.aclose()
        till.fake.webhooks.client = httpx.AsyncClient(transport=httpx.MockTransport(webhook))
        till.fake.webhooks.url = "http://webhook.test"
        for customer in self.customers[::3]:
            await till.agree(customer, threshold_mils=Mils(30_000), daily_cap_cents=20_000, monthly_cap_cents=200_000)
        for customer in self.postpaid:
            limit = SetCreditLine(customer, Mils(2_000_000))
            assert isinstance(till.ledger.apply(limit), CreditLineSet)
        faults = till.fake.faults
        faults.random = random.Random(self.chance.random())
        faults.api_probability, faults.webhook_probability = 0.02, 0.25
        faults.api_kinds = ("500_after", "500_before", "409", "429", "timeout")

    async def live_a_step(self) -> None:
        """A few hours: what customers, banks and the operator do, then the loops that always run."""
        till, chance = self.till, self.chance
        for customer in self.customers:
            if customer not in self.postpaid and chance.random() < 0.06:
                await self.top_up(customer)
            if chance.random() < 0.15:
                await self.spend(customer)
        payments = [each for each in till.fake.state.all("payment_intent") if each["status"] == "succeeded"][:200]
        for act, share in ((self.refund, 0.01), (self.dispute, 0.003)):
            for payment in payments:
                if chance.random() < share:
                    act(payment)
        self.settle_what_is_pending()
        till.clock.advance(DAY_S / STEPS_PER_DAY)
        till.fake.state.tick()
        await till.fake.deliver()
        await self.survive(till.payments.drain())
        await self.survive(till.payments.top_up_low_balances())
        await self.survive(invoices.bill_last_month(till.payments))
        await self.survive(sweeps.sweep_objects(till.payments))
        await self.survive(sweeps.sweep_events(till.payments))

    async def survive(self, loop: Any) -> None:
        """As the actor does: what fails is tried again at the next turn."""
        try:
            await loop
        except PaymentError:
            self.happened["loop failed"] += 1

    async def top_up(self, customer: CustomerId) -> None:
        card = self.chance.choice(CARDS)
        try:
            topup = await self.till.payments.topup(customer, self.chance.choice((500, 1_000, 2_500, 12_345)), BASE_URL)
        except PaymentError:
            self.happened["page not opened"] += 1
            return
        if self.chance.random() < 0.15:
            self.happened["page left"] += 1
            return
        try:
            self.till.fake.state.pay_session(topup.session_id, card)
            self.happened["page paid"] += 1
        except Refused:
            self.happened["card declined"] += 1
        if self.chance.random() < 0.3:
            await self.survive(self.till.payments.look(topup.topup_id))  # the customer comes back to our page
        if self.chance.random() < 0.05:  # a saved card goes bad
            known = self.till.payments.reader.customer(customer)
            if known is not None and known.payment_method:
                self.till.fake.state.cards[known.payment_method] = DECLINED_LATER

    async def spend(self, customer: CustomerId) -> None:
        frames = self.chance.randrange(1, 8_000)
        reserve = Reserve(mint_request_id(), self.keys[customer], frames, Mils(5), "work", 60.0)
        outcome = await asyncio.to_thread(self.till.ledger.apply, reserve)
        if isinstance(outcome, Reserved):
            await asyncio.to_thread(
                self.till.ledger.apply, Settle(reserve.request_id, self.chance.randrange(frames), "")
            )
        else:
            self.happened["refused for want of credits"] += 1
            await self.survive(self.till.payments.shortage(customer, Mils(frames * 5)))

    def refund(self, payment: dict[str, Any]) -> None:
        state = self.till.fake.state
        charge = state.get("charge", payment["latest_charge"])
        left = charge["amount"] - charge["amount_refunded"]
        if charge["disputed"] or not left:
            return
        refund = state.create_refund({"payment_intent": payment["id"], "amount": self.chance.randrange(1, left + 1)})
        self.happened["refund"] += 1
        if self.chance.random() < 0.2:
            state.fail_refund(refund["id"])
            self.happened["refund failed"] += 1

    def dispute(self, payment: dict[str, Any]) -> None:
        state = self.till.fake.state
        charge = state.get("charge", payment["latest_charge"])
        left = charge["amount"] - charge["amount_refunded"]
        if charge["disputed"] or not left:
            return
        state.withdraw_dispute(state.open_dispute(payment["id"], left)["id"])
        self.happened["dispute"] += 1

    def settle_what_is_pending(self) -> None:
        state, chance = self.till.fake.state, self.chance
        for session in list(state.all("checkout.session")):
            if session["status"] != "complete" or session["payment_status"] != "unpaid" or chance.random() > 0.3:
                continue
            if state.get("payment_intent", session["payment_intent"])["status"] == "processing":
                state.settle_bank(session["id"], succeeds=chance.random() < 0.8)
        for invoice in list(state.all("invoice")):
            if invoice["status"] == "open" and chance.random() < 0.02:
                state.pay_invoice(invoice["id"])
                self.happened["invoice paid"] += 1
        for dispute in list(state.all("dispute")):
            if dispute["status"] == "needs_response" and chance.random() < 0.1:
                state.close_dispute(dispute["id"], won=chance.random() < 0.5)
                self.happened["dispute closed"] += 1

    def differences(self) -> dict[CustomerId, int]:
        """Stripe's own objects summed per customer, less the ledger's payments, in cents; only what differs."""
        state, reader = self.till.fake.state, self.till.payments.reader
        owners = reader.customers()
        theirs: Counter[CustomerId] = Counter()
        for charge in state.all("charge"):
            theirs[owners[charge["customer"]]] += charge["amount"] - charge["amount_refunded"]
        for dispute in state.all("dispute"):
            moved = sum(each["amount"] for each in dispute["balance_transactions"])
            theirs[owners[state.get("charge", dispute["charge"])["customer"]]] += moved
        ours = reader.held_of_payments()
        return {
            customer: theirs[customer] - ours.get(customer, 0) // MILS_PER_CENT
            for customer in self.customers
            if theirs[customer] * MILS_PER_CENT != ours.get(customer, 0)
        }


async def simulate(directory: Path, customers: int, days: int, seed: int) -> dict[str, Any]:
    started = time.perf_counter()
    async with open_till(directory, request_timeout_s=0.25) as till:
        world = World(till, customers, seed)
        await world.set_up()
        for day in range(days):
            for _ in range(STEPS_PER_DAY):
                await world.live_a_step()
            await world.survive(sweeps.reconcile(till.payments, int(START // DAY_S) + day, SECRET))
        till.fake.faults.api_probability = till.fake.faults.webhook_probability = 0.0
        for _ in range(3):  # what is late comes, and nothing else happens
            till.clock.advance(DAY_S)
            till.fake.state.tick()
            await till.fake.deliver()
            await sweeps.sweep_events(till.payments)
            await sweeps.sweep_objects(till.payments, older_than_s=0.0)
            await invoices.bill_last_month(till.payments)
        first = int(START // DAY_S)
        reports = [await sweeps.reconcile(till.payments, first + day, SECRET) for day in range(days + 4)]
        inbox = till.payments.reader.inbox()
        compared = sum(len(json.loads(report.body)["customers"]) for report in reports)
        return {
            "customers": customers,
            "days": days,
            "seed": seed,
            "customer_days_compared": compared,
            "difference_cents": sum(report.difference_cents for report in reports),
            "customers_that_differ": len(world.differences()),
            "unknown_payments": sum(len(json.loads(report.body)["unknown_payments"]) for report in reports),
            "events_pending": inbox.pending,
            "events": len(till.fake.state.events),
            "invoices": dict(Counter(each["status"] for each in till.fake.state.all("invoice"))),
            "charges": len(list(till.fake.state.all("charge"))),
            "requests_to_stripe": len(till.fake.api.calls),
            **world.happened,
            "wall_s": round(time.perf_counter() - started, 1),
        }


def agrees(result: dict[str, Any]) -> bool:
    named = ("difference_cents", "customers_that_differ", "unknown_payments", "events_pending")
    return all(result[name] == 0 for name in named)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--customers", type=int, default=200)
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    with tempfile.TemporaryDirectory() as directory:
        result = asyncio.run(simulate(Path(directory), options.customers, options.days, options.seed))
    print(json.dumps(result))
    sys.exit(0 if agrees(result) else 1)
