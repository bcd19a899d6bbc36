"""The ledger's core against a seeded world of faults: two writers, several callers, a network that misbehaves.

    python -m benchmarks.ledger_simulation [--operations 1000000] [--seed N]

Everything happens in one thread and one random generator, so a seed is a whole history. What is real: `billing.core`,
its book and what the book keeps between commits. What is simulated: the database (a transaction is one step, and
refuses what the schema refuses), the clock, the network (drops, doubles, reorders and delays messages), crashes before
a commit and after it but before its answers, writers that freeze and wake up after somebody took over, callers that
leave.

Held after every step: the rules of the schema on what is written; each answer is the one that a dictionary gives
(`ledger_oracle.py`); what was acknowledged is in the database; the same command has one answer. Held at the end, when
all faults are healed: every reservation is settled, and the money adds up.

Prints one JSON line; on failure the seed and the commit that reproduce it.
"""

import argparse
import copy
import json
import random
import secrets
import subprocess
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from benchmarks.ledger_oracle import Oracle
from billing.checks import malformed
from billing.commands import (
    AddPrice,
    ChargeUnits,
    CloseStatement,
    Command,
    CreateKey,
    Credit,
    Credited,
    CustomerId,
    ExpireLeases,
    Grant,
    Granted,
    Heartbeat,
    IdempotencyConflict,
    InsufficientCredits,
    KeyCreated,
    KeyId,
    KeyRefused,
    Outcome,
    PriceAdded,
    Quote,
    Quoted,
    Repeated,
    RequestId,
    Reserve,
    Reserved,
    Reverse,
    RevokeKey,
    SetCreditLine,
    SetMember,
    Settle,
    Settled,
    SetUnits,
    StatementClosed,
    Transfer,
    Transferred,
    UnitsSet,
    UnknownReservation,
)
from billing.core import Book, decide
from billing.core.book import (
    Allotment,
    CreditLineRow,
    Entry,
    Key,
    Payment,
    PriceRow,
    ProvisionRow,
    QuoteRow,
    Reservation,
    StatementRow,
    Submission,
    TransferRow,
    Unbilled,
    Wallet,
)
from billing.core.reservations import KEY_MEMORY_S
from billing.keys import initial_grant_id
from billing.money import Mils, part_of_rate
from billing.price_terms import terms_of
from billing.prices import PriceVersion, Rate

NUM_CALLERS = 24
NUM_CUSTOMERS = 6
LEASE_S = 30.0
GRACE_S = 30.0
MAX_BATCH = 64
MODEL = "tiny-pusher"
RATES = ((5, 1), (60, 1), (7, 3), (1, 49), (333, 1_000))
"""Mils, for so many frames."""
UNIQUE = ("credit", "debit", "refund")
"""Kinds of which there is one entry for each public id."""


class Broken(AssertionError):
    """A promise of the ledger does not hold."""


def hold(promise: bool, what: str, *about: object) -> None:
    if not promise:
        raise Broken(f"{what}: {about}")


