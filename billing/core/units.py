"""Provisioned units: sold by the month, charged once for each, and the frames that they pay for."""

from datetime import UTC, datetime
from functools import lru_cache

from billing.commands import (
    CustomerId,
    Outcome,
    Rejected,
    SetUnits,
    UnitsCharged,
    UnitsSet,
    UnknownCustomer,
)
from billing.core.book import Allotment, Book, ProvisionRow, Reservation, UnitChargeRow, UnitUseRow, Wallet
from billing.keys import unit_charge_id
from billing.money import Mils

DAY_S = 86_400


def period_of(ts: float) -> str:
    """The month of UTC."""
    return _month_of(int(ts // DAY_S))


@lru_cache(maxsize=8)
def _month_of(day: int) -> str:
    """Every request asks, and formatting a date takes longer than deciding the rest of one."""
    return datetime.fromtimestamp(day * DAY_S, UTC).strftime("%Y-%m")


def set_units(book: Book, command: SetUnits) -> Outcome:
    if command.customer_id not in book.wallets:
        return UnknownCustomer(command.customer_id)
    versions = book.provisions.setdefault((command.customer_id, command.model), [])
    terms = (command.from_period, command.units, command.unit_mils, command.unit_frames, command.units_per_replica)
    for each in versions:
        if each.version == command.version:
            if each[5:10] != terms:
                return Rejected(f"version {command.version} of these units says something else already")
            return UnitsSet(each.customer_id, each.model, each.version)
    newest = versions[-1] if versions else None
    if command.version != len(versions) + 1:
        return Rejected(f"version {command.version} of these units does not follow {len(versions)}")
    if newest is not None and command.from_period <= newest.from_period:
        return Rejected(f"the units of {newest.from_period} are set already; another version begins later")
    if command.from_period < period_of(book.ts):
        return Rejected(f"{command.from_period} is over")
    if (command.customer_id, command.model, command.from_period) in book.allotments:
        return Rejected(f"{command.from_period} is charged already; another version begins later")
    row = ProvisionRow(
        command.customer_id,
        command.model,
        command.version,
        None if newest is None else newest.version,
        None if newest is None else newest.from_period,
        *terms,
        book.ts,
    )
    versions.append(row)
    book.new_provisions.append(row)
    return UnitsSet(row.customer_id, row.model, row.version)


def charge_units(book: Book) -> Outcome:
    period = period_of(book.ts)
    charged: list[str] = []
    unpaid: dict[CustomerId, None] = {}
    for (customer_id, model), versions in sorted(book.provisions.items()):
        in_force = [each for each in versions if each.from_period <= period]
        if not in_force or in_force[-1].units == 0 or (customer_id, model, period) in book.allotments:
            continue
        wallet = book.wallets[customer_id]
        if in_force[-1].units * in_force[-1].unit_mils > wallet.spendable:
            unpaid[customer_id] = None
        else:
            charged.append(_charge(book, wallet, in_force[-1], period))
    return UnitsCharged(tuple(charged), tuple(unpaid))


def _charge(book: Book, wallet: Wallet, units: ProvisionRow, period: str) -> str:
    amount, frames = Mils(units.units * units.unit_mils), units.units * units.unit_frames
    charge_id = unit_charge_id(wallet.customer_id, units.model, period)
    detail = f"{units.units} provisioned units · {units.model} · {period}"
    entry = book.move(wallet, "fee", Mils(-amount), charge_id, detail)
    book.new_charges.append(
        UnitChargeRow(
            wallet.customer_id,
            units.model,
            period,
            units.version,
            units.units,
            units.unit_mils,
            units.unit_frames,
            amount,
            frames,
            entry.seq,
            book.ts,
        )
    )
    book.allotments[wallet.customer_id, units.model, period] = Allotment(
        wallet.customer_id, units.model, period, frames
    )
    return charge_id


def coverable(book: Book, wallet: Wallet, model: str, frames: int) -> int:
    """How many of a request's frames this month's units pay for. None while the customer owes what is due."""
    allotment = book.allotments.get((wallet.customer_id, model, period_of(book.ts)))
    if allotment is None or wallet.debt > 0 or wallet.balance < wallet.floor:
        return 0
    return min(frames, allotment.frames - allotment.used)


def cover(book: Book, reservation: Reservation, frames: int) -> None:
    period = period_of(book.ts)
    reservation.covered, reservation.covered_period = frames, period
    _use(book, book.allotments[reservation.customer_id, reservation.model, period], frames, reservation)


def uncover(book: Book, reservation: Reservation) -> None:
    """Frames that units were to pay for and that were not delivered can be used again."""
    assert reservation.covered is not None
    assert reservation.covered_period is not None
    assert reservation.frames_delivered is not None
    missing = reservation.covered - reservation.frames_delivered
    if missing > 0:
        allotment = book.allotments[reservation.customer_id, reservation.model, reservation.covered_period]
        _use(book, allotment, -missing, reservation)


def _use(book: Book, allotment: Allotment, frames: int, reservation: Reservation) -> None:
    before, seq = allotment.used, (allotment.seq or 0) + 1
    book.new_uses.append(
        UnitUseRow(
            allotment.customer_id,
            allotment.model,
            allotment.period,
            seq,
            allotment.seq,
            before,
            frames,
            before + frames,
            allotment.frames,
            reservation.request_id,
        )
    )
    allotment.used, allotment.seq = before + frames, seq
