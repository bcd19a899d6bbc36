"""Money from outside."""

from billing.checks import printable
from billing.commands import Grant, Granted, Outcome, Rejected, UnknownCustomer
from billing.core.book import Book, Entry, Wallet
from billing.money import MAX_MILS, Mils


def grant(book: Book, command: Grant) -> Outcome:
    earlier = book.credits.get(command.public_id)
    if earlier is not None:
        if (earlier.customer_id, earlier.amount) != (command.customer_id, command.amount_mils):
            return Rejected(f"{command.public_id} has already credited {earlier.amount} mils to {earlier.customer_id}")
        return Granted(earlier.public_id, earlier.amount, earlier.balance_after)
    wallet = book.wallets.get(command.customer_id)
    if wallet is None:
        return UnknownCustomer(command.customer_id)
    if wallet.balance + command.amount_mils > MAX_MILS:
        return Rejected(f"the balance would exceed {MAX_MILS} mils")
    credit = add_credit(book, wallet, command.amount_mils, command.public_id, printable(command.detail))
    return Granted(credit.public_id, credit.amount, credit.balance_after)


def add_credit(book: Book, wallet: Wallet, amount: Mils, public_id: str, detail: str) -> Entry:
    entry = book.move(wallet, "credit", amount, public_id, detail)
    book.credits[public_id] = entry
    book.repay(wallet, public_id)
    return entry
