"""Prices that are promised for a while."""

from billing.commands import KeyRefused, Outcome, Quote, Quoted, QuoteRefused, Rejected, Reserve
from billing.core.book import Book, QuoteRow, Wallet
from billing.core.keys import has_expired
from billing.money import part_of_rate


def give_quote(book: Book, command: Quote) -> Outcome:
    key = book.keys.get(command.key_id)
    if key is None or key.revoked_at is not None or has_expired(book, key):
        return KeyRefused()
    work = (key.customer_id, command.model, command.frames, command.mils_per_frame, command.price_version)
    per_frames = command.per_frames
    quote = book.quotes.get(command.quote_id)
    if quote is None:
        balance = book.wallets[key.customer_id].spendable
        quote = QuoteRow(command.quote_id, *work, balance, book.ts, book.ts + command.valid_s, per_frames)
        book.quotes[quote.quote_id] = quote
        book.new_quotes.append(quote)
    elif (*quote[1:6], quote.per_frames) != (*work, per_frames):
        return Rejected(f"{command.quote_id} is already a quote for other work")
    return Quoted(
        quote.quote_id,
        part_of_rate(quote.frames, quote.mils_per_frame, quote.per_frames),
        quote.balance,
        quote.expires_at,
    )


def why_not(book: Book, quote: QuoteRow | None, command: Reserve, wallet: Wallet) -> QuoteRefused | None:
    """Why the quote does not bind for this request."""
    if quote is None or quote.customer_id != wallet.customer_id:
        return QuoteRefused("there is no such quote")
    if quote.expires_at <= book.ts:
        return QuoteRefused("the quote has expired")
    if (quote.model, quote.frames) != (command.model, command.frames):
        return QuoteRefused(f"the quote is for {quote.frames} frames of {quote.model}")
    return None