@dataclass
class Database:
    """What is durable. `commit` is one transaction: all of a book's rows, or `Broken` if the schema refused one."""

    epoch: int = 0
    wallets: dict[CustomerId, Wallet] = field(default_factory=dict)
    names: dict[str, CustomerId] = field(default_factory=dict)
    keys: dict[KeyId, Key] = field(default_factory=dict)
    reservations: dict[RequestId, Reservation] = field(default_factory=dict)
    open: set[RequestId] = field(default_factory=set)
    submissions: dict[RequestId, Submission] = field(default_factory=dict)
    holders: dict[tuple[CustomerId, str], RequestId] = field(default_factory=dict)
    by_payload: dict[tuple[CustomerId, str], list[RequestId]] = field(default_factory=dict)
    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)
    """By kind and public id: the schema's partial unique indexes."""
    payments: dict[str, Payment] = field(default_factory=dict)
    quotes: dict[str, QuoteRow] = field(default_factory=dict)
    prices: dict[tuple[str, str], list[PriceRow]] = field(default_factory=dict)
    provisions: dict[tuple[CustomerId, str], list[ProvisionRow]] = field(default_factory=dict)
    allotments: dict[tuple[CustomerId, str, str], Allotment] = field(default_factory=dict)
    transfers: dict[str, TransferRow] = field(default_factory=dict)
    drawn: dict[CustomerId, Counter[int]] = field(default_factory=dict)
    statements: dict[CustomerId, list[StatementRow]] = field(default_factory=dict)
    sums: dict[CustomerId, Counter[str]] = field(default_factory=dict)
    """What the entries after a wallet's last statement come to, by kind."""
    num_entries: int = 0
    newest_ts: float = 0.0
    moved: Counter[str] = field(default_factory=Counter)
    """What the entries of a kind come to."""

    def load(self, commands: list[Command], book: Book) -> None:
        """As `billing.store.load`: what these commands need and the book does not know."""
        request_ids: set[RequestId] = set()
        expires = made_members = False
        for command in commands:
            match command:
                case Reserve():
                    request_ids.add(command.request_id)
                    self._load_key(book, command.key_id)
                    self._load_quote(book, command.quote_id)
                    self._load_submissions(book, command, commands)
                case Settle():
                    request_ids.add(command.request_id)
                case Heartbeat():
                    request_ids.update(command.request_ids)
                case Grant():
                    self._load_wallet(book, command.customer_id)
                    self._load_credit(book, command.public_id)
                case CreateKey():
                    self._load_key(book, command.key_id)
                    self._load_wallet(book, command.customer_id)
                    if command.customer_name in self.names:
                        self._load_wallet(book, self.names[command.customer_name])
                    self._load_credit(book, initial_grant_id(command.key_id))
                case RevokeKey():
                    self._load_key(book, command.key_id)
                case Quote():
                    self._load_key(book, command.key_id)
                    self._load_quote(book, command.quote_id)
                case Credit():
                    self._load_wallet(book, command.customer_id)
                    self._load_credit(book, command.public_id)
                    self._load_payment(book, command.source)
                case Reverse():
                    self._load_payment(book, command.source)
                case SetMember():
                    made_members = True
                    for customer_id in (command.customer_id, command.parent_id, self.names.get(command.name)):
                        self._load_wallet(book, customer_id)
                case Transfer():
                    self._load_wallet(book, command.from_id)
                    self._load_wallet(book, command.to_id)
                    if command.transfer_id in self.transfers:
                        book.transfers[command.transfer_id] = self.transfers[command.transfer_id]
                case SetCreditLine():
                    self._load_wallet(book, command.customer_id)
                case CloseStatement():
                    self._load_wallet(book, command.customer_id)
                    self._load_statements(book, command.customer_id)
                case AddPrice():
                    self._load_wallet(book, CustomerId(command.customer_id))
                    versions = self.prices.get((command.model, command.customer_id), ())
                    book.prices[command.model, command.customer_id] = list(versions)
                case SetUnits() | ChargeUnits():
                    for (customer_id, model), known in self.provisions.items():
                        self._load_wallet(book, customer_id)
                        book.provisions[customer_id, model] = list(known)
                    if isinstance(command, SetUnits):
                        self._load_wallet(book, command.customer_id)
                case ExpireLeases():
                    expires = True
        for allotment in self.allotments.values() if len(book.allotments) < len(self.allotments) else ():
            month = (allotment.customer_id, allotment.model, allotment.period)
            book.allotments.setdefault(month, copy.copy(allotment))
        if expires:
            request_ids.update(id_ for id_ in self.open if self.reservations[id_].lease_until <= book.now)
            for request_id, submission in self.submissions.items():
                if submission.created_at > book.now - KEY_MEMORY_S:
                    break  # they are in the order in which they were made
                row = self.reservations[request_id]
                if row.settled_at is not None and row.settled_at <= book.now - KEY_MEMORY_S:
                    book.add_submission(copy.copy(submission))
        request_ids.update(book.submissions)
        for request_id in sorted(request_ids - book.reservations.keys()):
            row = self.reservations.get(request_id)
            if row is not None:
                book.reservations[request_id] = copy.copy(row)
                self._load_wallet(book, row.customer_id)
                if row.state == "settled":
                    book.passing.append(request_id)
        self._load_drawn(book, commands, made_members)

    def _load_wallet(self, book: Book, customer_id: CustomerId | None) -> None:
        if customer_id in self.wallets and customer_id not in book.wallets:
            wallet = copy.copy(self.wallets[customer_id])
            book.add_wallet(wallet)
            self._load_wallet(book, wallet.parent_id)

    def _load_drawn(self, book: Book, commands: list[Command], made_members: bool) -> None:
        used = {each.key_id for each in commands if isinstance(each, Reserve | Quote | CreateKey | RevokeKey)}
        named = {each.name for each in commands if isinstance(each, SetMember)}
        named.update(each.customer_name for each in commands if isinstance(each, CreateKey))
        owners = {book.keys[key_id].customer_id for key_id in used & book.keys.keys()}
        owners.update(book.customer_by_name[name] for name in named & book.customer_by_name.keys())
        for member in owners - book.drawn.keys():
            if made_members or book.wallets[member].cap is not None:
                book.drawn[member] = dict(self.drawn.get(member, {}))

    def _load_quote(self, book: Book, quote_id: str) -> None:
        if quote_id in self.quotes:
            book.quotes[quote_id] = self.quotes[quote_id]

    def _load_payment(self, book: Book, source: str) -> None:
        if source in self.payments:
            book.payments[source] = copy.copy(self.payments[source])
            self._load_wallet(book, self.payments[source].customer_id)

    def _load_statements(self, book: Book, customer_id: CustomerId) -> None:
        closed = self.statements.get(customer_id, [])
        book.statements.update({(customer_id, each.period): each for each in closed})
        book.unbilled[customer_id] = Unbilled(closed[-1] if closed else None, dict(self.sums.get(customer_id, {})))

    def _load_key(self, book: Book, key_id: KeyId) -> None:
        if key_id in self.keys and key_id not in book.keys:
            book.add_key(copy.copy(self.keys[key_id]))
            self._load_wallet(book, self.keys[key_id].customer_id)

    def _load_credit(self, book: Book, public_id: str) -> None:
        if ("credit", public_id) in self.entries:
            book.credits[public_id] = self.entries["credit", public_id]

    def _load_submissions(self, book: Book, command: Reserve, batch: list[Command]) -> None:
        owners = {
            each.key_id: self.names.get(each.customer_name)
            for each in batch
            if isinstance(each, CreateKey) and each.key_id == command.key_id
        }
        if command.key_id in self.keys:
            owners[command.key_id] = self.keys[command.key_id].customer_id
        customer_id = owners.get(command.key_id)
        if not command.payload_sha256 or customer_id is None:
            return
        wanted = {command.request_id, self.holders.get((customer_id, command.idempotency_key), RequestId(""))}
        if command.dedupe_window_s:
            wanted.update(self.by_payload.get((customer_id, command.payload_sha256), ())[-20:])
        for request_id in sorted(wanted & self.submissions.keys()):
            book.add_submission(copy.copy(self.submissions[request_id]))

    def commit(self, book: Book, epoch: int) -> None:
        hold(epoch == self.epoch, "a stale writer committed", epoch, self.epoch)
        for wallet in book.new_wallets:
            hold(wallet.customer_id not in self.wallets and wallet.name not in self.names, "two wallets", wallet)
            self.names[wallet.name] = wallet.customer_id
            self.wallets[wallet.customer_id] = Wallet(wallet.customer_id, wallet.name, -1, Mils(0), wallet.created_at)
        for key in [*book.new_keys, *book.revoked_keys]:
            known = self.keys.get(key.key_id)
            hold(known is None or known.revoked_at is None or key in book.new_keys, "a key revoked twice", key)
            self.keys[key.key_id] = copy.copy(key)
        for reservation in book.new_reservations:
            hold(reservation.request_id not in self.reservations, "a request reserved twice", reservation)
            paid = reservation.frames - (reservation.covered or 0)
            price = part_of_rate(paid, reservation.mils_per_frame, reservation.per_frames)
            hold(reservation.amount == price, "a price", reservation)
            if reservation.drawn:
                hold(f"{reservation.request_id}.draw" in book.transfers, "drawn from nowhere", reservation)
                days = self.drawn.setdefault(reservation.customer_id, Counter())
                days[reservation.draw_day or 0] += reservation.drawn - min(reservation.drawn, reservation.refunded)
            self._put(reservation)
        for reservation in [*book.settled, *book.renewed.values()]:
            if not reservation.is_new:
                known_row = self.reservations[reservation.request_id]
                hold(known_row.state == "open" or known_row == reservation, "settled twice", known_row, reservation)
                if reservation.drawn and known_row.state == "open":
                    back = min(reservation.drawn, reservation.refunded)
                    self.drawn[reservation.customer_id][reservation.draw_day or 0] -= back
                self._put(reservation)
        self._commit_submissions(book)
        self._commit_accounts(book)
        lines = {each.customer_id: [] for each in book.new_lines}  # type: dict[CustomerId, list[CreditLineRow]]
        for line in book.new_lines:
            lines[line.customer_id].append(line)
        for entry in book.entries:
            self._draw_lines(lines.get(entry.customer_id), before=entry.seq)
            self._append(entry)
        for drawn in lines.values():
            self._draw_lines(drawn)
        self._commit_payments(book)
        for wallet in [
            *book.moved_wallets.values(),
            *book.new_wallets,
            *book.lined_wallets.values(),
            *book.indebted_wallets.values(),
        ]:
            row = self.wallets[wallet.customer_id]
            hold(row == wallet, "a wallet is not what its rows say", wallet, row)
            hold(row.debt == 0 or row.balance <= row.floor, "spendable beside a debt", row)

    def _draw_lines(self, lines: list[CreditLineRow] | None, before: int | None = None) -> None:
        while lines and (before is None or lines[0].entry_seq < before):
            line = lines.pop(0)
            wallet = self.wallets[line.customer_id]
            hold(line.seq == wallet.line_seq + 1 and line.floor in (0, -line.limit), "a credit line", line, wallet)
            hold(line.limit == 0 or wallet.parent_id is None, "a member with a credit limit", line, wallet)
            hold(wallet.balance >= -line.limit, "a line above what is owed", line, wallet)
            wallet.line_seq, wallet.credit_limit, wallet.floor = line.seq, line.limit, line.floor

    def _commit_accounts(self, book: Book) -> None:
        for member in book.memberships.values():
            wallet, parent = self.wallets[member.customer_id], self.wallets[member.parent_id]
            hold(wallet.parent_id in (None, member.parent_id), "a member changed its team", wallet, member)
            hold(not wallet.has_members and parent.parent_id is None, "a team of three levels", wallet, parent)
            wallet.parent_id, wallet.cap, wallet.cap_period = member.parent_id, member.cap, member.cap_period
            parent.has_members = True
        for quote in book.new_quotes:
            hold(quote.quote_id not in self.quotes, "two quotes", quote)
            self.quotes[quote.quote_id] = quote
        for price in book.new_prices:
            versions = self.prices.setdefault((price.model, price.customer_id), [])
            hold(price.version == len(versions) + 1, "a gap between prices", price)
            hold(not versions or versions[-1].effective_from < price.effective_from, "prices out of order", price)
            versions.append(price)
        rows = book.new_transfers or book.new_charges
        entries = {(each.customer_id, each.seq): each for each in book.entries} if rows else {}
        self._commit_units(book, entries)
        for transfer in book.new_transfers:
            hold(transfer.transfer_id not in self.transfers, "transferred twice", transfer)
            out = entries[transfer.from_id, transfer.from_seq]
            into = entries[transfer.to_id, transfer.to_seq]
            hold(-out.amount == transfer.amount == into.amount, "a transfer in halves", transfer, out, into)
            pair = {self.wallets[transfer.from_id].parent_id, self.wallets[transfer.to_id].parent_id}
            hold(bool(pair & {transfer.from_id, transfer.to_id}), "a transfer between teams", transfer)
            self.transfers[transfer.transfer_id] = transfer
        for statement in book.new_statements:
            self._close(statement, book)

    def _close(self, statement: StatementRow, book: Book) -> None:
        closed = self.statements.setdefault(statement.customer_id, [])
        last = closed[-1] if closed else None
        start = (0, Mils(0), "") if last is None else (last.to_seq, last.closing, last.period)
        hold((statement.from_seq, statement.opening) == start[:2], "statements do not tile", statement, last)
        hold(statement.period > start[2] and statement.number == len(closed) + 1, "a month twice", statement, last)
        parts = statement.usage + statement.payments + statement.transfers
        hold(statement.opening + parts == statement.closing, "a statement does not add up", statement)
        sums = self.sums.setdefault(statement.customer_id, Counter())
        for entry in book.entries:
            if entry.customer_id == statement.customer_id and start[0] < entry.seq <= statement.to_seq:
                sums[entry.kind] += entry.amount
        hold(sums["debit"] + sums["refund"] + sums["fee"] == statement.usage, "a statement's usage", statement, sums)
        moved = sums["transfer_in"] + sums["transfer_out"]
        hold(moved == statement.transfers, "a statement's transfers", statement, sums)
        hold(sum(sums.values()) == parts, "a statement's payments", statement, sums)
        sums.clear()
        closed.append(statement)

    def _commit_payments(self, book: Book) -> None:
        for payment in book.changed_payments.values():
            hold(0 <= payment.reversed <= payment.granted, "more taken back than was paid", payment)
            hold(payment.is_new == (payment.source not in self.payments), "a payment twice", payment)
            before = Mils(0) if payment.is_new else self.payments[payment.source].reversed
            steps = [each for each in book.new_reversals if each.source == payment.source]
            for step in steps:
                hold(step.prev_mils == before, "a reversal from elsewhere", step, before)
                hold(step.to_mils - step.prev_mils == step.taken + step.owed, "a reversal", step)
                before = step.to_mils
            hold(before == payment.reversed, "reversed without a reversal", payment, steps)
            credit = self.entries["credit", payment.public_id]
            of_payment = (payment.customer_id, payment.granted, payment.credit_seq)
            hold((credit.customer_id, credit.amount, credit.seq) == of_payment, "a payment", payment, credit)
            self.payments[payment.source] = replace(payment, is_new=False)
        for debt in book.new_debts:
            wallet = self.wallets[debt.customer_id]
            hold((debt.prev_seq, debt.prev_debt) == (wallet.debt_seq, wallet.debt), "a debt's chain", debt, wallet)
            hold(debt.debt_after == debt.prev_debt + debt.amount >= 0, "a wrong debt", debt)
            wallet.debt, wallet.debt_seq = debt.debt_after, debt.seq
            self.moved[f"debt: {debt.kind}"] += debt.amount

    def _commit_units(self, book: Book, entries: dict[tuple[CustomerId, int], Entry]) -> None:
        for terms in book.new_provisions:
            versions = self.provisions.setdefault((terms.customer_id, terms.model), [])
            hold(terms.version == len(versions) + 1, "a gap between units", terms)
            hold(not versions or versions[-1].from_period < terms.from_period, "units out of order", terms)
            month = (terms.customer_id, terms.model, terms.from_period)
            hold(month not in self.allotments, "other units for a month that was charged", terms)
            versions.append(terms)
        for charge in book.new_charges:
            month = (charge.customer_id, charge.model, charge.period)
            hold(month not in self.allotments, "a month charged twice", charge)
            fee = entries[charge.customer_id, charge.entry_seq]
            hold((fee.kind, fee.amount) == ("fee", -charge.amount), "units that nobody paid", charge, fee)
            self.allotments[month] = Allotment(*month, charge.frames)
        for use in book.new_uses:
            units = self.allotments[use.customer_id, use.model, use.period]
            row = self.reservations[use.request_id]
            hold((use.prev_seq, use.used_before) == (units.seq, units.used), "a chain of uses", use, units)
            hold(0 <= use.used_before + use.frames == use.used_after <= units.frames, "more than there is", use, units)
            back = (row.frames_delivered or 0) - (row.covered or 0)
            right = row.covered if use.frames > 0 else back if row.state == "settled" else None
            hold(use.frames == right, "another use than the request's", use, row)
            units.used, units.seq = use.used_after, use.seq

    def _put(self, reservation: Reservation) -> None:
        row = copy.copy(reservation)
        row.is_new = False
        if row.state == "open":
            self.open.add(row.request_id)
            hold(row.captured == row.refunded == 0, "an open reservation moved money", row)
        else:
            self.open.discard(row.request_id)
            hold(row.captured + row.refunded == row.amount and row.captured >= 0 <= row.refunded, "a settlement", row)
        self.reservations[row.request_id] = row

    def _commit_submissions(self, book: Book) -> None:
        for request_id in book.forgotten:
            gone = self.submissions.pop(request_id)
            hold(self.reservations[request_id].state == "settled", "forgotten while open", gone)
            if self.holders.get((gone.customer_id, gone.idempotency_key)) == request_id:
                del self.holders[gone.customer_id, gone.idempotency_key]
            self.by_payload[gone.customer_id, gone.payload_sha256].remove(request_id)
        for submission in book.released:
            known = self.submissions.get(submission.request_id)
            if known is not None:
                row = self.reservations[submission.request_id]
                hold(row.state == "settled" and not row.frames_delivered, "a delivered request released its key", row)
                known.released_at = submission.released_at
                self.holders.pop((known.customer_id, known.idempotency_key), None)
        for submission in book.new_submissions:
            key = (submission.customer_id, submission.idempotency_key)
            row = self.reservations[submission.request_id]
            hold(row.customer_id == submission.customer_id, "another customer's request", submission)
            if submission.idempotency_key and submission.released_at is None:
                hold(key not in self.holders, "one key, two requests", submission, self.holders.get(key))
                self.holders[key] = submission.request_id
            kept = copy.copy(submission)
            kept.is_new = False
            self.submissions[submission.request_id] = kept
            payload = (submission.customer_id, submission.payload_sha256)
            self.by_payload.setdefault(payload, []).append(submission.request_id)

    def _append(self, entry: Entry) -> None:
        wallet = self.wallets[entry.customer_id]
        hold(entry.seq == wallet.seq + 1, "a gap or a fork", entry, wallet)
        hold(entry.prev_balance == wallet.balance, "a lie about the balance before", entry, wallet)
        hold(entry.balance_after == entry.prev_balance + entry.amount, "a wrong sum", entry)
        hold(entry.amount >= 0 or entry.balance_after >= wallet.floor, "spent below the floor", entry, wallet)
        hold(entry.epoch == self.epoch, "an entry of a stale writer", entry)
        hold(entry.ts >= self.newest_ts, "time ran back", entry, self.newest_ts)
        hold((entry.kind, entry.public_id) not in self.entries, "an id twice", entry)
        if entry.kind in UNIQUE:
            self.entries[entry.kind, entry.public_id] = entry
        if entry.kind in ("debit", "refund"):
            row = self.reservations[RequestId(entry.public_id)]
            hold(row.customer_id == entry.customer_id, "another wallet's request", entry, row)
            if entry.kind == "debit":
                hold(entry.amount == -row.amount and row.debit_seq == entry.seq, "a debit", entry, row)
            else:
                hold(("debit", entry.public_id) in self.entries, "a refund without a debit", entry)
                hold(row.state == "settled" and entry.amount == row.refunded, "a refund", entry, row)
        elif entry.kind.startswith("transfer"):
            hold(entry.public_id in self.transfers, "a half of a transfer", entry)
        self.moved[entry.kind] += entry.amount
        closed = self.statements.get(entry.customer_id)
        if not closed or entry.seq > closed[-1].to_seq:
            self.sums.setdefault(entry.customer_id, Counter())[entry.kind] += entry.amount
        self.num_entries += 1
        wallet.seq, wallet.balance, self.newest_ts = entry.seq, entry.balance_after, entry.ts

    def money_adds_up(self) -> None:
        spendable = sum(wallet.balance for wallet in self.wallets.values())
        held = sum(self.reservations[request_id].amount for request_id in self.open)
        kept = sum(row.captured for row in self.reservations.values())
        came = sum(self.moved[kind] for kind in ("credit", "reversal", "reinstatement", "repayment", "fee"))
        hold(came == spendable + held + kept, "money", came, spendable, held, kept)
        hold(self.moved["transfer_in"] + self.moved["transfer_out"] == 0, "transfers", self.moved)
        hold(self.moved["debt: repayment"] == self.moved["repayment"], "repayments", self.moved)
        debts = sum(wallet.debt for wallet in self.wallets.values())
        back = sum(payment.reversed for payment in self.payments.values())
        taken = -self.moved["reversal"] - self.moved["reinstatement"] - self.moved["repayment"]
        hold(back == taken + debts, "what was taken back", back, taken, debts)


