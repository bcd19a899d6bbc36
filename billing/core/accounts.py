"""Who pays later: credit lines, and months that are closed."""

from datetime import UTC, datetime

from billing.commands import (
    CloseStatement,
    CreditLineSet,
    Outcome,
    Rejected,
    SetCreditLine,
    StatementClosed,
    UnknownCustomer,
)
from billing.core.book import Book, CreditLineRow, StatementRow, Unbilled
from billing.money import Mils, dollars

USAGE = ("debit", "refund", "fee")
TRANSFERS = ("transfer_in", "transfer_out")


def set_credit_line(book: Book, command: SetCreditLine) -> Outcome:
    wallet = book.wallets.get(command.customer_id)
    if wallet is None:
        return UnknownCustomer(command.customer_id)
    if wallet.parent_id is not None and command.limit_mils > 0:
        return Rejected(f"{wallet.customer_id} is a member of a team; its parent may have a credit limit")
    if wallet.balance < -command.limit_mils:
        return Rejected(f"{wallet.customer_id} owes {dollars(Mils(-wallet.balance))} already; say that it is overdue")
    floor = Mils(0 if command.overdue else -command.limit_mils)
    if (wallet.credit_limit, wallet.floor) != (command.limit_mils, floor):
        wallet.line_seq += 1
        wallet.credit_limit, wallet.floor = command.limit_mils, floor
        book.new_lines.append(
            CreditLineRow(wallet.customer_id, wallet.line_seq, wallet.credit_limit, floor, wallet.seq, book.ts)
        )
        book.lined_wallets[wallet.customer_id] = wallet
        book.repay(wallet, f"{wallet.customer_id}.line.{wallet.line_seq}")
    return CreditLineSet(wallet.customer_id, wallet.credit_limit, wallet.floor)


def close_statement(book: Book, command: CloseStatement) -> Outcome:
    earlier = book.statements.get((command.customer_id, command.period))
    if earlier is not None:
        return _closed(earlier)
    wallet = book.wallets.get(command.customer_id)
    if wallet is None:
        return UnknownCustomer(command.customer_id)
    if command.period > datetime.fromtimestamp(book.ts, UTC).strftime("%Y-%m"):
        return Rejected(f"{command.period} has not begun")
    unbilled = book.unbilled.setdefault(wallet.customer_id, Unbilled(None, {}))
    last = unbilled.last
    if last is not None and command.period <= last.period:
        return Rejected(f"{last.period} is closed already, and {command.period} was not closed before it")
    sums = dict(unbilled.sums)
    for entry in book.entries[unbilled.counted :]:
        if entry.customer_id == wallet.customer_id:
            sums[entry.kind] = sums.get(entry.kind, 0) + entry.amount
    usage = sum(sums.get(kind, 0) for kind in USAGE)
    transfers = sum(sums.get(kind, 0) for kind in TRANSFERS)
    row = StatementRow(
        customer_id=wallet.customer_id,
        number=1 if last is None else last.number + 1,
        prev_number=None if last is None else last.number,
        period=command.period,
        from_seq=0 if last is None else last.to_seq,
        to_seq=wallet.seq,
        opening=Mils(0) if last is None else last.closing,
        usage=Mils(usage),
        payments=Mils(sum(sums.values()) - usage - transfers),
        transfers=Mils(transfers),
        closing=wallet.balance,
        closed_at=book.ts,
    )
    book.unbilled[wallet.customer_id] = Unbilled(row, {}, len(book.entries))
    book.statements[row.customer_id, row.period] = row
    book.new_statements.append(row)
    return _closed(row)


def _closed(row: StatementRow) -> StatementClosed:
    return StatementClosed(
        row.customer_id,
        row.number,
        row.period,
        row.from_seq,
        row.to_seq,
        row.opening,
        row.usage,
        row.payments,
        row.transfers,
        row.closing,
        row.closed_at,
    )
