"""The unit of money and how it is shown.

One mil is $0.0001, a hundredth of a cent (not the textbook $0.001): at the list price of $0.0005 a frame costs exactly
5 mils, so no rollout ever needs rounding. Everything stored or computed is an integer number of mils; cents and dollars
are for showing to a person and are never read back.
"""

from decimal import Decimal
from typing import NewType

Mils = NewType("Mils", int)

MILS_PER_CENT = 100
MILS_PER_USD = 10_000

MAX_MILS = Mils(2**53 - 1)
"""The largest amount or balance, about $900 billion: exact in every database, in JSON and in a float."""


MAX_EXACT = 2**62
"""The largest product that a database computes exactly, with room to round up."""


def part_of_rate(frames: int, mils: int, per_frames: int) -> Mils:
    """What `frames` cost at `mils` for every `per_frames` frames: exact, then rounded up once.

    So no part costs more than the whole, more frames never cost less, and all of them cost what was reserved.
    """
    return Mils(-(-frames * mils // per_frames))


def cents(amount: Mils) -> int:
    """Whole cents, half-up away from zero, so that a refund shows as the exact mirror of its debit."""
    magnitude = (abs(amount) + MILS_PER_CENT // 2) // MILS_PER_CENT
    return magnitude if amount >= 0 else -magnitude


def cents_rounded_up(amount: Mils) -> int:
    """The fewest whole cents that cover a non-negative `amount`."""
    return -(-amount // MILS_PER_CENT)


def usd(amount: Mils) -> float:
    """Dollars for display; exact to the mil for any balance below 2**51 mils, about $225 billion."""
    return amount / MILS_PER_USD


def mils_from_usd(dollars: Decimal) -> Mils:
    """The exact number of mils in `dollars`.

    Raises:
        ValueError: `dollars` is not finite or is not a whole number of mils.
    """
    mils = dollars * MILS_PER_USD
    if not mils.is_finite() or mils != mils.to_integral_value():
        raise ValueError(f"{dollars} dollars is not a whole number of mils ($0.0001)")
    return Mils(int(mils))


def dollars(amount: Mils) -> str:
    """`$25.00`, or as many as four decimals where cents are not enough: `$0.0245`."""
    whole, rest = divmod(abs(amount), MILS_PER_USD)
    decimals = f"{rest:04d}"
    if decimals.endswith("00"):
        decimals = decimals[:2]
    return f"{'-' if amount < 0 else ''}${whole}.{decimals}"