class Fenced(Exception):
    pass


class Crashed(Exception):
    pass


@dataclass
class Writer:
    """As `billing.ledger.Ledger`, with a database of this simulation."""

    database: Database
    oracle: Oracle
    epoch: int = 0
    newest_ts: float = 0.0
    book: Book = field(default_factory=Book)
    queue: list[tuple["Caller | None", Command]] = field(default_factory=list)
    frozen: bool = False

    def take_over(self, now: float) -> None:
        self.database.epoch += 1
        self.epoch, self.newest_ts, self.book = self.database.epoch, self.database.newest_ts, Book()
        for request_id in self.database.open:
            row = self.database.reservations[request_id]
            row.lease_until = max(row.lease_until, now + GRACE_S)

    def apply(self, commands: list[Command], now: float, crash: str) -> list[Outcome]:
        for command in commands:
            hold(malformed(command) is None, "a caller of this simulation sent nonsense", command)
        book, self.book = self.book, Book()
        if self.epoch != self.database.epoch:
            raise Fenced
        book.begin(now, max(now, self.newest_ts), self.epoch)
        self.database.load(commands, book)
        outcomes = [decide(book, command) for command in commands]
        if crash == "before commit":
            raise Crashed
        self.database.commit(book, self.epoch)
        for command, outcome in zip(commands, outcomes, strict=True):
            right = self.oracle.disputes(command, outcome, book.ts)
            hold(right is None, "the oracle says otherwise", command, outcome, right)
        for customer_id in {*book.moved_wallets, *book.indebted_wallets, *book.lined_wallets}:
            account, row = self.oracle.accounts[customer_id], self.database.wallets[customer_id]
            theirs = (account.balance, account.debt, account.floor, account.num_entries)
            hold(theirs == (row.balance, row.debt, row.floor, row.seq), "not as the oracle has it", row, account)
        if crash == "after commit":
            raise Crashed
        self.newest_ts = book.ts
        book.committed()
        self.book = book
        return outcomes


