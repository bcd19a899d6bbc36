"""The ledger's core against a seeded world of faults: two writers, several callers, a network that misbehaves.

    python -m benchmarks.ledger_simulation [--operations 1000000] [--seed N]

Everything happens in one thread and one random generator, so a seed is a whole history. What is real: `billing.core`,
its book and what the book keeps between commits. What is simulated: the database (a transaction is one step, and
refuses what the schema refuses), the clock, the network (drops, doubles, reorders and delays messages), crashes before
a commit and after it but before its answers, writers that freeze and wake up after somebody took over, callers that
leave.

Held after every step: the rules of the schema on what is written; what was acknowledged is in the database; the same
command has one answer. Held at the end, when all faults are healed: every reservation is settled, and the money adds
up.

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
from typing import Any

from billing.checks import malformed
from billing.commands import (
    Command,
    CreateKey,
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
    Rejected,
    Repeated,
    RequestId,
    Reserve,
    Reserved,
    RevokeKey,
    Settle,
    Settled,
    UnknownReservation,
)
from billing.core import Book, decide
from billing.core.book import Entry, Key, Reservation, Submission, Wallet
from billing.core.reservations import KEY_MEMORY_S
from billing.keys import initial_grant_id
from billing.money import Mils

NUM_CALLERS = 24
NUM_CUSTOMERS = 5
LEASE_S = 30.0
GRACE_S = 30.0
MAX_BATCH = 64
RATE = Mils(5)


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
    num_entries: int = 0
    newest_ts: float = 0.0
    credited: int = 0

    def load(self, commands: list[Command], book: Book) -> None:
        """As `billing.store.load`: what these commands need and the book does not know."""
        request_ids: set[RequestId] = set()
        expires = False
        for command in commands:
            match command:
                case Reserve():
                    request_ids.add(command.request_id)
                    self._load_key(book, command.key_id)
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
                case ExpireLeases():
                    expires = True
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

    def _load_wallet(self, book: Book, customer_id: CustomerId) -> None:
        if customer_id in self.wallets and customer_id not in book.wallets:
            book.add_wallet(copy.copy(self.wallets[customer_id]))

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
            self.wallets[wallet.customer_id] = replace(wallet, seq=-1, balance=Mils(0))
        for key in [*book.new_keys, *book.revoked_keys]:
            known = self.keys.get(key.key_id)
            hold(known is None or known.revoked_at is None or key in book.new_keys, "a key revoked twice", key)
            self.keys[key.key_id] = copy.copy(key)
        for reservation in book.new_reservations:
            hold(reservation.request_id not in self.reservations, "a request reserved twice", reservation)
            hold(reservation.amount == reservation.frames * reservation.mils_per_frame, "a price", reservation)
            self._put(reservation)
        for reservation in [*book.settled, *book.renewed.values()]:
            if not reservation.is_new:
                known_row = self.reservations[reservation.request_id]
                hold(known_row.state == "open" or known_row == reservation, "settled twice", known_row, reservation)
                self._put(reservation)
        self._commit_submissions(book)
        for entry in book.entries:
            self._append(entry)
        for wallet in [*book.moved_wallets.values(), *book.new_wallets]:
            row = self.wallets[wallet.customer_id]
            hold((row.seq, row.balance) == (wallet.seq, wallet.balance), "a wallet is not its tail", wallet, row)

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
                hold(row.state == "settled" and row.captured == 0, "a paid request released its key", row)
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
        hold(entry.balance_after == entry.prev_balance + entry.amount >= 0, "a wrong sum", entry)
        hold(entry.epoch == self.epoch, "an entry of a stale writer", entry)
        hold(entry.ts >= self.newest_ts, "time ran back", entry, self.newest_ts)
        hold((entry.kind, entry.public_id) not in self.entries, "an id twice", entry)
        if entry.kind in ("debit", "refund"):
            row = self.reservations[RequestId(entry.public_id)]
            hold(row.customer_id == entry.customer_id, "another wallet's request", entry, row)
            if entry.kind == "debit":
                hold(entry.amount == -row.amount and row.debit_seq == entry.seq, "a debit", entry, row)
            else:
                hold(("debit", entry.public_id) in self.entries, "a refund without a debit", entry)
                hold(row.state == "settled" and entry.amount == row.refunded, "a refund", entry, row)
        elif entry.kind == "credit":
            self.credited += entry.amount
        self.entries[entry.kind, entry.public_id] = entry
        self.num_entries += 1
        wallet.seq, wallet.balance, self.newest_ts = entry.seq, entry.balance_after, entry.ts

    def money_adds_up(self) -> None:
        spendable = sum(wallet.balance for wallet in self.wallets.values())
        held = sum(self.reservations[request_id].amount for request_id in self.open)
        kept = sum(row.captured for row in self.reservations.values())
        hold(self.credited == spendable + held + kept, "money", self.credited, spendable, held, kept)


class Fenced(Exception):
    pass


class Crashed(Exception):
    pass


@dataclass
class Writer:
    """As `billing.ledger.Ledger`, with a database of this simulation."""

    database: Database
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
        named = draw.random()
        payload = draw.choice("abcd") * 64
        name, window_s = (f"name-{draw.randrange(6)}", 0.0) if named < 0.3 else ("", 60.0 if named < 0.6 else 0.0)
        return Reserve(
            RequestId(self.fresh("req")),
            draw.choice(self.world.key_ids),
            draw.randint(1, 60),
            RATE,
            "predict",
            LEASE_S,
            name,
            payload if named < 0.8 else "",
            window_s,
        )

    def make_key(self) -> CreateKey:
        key_id = KeyId(self.fresh("key"))
        number = self.world.draw.randrange(NUM_CUSTOMERS)
        customer = CustomerId(f"cus_{number}")
        self.world.key_ids.append(key_id)
        del self.world.key_ids[: -3 * NUM_CUSTOMERS]
        sha256 = f"{self.number:032x}{self.serial:032x}"
        return CreateKey(key_id, sha256, "abcd", f"name {number}", customer, Mils(200), 50.0, 200)

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
            case InsufficientCredits() if isinstance(command, Reserve):
                self.waiting = Grant(self.world.customer(), Mils(1_000), self.fresh("adm"), "")
            case KeyRefused():
                self.waiting = self.make_key()


class Simulation:
    def __init__(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.now = 1_800_000_000.0
        self.database = Database()
        self.writers = [Writer(self.database), Writer(self.database)]
        self.writers[0].take_over(self.now)
        self.key_ids = [KeyId("key_unknown")]
        self.callers = [Caller(self, number) for number in range(NUM_CALLERS)]
        self.to_writers: list[tuple[Caller, Command]] = []
        self.to_callers: list[tuple[Caller, Command, Outcome]] = []
        self.first_answers: dict[object, Outcome] = {}
        self.operations = 0
        self.seen: Counter[str] = Counter()

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
            hold(not isinstance(outcome, Rejected), "a right command was rejected", command, outcome)
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
        "seconds": round(time.perf_counter() - started, 1),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
