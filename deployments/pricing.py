"""What work costs now: the one place that reservations, quotes, the catalog and answers take a price from."""

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import ParamSpec, TypeVar

import structlog

from billing.commands import CustomerId
from billing.database import DATABASE_FAILURES
from billing.keys import mint_quote_id
from billing.prices import NANO_PER_MIL, PriceBook, Priced, PriceVersion, Rate, Work, price
from deployments.errors import LedgerUnavailable, QuoteNotAccepted
from deployments.messages import ModelSpec, ServiceClass

REREAD_EVERY_S = 5.0
"""A price that was added is charged this long after at the latest."""
QUOTED_CLASSES: dict[ServiceClass, str] = {"standard": "0", "batch": "1", "interactive": "2"}
"""The first digit of a quote's id: the ledger, which knows no classes, finds a quote only under the id it was given."""

Arguments = ParamSpec("Arguments")
Answer = TypeVar("Answer")

log = structlog.get_logger(__name__)


class Prices:
    """The ledger's price book, read again every `REREAD_EVERY_S`. A model that is not in it costs what its spec says.

    `used_frames` is asked only for prices with volume tiers: how many frames a customer has used since a moment.
    """

    def __init__(
        self,
        read: Callable[[], Sequence[PriceVersion]],
        used_frames: Callable[[CustomerId, float], int],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._read = read
        self._used_frames = used_frames
        self._clock = clock
        self._book: PriceBook | None = None
        self._reread_at = 0.0
        self._turn = asyncio.Lock()

    async def price(
        self,
        model: ModelSpec,
        frames: int,
        customer_id: CustomerId | None = None,
        service_class: ServiceClass = "standard",
    ) -> Priced:
        """What so many frames of `model` cost the customer now; anybody without a price of its own, if none is given.

        Raises:
            LedgerUnavailable: the price book has never been read, or the customer's volume cannot be.
        """
        book, now = await self._current(), self._clock()
        version = book.at(model.slug, now, customer_id or "") or default_price(model)
        used = 0
        if version.tiers and customer_id is not None:
            used = await _ask(self._used_frames, customer_id, _month_start(now))
        height, width = model.resolution
        return price(version, Work(frames, model.fps, height, width, service_class, used))

    async def _current(self) -> PriceBook:
        if self._book is None or time.monotonic() >= self._reread_at:
            async with self._turn:
                if self._book is None or time.monotonic() >= self._reread_at:
                    await self._reread()
        assert self._book is not None
        return self._book

    async def _reread(self) -> None:
        """While the database is away the last book stands: nothing can be reserved at its prices meanwhile."""
        try:
            versions = await _ask(self._read)
        except LedgerUnavailable:
            if self._book is None:
                raise
            log.warning("price_book_not_read")
        else:
            self._book = PriceBook(versions)
        self._reread_at = time.monotonic() + REREAD_EVERY_S


def default_price(model: ModelSpec) -> PriceVersion:
    """Version 0: of no book."""
    return PriceVersion(model.slug, 0, 0.0, (Rate("frame", model.mils_per_frame * NANO_PER_MIL),))


def quote_id_for(service_class: ServiceClass) -> str:
    prefix, digits = mint_quote_id().split("_")
    return f"{prefix}_{QUOTED_CLASSES[service_class]}{digits[1:]}"


def check_quoted_class(quote_id: str, service_class: ServiceClass) -> None:
    """Raises QuoteNotAccepted if the quote is for work of another class, which may have another price."""
    for quoted, digit in QUOTED_CLASSES.items():
        if quote_id.startswith(f"quo_{digit}") and quoted != service_class:
            raise QuoteNotAccepted(f"the quote is for work of class {quoted}, and this is {service_class}")


async def _ask(question: Callable[Arguments, Answer], *args: Arguments.args, **kwargs: Arguments.kwargs) -> Answer:
    try:
        return await asyncio.to_thread(question, *args, **kwargs)
    except DATABASE_FAILURES as error:
        raise LedgerUnavailable() from error


def _month_start(ts: float) -> float:
    moment = datetime.fromtimestamp(ts, UTC)
    return datetime(moment.year, moment.month, 1, tzinfo=UTC).timestamp()
