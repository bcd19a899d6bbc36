"""Money that was paid outside: credited once, and taken back as far as the provider says, in any order."""

from billing.checks import printable
from billing.commands import Credit, Credited, Outcome, Rejected, Reverse, Reversed, UnknownCustomer, UnknownPayment
from billing.core.book import Book, Payment, PaymentEventRow, ReversalRow, Wallet
from billing.core.credits import add_credit
from billing.money import MAX_MILS, Mils


def credit_payment(book: Book, command: Credit) -> Outcome:
    payment = book.payments.get(command.source)
    if payment is not None:
        if (payment.customer_id, payment.granted) != (command.customer_id, command.amount_mils):
            return Rejected(f"{command.source} has already credited {payment.granted} mils to {payment.customer_id}")
        _mark(book, command)
        return Credited(payment.source, payment.public_id, payment.granted, payment.balance_after_credit)
    if command.public_id in book.credits:
        return Rejected(f"{command.public_id} has already credited something else")
    wallet = book.wallets.get(command.customer_id)
    if wallet is None:
        return UnknownCustomer(command.customer_id)
    if wallet.balance + command.amount_mils > MAX_MILS:
        return Rejected(f"the balance would exceed {MAX_MILS} mils")
    credit = add_credit(book, wallet, command.amount_mils, command.public_id, printable(command.detail))
    payment = Payment(
        source=command.source,
        public_id=command.public_id,
        customer_id=wallet.customer_id,
        granted=command.amount_mils,
        credit_seq=credit.seq,
        reversed=Mils(0),
        reversal_seq=None,
        created_at=book.ts,
        balance_after_credit=credit.balance_after,
        is_new=True,
    )
    book.payments[payment.source] = payment
    book.changed_payments[payment.source] = payment
    _mark(book, command)
    return Credited(payment.source, payment.public_id, payment.granted, payment.balance_after_credit)


def reverse_payment(book: Book, command: Reverse) -> Outcome:
    payment = book.payments.get(command.source)
    if payment is None:
        return UnknownPayment(command.source)
    wallet = book.wallets[payment.customer_id]
    target = Mils(min(command.target_mils, payment.granted))
    if target != payment.reversed:
        _book_reversal(book, payment, wallet, target, command)
    _mark(book, command)
    return Reversed(payment.source, payment.customer_id, payment.reversed, wallet.balance, wallet.debt)


def _book_reversal(book: Book, payment: Payment, wallet: Wallet, target: Mils, command: Reverse) -> None:
    change = target - payment.reversed
    taken = Mils(min(change, wallet.spendable))
    owed = Mils(change - taken)
    detail = printable(command.detail)
    if taken > 0:
        book.move(wallet, "reversal", Mils(-taken), command.public_id, detail)
    elif taken < 0:
        book.move(wallet, "reinstatement", Mils(-taken), command.public_id, detail)
    seq = (payment.reversal_seq or 0) + 1
    book.new_reversals.append(
        ReversalRow(
            payment.source,
            seq,
            payment.reversal_seq,
            payment.reversed,
            target,
            taken,
            owed,
            wallet.customer_id,
            wallet.seq,
            command.public_id,
            book.ts,
        )
    )
    payment.reversed, payment.reversal_seq = target, seq
    book.changed_payments[payment.source] = payment
    if owed > 0:
        book.change_debt(wallet, "shortage", owed, wallet.seq, command.public_id)
    book.repay(wallet, command.public_id)


def _mark(book: Book, command: Credit | Reverse) -> None:
    for event_id in command.events:
        if event_id not in book.events:
            book.events.add(event_id)
            book.new_events.append(PaymentEventRow(event_id, command.source, book.ts))
