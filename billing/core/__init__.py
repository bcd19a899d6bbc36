"""What each command does to the money: a pure function of what was loaded, the command, the time and the epoch.

`Book` is the part of the ledger that one batch of commands can see. `decide` answers one command and notes in the book
what has to be written; it never touches a database, so a batch is decided in memory and written at once.
"""

from typing import assert_never

from billing.commands import (
    AddPrice,
    ChargeUnits,
    CloseStatement,
    Command,
    CreateKey,
    Credit,
    ExpireLeases,
    Grant,
    Heartbeat,
    Outcome,
    PaymentCommand,
    Quote,
    Reserve,
    Reverse,
    RevokeKey,
    RotateKey,
    SetCreditLine,
    SetKeyTerms,
    SetMember,
    Settle,
    SetUnits,
    Transfer,
)
from billing.core.accounts import close_statement, set_credit_line
from billing.core.book import Book
from billing.core.credits import grant
from billing.core.keys import create_key, revoke_key, rotate_key, set_key_terms
from billing.core.payments import credit_payment, reverse_payment
from billing.core.price_book import add_price
from billing.core.quotes import give_quote
from billing.core.reservations import expire_leases, heartbeat, reserve, settle
from billing.core.teams import set_member, transfer
from billing.core.units import charge_units, set_units

__all__ = ["Book", "decide"]


def decide(book: Book, command: Command) -> Outcome:
    """Answer one command that `billing.checks` has passed. A refusal leaves the book as it was."""
    match command:
        case Reserve():
            return reserve(book, command)
        case Quote():
            return give_quote(book, command)
        case Settle():
            return settle(book, command)
        case Heartbeat():
            return heartbeat(book, command)
        case Grant():
            return grant(book, command)
        case Credit():
            return credit_payment(book, command)
        case Reverse():
            return reverse_payment(book, command)
        case CreateKey():
            return create_key(book, command)
        case RevokeKey():
            return revoke_key(book, command)
        case SetKeyTerms():
            return set_key_terms(book, command)
        case RotateKey():
            return rotate_key(book, command)
        case SetMember():
            return set_member(book, command)
        case Transfer():
            return transfer(book, command)
        case SetCreditLine():
            return set_credit_line(book, command)
        case CloseStatement():
            return close_statement(book, command)
        case AddPrice():
            return add_price(book, command)
        case SetUnits():
            return set_units(book, command)
        case ChargeUnits():
            return charge_units(book)
        case ExpireLeases():
            return expire_leases(book)
        case PaymentCommand():
            raise AssertionError("payments are carried out by billing.payments.records")
        case _:
            assert_never(command)
