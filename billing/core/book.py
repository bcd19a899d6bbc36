"""What the ledger's core can see and what it has to write: the rows of one batch, and those kept between batches."""

from dataclasses import dataclass, field
from typing import NamedTuple

from billing.commands import NO_TERMS, CustomerId, KeyId, KeyTerms, RequestId
from billing.money import Mils, dollars

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
    credit_limit: Mils = ZERO
    floor: Mils = ZERO
    debt: Mils = ZERO
    debt_seq: int | None = None
    parent_id: CustomerId | None = None
    cap: Mils | None = None
    cap_period: str | None = None
    has_members: bool = False
    line_seq: int = 0
    """How many credit lines it has had."""

    @property
    def is_overdue(self) -> bool:
        return self.floor > -self.credit_limit

    @property
    def spendable(self) -> Mils:
        """Nothing while there is a debt: every mil above the floor would have repaid it."""
        return Mils(max(0, self.balance - self.floor))


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
    model: str = ""
    per_frames: int = 1
    frames_delivered: int | None = None
    covered: int | None = None
    """Frames that provisioned units pay for; None for none."""
    covered_period: str | None = None
    drawn: Mils = ZERO
    """What of it came out of the parent's wallet."""
    draw_day: int | None = None
    """In days of UTC since 1970."""
    is_new: bool = False
    """Made by this batch: not in the database yet."""


class BudgetEvent(NamedTuple):
    """In the order of the table's columns."""

    event_id: str
    customer_id: CustomerId
    key_id: KeyId
    period: str
    starts_day: int
    level: int
    limit: Mils
    spent: Mils
    created_at: float


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
    per_frames: int


class PriceRow(NamedTuple):
    """In the order of the table's columns."""

    model: str
    customer_id: str
    version: int
    prev_version: int | None
    prev_effective_from: float | None
    effective_from: float
    terms: str
    created_at: float


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
class Payment:
    source: str
    public_id: str
    customer_id: CustomerId
    granted: Mils
    credit_seq: int
    reversed: Mils
    reversal_seq: int | None
    created_at: float
    balance_after_credit: Mils
    is_new: bool = False
    """Made by this batch: not in the database yet."""


class ReversalRow(NamedTuple):
    """In the order of the table's columns."""

    source: str
    seq: int
    prev_seq: int | None
    prev_mils: Mils
    to_mils: Mils
    taken: Mils
    owed: Mils
    customer_id: CustomerId
    entry_seq: int
    public_id: str
    ts: float


class DebtRow(NamedTuple):
    """In the order of the table's columns."""

    customer_id: CustomerId
    seq: int
    prev_seq: int | None
    prev_debt: Mils
    amount: Mils
    debt_after: Mils
    kind: str
    entry_seq: int
    public_id: str
    ts: float


class PaymentEventRow(NamedTuple):
    """In the order of the table's columns."""

    event_id: str
    source: str
    applied_at: float


class CreditLineRow(NamedTuple):
    """In the order of the table's columns."""

    customer_id: CustomerId
    seq: int
    limit: Mils
    floor: Mils
    entry_seq: int
    ts: float


class MembershipRow(NamedTuple):
    """In the order of the table's columns."""

    customer_id: CustomerId
    parent_id: CustomerId
    cap: Mils | None
    cap_period: str | None


class ProvisionRow(NamedTuple):
    """In the order of the table's columns."""

    customer_id: CustomerId
    model: str
    version: int
    prev_version: int | None
    prev_period: str | None
    from_period: str
    units: int
    unit_mils: Mils
    unit_frames: int
    units_per_replica: int
    created_at: float


class UnitChargeRow(NamedTuple):
    """In the order of the table's columns."""

    customer_id: CustomerId
    model: str
    period: str
    version: int
    units: int
    unit_mils: Mils
    unit_frames: int
    amount: Mils
    frames: int
    entry_seq: int
    charged_at: float


class UnitUseRow(NamedTuple):
    """In the order of the table's columns."""

    customer_id: CustomerId
    model: str
    period: str
    seq: int
    prev_seq: int | None
    used_before: int
    frames: int
    used_after: int
    allotment: int
    request_id: RequestId


@dataclass(slots=True)
class Allotment:
    """Frames that a month's units pay for, and how many of them are used."""

    customer_id: CustomerId
    model: str
    period: str
    frames: int
    used: int = 0
    seq: int | None = None
    """Of its last use."""


class TransferRow(NamedTuple):
    """In the order of the table's columns, and what the two entries came to."""

    transfer_id: str
    from_id: CustomerId
    to_id: CustomerId
    amount: Mils
    from_seq: int
    to_seq: int
    from_balance_after: Mils
    to_balance_after: Mils


class StatementRow(NamedTuple):
    """In the order of the table's columns."""

    customer_id: CustomerId
    number: int
    prev_number: int | None
    period: str
    from_seq: int
    to_seq: int
    opening: Mils
    usage: Mils
    payments: Mils
    transfers: Mils
    closing: Mils
    closed_at: float


