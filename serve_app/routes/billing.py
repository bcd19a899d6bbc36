"""A customer's balance and ledger rows, read from the database that the ledger commits to."""

from typing import Annotated

from fastapi import APIRouter, Query

from billing.money import cents, usd
from serve_app.context import Caller, Parts
from serve_app.schemas import Balance, Transaction, Transactions

MAX_LIMIT = 200

router = APIRouter(prefix="/v1/billing", tags=["billing"])


@router.get("/balance")
async def get_balance(parts: Parts, caller: Caller) -> Balance:
    balance = await parts.ask(parts.reader.balance, caller.customer_id)
    return Balance(
        customer_id=caller.customer_id,
        balance_mils=balance,
        balance_cents=cents(balance),
        balance_usd=usd(balance),
    )


@router.get("/transactions")
async def list_transactions(
    parts: Parts,
    caller: Caller,
    limit: Annotated[int, Query(ge=1, description="Rows, newest first; above 200 means 200")] = 50,
) -> Transactions:
    entries = await parts.ask(parts.reader.transactions, caller.customer_id, min(limit, MAX_LIMIT))
    return Transactions(
        customer_id=caller.customer_id,
        transactions=[
            Transaction(
                id=entry.public_id,
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