class Caller:
    """One ingress: sends a command until it is answered, then what follows from the answer."""

    def __init__(self, world: "Simulation", number: int) -> None:
        self.world, self.number = world, number
        self.waiting: Command | None = None
        self.sent: Command | None = None
        self.job: Reserve | None = None
        self.serial = 0

    def turn(self) -> Command:
        """The next command, or the one that nobody has answered yet."""
        if self.waiting is None:
            self.waiting = self.next_command()
        return self.waiting

    def fresh(self, prefix: str) -> str:
        self.serial += 1
        return f"{prefix}_{self.number}_{self.serial}"

    def next_command(self) -> Command:
        draw = self.world.draw
        if self.job is not None:
            kind = draw.random()
            if kind < 0.1:
                return Heartbeat((self.job.request_id,), LEASE_S)
            if kind < 0.95:
                delivered = draw.choice((0, self.job.frames, draw.randint(0, self.job.frames)))
                return Settle(self.job.request_id, delivered, "" if delivered else "engine failed")
            self.job = None  # this ingress forgets its work; the lease will refund it
        kind = draw.random()
        if kind < 0.02:
            return self.make_key()
        if kind < 0.03:
            return RevokeKey(draw.choice(self.world.key_ids))
        if kind < 0.05:
            return Grant(self.world.customer(), Mils(draw.randint(1, 300)), self.fresh("adm"), "")
        if kind < 0.15:
            return self.account_command()
        if kind < 0.2:
            return self.quote(draw.choice(self.world.key_ids))
        return self.reserve(draw.choice(self.world.key_ids), draw.randint(1, 60), *self.world.rate(), "")

    def reserve(self, key_id: KeyId, frames: int, mils: int, per_frames: int, quote_id: str) -> Reserve:
        draw = self.world.draw
        named = draw.random()
        payload = draw.choice("abcd") * 64
        name, window_s = (f"name-{draw.randrange(6)}", 0.0) if named < 0.3 else ("", 60.0 if named < 0.6 else 0.0)
        return Reserve(
            RequestId(self.fresh("req")),
            key_id,
            frames,
            Mils(mils),
            "predict",
            LEASE_S,
            name,
            payload if named < 0.8 else "",
            window_s,
            MODEL,
            quote_id,
            per_frames,
        )

    def quote(self, key_id: KeyId) -> Quote:
        draw = self.world.draw
        mils, per_frames = self.world.rate()
        valid_s = draw.choice((1.0, 60.0))
        return Quote(self.fresh("quo"), key_id, MODEL, draw.randint(1, 60), Mils(mils), 0, valid_s, per_frames)

    def account_command(self) -> Command:
        """What payments, teams, postpaid customers and operators do."""
        draw, world = self.world.draw, self.world
        customer = world.customer()
        member = CustomerId(f"cus_{draw.randint(3, NUM_CUSTOMERS - 1)}")
        parent = CustomerId(f"cus_{draw.choice((0, 0, 0, 0, 1, 4))}")
        match draw.choices(range(9), (20, 20, 8, 20, 12, 10, 2, 3, 5))[0]:
            case 0:
                if not world.sources or draw.random() < 0.7:
                    world.sources.append((self.fresh("stripe"), customer, Mils(draw.randint(1, 3_000))))
                    del world.sources[:-20]
                source, customer, amount = draw.choice(world.sources)  # a webhook and a sweep may both credit it
                wrong = draw.random() < 0.02
                return Credit(customer, Mils(amount + wrong), source, self.fresh("evt"), "top-up")
            case 1:
                source = draw.choice(world.sources)[0] if world.sources else "stripe_unknown"
                return Reverse(source, Mils(draw.choice((0, 500, 9_999, 9_999))), self.fresh("evt"), "refund")
            case 2:
                cap = draw.choice((None, 0, 500, 3_000))
                period = None if cap is None else draw.choice(("day", "month"))
                name = f"name {member.removeprefix('cus_')}"
                return SetMember(member, name, parent, None if cap is None else Mils(cap), period)
            case 3:
                ends = (parent, member) if draw.random() < 0.7 else (member, parent)
                return Transfer(self.fresh("tra"), *ends, Mils(draw.randint(1, 400)), "allocation")
            case 4:
                return SetCreditLine(customer, Mils(draw.choice((0, 200, 1_000))), draw.random() < 0.3)
            case 5:
                month = datetime.fromtimestamp(world.now - draw.choice((0, 0, 30, -30)) * 86_400, UTC)
                return CloseStatement(customer, f"{month:%Y-%m}")
            case 6:
                return ChargeUnits()
            case 7:
                version = len(world.database.provisions.get((customer, MODEL), ())) + draw.choice((1, 1, 1, 2))
                month = datetime.fromtimestamp(world.now + draw.choice((0, 0, 30, -30)) * 86_400, UTC)
                mils, frames = Mils(draw.randint(1, 100)), draw.choice((0, 50, 500))
                return SetUnits(customer, MODEL, version, f"{month:%Y-%m}", draw.randint(0, 3), mils, frames, 2)
            case _:
                whose = draw.choice(("", customer))
                version = len(world.database.prices.get((MODEL, whose), ())) + draw.choice((1, 1, 1, 2))
                mils, per_frames = draw.choice(RATES)
                rate = Rate("frame", mils * 100_000, per_frames)
                terms = terms_of(PriceVersion(MODEL, version, world.now, (rate,)))
                return AddPrice(MODEL, whose, version, world.now, terms)

    def make_key(self) -> CreateKey:
        key_id = KeyId(self.fresh("key"))
        number = self.world.draw.randrange(NUM_CUSTOMERS)
        customer = CustomerId(f"cus_{number}")
        self.world.key_ids.append(key_id)
        del self.world.key_ids[: -3 * NUM_CUSTOMERS]
        sha256 = f"{self.number:032x}{self.serial:032x}"
        return CreateKey(
            key_id, sha256, "abcd", f"name {number}", customer, Mils(self.world.draw.choice((0, 200))), 50.0, 200
        )

    def answered(self, command: Command, outcome: Outcome) -> None:
        self.world.check(command, outcome)
        if command != self.waiting:
            return  # a double of an earlier answer
        self.waiting = None
        match outcome:
            case Reserved():
                hold(isinstance(command, Reserve), "an answer to another question", command, outcome)
                self.job = command if isinstance(command, Reserve) else None
            case Settled():
                self.job = None
            case Quoted() if isinstance(command, Quote):
                rates = (command.mils_per_frame, command.per_frames), self.world.rate()
                frames = command.frames + (self.world.draw.random() < 0.05)
                reserve = self.reserve(command.key_id, frames, *self.world.draw.choice(rates), command.quote_id)
                self.waiting = reserve
            case InsufficientCredits() if isinstance(command, Reserve) and self.world.draw.random() < 0.7:
                self.waiting = Grant(self.world.customer(), Mils(500), self.fresh("adm"), "")
            case KeyRefused():
                self.waiting = self.make_key()