@dataclass(slots=True)
class Unbilled:
    """What a wallet has had since its last statement."""

    last: StatementRow | None
    sums: dict[str, int]
    """By kind of entry, of those that are in the database."""
    counted: int = 0
    """How many of the batch's entries are in a statement already."""


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
    budget_events: dict[str, BudgetEvent] = field(default_factory=dict)
    """Those that this writer has decided lately: the table keeps each once, whoever decides it again."""
    new_budget_events: list[BudgetEvent] = field(default_factory=list)
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
    """Those that this batch closed; it may have made them too."""
    passing: list[RequestId] = field(default_factory=list)
    """Settled reservations, which the next batch will hardly ask for."""
    renewed: dict[RequestId, Reservation] = field(default_factory=dict)
    """Those whose lease this batch renewed; some of them may have been closed since."""
    credits: dict[str, Entry] = field(default_factory=dict)
    """Credits from outside by their public id."""
    payments: dict[str, Payment] = field(default_factory=dict)
    """By source."""
    changed_payments: dict[str, Payment] = field(default_factory=dict)
    """Made by this batch, or reversed."""
    new_reversals: list[ReversalRow] = field(default_factory=list)
    new_debts: list[DebtRow] = field(default_factory=list)
    indebted_wallets: dict[CustomerId, Wallet] = field(default_factory=dict)
    """Those whose debt this batch changed."""
    drawn: dict[CustomerId, dict[int, int]] = field(default_factory=dict)
    """By member and day, for at least the current month: what was drawn on the parent less what went back."""
    new_lines: list[CreditLineRow] = field(default_factory=list)
    lined_wallets: dict[CustomerId, Wallet] = field(default_factory=dict)
    """Those whose credit line this batch changed."""
    memberships: dict[CustomerId, MembershipRow] = field(default_factory=dict)
    """Those that this batch made or changed."""
    transfers: dict[str, TransferRow] = field(default_factory=dict)
    new_transfers: list[TransferRow] = field(default_factory=list)
    unbilled: dict[CustomerId, Unbilled] = field(default_factory=dict)
    statements: dict[tuple[CustomerId, str], StatementRow] = field(default_factory=dict)
    """By customer and period."""
    new_statements: list[StatementRow] = field(default_factory=list)
    events: set[str] = field(default_factory=set)
    """Of the batch's events, those that are marked."""
    new_events: list[PaymentEventRow] = field(default_factory=list)
    quotes: dict[str, QuoteRow] = field(default_factory=dict)
    new_quotes: list[QuoteRow] = field(default_factory=list)
    prices: dict[tuple[str, str], list[PriceRow]] = field(default_factory=dict)
    """By model and customer, in the order of their versions."""
    new_prices: list[PriceRow] = field(default_factory=list)
    provisions: dict[tuple[CustomerId, str], list[ProvisionRow]] = field(default_factory=dict)
    """By customer and model, in the order of their versions."""
    new_provisions: list[ProvisionRow] = field(default_factory=list)
    new_charges: list[UnitChargeRow] = field(default_factory=list)
    allotments: dict[tuple[CustomerId, str, str], Allotment] = field(default_factory=dict)
    """By customer, model and month."""
    allotments_since: dict[CustomerId, str] = field(default_factory=dict)
    """The month from which on a customer's are known."""
    new_uses: list[UnitUseRow] = field(default_factory=list)
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
            self.payments,
            self.changed_payments,
            self.indebted_wallets,
            self.lined_wallets,
            self.memberships,
            self.transfers,
            self.unbilled,
            self.statements,
            self.events,
            self.quotes,
            self.prices,
            self.provisions,
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
            self.new_reversals,
            self.new_debts,
            self.new_events,
            self.new_lines,
            self.new_transfers,
            self.new_statements,
            self.new_quotes,
            self.new_prices,
            self.new_provisions,
            self.new_charges,
            self.new_uses,
            self.new_budget_events,
            self.entries,
        ):
            written.clear()
        if len(self.budget_events) > MAX_REMEMBERED:
            self.budget_events.clear()
        if max(len(self.wallets), len(self.keys), len(self.reservations)) > MAX_REMEMBERED:
            for remembered in (
                self.wallets,
                self.customer_by_name,
                self.keys,
                self.key_by_sha256,
                self.spent,
                self.drawn,
                self.allotments,
                self.allotments_since,
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
        assert amount >= 0 or balance >= wallet.floor, f"{kind} of {amount} mils on a balance of {wallet.balance}"
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

    def repay(self, wallet: Wallet, public_id: str) -> None:
        """What came in under that id goes to the debt first."""
        amount = min(wallet.debt, wallet.spendable)
        if amount > 0:
            detail = f"Repayment of debt · {dollars(Mils(amount))}"
            entry = self.move(wallet, "repayment", Mils(-amount), public_id, detail)
            self.change_debt(wallet, "repayment", Mils(-amount), entry.seq, public_id)

    def transfer(self, transfer_id: str, source: Wallet, target: Wallet, amount: Mils, detail: str) -> TransferRow:
        """Move money between two wallets of a team. The target's debt is not repaid by this."""
        out = self.move(source, "transfer_out", Mils(-amount), transfer_id, detail)
        into = self.move(target, "transfer_in", amount, transfer_id, detail)
        row = TransferRow(
            transfer_id,
            source.customer_id,
            target.customer_id,
            amount,
            out.seq,
            into.seq,
            out.balance_after,
            into.balance_after,
        )
        self.transfers[transfer_id] = row
        self.new_transfers.append(row)
        return row

    def change_debt(self, wallet: Wallet, kind: str, amount: Mils, entry_seq: int, public_id: str) -> None:
        before, debt = wallet.debt, Mils(wallet.debt + amount)
        seq = (wallet.debt_seq or 0) + 1
        self.new_debts.append(
            DebtRow(wallet.customer_id, seq, wallet.debt_seq, before, amount, debt, kind, entry_seq, public_id, self.ts)
        )
        wallet.debt, wallet.debt_seq = debt, seq
        self.indebted_wallets[wallet.customer_id] = wallet
