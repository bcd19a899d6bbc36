"""Start frames that customers uploaded once, to be named by what they hold instead of being sent ten times a second.

A frame is known only to its customer. Each may keep `MAX_FRAMES` for `TTL_S`; beyond that its oldest goes.
"""

import hashlib
import io
import re
import threading
import time
from collections import OrderedDict

import numpy as np
import structlog
from PIL import Image

from billing.commands import CustomerId
from deployments.file_groups import FileGroups
from deployments.messages import Frame
from deployments.presenter import exact_png

TTL_S = 3600.0
MAX_FRAMES = 64
MAX_CACHED_BYTES = 64 * 2**20
"""Decoded frames that one process keeps, so that a control loop reads no file ten times a second."""
KIND = "frames"
PICTURE = "frame.png"
_FRAME_ID = re.compile(r"frame_[0-9a-f]{32}")
_CUSTOMER_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")

log = structlog.get_logger(__name__)


class FrameStore:
    """Frames in `groups`, which processes may share. Blocks: call it off the event loop."""

    def __init__(self, groups: FileGroups) -> None:
        self._groups = groups
        self._cache: OrderedDict[str, Frame] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    def put(self, customer_id: CustomerId, frame: Frame) -> tuple[str, float]:
        """The frame's id, and until when it is kept at least (POSIX seconds). The same pixels have the same id.

        Raises:
            OSError: it cannot be stored.
        """
        frame_id = "frame_" + hashlib.sha256(repr(frame.shape).encode() + frame.tobytes()).hexdigest()[:32]
        name = _name(customer_id, frame_id)
        now = time.time()
        kept = dict(self._groups.ages(f"{KIND}/{customer_id}"))
        if (stored_at := kept.pop(name, None)) is not None:
            if now - stored_at < TTL_S / 2:
                return frame_id, stored_at + TTL_S
            self._remove(name)
        for _, old in sorted((stored_at, name) for name, stored_at in kept.items())[: len(kept) - MAX_FRAMES + 1]:
            self._remove(old)
        self._groups.put(name, {PICTURE: exact_png(frame)}, durable=False)
        self._remember(name, frame)
        return frame_id, now + TTL_S

    def get(self, customer_id: CustomerId, frame_id: str) -> Frame | None:
        """The customer's frame, or None if there is no such frame, or no longer."""
        if not _FRAME_ID.fullmatch(frame_id):
            return None
        name = _name(customer_id, frame_id)
        with self._lock:
            if (cached := self._cache.get(name)) is not None:
                self._cache.move_to_end(name)
                return cached
        try:
            content = self._groups.read(name, PICTURE)
        except FileNotFoundError:
            return None
        frame = np.array(Image.open(io.BytesIO(content)), np.uint8)
        self._remember(name, frame)
        return frame

    def sweep(self) -> int:
        """Delete what belongs to customers who have uploaded nothing for `TTL_S`; returns of how many."""
        swept = 0
        for name, written_at in self._groups.ages(KIND):
            if written_at < time.time() - TTL_S:
                self._remove(name)
                swept += 1
        return swept

    def _remove(self, name: str) -> None:
        with self._lock:
            if (cached := self._cache.pop(name, None)) is not None:
                self._cached_bytes -= cached.nbytes
        try:
            self._groups.remove(name)
        except FileNotFoundError:  # another process was faster
            return
        except OSError as error:
            log.warning("frame_not_removed", name=name, error=type(error).__name__)

    def _remember(self, name: str, frame: Frame) -> None:
        frame.flags.writeable = False
        with self._lock:
            if name not in self._cache:
                self._cache[name] = frame
                self._cached_bytes += frame.nbytes
            while self._cached_bytes > MAX_CACHED_BYTES:
                _, oldest = self._cache.popitem(last=False)
                self._cached_bytes -= oldest.nbytes


def _name(customer_id: CustomerId, frame_id: str) -> str:
    if not _CUSTOMER_ID.fullmatch(customer_id):
        raise ValueError(f"{customer_id!r} is not a customer's id")
    return f"{KIND}/{customer_id}/{frame_id}"
