"""What each command does to the money: a pure function of what was loaded, the command, the time and the epoch.

`Book` is the part of the ledger that one batch of commands can see. `decide` answers one command and notes in the book
what has to be written; it never touches a database, so a batch is decided in memory and written at once.
"""

import calendar
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Literal, NamedTuple, assert_never

from billing.checks import printable
from billing.commands import (
    NO_TERMS,
    BudgetExceeded,
    Command,
    CreateKey,
    CustomerId,
    ExpireLeases,
    Grant,
    Granted,
    Heartbeat,
    HeartbeatDone,
    IdempotencyConflict,
    InsufficientCredits,
    KeyCreated,
    KeyId,
    KeyRefused,
    KeyRevoked,
    KeyRotated,
    KeyTerms,
    KeyTermsSet,
    LeasesExpired,
    Outcome,
    Quote,
    Quoted,
    QuoteRefused,
    Rejected,
    Repeated,
    RequestId,
    Reserve,
    Reserved,
    RevokeKey,
    RotateKey,
    ScopeRefused,
    SetKeyTerms,
    Settle,
    Settled,
    UnknownCustomer,
    UnknownKey,
    UnknownReservation,
)
from billing.keys import initial_grant_id
from billing.money import MAX_MILS, Mils, dollars

LEASE_EXPIRED = "lease expired"
DAY_S = 86_400
KEY_MEMORY_S = 86_400.0
"""How long an idempotency key is remembered at least; a sweep forgets it some time after."""
MAX_FORGOTTEN_PER_SWEEP = 1_000
MAX_REMEMBERED = 100_000
"""Wallets, keys and open reservations that the writer keeps in memory; above it, it starts over with none."""
ZERO = Mils(0)


@dataclass(slots=True)
class Wallet:
    customer_id: CustomerId
    name: str
    seq: int
    balance: Mils
    created_at: float


@dataclass(slots=True)
class Key:
    key_id: KeyId
    sha256: str
    last4: str
    customer_id: CustomerId
    refill_per_s: float
    burst: int
    created_at: float
    created_seq: int
    balance_at_creation: Mils
    revoked_at: float | None = None
    revoked_seq: int | None = None
    terms: KeyTerms = NO_TERMS
    budget_id: str = ""
    """What its spending is counted under: its own id, or that of the key which it was rotated from."""

    @property
    def has_budget(self) -> bool:
        return self.terms.daily_budget_mils is not None or self.terms.monthly_budget_mils is not None


@dataclass(slots=True)
class Reservation:
    request_id: RequestId
    customer_id: CustomerId
    key_id: KeyId
    frames: int
    mils_per_frame: Mils
    amount: Mils
    lease_until: float
    created_at: float
    debit_seq: int
    balance_after_debit: Mils
    captured: Mils = ZERO
    refunded: Mils = ZERO
    state: str = "open"
    reason: str = ""
    settled_at: float | None = None
    settled_seq: int | None = None
    balance_after_settlement: Mils | None = None
    budget_id: str | None = None
    """The budget that it is counted under, if its key had one."""
    budget_day: int | None = None
    """In days of UTC since 1970."""
    is_new: bool = False
    """Made by this batch: not in the database yet."""


class QuoteRow(NamedTuple):
    """In the order of the table's columns."""

    quote_id: str
    customer_id: CustomerId
    model: str
    frames: int
    mils_per_frame: Mils
    price_version: int
    balance: Mils
    created_at: float
    expires_at: float


@dataclass(slots=True)
class Submission:
    """By what a request is recognised when it comes again."""

    request_id: RequestId
    customer_id: CustomerId
    amount: Mils
    idempotency_key: str
    payload_sha256: str
    created_at: float
    released_at: float | None = None
    is_new: bool = False
    """Made by this batch: not in the database yet."""


class Entry(NamedTuple):
    """In the order of the table's columns."""

    customer_id: CustomerId
    seq: int
    prev_seq: int | None
    prev_balance: Mils
    amount: Mils
    balance_after: Mils
    kind: str
    public_id: str
    reserved: Mils | None
    ts: float
    detail: str
    epoch: int


