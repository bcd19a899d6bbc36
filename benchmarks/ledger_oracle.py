"""What the ledger promises about money, in dictionaries: follows a history answer by answer and disputes a wrong one.

Written from the promises of `billing/README.md`, with nothing of `billing.core`. Which request repeats which is not its
business; what every other answer is, to the mil, is.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

from billing.commands import (
    AddPrice,
    BudgetExceeded,
    ChargeUnits,
    CloseStatement,
    Command,
    CreateKey,
    Credit,
    Credited,
    CreditLineSet,
    Grant,
    Granted,
    IdempotencyConflict,
    InsufficientCredits,
    KeyCreated,
    KeyRefused,
    LeasesExpired,
    MemberSet,
    Outcome,
    PriceAdded,
    Quote,
    Quoted,
    QuoteRefused,
    Rejected,
    Repeated,
    Reserve,
    Reserved,
    Reverse,
    Reversed,
    RevokeKey,
    SetCreditLine,
    SetMember,
    Settle,
    Settled,
    SetUnits,
    StatementClosed,
    Transfer,
    Transferred,
    UnitsCharged,
    UnitsSet,
    UnknownCustomer,
    UnknownPayment,
    UnknownReservation,
)
from billing.keys import unit_charge_id
from billing.money import Mils

DAY_S = 86_400


@dataclass
class Account:
    balance: int = 0
    debt: int = 0
    limit: int = 0
    floor: int = 0
    num_entries: int = 0
    """Besides the one that opened it."""
    parent: str | None = None
    cap: int | None = None
    cap_period: str | None = None
    drawn: defaultdict[int, int] = field(default_factory=lambda: defaultdict(int))
    """By day of UTC."""
    statement: StatementClosed | None = None
    since: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    """What the entries after the last statement come to: usage, payments, transfers."""

    @property
    def spendable(self) -> int:
        return max(0, self.balance - self.floor)

    def change(self, amount: int, part: str) -> None:
        self.balance += amount
        self.num_entries += 1
        self.since[part] += amount


@dataclass
class Held:
    """A reservation."""

    reserved: Reserved
    frames: int
    rate: int
    per_frames: int
    drawn: int
    day: int
    units: "Allotment | None" = None
    """Those that pay for the first `covered` frames."""
    covered: int = 0
    settled: Settled | None = None


@dataclass
class Allotment:
    """Frames of one model that a month's units pay for."""

    frames: int
    used: int = 0


