"""Versions of prices: each is added once, after the one before it."""

from billing.commands import AddPrice, CustomerId, Outcome, PriceAdded, Rejected, UnknownCustomer
from billing.core.book import Book, PriceRow


def add_price(book: Book, command: AddPrice) -> Outcome:
    if command.customer_id and CustomerId(command.customer_id) not in book.wallets:
        return UnknownCustomer(command.customer_id)
    versions = book.prices.setdefault((command.model, command.customer_id), [])
    for each in versions:
        if each.version == command.version:
            if (each.effective_from, each.terms) != (command.effective_from, command.terms):
                return Rejected(f"version {command.version} of {command.model} is already another price")
            return PriceAdded(each.model, each.customer_id, each.version)
    newest = versions[-1] if versions else None
    if command.version != len(versions) + 1:
        return Rejected(f"version {command.version} of {command.model} does not follow {len(versions)}")
    if newest is not None and command.effective_from <= newest.effective_from:
        return Rejected(f"version {command.version} of {command.model} does not take effect after its predecessor")
    row = PriceRow(
        command.model,
        command.customer_id,
        command.version,
        None if newest is None else newest.version,
        None if newest is None else newest.effective_from,
        command.effective_from,
        command.terms,
        book.ts,
    )
    versions.append(row)
    book.new_prices.append(row)
    return PriceAdded(row.model, row.customer_id, row.version)
