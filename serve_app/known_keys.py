"""Keys that were read a moment ago, so that a client that asks often is not looked up in the database each time."""

from collections import OrderedDict
from collections.abc import Callable

from billing.reader import KeyRecord

KNOWN_S = 1.0
"""A key that was revoked is still taken for that long where the ledger, which knows at once, decides again."""
MAX_KEYS = 10_000


class KnownKeys:
    """By the SHA-256 of their token. `clock` in seconds, monotonic."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._keys: OrderedDict[str, tuple[float, KeyRecord]] = OrderedDict()

    def get(self, sha256: str) -> KeyRecord | None:
        read_at, key = self._keys.get(sha256, (0.0, None))
        return key if key is not None and self._clock() - read_at < KNOWN_S else None

    def add(self, sha256: str, key: KeyRecord) -> None:
        self._keys[sha256] = (self._clock(), key)
        self._keys.move_to_end(sha256)
        if len(self._keys) > MAX_KEYS:
            self._keys.popitem(last=False)