@dataclass(slots=True)
class Book:
    """What the writer knows, and what the batch that it decides has to write.

    Between batches it keeps wallets, keys and open reservations: while the fence is held nobody else changes them. What
    a batch needs besides is loaded for it and dropped after it. A batch that was not committed spoils the book; its
    owner throws it away and begins with an empty one.
    """

    epoch: int = 0
    now: float = 0.0
    """The clock, for leases."""
    ts: float = 0.0
    """The clock, held back so that it never decreases from one entry to the next."""
    wallets: dict[CustomerId, Wallet] = field(default_factory=dict)
    customer_by_name: dict[str, CustomerId] = field(default_factory=dict)
    keys: dict[KeyId, Key] = field(default_factory=dict)
    key_by_sha256: dict[str, KeyId] = field(default_factory=dict)
    spent: dict[str, dict[int, int]] = field(default_factory=dict)
    """By budget and day, for at least the current month: what was reserved less what was refunded."""
    reservations: dict[RequestId, Reservation] = field(default_factory=dict)
    submissions: dict[RequestId, Submission] = field(default_factory=dict)
    """Of the batch's requests, and those that may be what the batch repeats."""
    submission_by_key: dict[tuple[CustomerId, str], Submission] = field(default_factory=dict)
    """The one that holds each idempotency key."""
    submissions_by_payload: dict[tuple[CustomerId, str], list[Submission]] = field(default_factory=dict)
    forgotten: list[RequestId] = field(default_factory=list)
    """Submissions that are to be deleted."""
    released: list[Submission] = field(default_factory=list)
    new_submissions: list[Submission] = field(default_factory=list)
    new_wallets: list[Wallet] = field(default_factory=list)
    moved_wallets: dict[CustomerId, Wallet] = field(default_factory=dict)
    new_keys: list[Key] = field(default_factory=list)
    revoked_keys: list[Key] = field(default_factory=list)
    new_terms: dict[KeyId, Key] = field(default_factory=dict)
    new_reservations: list[Reservation] = field(default_factory=list)
    settled: list[Reservation] = field(default_factory=list)
    """Those that this batch closed and did not make."""
    passing: list[RequestId] = field(default_factory=list)
    """Settled reservations, which the next batch will hardly ask for."""
    renewed: dict[RequestId, Reservation] = field(default_factory=dict)
    """Those whose lease this batch renewed; some of them may have been closed since."""
    credits: dict[str, Entry] = field(default_factory=dict)
    """Credits from outside by their public id."""
    quotes: dict[str, QuoteRow] = field(default_factory=dict)
    new_quotes: list[QuoteRow] = field(default_factory=list)
    entries: list[Entry] = field(default_factory=list)
    """New ones, in the order in which they chain."""

    def begin(self, now: float, ts: float, epoch: int) -> None:
        self.now, self.ts, self.epoch = now, ts, epoch

    def committed(self) -> None:
        """What the batch decided is in the database; keep what the next one can use."""
        for reservation in self.new_reservations:
            reservation.is_new = False
        for request_id in self.passing:
            self.reservations.pop(request_id, None)
        for done in (
            self.submissions,
            self.submission_by_key,
            self.submissions_by_payload,
            self.credits,
            self.quotes,
            self.moved_wallets,
            self.new_terms,
            self.renewed,
        ):
            done.clear()
        for written in (
            self.forgotten,
            self.released,
            self.new_submissions,
            self.new_wallets,
            self.new_keys,
            self.revoked_keys,
            self.new_reservations,
            self.settled,
            self.passing,
            self.new_quotes,
            self.entries,
        ):
            written.clear()
        if max(len(self.wallets), len(self.keys), len(self.reservations)) > MAX_REMEMBERED:
            for remembered in (
                self.wallets,
                self.customer_by_name,
                self.keys,
                self.key_by_sha256,
                self.spent,
                self.reservations,
            ):
                remembered.clear()

    def add_wallet(self, wallet: Wallet) -> None:
        self.wallets[wallet.customer_id] = wallet
        self.customer_by_name[wallet.name] = wallet.customer_id

    def add_key(self, key: Key) -> None:
        self.keys[key.key_id] = key
        self.key_by_sha256[key.sha256] = key.key_id

    def add_submission(self, submission: Submission) -> None:
        if submission.request_id in self.submissions:
            return
        self.submissions[submission.request_id] = submission
        if submission.idempotency_key and submission.released_at is None:
            self.submission_by_key[submission.customer_id, submission.idempotency_key] = submission
        payload = (submission.customer_id, submission.payload_sha256)
        self.submissions_by_payload.setdefault(payload, []).append(submission)

    def forget(self, submission: Submission) -> None:
        del self.submissions[submission.request_id]
        key = (submission.customer_id, submission.idempotency_key)
        if self.submission_by_key.get(key) is submission:
            del self.submission_by_key[key]
        self.submissions_by_payload[submission.customer_id, submission.payload_sha256].remove(submission)
        self.forgotten.append(submission.request_id)

    def open_wallet(self, customer_id: CustomerId, name: str) -> Wallet:
        wallet = Wallet(customer_id, name, 0, ZERO, self.ts)
        self.add_wallet(wallet)
        self.new_wallets.append(wallet)
        self.entries.append(
            Entry(customer_id, 0, None, ZERO, ZERO, ZERO, "opening", customer_id, None, self.ts, "", self.epoch)
        )
        return wallet

    def move(
        self, wallet: Wallet, kind: str, amount: Mils, public_id: str, detail: str, reserved: Mils | None = None
    ) -> Entry:
        """Append one entry to the wallet's chain."""
        balance = Mils(wallet.balance + amount)
        assert balance >= 0, f"{kind} of {amount} mils on a balance of {wallet.balance}"
        seq, before = wallet.seq, wallet.balance
        entry = Entry(
            wallet.customer_id,
            seq + 1,
            seq,
            before,
            amount,
            balance,
            kind,
            public_id,
            reserved,
            self.ts,
            detail,
            self.epoch,
        )
        self.entries.append(entry)
        wallet.seq, wallet.balance = seq + 1, balance
        self.moved_wallets[wallet.customer_id] = wallet
        return entry