class Oracle:
    def __init__(self) -> None:
        self.accounts: dict[str, Account] = {}
        self.names: dict[str, str] = {}
        self.keys: dict[str, tuple[str, KeyCreated]] = {}
        self.revoked: set[str] = set()
        self.requests: dict[str, Held] = {}
        self.granted: dict[str, tuple[str, Granted]] = {}
        self.payments: dict[str, tuple[str, Credited]] = {}
        self.reversed: defaultdict[str, int] = defaultdict(int)
        self.transfers: dict[str, tuple[Transfer, Transferred]] = {}
        self.quotes: dict[str, tuple[Quote, str, Quoted]] = {}
        self.prices: defaultdict[tuple[str, str], list[AddPrice]] = defaultdict(list)
        self.statements: dict[tuple[str, str], StatementClosed] = {}
        self.units: defaultdict[tuple[str, str], list[SetUnits]] = defaultdict(list)
        self.allotments: dict[tuple[str, str, str], Allotment] = {}

    def disputes(self, command: Command, outcome: Outcome, ts: float) -> Outcome | None:
        """What the answer should have been, if it is another. `ts` is the time of the batch's entries."""
        if isinstance(outcome, LeasesExpired):
            for request_id in outcome.request_ids:
                if self.requests[request_id].settled is not None:
                    return UnknownReservation(request_id)
                self.settle(request_id, 0)
            return None
        right = self.answer(command, outcome, ts)
        if right is None or (isinstance(right, Rejected) and isinstance(outcome, Rejected)):
            return None
        if isinstance(right, QuoteRefused) and isinstance(outcome, QuoteRefused):
            return None
        return None if right == outcome else right

    def answer(self, command: Command, outcome: Outcome, ts: float) -> Outcome | None:
        match command:
            case Reserve():
                return self.reserve(command, outcome, ts)
            case Settle():
                if command.request_id not in self.requests:
                    return UnknownReservation(command.request_id)
                return self.settle(command.request_id, command.frames_delivered)
            case Quote():
                return self.quote(command, ts)
            case Grant():
                return self.grant(command.customer_id, command.amount_mils, command.public_id)
            case Credit():
                return self.credit(command)
            case Reverse():
                return self.reverse(command)
            case CreateKey():
                return self.create_key(command)
            case RevokeKey():
                self.revoked.update({command.key_id} & self.keys.keys())
                return None
            case SetMember():
                return self.set_member(command)
            case Transfer():
                return self.transfer(command)
            case SetCreditLine():
                return self.set_credit_line(command)
            case CloseStatement():
                return self.close_statement(command, ts)
            case AddPrice():
                return self.add_price(command)
            case SetUnits():
                return self.set_units(command, ts)
            case ChargeUnits():
                return self.charge_units(ts)
            case _:
                return None

    def reserve(self, command: Reserve, outcome: Outcome, ts: float) -> Outcome | None:
        if command.request_id in self.requests:
            return self.requests[command.request_id].reserved
        if command.key_id not in self.keys or command.key_id in self.revoked:
            return KeyRefused()
        if isinstance(outcome, Repeated | IdempotencyConflict):
            return None
        customer = self.keys[command.key_id][1].customer_id
        account = self.accounts[customer]
        rate, per_frames = int(command.mils_per_frame), command.per_frames
        if command.quote_id:
            if command.quote_id not in self.quotes:
                return QuoteRefused("")
            quote, owner, quoted = self.quotes[command.quote_id]
            wanted = (customer, command.model, command.frames)
            if (owner, quote.model, quote.frames) != wanted or quoted.expires_at <= ts:
                return QuoteRefused("")
            rate, per_frames = quote.mils_per_frame, quote.per_frames
        units = self.allotments.get((customer, command.model, month_of(ts)))
        covered = 0
        if units is not None and account.debt == 0 and account.balance >= account.floor:
            covered = min(command.frames, units.frames - units.used)
        amount = cost(command.frames - covered, rate, per_frames)
        missing, today = amount - account.spendable, int(ts // DAY_S)
        if missing > 0:
            if account.debt or account.cap is None or account.parent is None:
                return InsufficientCredits(Mils(account.balance), Mils(amount), Mils(account.debt))
            days, resets_at = days_of(account.cap_period or "", ts)
            drawn = sum(account.drawn[day] for day in days if day in account.drawn)
            if drawn + missing > account.cap:
                period = "day" if account.cap_period == "day" else "month"
                return BudgetExceeded(Mils(account.cap), Mils(drawn), period, resets_at, Mils(amount), "team")  # type: ignore[arg-type]
            parent = self.accounts[account.parent]
            if missing > parent.spendable:
                both = account.spendable + parent.spendable
                return InsufficientCredits(Mils(both), Mils(amount), Mils(parent.debt))
            self.move(parent, account, missing)
            account.drawn[today] += missing
        if units is not None:
            units.used += covered
        account.change(-amount, "usage")
        reserved = Reserved(
            command.request_id, self.keys[command.key_id][1].customer_id, Mils(amount), Mils(account.balance)
        )
        held = Held(reserved, command.frames, rate, per_frames, max(0, missing), today, units, covered)
        self.requests[command.request_id] = held
        return reserved

    def settle(self, request_id: str, delivered: int) -> Settled:
        held = self.requests[request_id]
        if held.settled is None:
            account = self.accounts[held.reserved.customer_id]
            captured = cost(max(0, delivered - held.covered), held.rate, held.per_frames)
            if held.units is not None:
                held.units.used -= max(0, held.covered - delivered)
            refunded = held.reserved.amount_mils - captured
            if refunded:
                account.change(refunded, "usage")
                back = min(refunded, held.drawn)
                if back:
                    assert account.parent is not None
                    parent = self.accounts[account.parent]
                    self.move(account, parent, back)
                    self.repay(parent)
                    account.drawn[held.day] -= back
                self.repay(account)
            held.settled = Settled(held.reserved.request_id, Mils(captured), Mils(refunded), Mils(account.balance))
        return held.settled

    def quote(self, command: Quote, ts: float) -> Outcome:
        if command.key_id not in self.keys or command.key_id in self.revoked:
            return KeyRefused()
        customer = self.keys[command.key_id][1].customer_id
        if command.quote_id not in self.quotes:
            amount = Mils(cost(command.frames, command.mils_per_frame, command.per_frames))
            spendable = Mils(self.accounts[customer].spendable)
            quoted = Quoted(command.quote_id, amount, spendable, ts + command.valid_s)
            self.quotes[command.quote_id] = (command, customer, quoted)
        return self.quotes[command.quote_id][2]

    def grant(self, customer: str, amount: Mils, public_id: str) -> Outcome:
        if public_id not in self.granted:
            if customer not in self.accounts:
                return UnknownCustomer(customer)
            account = self.accounts[customer]
            account.change(amount, "payments")
            self.granted[public_id] = (customer, Granted(public_id, amount, Mils(account.balance)))
            self.repay(account)
        owner, granted = self.granted[public_id]
        return granted if (owner, granted.amount_mils) == (customer, amount) else Rejected("")

    def credit(self, command: Credit) -> Outcome:
        if command.source not in self.payments:
            if command.public_id in self.granted:
                return Rejected("")
            granted = self.grant(command.customer_id, command.amount_mils, command.public_id)
            if not isinstance(granted, Granted):
                return granted
            after = granted.balance_after_mils
            credited = Credited(command.source, command.public_id, command.amount_mils, after)
            self.payments[command.source] = (command.customer_id, credited)
        owner, credited = self.payments[command.source]
        same = (owner, credited.amount_mils) == (command.customer_id, command.amount_mils)
        return credited if same else Rejected("")

    def reverse(self, command: Reverse) -> Outcome:
        if command.source not in self.payments:
            return UnknownPayment(command.source)
        owner, credited = self.payments[command.source]
        account = self.accounts[owner]
        target = min(command.target_mils, credited.amount_mils)
        change = target - self.reversed[command.source]
        taken = min(change, account.spendable)
        if taken:
            account.change(-taken, "payments")
        account.debt += change - taken
        self.reversed[command.source] = target
        self.repay(account)
        customer = self.granted[credited.public_id][0]
        return Reversed(command.source, customer, Mils(target), Mils(account.balance), Mils(account.debt))  # type: ignore[arg-type]

    def create_key(self, command: CreateKey) -> Outcome:
        if command.key_id not in self.keys:
            customer = self.names.setdefault(command.customer_name, command.customer_id)
            account = self.accounts.setdefault(customer, Account())
            if command.initial_credits_mils:
                account.change(command.initial_credits_mils, "payments")
                self.repay(account)
            created = KeyCreated(command.key_id, command.customer_id, Mils(account.balance))
            self.keys[command.key_id] = (command.sha256, created)
        return self.keys[command.key_id][1]

    def set_member(self, command: SetMember) -> Outcome:
        parent = self.accounts.get(command.parent_id)
        if parent is None:
            return UnknownCustomer(command.parent_id)
        account = self.accounts.get(self.names.get(command.name, ""))
        has_members = any(each.parent == command.customer_id for each in self.accounts.values())
        if parent.parent is not None or account is parent or has_members:
            return Rejected("")
        if account is not None and (account.parent not in (None, command.parent_id) or account.limit):
            return Rejected("")
        if account is None:
            self.names[command.name] = command.customer_id
            account = self.accounts[command.customer_id] = Account()
        account.parent, account.cap, account.cap_period = command.parent_id, command.cap_mils, command.cap_period
        return MemberSet(command.customer_id, command.parent_id)

    def transfer(self, command: Transfer) -> Outcome:
        if command.transfer_id in self.transfers:
            return self.transfers[command.transfer_id][1]
        source, target = self.accounts.get(command.from_id), self.accounts.get(command.to_id)
        if source is None or target is None:
            return UnknownCustomer(command.from_id if source is None else command.to_id)
        if source.parent != command.to_id and target.parent != command.from_id:
            return Rejected("")
        if command.amount_mils > source.spendable:
            return InsufficientCredits(Mils(source.balance), command.amount_mils, Mils(source.debt))
        self.move(source, target, command.amount_mils)
        after = (Mils(source.balance), Mils(target.balance))
        transferred = Transferred(command.transfer_id, command.amount_mils, *after)
        self.transfers[command.transfer_id] = (command, transferred)
        self.repay(target)
        return transferred

    def set_credit_line(self, command: SetCreditLine) -> Outcome:
        account = self.accounts.get(command.customer_id)
        if account is None:
            return UnknownCustomer(command.customer_id)
        if account.balance < -command.limit_mils or (account.parent is not None and command.limit_mils):
            return Rejected("")
        account.limit, account.floor = command.limit_mils, 0 if command.overdue else -command.limit_mils
        self.repay(account)
        return CreditLineSet(command.customer_id, command.limit_mils, Mils(account.floor))

    def close_statement(self, command: CloseStatement, ts: float) -> Outcome:
        closed = self.statements.get((command.customer_id, command.period))
        if closed is not None:
            return closed
        account = self.accounts.get(command.customer_id)
        if account is None:
            return UnknownCustomer(command.customer_id)
        last = account.statement
        if command.period > f"{datetime.fromtimestamp(ts, UTC):%Y-%m}" or (last and command.period <= last.period):
            return Rejected("")
        closed = StatementClosed(
            command.customer_id,
            last.number + 1 if last else 1,
            command.period,
            last.to_seq if last else 0,
            account.num_entries,
            last.closing_mils if last else Mils(0),
            Mils(account.since["usage"]),
            Mils(account.since["payments"]),
            Mils(account.since["transfers"]),
            Mils(account.balance),
            ts,
        )
        account.statement = self.statements[command.customer_id, command.period] = closed
        account.since.clear()
        return closed

    def add_price(self, command: AddPrice) -> Outcome:
        if command.customer_id and command.customer_id not in self.accounts:
            return UnknownCustomer(command.customer_id)
        versions = self.prices[command.model, command.customer_id]
        if command.version == len(versions) + 1:
            if versions and versions[-1].effective_from >= command.effective_from:
                return Rejected("")
            versions.append(command)
        if command.version > len(versions) or versions[command.version - 1] != command:
            return Rejected("")
        return PriceAdded(command.model, command.customer_id, command.version)

    def set_units(self, command: SetUnits, ts: float) -> Outcome:
        if command.customer_id not in self.accounts:
            return UnknownCustomer(command.customer_id)
        versions = self.units[command.customer_id, command.model]
        if command.version == len(versions) + 1:
            charged = (command.customer_id, command.model, command.from_period) in self.allotments
            too_early = versions and versions[-1].from_period >= command.from_period
            if charged or too_early or command.from_period < month_of(ts):
                return Rejected("")
            versions.append(command)
        if command.version > len(versions) or versions[command.version - 1] != command:
            return Rejected("")
        return UnitsSet(command.customer_id, command.model, command.version)

    def charge_units(self, ts: float) -> UnitsCharged:
        month = month_of(ts)
        charged, unpaid = [], []
        for (customer, model), versions in sorted(self.units.items()):
            standing = [each for each in versions if each.from_period <= month]
            if not standing or not standing[-1].units or (customer, model, month) in self.allotments:
                continue
            price, account = standing[-1].units * standing[-1].unit_mils, self.accounts[customer]
            if price > account.spendable:
                unpaid.append(standing[-1].customer_id)
                continue
            account.change(-price, "usage")
            self.allotments[customer, model, month] = Allotment(standing[-1].units * standing[-1].unit_frames)
            charged.append(unit_charge_id(standing[-1].customer_id, model, month))
        return UnitsCharged(tuple(charged), tuple(dict.fromkeys(unpaid)))

    def move(self, source: Account, target: Account, amount: int) -> None:
        source.change(-amount, "transfers")
        target.change(amount, "transfers")

    def repay(self, account: Account) -> None:
        amount = min(account.debt, account.spendable)
        if amount:
            account.change(-amount, "payments")
            account.debt -= amount


def cost(frames: int, rate: int, per_frames: int) -> int:
    whole, rest = divmod(frames * rate, per_frames)
    return whole + (rest > 0)


def month_of(ts: float) -> str:
    return f"{datetime.fromtimestamp(ts, UTC):%Y-%m}"


def days_of(period: str, ts: float) -> tuple[range, float]:
    """The days of UTC of the day or month that `ts` is in, and when it ends."""
    first = datetime.fromtimestamp(ts, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    after = first + timedelta(days=1)
    if period == "month":
        first = first.replace(day=1)
        after = (first + timedelta(days=32)).replace(day=1)
    return range(int(first.timestamp()) // DAY_S, int(after.timestamp()) // DAY_S), after.timestamp()
