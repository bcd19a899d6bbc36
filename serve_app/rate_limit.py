"""A token bucket per key: a floor against runaway clients. What a customer may spend is the ledger's business."""

import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

MAX_BUCKETS = 100_000
_ROUNDING = 1e-6
"""Tokens that may be missing from a whole one, so that waiting as long as was said is always enough."""


@dataclass(slots=True)
class _Bucket:
    tokens: float
    filled_at: float


class TokenBuckets:
    """In memory of one ingress replica, which grants its `share` of each key's rate and burst.

    A bucket that has not been used for longest is forgotten beyond `MAX_BUCKETS`, which can only favour its key.
    `clock` in seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float], share: float = 1.0) -> None:
        assert 0 < share <= 1
        self._clock = clock
        self._share = share
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()

    def take(self, key_id: str, refill_per_s: float, burst: int) -> int | None:
        """Take one token; None if there was one, else the whole seconds until there will be, at least 1."""
        now = self._clock()
        rate, size = refill_per_s * self._share, max(1.0, burst * self._share)
        bucket = self._buckets.pop(key_id, None) or _Bucket(size, now)
        bucket.tokens = min(size, bucket.tokens + (now - bucket.filled_at) * rate)
        bucket.filled_at = now
        self._buckets[key_id] = bucket
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets.popitem(last=False)
        if bucket.tokens >= 1 - _ROUNDING:
            bucket.tokens = max(0.0, bucket.tokens - 1)
            return None
        wait_s = max(1, math.ceil((1 - _ROUNDING - bucket.tokens) / rate))
        # The division may round down to a whole second at which the multiplication above does not reach a token.
        return wait_s if bucket.tokens + wait_s * rate >= 1 - _ROUNDING else wait_s + 1
