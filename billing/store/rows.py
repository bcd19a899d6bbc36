"""A record of the core as a row of its table, and back."""

from typing import Any

from billing.commands import NO_TERMS, KeyTerms
from billing.core.book import ZERO, Key, Payment, Reservation, Submission, Wallet


def key_of(row: Any) -> Key:
    return Key(
        key_id=row.key_id,
        sha256=row.sha256,
        last4=row.last4,
        customer_id=row.customer_id,
        refill_per_s=row.refill_per_s,
        burst=row.burst,
        created_at=row.created_at,
        created_seq=row.created_seq,
        balance_at_creation=row.balance_at_creation,
        revoked_at=row.revoked_at,
        revoked_seq=row.revoked_seq,
        terms=terms_of(row),
        budget_id=row.budget_id or row.key_id,
    )


def terms_of(row: Any) -> KeyTerms:
    """From a row that was joined with the terms, of which there may be none."""
    if row.scope is None:
        return NO_TERMS
    return KeyTerms(
        label=row.label,
        scope=row.scope,
        models=tuple(row.models.split()),
        expires_at=row.expires_at,
        daily_budget_mils=row.daily_budget_mils,
        monthly_budget_mils=row.monthly_budget_mils,
    )


def reservation_of(row: Any) -> Reservation:
    return Reservation(
        request_id=row.request_id,
        customer_id=row.customer_id,
        key_id=row.key_id,
        frames=row.frames,
        mils_per_frame=row.mils_per_frame,
        amount=row.amount,
        lease_until=row.lease_until,
        created_at=row.created_at,
        debit_seq=row.debit_seq,
        balance_after_debit=row.balance_after_debit,
        captured=row.captured,
        refunded=row.refunded,
        state=row.state,
        reason=row.reason,
        settled_at=row.settled_at,
        settled_seq=row.settled_seq,
        balance_after_settlement=row.balance_after_settlement,
        budget_id=row.budget_id,
        budget_day=row.budget_day,
        per_frames=row.per_frames,
        frames_delivered=row.frames_delivered,
        drawn=row.drawn or ZERO,
        draw_day=row.draw_day,
        model=row.model,
        covered=row.covered,
        covered_period=row.covered_period,
    )


def wallet_row(each: Wallet) -> tuple[Any, ...]:
    return (
        each.customer_id,
        each.name,
        each.seq,
        each.balance,
        each.created_at,
        0,  # a wallet begins prepaid; a credit line is drawn after it
        0,
        each.debt,
        each.debt_seq,
    )


def key_row(each: Key) -> tuple[Any, ...]:
    return (
        each.key_id,
        each.sha256,
        each.last4,
        each.customer_id,
        each.refill_per_s,
        each.burst,
        each.created_at,
        each.created_seq,
        each.revoked_at,
        each.revoked_seq,
    )


def terms_row(each: Key) -> tuple[Any, ...]:
    terms = each.terms
    return (
        each.key_id,
        each.budget_id,
        terms.label,
        terms.scope,
        " ".join(terms.models),
        terms.expires_at,
        terms.daily_budget_mils,
        terms.monthly_budget_mils,
    )


OPEN = {
    "captured": "0",
    "refunded": "0",
    "state": "'open'",
    "reason": "''",
    "settled_at": "NULL",
    "settled_seq": "NULL",
    "frames_delivered": "NULL",
}
"""What is the same in every reservation that is made: it is settled after it."""


def reservation_row(each: Reservation) -> tuple[Any, ...]:
    """Without the columns of `OPEN`."""
    return (
        each.request_id,
        each.customer_id,
        each.key_id,
        each.frames,
        each.mils_per_frame,
        each.amount,
        each.lease_until,
        each.created_at,
        each.debit_seq,
        each.model,
        each.per_frames,
        each.covered,
    )


def settlement_row(each: Reservation) -> tuple[Any, ...]:
    return (
        each.captured,
        each.refunded,
        each.state,
        each.reason,
        each.settled_at,
        each.settled_seq,
        each.frames_delivered,
        each.request_id,
    )


def submission_row(each: Submission) -> tuple[Any, ...]:
    return (
        each.request_id,
        each.customer_id,
        each.amount,
        each.idempotency_key,
        each.payload_sha256,
        each.created_at,
        each.released_at,
    )


def payment_row(each: Payment) -> tuple[Any, ...]:
    return (
        each.source,
        each.public_id,
        each.customer_id,
        each.granted,
        each.credit_seq,
        each.reversed,
        each.reversal_seq,
        each.created_at,
    )
