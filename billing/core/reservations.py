"""A request's money: reserved before any work, settled once, kept alive by heartbeats or swept up when it is silent."""

from typing import Literal

from billing.checks import printable
from billing.commands import (
    CustomerId,
    Heartbeat,
    HeartbeatDone,
    IdempotencyConflict,
    KeyRefused,
    LeasesExpired,
    Outcome,
    QuoteRefused,
    Rejected,
    Repeated,
    Reserve,
    Reserved,
    ScopeRefused,
    Settle,
    Settled,
    UnknownReservation,
)
from billing.core.book import Book, Reservation, Submission
from billing.core.keys import day_of, exceeded_budget, has_expired, warn_of_budgets
from billing.core.quotes import why_not
from billing.core.teams import draw, give_back, shortfall
from billing.core.units import cover, coverable, uncover
from billing.money import Mils, part_of_rate

LEASE_EXPIRED = "lease expired"
KEY_MEMORY_S = 86_400.0
"""How long an idempotency key is remembered at least; a sweep forgets it some time after."""
MAX_FORGOTTEN_PER_SWEEP = 1_000


def reserve(book: Book, command: Reserve) -> Outcome:
    earlier = book.reservations.get(command.request_id)
    if earlier is not None:
        same = (earlier.key_id, earlier.frames) == (command.key_id, command.frames)
        if not command.quote_id:  # a quote's rate was charged whatever the command said
            same &= (earlier.mils_per_frame, earlier.per_frames) == (command.mils_per_frame, command.per_frames)
        known = book.submissions.get(command.request_id)
        if known is not None and command.payload_sha256:
            same &= (known.idempotency_key, known.payload_sha256) == (command.idempotency_key, command.payload_sha256)
        if not same:
            return Rejected(f"{command.request_id} is already reserved for other work")
        return Reserved(earlier.request_id, earlier.customer_id, earlier.amount, earlier.balance_after_debit)
    key = book.keys.get(command.key_id)
    if key is None or key.revoked_at is not None or has_expired(book, key):
        return KeyRefused()
    if key.terms.scope != "spend":
        return ScopeRefused("this key may read and not spend")
    if key.terms.models and command.model not in key.terms.models:
        return ScopeRefused(f"this key may not use {command.model or 'an unnamed model'}")
    holder = None
    if command.payload_sha256:
        holder = book.submission_by_key.get((key.customer_id, command.idempotency_key))
        if holder is not None and holder.payload_sha256 != command.payload_sha256:
            return IdempotencyConflict(holder.request_id)
        first = _first_of(book, key.customer_id, command, holder)
        if first is not None:
            state: Literal["open", "settled"] = "open" if first.state == "open" else "settled"
            return Repeated(first.request_id, state, first.captured, first.created_at)
    wallet = book.wallets[key.customer_id]
    rate, per_frames = command.mils_per_frame, command.per_frames
    if command.quote_id:
        quote = book.quotes.get(command.quote_id)
        refused = why_not(book, quote, command, wallet)
        if quote is None or refused is not None:
            return refused or QuoteRefused("there is no such quote")
        rate, per_frames = quote.mils_per_frame, quote.per_frames
    covered = coverable(book, wallet, command.model, command.frames)
    amount = part_of_rate(command.frames - covered, rate, per_frames)
    exceeded = exceeded_budget(book, key, amount) if key.has_budget else None
    if exceeded is not None:
        return exceeded
    drawn = Mils(0)
    if amount > wallet.spendable:
        missing = shortfall(book, wallet, amount)
        if not isinstance(missing, int):
            return missing
        drawn = missing
    if holder is not None:  # refunded in full, so the key is free for this attempt
        holder.released_at = book.ts
        if not holder.is_new:
            book.released.append(holder)
    detail = printable(command.detail + (f" · {covered} of {command.frames} frames provisioned" if covered else ""))
    draw_day = draw(book, wallet, drawn, command.request_id, detail) if drawn else None
    debit = book.move(wallet, "debit", Mils(-amount), command.request_id, detail, reserved=amount)
    reservation = Reservation(
        request_id=command.request_id,
        customer_id=wallet.customer_id,
        key_id=key.key_id,
        frames=command.frames,
        mils_per_frame=rate,
        amount=amount,
        lease_until=book.now + command.lease_s,
        created_at=debit.ts,
        debit_seq=debit.seq,
        balance_after_debit=debit.balance_after,
        model=command.model,
        per_frames=per_frames,
        drawn=drawn,
        draw_day=draw_day,
        is_new=True,
    )
    book.reservations[command.request_id] = reservation
    book.new_reservations.append(reservation)
    if covered:
        cover(book, reservation, covered)
    if key.has_budget:
        reservation.budget_id, reservation.budget_day = key.budget_id, day_of(debit.ts)
        days = book.spent.setdefault(key.budget_id, {})
        days[reservation.budget_day] = days.get(reservation.budget_day, 0) + amount
        warn_of_budgets(book, key)
    if command.payload_sha256:
        submission = Submission(
            request_id=command.request_id,
            customer_id=wallet.customer_id,
            amount=amount,
            idempotency_key=command.idempotency_key,
            payload_sha256=command.payload_sha256,
            created_at=debit.ts,
            is_new=True,
        )
        book.add_submission(submission)
        book.new_submissions.append(submission)
    return Reserved(command.request_id, wallet.customer_id, amount, debit.balance_after)


