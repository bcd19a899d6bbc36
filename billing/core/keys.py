"""Keys: made, limited, rotated and revoked; and what their terms say about a reservation."""

import calendar
from dataclasses import replace
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from billing.commands import (
    NO_TERMS,
    BudgetExceeded,
    CreateKey,
    KeyCreated,
    KeyRefused,
    KeyRevoked,
    KeyRotated,
    KeyTermsSet,
    Outcome,
    Rejected,
    RevokeKey,
    RotateKey,
    SetKeyTerms,
    UnknownKey,
)
from billing.core.book import Book, BudgetEvent, Key
from billing.core.credits import add_credit
from billing.keys import budget_event_id, initial_grant_id
from billing.money import MAX_MILS, Mils, dollars

DAY_S = 86_400
BUDGET_LEVELS = (75, 90)
"""Per cent of a budget at which its owner is warned."""


def create_key(book: Book, command: CreateKey) -> Outcome:
    earlier = book.keys.get(command.key_id)
    if earlier is not None:
        owner = book.wallets[earlier.customer_id]
        if (earlier.sha256, owner.name) != (command.sha256, command.customer_name):
            return Rejected(f"{command.key_id} is already another key")
        return KeyCreated(earlier.key_id, earlier.customer_id, earlier.balance_at_creation)
    if command.sha256 in book.key_by_sha256:
        return Rejected("this token already has a key under another id")
    customer_id = book.customer_by_name.get(command.customer_name)
    if customer_id is None and command.customer_id in book.wallets:
        return Rejected(f"{command.customer_id} is already another customer")
    if command.initial_credits_mils > 0 and initial_grant_id(command.key_id) in book.credits:
        return Rejected(f"{initial_grant_id(command.key_id)} has already credited something else")
    balance = 0 if customer_id is None else book.wallets[customer_id].balance
    if balance + command.initial_credits_mils > MAX_MILS:
        return Rejected(f"the balance would exceed {MAX_MILS} mils")

    if customer_id is None:
        wallet = book.open_wallet(command.customer_id, command.customer_name)
    else:
        wallet = book.wallets[customer_id]
    if command.initial_credits_mils > 0:
        detail = f"Initial credits · {dollars(command.initial_credits_mils)}"
        add_credit(book, wallet, command.initial_credits_mils, initial_grant_id(command.key_id), detail)
    key = Key(
        key_id=command.key_id,
        sha256=command.sha256,
        last4=command.last4,
        customer_id=wallet.customer_id,
        refill_per_s=float(command.refill_per_s),
        burst=command.burst,
        created_at=book.ts,
        created_seq=wallet.seq,
        balance_at_creation=wallet.balance,
        terms=command.terms,
        budget_id=command.key_id,
    )
    book.add_key(key)
    book.new_keys.append(key)
    if command.terms != NO_TERMS:
        book.new_terms[key.key_id] = key
    return KeyCreated(command.key_id, wallet.customer_id, wallet.balance)


def revoke_key(book: Book, command: RevokeKey) -> Outcome:
    key = book.keys.get(command.key_id)
    if key is None:
        return UnknownKey(command.key_id)
    if key.revoked_at is None:
        key.revoked_at = book.ts
        key.revoked_seq = book.wallets[key.customer_id].seq
        book.revoked_keys.append(key)
    return KeyRevoked(key.key_id, key.revoked_at)


def set_key_terms(book: Book, command: SetKeyTerms) -> Outcome:
    key = book.keys.get(command.key_id)
    if key is None:
        return UnknownKey(command.key_id)
    if key.terms != command.terms:
        key.terms = command.terms
        book.new_terms[key.key_id] = key
    return KeyTermsSet(key.key_id)


def rotate_key(book: Book, command: RotateKey) -> Outcome:
    old, earlier = book.keys.get(command.key_id), book.keys.get(command.new_key_id)
    if old is None:
        return UnknownKey(command.key_id)
    if earlier is not None:
        if (earlier.sha256, earlier.budget_id) != (command.sha256, old.budget_id) or old.revoked_at is None:
            return Rejected(f"{command.new_key_id} is already another key")
        return KeyRotated(earlier.key_id, earlier.customer_id, old.revoked_at)
    if command.sha256 in book.key_by_sha256:
        return Rejected("this token already has a key under another id")
    if old.revoked_at is not None or has_expired(book, old):
        return KeyRefused()
    wallet = book.wallets[old.customer_id]
    new = replace(
        old,
        key_id=command.new_key_id,
        sha256=command.sha256,
        last4=command.last4,
        created_at=book.ts,
        created_seq=wallet.seq,
        balance_at_creation=wallet.balance,
    )
    book.add_key(new)
    book.new_keys.append(new)
    book.new_terms[new.key_id] = new
    revoke_key(book, RevokeKey(old.key_id))
    return KeyRotated(new.key_id, new.customer_id, book.ts)


def has_expired(book: Book, key: Key) -> bool:
    return key.terms.expires_at is not None and key.terms.expires_at <= book.ts


def day_of(ts: float) -> int:
    return int(ts // DAY_S)


class BudgetState(NamedTuple):
    """One of a key's budgets, now."""

    period: Literal["day", "month"]
    limit: Mils
    spent: Mils
    first: int
    """Day of UTC since 1970."""
    after: int
    """The first day that is not in the period any more."""


def budgets_of(book: Book, key: Key) -> list[BudgetState]:
    """Those that the key has, the day's first."""
    today = day_of(book.ts)
    date = datetime.fromtimestamp(today * DAY_S, UTC)  # of `ts` it would round up in a day's last microsecond
    month = today - date.day + 1
    next_month = month + calendar.monthrange(date.year, date.month)[1]
    days = book.spent.get(key.budget_id, {})
    periods: tuple[tuple[Literal["day", "month"], Mils | None, int, int], ...] = (
        ("day", key.terms.daily_budget_mils, today, today + 1),
        ("month", key.terms.monthly_budget_mils, month, next_month),
    )
    return [
        BudgetState(
            period, limit, Mils(sum(spent for day, spent in days.items() if first <= day < after)), first, after
        )
        for period, limit, first, after in periods
        if limit is not None
    ]


def exceeded_budget(book: Book, key: Key, amount: Mils) -> BudgetExceeded | None:
    """The first of the key's budgets that this amount would overdraw."""
    for budget in budgets_of(book, key):
        if budget.spent + amount > budget.limit:
            return BudgetExceeded(budget.limit, budget.spent, budget.period, budget.after * DAY_S, amount)
    return None


def warn_of_budgets(book: Book, key: Key) -> None:
    """Note each level that a budget has come to. Its id says which, so a second time is no second event."""
    for budget in budgets_of(book, key):
        for level in BUDGET_LEVELS:
            if budget.spent * 100 < budget.limit * level:
                break
            event_id = budget_event_id(key.budget_id, budget.period, budget.first, budget.limit, level)
            if event_id not in book.budget_events:
                event = BudgetEvent(
                    event_id,
                    key.customer_id,
                    key.key_id,
                    budget.period,
                    budget.first,
                    level,
                    budget.limit,
                    budget.spent,
                    book.ts,
                )
                book.budget_events[event_id] = event
                book.new_budget_events.append(event)
