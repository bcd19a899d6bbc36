"""Start frames' latents by their content, so that a planner's second look at a scene costs no encoding.

Used by one thread: the one that starts rows.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from torch import Tensor

Frame = npt.NDArray[np.uint8]  # (H, W, 3)
MAX_BYTES = 64 * 2**20


class LatentCache:
    """The least recently used go first once `max_bytes` of latents are kept."""

    def __init__(self, max_bytes: int = MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._latents: OrderedDict[bytes, Tensor] = OrderedDict()
        self.num_bytes = 0
        self.hits = 0
        self.misses = 0
        """Frames that were encoded."""

    def get_or_encode(
        self, frames: Sequence[Frame], encode: Callable[[list[Frame]], list[Tensor]], keep: Sequence[bool]
    ) -> list[Tensor]:
        """Latents of `frames`: each distinct one that is not known is encoded once, and kept if `keep` says so."""
        digests = [hashlib.sha256(np.ascontiguousarray(frame).data).digest() for frame in frames]
        unknown: dict[bytes, Frame] = {}
        latents: dict[bytes, Tensor] = {}
        for digest, frame in zip(digests, frames, strict=True):
            if digest in self._latents:
                self._latents.move_to_end(digest)
                self.hits += 1
                latents[digest] = self._latents[digest]
            elif digest not in unknown:
                unknown[digest] = frame
        self.misses += len(unknown)
        if unknown:
            latents |= zip(unknown, encode(list(unknown.values())), strict=True)
        worth_keeping = {digest for digest, kept in zip(digests, keep, strict=True) if kept}
        self._keep({digest: latents[digest] for digest in unknown if digest in worth_keeping})
        return [latents[digest] for digest in digests]

    def _keep(self, latents: Mapping[bytes, Tensor]) -> None:
        for digest, tensor in latents.items():
            own = tensor.clone()  # a slice would keep the whole batch that it was encoded in
            self._latents[digest] = own
            self.num_bytes += own.nbytes
        while self.num_bytes > self._max_bytes:
            _, oldest = self._latents.popitem(last=False)
            self.num_bytes -= oldest.nbytes
