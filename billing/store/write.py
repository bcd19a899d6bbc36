"""Writes what a batch decided: one statement for each kind of row."""

from billing.core.book import Book
from billing.store.connection import WriterConnection
from billing.store.rows import (
    OPEN,
    key_row,
    payment_row,
    reservation_row,
    settlement_row,
    submission_row,
    terms_row,
    wallet_row,
)
from billing.store.sql import delete_all, insert_all, insert_missing, update_all, upsert_all
from billing.tables import (
    api_key,
    budget_event,
    budget_use,
    credit_line,
    debt,
    draw,
    entry,
    key_terms,
    membership,
    payment,
    payment_event,
    price,
    provision,
    quote,
    reservation,
    reversal,
    statement,
    submission,
    transfer,
    unit_charge,
    unit_use,
    wallet,
)

_INSERT_WALLETS = insert_all(wallet)
_INSERT_KEYS = insert_all(api_key)
_INSERT_RESERVATIONS = insert_all(reservation, same=OPEN)
_INSERT_SUBMISSIONS = insert_all(submission)
_INSERT_ENTRIES = insert_all(entry)
_INSERT_BUDGET_USES = insert_all(budget_use)
_INSERT_QUOTES = insert_all(quote)
_INSERT_BUDGET_EVENTS = insert_missing(budget_event)
_INSERT_REVERSALS = insert_all(reversal)
_INSERT_DEBTS = insert_all(debt)
_INSERT_PAYMENTS = insert_all(payment)
_INSERT_PAYMENT_EVENTS = insert_all(payment_event)
_REVERSE_PAYMENTS = update_all(payment, "source", ("reversed", "reversal_seq"))
_MOVE_INDEBTED_WALLETS = update_all(wallet, "customer_id", ("seq", "balance_mils", "debt_mils", "debt_seq"))
_INSERT_LINES = insert_all(credit_line)
_DRAW_LINES = update_all(wallet, "customer_id", ("credit_limit_mils", "floor_mils"))
_PUT_MEMBERSHIPS = upsert_all(membership, "customer_id")
_INSERT_TRANSFERS = insert_all(transfer)
_INSERT_DRAWS = insert_all(draw)
_INSERT_STATEMENTS = insert_all(statement)
_INSERT_PRICES = insert_all(price)
_INSERT_PROVISIONS = insert_all(provision)
_INSERT_CHARGES = insert_all(unit_charge)
_INSERT_USES = insert_all(unit_use)
_PUT_TERMS = upsert_all(key_terms, "key_id")
_MOVE_WALLETS = update_all(wallet, "customer_id", ("seq", "balance_mils"))
_REVOKE_KEYS = update_all(api_key, "key_id", ("revoked_at", "revoked_seq"))
_SETTLE = update_all(
    reservation,
    "request_id",
    ("captured", "refunded", "state", "reason", "settled_at", "settled_seq", "frames_delivered"),
)
_RENEW = update_all(reservation, "request_id", ("lease_until",))
_RELEASE = update_all(submission, "request_id", ("released_at",))
_FORGET = delete_all(submission, "request_id")


def write(connection: WriterConnection, book: Book) -> None:
    """Write what the batch decided. Reservations go before the entries that point at them, entries before wallets."""
    new_wallets = {each.customer_id for each in book.new_wallets}
    new_keys = {each.key_id for each in book.new_keys}
    _INSERT_WALLETS(connection, [wallet_row(each) for each in book.new_wallets])
    _INSERT_KEYS(connection, [key_row(each) for each in book.new_keys])
    _REVOKE_KEYS(
        connection,
        [(each.revoked_at, each.revoked_seq, each.key_id) for each in book.revoked_keys if each.key_id not in new_keys],
    )
    _PUT_TERMS(connection, [terms_row(each) for each in book.new_terms.values()])
    _write_accounts(connection, book)
    _INSERT_RESERVATIONS(connection, [reservation_row(each) for each in book.new_reservations])
    _INSERT_BUDGET_USES(
        connection,
        [(each.request_id, each.budget_id, each.budget_day) for each in book.new_reservations if each.budget_id],
    )
    _INSERT_DRAWS(
        connection,
        [
            (each.request_id, each.customer_id, each.draw_day, each.drawn)
            for each in book.new_reservations
            if each.drawn
        ],
    )
    _RENEW(
        connection,
        [(each.lease_until, each.request_id) for each in book.renewed.values() if not each.is_new],
    )
    _SETTLE(connection, [settlement_row(each) for each in book.settled])
    _FORGET(connection, [(request_id,) for request_id in book.forgotten])
    _RELEASE(connection, [(each.released_at, each.request_id) for each in book.released])
    _INSERT_SUBMISSIONS(connection, [submission_row(each) for each in book.new_submissions])
    _INSERT_QUOTES(connection, book.new_quotes)
    _INSERT_BUDGET_EVENTS(connection, book.new_budget_events)
    _INSERT_PRICES(connection, book.new_prices)
    _INSERT_PROVISIONS(connection, book.new_provisions)
    _INSERT_CHARGES(connection, book.new_charges)
    _INSERT_USES(connection, book.new_uses)
    _INSERT_REVERSALS(connection, book.new_reversals)
    _INSERT_DEBTS(connection, book.new_debts)
    _INSERT_ENTRIES(connection, book.entries)
    _write_payments(connection, book)
    _INSERT_STATEMENTS(connection, book.new_statements)
    _MOVE_WALLETS(
        connection,
        [
            (each.seq, each.balance, each.customer_id)
            for each in book.moved_wallets.values()
            if each.customer_id not in new_wallets and each.customer_id not in book.indebted_wallets
        ],
    )
    _MOVE_INDEBTED_WALLETS(
        connection,
        [
            (each.seq, each.balance, each.debt, each.debt_seq, each.customer_id)
            for each in book.indebted_wallets.values()
            if each.customer_id not in new_wallets
        ],
    )


def _write_accounts(connection: WriterConnection, book: Book) -> None:
    """Before the entries: they need a line to go below zero, and a transfer to move within a team."""
    _INSERT_LINES(connection, book.new_lines)
    lined = book.lined_wallets.values()
    _DRAW_LINES(connection, [(each.credit_limit, each.floor, each.customer_id) for each in lined])
    _PUT_MEMBERSHIPS(connection, list(book.memberships.values()))
    _INSERT_TRANSFERS(connection, [each[:6] for each in book.new_transfers])


def _write_payments(connection: WriterConnection, book: Book) -> None:
    """After the entries: a payment points at its credit."""
    payments = book.changed_payments.values()
    _INSERT_PAYMENTS(connection, [payment_row(each) for each in payments if each.is_new])
    _REVERSE_PAYMENTS(
        connection, [(each.reversed, each.reversal_seq, each.source) for each in payments if not each.is_new]
    )
    _INSERT_PAYMENT_EVENTS(connection, book.new_events)