def decide(book: Book, command: Command) -> Outcome:
    """Answer one command that `billing.checks` has passed. A refusal leaves the book as it was."""
    match command:
        case Reserve():
            return _reserve(book, command)
        case Quote():
            return _quote(book, command)
        case Settle():
            return _settle(book, command)
        case Heartbeat():
            return _heartbeat(book, command)
        case Grant():
            return _grant(book, command)
        case CreateKey():
            return _create_key(book, command)
        case RevokeKey():
            return _revoke_key(book, command)
        case SetKeyTerms():
            return _set_key_terms(book, command)
        case RotateKey():
            return _rotate_key(book, command)
        case ExpireLeases():
            return _expire_leases(book)
        case _:
            assert_never(command)


def _reserve(book: Book, command: Reserve) -> Outcome:
    earlier = book.reservations.get(command.request_id)
    if earlier is not None:
        same = (earlier.key_id, earlier.frames) == (command.key_id, command.frames)
        if not command.quote_id:  # a quote's rate was charged whatever the command said
            same &= earlier.mils_per_frame == command.mils_per_frame
        known = book.submissions.get(command.request_id)
        if known is not None and command.payload_sha256:
            same &= (known.idempotency_key, known.payload_sha256) == (command.idempotency_key, command.payload_sha256)
        if not same:
            return Rejected(f"{command.request_id} is already reserved for other work")
        return Reserved(earlier.request_id, earlier.customer_id, earlier.amount, earlier.balance_after_debit)
    key = book.keys.get(command.key_id)
    if key is None or key.revoked_at is not None or _has_expired(book, key):
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
    rate = command.mils_per_frame
    if command.quote_id:
        quote = book.quotes.get(command.quote_id)
        refused = _why_not(book, quote, command, wallet)
        if quote is None or refused is not None:
            return refused or QuoteRefused("there is no such quote")
        rate = quote.mils_per_frame
    amount = Mils(command.frames * rate)
    exceeded = _exceeded_budget(book, key, amount) if key.has_budget else None
    if exceeded is not None:
        return exceeded
    if amount > wallet.balance:
        return InsufficientCredits(wallet.balance, amount)
    if holder is not None:  # refunded in full, so the key is free for this attempt
        holder.released_at = book.ts
        if not holder.is_new:
            book.released.append(holder)
    debit = book.move(wallet, "debit", Mils(-amount), command.request_id, printable(command.detail), reserved=amount)
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
        is_new=True,
    )
    book.reservations[command.request_id] = reservation
    book.new_reservations.append(reservation)
    if key.has_budget:
        reservation.budget_id, reservation.budget_day = key.budget_id, _day(debit.ts)
        days = book.spent.setdefault(key.budget_id, {})
        days[reservation.budget_day] = days.get(reservation.budget_day, 0) + amount
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


