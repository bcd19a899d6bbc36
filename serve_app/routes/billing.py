"""A customer's balance and ledger rows, read from the database that the ledger commits to."""

import time
from typing import Annotated

from fastapi import APIRouter, Query

from billing.money import Mils, cents, usd
from billing.reader import MAX_SEQ
from serve_app.catalog import CATALOG, STANDARD_FRAMES, model_spec
from serve_app.context import ActiveSlug, Caller, Parts
from serve_app.schemas import Balance, Transaction, Transactions

MAX_LIMIT = 200
HOUR_S = 3_600
MPC_FRAMES_PER_HOUR = 10 * 8 * STANDARD_FRAMES * HOUR_S
"""10 decisions a second, each among 8 candidates: 14,112,000 frames."""
SPENDING_WINDOW_S = 60

router = APIRouter(prefix="/v1/billing", tags=["billing"])


@router.get("/balance")
async def get_balance(parts: Parts, caller: Caller, active: ActiveSlug) -> Balance:
    customer = await parts.ask(parts.reader.customer, caller.customer_id)
    assert customer is not None, "a key has a customer"
    balance, now = customer.balance_mils, time.time()
    spendable = await parts.ask(parts.reader.spendable, caller.customer_id, now)
    covered = await parts.ask(parts.units.frames_left, now, caller.customer_id, active)
    spent = await parts.ask(parts.usage.spent_since, caller.customer_id, now - SPENDING_WINDOW_S)
    per_hour = Mils(round(spent * HOUR_S / SPENDING_WINDOW_S))
    model = model_spec(CATALOG[active])
    rollout = await parts.prices.price(model, STANDARD_FRAMES, caller.customer_id)
    mpc_hour = await parts.prices.price(model, MPC_FRAMES_PER_HOUR, caller.customer_id)
    return Balance(
        customer_id=caller.customer_id,
        balance_mils=balance,
        balance_cents=cents(balance),
        balance_usd=usd(balance),
        spendable_mils=spendable,
        debt_mils=customer.debt_mils,
        model=active,
        rollouts_left=covered // STANDARD_FRAMES + spendable // rollout.total_mils,
        mpc_hours_left=round(spendable / mpc_hour.total_mils, 4),
        spending_mils_per_hour=per_hour,
        hours_left=round(spendable / per_hour, 4) if per_hour > 0 else None,
    )


@router.get("/transactions")
async def list_transactions(
    parts: Parts,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, description="Rows, newest first; above 200 means 200")] = 50,
    before_seq: Annotated[int, Query(ge=1, le=MAX_SEQ, description="Those before this one")] = MAX_SEQ,
) -> Transactions:
    entries = await parts.ask(parts.reader.transactions, caller.customer_id, min(limit, MAX_LIMIT), before_seq)
    return Transactions(
        customer_id=caller.customer_id,
        transactions=[
            Transaction(
                id=entry.public_id,
                seq=entry.seq,
                ts=entry.ts,
                kind=entry.kind,
                amount_mils=entry.amount_mils,
                amount_cents=cents(entry.amount_mils),
                amount_usd=usd(entry.amount_mils),
                balance_after_mils=entry.balance_after_mils,
                balance_after_cents=cents(entry.balance_after_mils),
                balance_after_usd=usd(entry.balance_after_mils),
                detail=entry.detail,
            )
            for entry in entries
        ],
    )
