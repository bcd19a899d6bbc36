"""The price book as it is now, for whoever prices many requests: read from the database now and then."""

import time
from collections.abc import Callable
from threading import Lock

from billing.prices import PriceBook, Rate
from billing.reader import LedgerReader

REFRESH_S = 10.0
"""How long a new version may stay unseen. Versions that take effect later than that are never missed."""


class CurrentPrices:
    """Safe to share between threads.

    A price that lags by a few seconds is no error: what was reserved or quoted keeps the rate that it was given.
    """

    def __init__(
        self,
        reader: LedgerReader,
        default: tuple[Rate, ...],
        refresh_s: float = REFRESH_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._reader = reader
        self._default = default
        self._refresh_s = refresh_s
        self._clock = clock
        self._turn = Lock()
        self._book: PriceBook | None = None
        self._read_at = 0.0

    def book(self) -> PriceBook:
        """Raises one of `DATABASE_FAILURES` when the database fails."""
        with self._turn:
            now = self._clock()
            if self._book is None or now - self._read_at >= self._refresh_s:
                self._book = PriceBook(self._reader.prices(), self._default)
                self._read_at = now
            return self._book