def _first_of(book: Book, customer_id: CustomerId, command: Reserve, holder: Submission | None) -> Reservation | None:
    """The request that this one repeats: under its key, or without one the newest of the same payload.

    A payload is recognised while the first request is open and for a while after it was settled: a client that lost
    its connection comes back when its own patience ends, however long the work took.
    """
    since = book.ts - command.dedupe_window_s
    if command.idempotency_key:
        candidates = [holder] if holder is not None else []
    else:
        same_payload = book.submissions_by_payload.get((customer_id, command.payload_sha256), [])
        candidates = same_payload if command.dedupe_window_s else []
    stand = [book.reservations[each.request_id] for each in candidates]
    if not command.idempotency_key:
        stand = [each for each in stand if each.settled_at is None or each.settled_at >= since]
    # What was refunded in full does not stand in the way of another attempt.
    stand = [each for each in stand if each.state == "open" or each.frames_delivered]
    return max(stand, key=lambda each: (each.created_at, each.debit_seq), default=None)


def settle(book: Book, command: Settle) -> Outcome:
    reservation = book.reservations.get(command.request_id)
    if reservation is None:
        return UnknownReservation(command.request_id)
    if command.frames_delivered > reservation.frames:
        return Rejected(
            f"{command.request_id} reserved {reservation.frames} frames; {command.frames_delivered} were delivered"
        )
    if reservation.state == "open":
        _close(book, reservation, command.frames_delivered, printable(command.reason))
    assert reservation.balance_after_settlement is not None
    return Settled(
        reservation.request_id, reservation.captured, reservation.refunded, reservation.balance_after_settlement
    )


def _close(book: Book, reservation: Reservation, frames_delivered: int, reason: str) -> None:
    """Keep the price of what was delivered and give the rest back, once."""
    assert reservation.state == "open"
    wallet = book.wallets[reservation.customer_id]
    reservation.frames_delivered = frames_delivered
    paid = max(0, frames_delivered - (reservation.covered or 0))
    reservation.captured = part_of_rate(paid, reservation.mils_per_frame, reservation.per_frames)
    reservation.refunded = Mils(reservation.amount - reservation.captured)
    if reservation.refunded > 0:
        missing = reservation.frames - frames_delivered
        detail = f"refund · {missing} of {reservation.frames} frames not delivered" + (f" · {reason}" if reason else "")
        book.move(wallet, "refund", reservation.refunded, reservation.request_id, detail, reserved=reservation.amount)
        if reservation.drawn:
            give_back(book, wallet, reservation, detail)
        book.repay(wallet, reservation.request_id)
    if reservation.covered is not None:
        uncover(book, reservation)
    reservation.state = "settled"
    reservation.reason = reason
    reservation.settled_at = book.ts
    reservation.settled_seq = wallet.seq
    reservation.balance_after_settlement = wallet.balance
    book.passing.append(reservation.request_id)
    book.settled.append(reservation)
    days = book.spent.get(reservation.budget_id or "")
    if days is not None and reservation.budget_day in days:
        days[reservation.budget_day] -= reservation.refunded


def heartbeat(book: Book, command: Heartbeat) -> Outcome:
    renewed = 0
    for request_id in dict.fromkeys(command.request_ids):
        reservation = book.reservations.get(request_id)
        if reservation is None or reservation.state != "open":
            continue
        renewed += 1
        lease_until = book.now + command.lease_s
        if lease_until > reservation.lease_until:
            reservation.lease_until = lease_until
            book.renewed[request_id] = reservation
    return HeartbeatDone(renewed)


def expire_leases(book: Book) -> Outcome:
    expired = sorted(
        (reservation.lease_until, reservation.request_id)
        for reservation in book.reservations.values()
        if reservation.state == "open" and reservation.lease_until <= book.now
    )
    for _, request_id in expired:
        _close(book, book.reservations[request_id], 0, LEASE_EXPIRED)
    before = book.now - KEY_MEMORY_S
    old = [
        submission
        for submission in book.submissions.values()
        if submission.created_at <= before and _was_settled(book.reservations[submission.request_id], before)
    ]
    old.sort(key=lambda each: (each.created_at, each.request_id))
    for submission in old[:MAX_FORGOTTEN_PER_SWEEP]:
        book.forget(submission)
    return LeasesExpired(tuple(request_id for _, request_id in expired))


def _was_settled(reservation: Reservation, before: float) -> bool:
    return reservation.settled_at is not None and reservation.settled_at <= before
