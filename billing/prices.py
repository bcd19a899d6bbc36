"""The price book: what work costs, as data with versions and dates. Pure: it reads no clock and no database.

Rates are in nano-dollars, so a rate can be far below a mil; each line is computed exactly and rounded once, up, to a
whole number of mils. A version is never changed: another price is another version with its own date, and work keeps the
version that it was priced with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, assert_never

from billing.money import MILS_PER_USD, Mils

NANO_PER_USD = 10**9
NANO_PER_MIL = NANO_PER_USD // MILS_PER_USD

Metric = Literal["frame", "second", "megapixel_frame", "request"]


@dataclass(frozen=True, slots=True)
class Rate:
    """`nano_usd` for every `per` units of a metric: exact also for prices in credits, of which 1,200 may cost $4."""

    metric: Metric
    nano_usd: int
    per: int = 1

    def __post_init__(self) -> None:
        if self.nano_usd < 0 or self.per < 1:
            raise ValueError(f"{self.nano_usd} nano-dollars for {self.per} units is not a rate")


@dataclass(frozen=True, slots=True)
class CreditPack:
    """How a provider that counts in credits sells them."""

    credits: int
    costs: Mils

    def rate(self, metric: Metric, num_credits: int, per: int = 1) -> Rate:
        """`num_credits` for every `per` units."""
        return Rate(metric, num_credits * self.costs * NANO_PER_MIL, self.credits * per)


@dataclass(frozen=True, slots=True)
class PriceVersion:
    model: str
    version: int
    effective_from: float
    """POSIX seconds."""
    rates: tuple[Rate, ...]
    """One line each; the price is their sum."""


@dataclass(frozen=True, slots=True)
class Work:
    frames: int
    fps: int
    height: int
    width: int


@dataclass(frozen=True, slots=True)
class Line:
    rate: Rate
    quantity: Fraction
    mils: Mils


@dataclass(frozen=True, slots=True)
class Priced:
    version: PriceVersion
    lines: tuple[Line, ...]
    total_mils: Mils


class PriceBook:
    """Every version of every model's price.

    Raises:
        ValueError: a model's versions are not numbered from 1, or do not take effect one after the other.
    """

    def __init__(self, versions: Sequence[PriceVersion]) -> None:
        self._versions: dict[str, list[PriceVersion]] = {}
        for version in sorted(versions, key=lambda each: (each.model, each.version)):
            earlier = self._versions.setdefault(version.model, [])
            if version.version != len(earlier) + 1:
                raise ValueError(f"version {version.version} of {version.model} does not follow {len(earlier)}")
            if earlier and version.effective_from <= earlier[-1].effective_from:
                raise ValueError(
                    f"version {version.version} of {version.model} does not take effect after its predecessor"
                )
            earlier.append(version)

    def at(self, model: str, ts: float) -> PriceVersion | None:
        """The version in force at that moment; None for an unknown model, or before its first price."""
        in_force = [each for each in self._versions.get(model, ()) if each.effective_from <= ts]
        return in_force[-1] if in_force else None


def price(version: PriceVersion, work: Work) -> Priced:
    """Each line exact, then rounded up to a whole mil, once."""
    lines = []
    for rate in version.rates:
        quantity = _quantity(rate.metric, work)
        exact = quantity * rate.nano_usd / (rate.per * NANO_PER_MIL)
        lines.append(Line(rate, quantity, Mils(-(-exact.numerator // exact.denominator))))
    return Priced(version, tuple(lines), Mils(sum(line.mils for line in lines)))


def whole_mils_per_frame(version: PriceVersion) -> Mils | None:
    """The rate as a reservation can freeze it; None if it is not by the frame alone, or not whole mils."""
    match version.rates:
        case (Rate("frame", nano_usd, per),) if nano_usd % (per * NANO_PER_MIL) == 0:
            return Mils(nano_usd // (per * NANO_PER_MIL))
    return None


def _quantity(metric: Metric, work: Work) -> Fraction:
    match metric:
        case "frame":
            return Fraction(work.frames)
        case "second":
            return Fraction(work.frames, work.fps)
        case "megapixel_frame":
            return Fraction(work.frames * work.height * work.width, 10**6)
        case "request":
            return Fraction(1)
        case _:
            assert_never(metric)
