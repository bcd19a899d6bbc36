"""The price book: what work costs, as data with versions and dates. Pure: it reads no clock and no database.

Rates are in nano-dollars, so a rate can be far below a mil; each line is computed exactly and rounded once, up, to a
whole number of mils. A version is never changed: another price is another version with its own date, and work keeps the
rate that it was priced with.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple, assert_never

from billing.money import MAX_EXACT, MILS_PER_USD, Mils, part_of_rate

NANO_PER_USD = 10**9
NANO_PER_MIL = NANO_PER_USD // MILS_PER_USD
STANDARD = "standard"

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


class Tier(NamedTuple):
    """The factor on every frame of a month after the first `after_frames`."""

    after_frames: int
    factor: Fraction


@dataclass(frozen=True, slots=True)
class PriceVersion:
    """One model's price from one date on, for everybody or for one customer.

    Raises:
        ValueError: nothing is charged, a factor is not positive, or the tiers do not ascend.
    """

    model: str
    version: int
    effective_from: float
    """POSIX seconds."""
    rates: tuple[Rate, ...]
    """One line each; the price is their sum."""
    customer_id: str = ""
    """Whose price it is; empty for the list price."""
    resolutions: tuple[tuple[int, int, Fraction], ...] = ()
    """Height, width and the factor on what is made at that size; 1 for other sizes."""
    latency_classes: tuple[tuple[str, Fraction], ...] = ()
    """A class and its factor; 1 for other classes."""
    tiers: tuple[Tier, ...] = ()
    """Ascending. The frames that cross a tier's boundary are a line of their own."""

    def __post_init__(self) -> None:
        if not any(rate.nano_usd for rate in self.rates):
            raise ValueError(f"a price of {self.model} must have a rate above nothing")
        factors = [each[-1] for each in (*self.resolutions, *self.latency_classes, *self.tiers)]
        if not all(isinstance(factor, Fraction) and factor > 0 for factor in factors):
            raise ValueError(f"every factor on the price of {self.model} must be positive")
        boundaries = [tier.after_frames for tier in self.tiers]
        if any(boundary < 1 for boundary in boundaries) or boundaries != sorted(set(boundaries)):
            raise ValueError(f"the tiers of {self.model} must ascend from at least 1 frame")


@dataclass(frozen=True, slots=True)
class Work:
    frames: int
    fps: int
    height: int
    width: int
    latency_class: str = STANDARD
    used_frames: int = 0
    """What the customer had used in the month before this; tiers count from there."""


@dataclass(frozen=True, slots=True)
class Line:
    rate: Rate
    quantity: Fraction
    mils: Mils
    factor: Fraction = Fraction(1)
    """On the rate: of the resolution, the latency class and the tier together."""


@dataclass(frozen=True, slots=True)
class Priced:
    version: PriceVersion
    lines: tuple[Line, ...]
    total_mils: Mils
    mils_per_frame: Mils
    """With `per_frames`, the rate that a reservation freezes: that many mils for every `per_frames` frames."""
    per_frames: int

    def of(self, frames: int) -> Mils:
        """What so many of the work's frames cost, as the ledger settles them: rounded up once, all the total."""
        return part_of_rate(frames, self.mils_per_frame, self.per_frames)


class PriceBook:
    """Every version of every model's price. A model that has none costs the `default`, as version 0.

    Raises:
        ValueError: versions are not numbered from 1, or do not take effect one after the other.
    """

    def __init__(self, versions: Sequence[PriceVersion], default: tuple[Rate, ...] = ()) -> None:
        self._default = default
        self._versions: dict[tuple[str, str], list[PriceVersion]] = {}
        for version in sorted(versions, key=lambda each: (each.model, each.customer_id, each.version)):
            earlier = self._versions.setdefault((version.model, version.customer_id), [])
            if version.version != len(earlier) + 1:
                raise ValueError(f"version {version.version} of {version.model} does not follow {len(earlier)}")
            if earlier and version.effective_from <= earlier[-1].effective_from:
                raise ValueError(
                    f"version {version.version} of {version.model} does not take effect after its predecessor"
                )
            earlier.append(version)

    def at(self, model: str, ts: float, customer_id: str = "") -> PriceVersion | None:
        """The version in force at that moment: the customer's own, else the list's, else the default; or none."""
        for owner in (customer_id, "") if customer_id else ("",):
            in_force = [each for each in self._versions.get((model, owner), ()) if each.effective_from <= ts]
            if in_force:
                return in_force[-1]
        return PriceVersion(model, 0, 0.0, self._default) if self._default else None

    def price(self, model: str, work: Work, ts: float, customer_id: str = "") -> Priced | None:
        """What reservations, quotes and bills all say; None if the model has no price."""
        version = self.at(model, ts, customer_id)
        return None if version is None else price(version, work)


def price(version: PriceVersion, work: Work) -> Priced:
    """Each line exact, then rounded up to a whole mil, once."""
    factor = Fraction(1)
    for height, width, of_size in version.resolutions:
        if (height, width) == (work.height, work.width):
            factor *= of_size
    factor *= dict(version.latency_classes).get(work.latency_class, 1)
    lines: list[Line] = []
    exact_total = Fraction(0)
    for index, (frames, of_tier) in enumerate(_by_tier(version.tiers, work)):
        for rate in version.rates:
            if rate.metric == "request" and index > 0:
                continue  # once, whatever tiers it crosses
            quantity = _quantity(rate.metric, frames, work)
            applied = factor if rate.metric == "request" else factor * of_tier
            exact = quantity * rate.nano_usd * applied / (rate.per * NANO_PER_MIL)
            exact_total += exact
            lines.append(Line(rate, quantity, Mils(-(-exact.numerator // exact.denominator)), applied))
    total = Mils(sum(line.mils for line in lines))
    frozen = exact_total / work.frames if len(lines) == 1 else Fraction(total, work.frames)
    if frozen.numerator * work.frames + frozen.denominator > MAX_EXACT:
        frozen = Fraction(total, work.frames)
    return Priced(version, tuple(lines), total, Mils(frozen.numerator), frozen.denominator)


def _by_tier(tiers: Sequence[Tier], work: Work) -> list[tuple[int, Fraction]]:
    """How many of the work's frames fall into each tier, and its factor."""
    starts = [Tier(0, Fraction(1)), *tiers]
    parts = []
    for index, (after, factor) in enumerate(starts):
        end = starts[index + 1].after_frames if index + 1 < len(starts) else None
        first = max(after, work.used_frames)
        last = work.used_frames + work.frames if end is None else min(end, work.used_frames + work.frames)
        if last > first:
            parts.append((last - first, factor))
    return parts


def _quantity(metric: Metric, frames: int, work: Work) -> Fraction:
    match metric:
        case "frame":
            return Fraction(frames)
        case "second":
            return Fraction(frames, work.fps)
        case "megapixel_frame":
            return Fraction(frames * work.height * work.width, 10**6)
        case "request":
            return Fraction(1)
        case _:
            assert_never(metric)