def _quote(book: Book, command: Quote) -> Outcome:
    key = book.keys.get(command.key_id)
    if key is None or key.revoked_at is not None or _has_expired(book, key):
        return KeyRefused()
    work = (key.customer_id, command.model, command.frames, command.mils_per_frame, command.price_version)
    quote = book.quotes.get(command.quote_id)
    if quote is None:
        balance = book.wallets[key.customer_id].balance
        quote = QuoteRow(command.quote_id, *work, balance, book.ts, book.ts + command.valid_s)
        book.quotes[quote.quote_id] = quote
        book.new_quotes.append(quote)
    elif quote[1:6] != work:
        return Rejected(f"{command.quote_id} is already a quote for other work")
    return Quoted(quote.quote_id, Mils(quote.frames * quote.mils_per_frame), quote.balance, quote.expires_at)


def _why_not(book: Book, quote: QuoteRow | None, command: Reserve, wallet: Wallet) -> QuoteRefused | None:
    """Why the quote does not bind for this request."""
    if quote is None or quote.customer_id != wallet.customer_id:
        return QuoteRefused("there is no such quote")
    if quote.expires_at <= book.ts:
        return QuoteRefused("the quote has expired")
    if (quote.model, quote.frames) != (command.model, command.frames):
        return QuoteRefused(f"the quote is for {quote.frames} frames of {quote.model}")
    return None


def _has_expired(book: Book, key: Key) -> bool:
    return key.terms.expires_at is not None and key.terms.expires_at <= book.ts