class Simulation:
    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.now = 1_800_000_000.0
        self.database = Database()
        oracle = Oracle()
        self.writers = [Writer(self.database, oracle), Writer(self.database, oracle)]
        self.sources: list[tuple[str, CustomerId, Mils]] = []
        self.writers[0].take_over(self.now)
        self.key_ids = [KeyId("key_unknown")]
        self.callers = [Caller(self, number) for number in range(NUM_CALLERS)]
        self.to_writers: list[tuple[Caller, Command]] = []
        self.to_callers: list[tuple[Caller, Command, Outcome]] = []
        self.first_answers: dict[object, Outcome] = {}
        self.operations = 0
        self.seen: Counter[str] = Counter()

    def rate(self) -> tuple[int, int]:
        return self.draw.choice(RATES)

    def customer(self) -> CustomerId:
        return CustomerId(f"cus_{self.draw.randrange(NUM_CUSTOMERS)}")

    def run(self, operations: int) -> None:
        steps: list[Callable[[], None]] = [self.send, self.deliver, self.write, self.answer, self.fault]
        weights = [30, 30, 12, 25, 1]
        while self.operations < operations:
            self.draw.choices(steps, weights)[0]()
            self.now += self.draw.random() * 0.2
        self.heal()

    def send(self) -> None:
        caller = self.draw.choice(self.callers)
        if caller.waiting is not None and caller.sent == caller.waiting and self.draw.random() < 0.9:
            return  # still patient
        message = (caller, caller.turn())
        caller.sent = caller.waiting
        copies = self.draw.choices((0, 1, 2), (5, 85, 10))[0]
        self.to_writers += [message] * copies

    def deliver(self) -> None:
        """Any of the messages that are under way, to whichever writer its sender believes in."""
        if self.to_writers:
            at = self.draw.randrange(len(self.to_writers))
            self.to_writers[at], self.to_writers[-1] = self.to_writers[-1], self.to_writers[at]
            newest = max(self.writers, key=lambda writer: writer.epoch)
            writer = newest if self.draw.random() < 0.95 else self.draw.choice(self.writers)
            writer.queue.append(self.to_writers.pop())

    def write(self) -> None:
        writer = self.draw.choice(self.writers)
        if writer.frozen:
            return
        if self.draw.random() < 0.05:
            writer.queue.append((None, ExpireLeases()))
        batch, writer.queue = writer.queue[:MAX_BATCH], writer.queue[MAX_BATCH:]
        if not batch:
            return
        crash = self.draw.choices(("", "before commit", "after commit"), (96, 2, 2))[0]
        now = self.now + self.draw.choice((0.0, 0.0, 0.0, -5.0, 5.0))
        try:
            outcomes = writer.apply([command for _, command in batch], now, crash)
        except (Fenced, Crashed) as failure:
            self.seen[type(failure).__name__ if isinstance(failure, Fenced) else crash] += 1
            writer.queue.clear()
            if isinstance(failure, Crashed) or self.draw.random() < 0.5:
                writer.take_over(now)
            return
        for (caller, command), outcome in zip(batch, outcomes, strict=True):
            self.operations += 1
            self.seen[type(outcome).__name__] += 1
            if caller is not None:
                copies = self.draw.choices((0, 1, 2), (5, 85, 10))[0]
                self.to_callers += [(caller, command, outcome)] * copies

    def answer(self) -> None:
        if self.to_callers:
            at = self.draw.randrange(len(self.to_callers))
            self.to_callers[at], self.to_callers[-1] = self.to_callers[-1], self.to_callers[at]
            caller, command, outcome = self.to_callers.pop()
            caller.answered(command, outcome)

    def fault(self) -> None:
        kind = self.draw.random()
        writer = self.draw.choice(self.writers)
        if kind < 0.5:
            writer.frozen = not writer.frozen
        elif kind < 0.9:
            writer.frozen = False
            writer.take_over(self.now)
        else:
            self.now += self.draw.choice((60.0, 3600.0, KEY_MEMORY_S))

    def check(self, command: Command, outcome: Outcome) -> None:
        """An answer has reached a caller: it is durable, and the only one there will ever be."""
        database = self.database
        about: object = command
        match outcome:
            case Reserved():
                hold(outcome.request_id in database.reservations, "an acknowledged reservation is lost", outcome)
            case Settled():
                row = database.reservations[outcome.request_id]
                hold(
                    (row.state, row.captured, row.refunded)
                    == ("settled", outcome.captured_mils, outcome.refunded_mils),
                    "an acknowledged settlement is lost",
                    outcome,
                    row,
                )
                about = ("settled", outcome.request_id)
            case Granted():
                hold(("credit", outcome.public_id) in database.entries, "an acknowledged credit is lost", outcome)
            case Credited():
                hold(outcome.source in database.payments, "an acknowledged payment is lost", outcome)
                about = ("credited", outcome.source)
            case Transferred():
                hold(outcome.transfer_id in database.transfers, "an acknowledged transfer is lost", outcome)
            case Quoted():
                hold(outcome.quote_id in database.quotes, "an acknowledged quote is lost", outcome)
            case PriceAdded():
                versions = database.prices[outcome.model, outcome.customer_id]
                hold(len(versions) >= outcome.version, "an acknowledged price is lost", outcome)
            case UnitsSet():
                known = database.provisions[outcome.customer_id, outcome.model]
                hold(len(known) >= outcome.version, "acknowledged units are lost", outcome)
            case StatementClosed():
                closed = database.statements[outcome.customer_id][outcome.number - 1]
                hold(closed.period == outcome.period, "an acknowledged statement is lost", outcome)
                about = ("closed", outcome.customer_id, outcome.period)
            case KeyCreated():
                hold(outcome.key_id in database.keys, "an acknowledged key is lost", outcome)
            case Repeated() | IdempotencyConflict():
                hold(outcome.request_id in database.reservations, "a repetition of nothing", outcome)
                return
            case UnknownReservation():
                raise Broken(f"an acknowledged reservation is lost: {outcome}")
            case _:
                return
        hold(self.first_answers.setdefault(about, outcome) == outcome, "two answers to one command", command, outcome)

    def heal(self) -> None:
        """No more faults: everything open is settled within its lease, and the money adds up."""
        self.database.money_adds_up()
        for writer in self.writers:
            writer.queue.clear()
        last = self.writers[0]
        last.take_over(self.now)
        self.now += LEASE_S + GRACE_S + 10.0
        last.apply([ExpireLeases()], self.now, "")
        hold(not self.database.open, "a reservation leaked", sorted(self.database.open)[:3])
        self.database.money_adds_up()


def simulate(seed: int, operations: int) -> Simulation:
    simulation = Simulation(seed)
    try:
        simulation.run(operations)
    except AssertionError as failure:
        failure.add_note(f"seed {seed}, operation {simulation.operations}, commit {commit()}")
        raise
    return simulation


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--operations", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=None)
    arguments = parser.parse_args()
    seed = secrets.randbelow(2**32) if arguments.seed is None else arguments.seed
    started = time.perf_counter()
    simulation = simulate(seed, arguments.operations)
    result: dict[str, Any] = {
        "simulation": "ledger",
        "seed": seed,
        "commit": commit(),
        "operations": simulation.operations,
        "entries": simulation.database.num_entries,
        "epochs": simulation.database.epoch,
        "seen": dict(simulation.seen.most_common()),
        "moved_mils": dict(simulation.database.moved.most_common()),
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
