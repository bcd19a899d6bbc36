"""Prices as text: as rows keep them, and as operators write them in a file.

    [[price]]
    model = "tiny-pusher"
    effective_from = 2026-01-01T00:00:00Z   # or POSIX seconds; left out: always
    customer = "cus_..."                    # left out: the list price
    rates = [{ metric = "frame", usd = "0.0005" }]
    resolutions = [{ height = 480, width = 640, factor = "1.5" }]
    latency_classes = { batch = "0.5" }
    tiers = [{ after_frames = 1000000, factor = "0.8" }]

A rate is dollars, or a number of a provider's credits, for every `per` units (1 if left out):
`{ metric = "second", credits = 100, per = 5, pack = { credits = 1200, usd = "4" } }`.
Dollars and factors are strings, so that they are read exactly.
"""

import json
import tomllib
from collections.abc import Mapping, Sequence
from datetime import datetime
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from typing import Any, NamedTuple, get_args

from billing.money import mils_from_usd
from billing.prices import NANO_PER_USD, CreditPack, Metric, PriceVersion, Rate, Tier

MAX_TERMS_CHARS = 20_000


class PriceTerms(NamedTuple):
    """A price that has no version yet."""

    model: str
    customer: str
    """Name or id; empty for the list price."""
    effective_from: float
    terms: str


def terms_of(version: PriceVersion) -> str:
    """The same text for the same terms."""
    return json.dumps(
        {
            "rates": [[rate.metric, rate.nano_usd, rate.per] for rate in version.rates],
            "resolutions": [[height, width, str(factor)] for height, width, factor in version.resolutions],
            "latency_classes": [[name, str(factor)] for name, factor in version.latency_classes],
            "tiers": [[tier.after_frames, str(tier.factor)] for tier in version.tiers],
        },
        separators=(",", ":"),
    )


def version_of(model: str, customer_id: str, version: int, effective_from: float, terms: str) -> PriceVersion:
    """The inverse of `terms_of`.

    Raises:
        ValueError: `terms` is not what `terms_of` writes.
    """
    try:
        parts = json.loads(terms)
        return PriceVersion(
            model,
            version,
            effective_from,
            tuple(Rate(_metric(metric), _whole(nano), _whole(per)) for metric, nano, per in parts["rates"]),
            customer_id,
            tuple((_whole(height), _whole(width), Fraction(factor)) for height, width, factor in parts["resolutions"]),
            tuple((str(name), Fraction(factor)) for name, factor in parts["latency_classes"]),
            tuple(Tier(_whole(after), Fraction(factor)) for after, factor in parts["tiers"]),
        )
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise ValueError(f"these are no price terms: {error}") from None


def read_price_file(text: str) -> list[PriceTerms]:
    """Every `[[price]]` of an operator's file.

    Raises:
        ValueError: says which price and what is wrong with it.
    """
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"this is not TOML: {error}") from None
    prices = document.get("price")
    if not isinstance(prices, list) or set(document) != {"price"}:
        raise ValueError("the file must hold [[price]] tables and nothing else")
    read = []
    for number, given in enumerate(prices, 1):
        try:
            read.append(_price(given))
        except (KeyError, ValueError, TypeError, InvalidOperation, ZeroDivisionError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else error
            raise ValueError(f"price {number} ({given.get('model', 'no model')}): {reason}") from None
    return read


_FIELDS = {"model", "customer", "effective_from", "rates", "resolutions", "latency_classes", "tiers"}


def _price(given: Mapping[str, Any]) -> PriceTerms:
    if unknown := set(given) - _FIELDS:
        raise ValueError(f"{sorted(unknown)} are not fields of a price; {sorted(_FIELDS)} are")
    since = given.get("effective_from", 0.0)
    version = PriceVersion(
        model=str(given["model"]),
        version=1,
        effective_from=since.timestamp() if isinstance(since, datetime) else float(since),
        rates=tuple(_rate(each) for each in given["rates"]),
        resolutions=tuple(
            (_whole(each["height"]), _whole(each["width"]), _factor(each["factor"]))
            for each in given.get("resolutions", ())
        ),
        latency_classes=tuple((name, _factor(factor)) for name, factor in given.get("latency_classes", {}).items()),
        tiers=tuple(Tier(_whole(each["after_frames"]), _factor(each["factor"])) for each in _tables(given, "tiers")),
    )
    return PriceTerms(version.model, str(given.get("customer", "")), version.effective_from, terms_of(version))


def _tables(given: Mapping[str, Any], name: str) -> Sequence[Mapping[str, Any]]:
    tables = given.get(name, ())
    return tables if isinstance(tables, list | tuple) else ()


def _rate(given: Mapping[str, Any]) -> Rate:
    metric, per = _metric(given["metric"]), _whole(given.get("per", 1))
    if "pack" in given:
        pack = CreditPack(_whole(given["pack"]["credits"]), mils_from_usd(Decimal(given["pack"]["usd"])))
        return pack.rate(metric, _whole(given["credits"]), per)
    nano = _text(given["usd"]) * NANO_PER_USD
    if nano != nano.to_integral_value():
        raise ValueError(f"{given['usd']} dollars is not a whole number of nano-dollars; use `per` for smaller rates")
    return Rate(metric, int(nano), per)


def _metric(value: object) -> Metric:
    for metric in get_args(Metric):
        if value == metric:
            return metric  # type: ignore[no-any-return]
    raise ValueError(f"{value!r} is not a metric; {', '.join(get_args(Metric))} are")


def _whole(value: object) -> int:
    if type(value) is not int:
        raise ValueError(f"{value!r} must be a whole number")
    return value


def _text(value: object) -> Decimal:
    if not isinstance(value, str):
        raise ValueError(f"{value!r} must be a string, so that it is read exactly")
    number = Decimal(value)
    if not number.is_finite():
        raise ValueError(f"{value!r} is not an amount")
    return number


def _factor(value: object) -> Fraction:
    return Fraction(_text(value))
