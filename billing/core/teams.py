"""Teams: a parent's members spend money that it gave them, or its own up to a cap."""

import calendar
from datetime import UTC, datetime
from typing import Literal

from billing.checks import printable
from billing.commands import (
    BudgetExceeded,
    InsufficientCredits,
    MemberSet,
    Outcome,
    Rejected,
    SetMember,
    Transfer,
    Transferred,
    UnknownCustomer,
)
from billing.core.book import Book, MembershipRow, Reservation, Wallet
from billing.money import MAX_MILS, Mils

DAY_S = 86_400


def set_member(book: Book, command: SetMember) -> Outcome:
    parent = book.wallets.get(command.parent_id)
    if parent is None:
        return UnknownCustomer(command.parent_id)
    customer_id = book.customer_by_name.get(command.name)
    if customer_id is None and command.customer_id in book.wallets:
        return Rejected(f"{command.customer_id} is already another customer")
    if parent.parent_id is not None:
        return Rejected(f"{parent.customer_id} is a member itself; teams have two levels")
    if customer_id is not None:
        member = book.wallets[customer_id]
        if member is parent or member.has_members:
            return Rejected(f"{customer_id} has members or would be its own; teams have two levels")
        if member.parent_id not in (None, parent.customer_id):
            return Rejected(f"{customer_id} is in the team of {member.parent_id}")
        if member.credit_limit > 0:
            return Rejected(f"{customer_id} has a credit limit; its parent may have one")
    else:
        member = book.open_wallet(command.customer_id, command.name)
    member.parent_id, member.cap, member.cap_period = parent.customer_id, command.cap_mils, command.cap_period
    parent.has_members = True
    book.memberships[member.customer_id] = MembershipRow(
        member.customer_id, parent.customer_id, command.cap_mils, command.cap_period
    )
    return MemberSet(member.customer_id, parent.customer_id)


def transfer(book: Book, command: Transfer) -> Outcome:
    earlier = book.transfers.get(command.transfer_id)
    if earlier is not None:
        if (earlier.from_id, earlier.to_id, earlier.amount) != (command.from_id, command.to_id, command.amount_mils):
            return Rejected(f"{command.transfer_id} has already moved something else")
        return Transferred(earlier.transfer_id, earlier.amount, earlier.from_balance_after, earlier.to_balance_after)
    source, target = book.wallets.get(command.from_id), book.wallets.get(command.to_id)
    if source is None or target is None:
        return UnknownCustomer(command.from_id if source is None else command.to_id)
    if source.customer_id != target.parent_id and target.customer_id != source.parent_id:
        return Rejected(f"{source.customer_id} and {target.customer_id} are not parent and member")
    if command.amount_mils > source.spendable:
        return InsufficientCredits(source.balance, command.amount_mils, source.debt)
    if target.balance + command.amount_mils > MAX_MILS:
        return Rejected(f"the balance would exceed {MAX_MILS} mils")
    row = book.transfer(command.transfer_id, source, target, command.amount_mils, printable(command.detail))
    book.repay(target, command.transfer_id)
    return Transferred(row.transfer_id, row.amount, row.from_balance_after, row.to_balance_after)


def shortfall(book: Book, member: Wallet, amount: Mils) -> Mils | InsufficientCredits | BudgetExceeded:
    """What a member has to draw on its parent to spend `amount`; or why it cannot."""
    if amount <= member.spendable:
        return Mils(0)
    missing = Mils(amount - member.spendable)
    if member.debt > 0 or member.cap is None or member.parent_id is None:
        return InsufficientCredits(member.balance, amount, member.debt)
    first, after = days_of_period(book.ts, member.cap_period)
    days = book.drawn.get(member.customer_id, {})
    drawn = Mils(sum(mils for day, mils in days.items() if first <= day < after))
    if drawn + missing > member.cap:
        period: Literal["day", "month"] = "day" if member.cap_period == "day" else "month"
        return BudgetExceeded(member.cap, drawn, period, after * DAY_S, amount, "team")
    parent = book.wallets[member.parent_id]
    if missing > parent.spendable:
        return InsufficientCredits(Mils(member.spendable + parent.spendable), amount, parent.debt)
    return missing


def draw(book: Book, member: Wallet, missing: Mils, request_id: str, detail: str) -> int:
    """Bring what is missing from the parent. Returns the day that it counts for."""
    assert member.parent_id is not None
    book.transfer(f"{request_id}.draw", book.wallets[member.parent_id], member, missing, f"{member.name} · {detail}")
    today = int(book.ts // DAY_S)
    days = book.drawn.setdefault(member.customer_id, {})
    days[today] = days.get(today, 0) + missing
    return today


def give_back(book: Book, member: Wallet, reservation: Reservation, detail: str) -> None:
    """What was drawn and is refunded goes back to the parent."""
    amount = Mils(min(reservation.refunded, reservation.drawn))
    if amount == 0:
        return
    assert member.parent_id is not None
    parent = book.wallets[member.parent_id]
    transfer_id = f"{reservation.request_id}.back"
    book.transfer(transfer_id, member, parent, amount, f"{member.name} · {detail}")
    book.repay(parent, transfer_id)
    days = book.drawn.get(member.customer_id)
    if days is not None and reservation.draw_day in days:
        days[reservation.draw_day] -= amount


def days_of_period(ts: float, period: str | None) -> tuple[int, int]:
    """The first day of the period, and the first after it, in days of UTC since 1970."""
    today = int(ts // DAY_S)
    if period == "day":
        return today, today + 1
    date = datetime.fromtimestamp(today * DAY_S, UTC)  # of `ts` it would round up in a day's last microsecond
    first = today - date.day + 1
    return first, first + calendar.monthrange(date.year, date.month)[1]