def _day(ts: float) -> int:
    return int(ts // DAY_S)


def _exceeded_budget(book: Book, key: Key, amount: Mils) -> BudgetExceeded | None:
    """The first of the key's budgets that this amount would overdraw."""
    today = _day(book.ts)
    date = datetime.fromtimestamp(book.ts, UTC)
    month = today - date.day + 1
    next_month = month + calendar.monthrange(date.year, date.month)[1]
    days = book.spent.get(key.budget_id, {})
    periods: tuple[tuple[Literal["day", "month"], Mils | None, int, int], ...] = (
        ("day", key.terms.daily_budget_mils, today, today + 1),
        ("month", key.terms.monthly_budget_mils, month, next_month),
    )
    for period, limit, first, after in periods:
        spent = Mils(sum(spent for day, spent in days.items() if first <= day < after))
        if limit is not None and spent + amount > limit:
            return BudgetExceeded(limit, spent, period, after * DAY_S)
    return None


def _first_of(book: Book, customer_id: CustomerId, command: Reserve, holder: Submission | None) -> Reservation | None:
    """The request that this one repeats: under its key, or without one the newest of the same payload."""
    if command.idempotency_key:
        candidates = [holder] if holder is not None else []
    else:
        since = book.ts - command.dedupe_window_s
        same_payload = book.submissions_by_payload.get((customer_id, command.payload_sha256), [])
        candidates = [each for each in same_payload if command.dedupe_window_s and each.created_at >= since]
    stand = [book.reservations[each.request_id] for each in candidates]
    # What was refunded in full does not stand in the way of another attempt.
    stand = [each for each in stand if each.state == "open" or each.captured > 0]
    return max(stand, key=lambda each: (each.created_at, each.debit_seq), default=None)


def _settle(book: Book, command: Settle) -> Outcome:
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
    reservation.captured = Mils(frames_delivered * reservation.mils_per_frame)
    reservation.refunded = Mils(reservation.amount - reservation.captured)
    if reservation.refunded > 0:
        missing = reservation.frames - frames_delivered
        detail = f"refund · {missing} of {reservation.frames} frames not delivered" + (f" · {reason}" if reason else "")
        book.move(wallet, "refund", reservation.refunded, reservation.request_id, detail, reserved=reservation.amount)
    reservation.state = "settled"
    reservation.reason = reason
    reservation.settled_at = book.ts
    reservation.settled_seq = wallet.seq
    reservation.balance_after_settlement = wallet.balance
    book.passing.append(reservation.request_id)
    if not reservation.is_new:
        book.settled.append(reservation)
    days = book.spent.get(reservation.budget_id or "")
    if days is not None and reservation.budget_day in days:
        days[reservation.budget_day] -= reservation.refunded


def _heartbeat(book: Book, command: Heartbeat) -> Outcome:
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


def _grant(book: Book, command: Grant) -> Outcome:
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
    credit = _credit(book, wallet, command.amount_mils, command.public_id, printable(command.detail))
    return Granted(credit.public_id, credit.amount, credit.balance_after)


def _credit(book: Book, wallet: Wallet, amount: Mils, public_id: str, detail: str) -> Entry:
    entry = book.move(wallet, "credit", amount, public_id, detail)
    book.credits[public_id] = entry
    return entry


def _create_key(book: Book, command: CreateKey) -> Outcome:
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
        _credit(book, wallet, command.initial_credits_mils, initial_grant_id(command.key_id), detail)
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


def _revoke_key(book: Book, command: RevokeKey) -> Outcome:
    key = book.keys.get(command.key_id)
    if key is None:
        return UnknownKey(command.key_id)
    if key.revoked_at is None:
        key.revoked_at = book.ts
        key.revoked_seq = book.wallets[key.customer_id].seq
        book.revoked_keys.append(key)
    return KeyRevoked(key.key_id, key.revoked_at)


def _set_key_terms(book: Book, command: SetKeyTerms) -> Outcome:
    key = book.keys.get(command.key_id)
    if key is None:
        return UnknownKey(command.key_id)
    if key.terms != command.terms:
        key.terms = command.terms
        book.new_terms[key.key_id] = key
    return KeyTermsSet(key.key_id)


def _rotate_key(book: Book, command: RotateKey) -> Outcome:
    old, earlier = book.keys.get(command.key_id), book.keys.get(command.new_key_id)
    if old is None:
        return UnknownKey(command.key_id)
    if earlier is not None:
        if (earlier.sha256, earlier.budget_id) != (command.sha256, old.budget_id) or old.revoked_at is None:
            return Rejected(f"{command.new_key_id} is already another key")
        return KeyRotated(earlier.key_id, earlier.customer_id, old.revoked_at)
    if command.sha256 in book.key_by_sha256:
        return Rejected("this token already has a key under another id")
    if old.revoked_at is not None or _has_expired(book, old):
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
    _revoke_key(book, RevokeKey(old.key_id))
    return KeyRotated(new.key_id, new.customer_id, book.ts)


def _expire_leases(book: Book) -> Outcome:
    expired = sorted(
        (reservation.lease_until, reservation.request_id)
        for reservation in book.reservations.values()
        if reservation.state == "open" and reservation.lease_until <= book.now
    )
    for _, request_id in expired:
        _close(book, book.reservations[request_id], 0, LEASE_EXPIRED)
    old = [
        submission
        for submission in book.submissions.values()
        if submission.created_at <= book.now - KEY_MEMORY_S
        and book.reservations[submission.request_id].state == "settled"
    ]
    old.sort(key=lambda each: (each.created_at, each.request_id))
    for submission in old[:MAX_FORGOTTEN_PER_SWEEP]:
        book.forget(submission)
    return LeasesExpired(tuple(request_id for _, request_id in expired))
