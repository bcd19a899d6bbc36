"""Finished rollouts on disk until they expire: what a link leads to, and what a repeated request is answered with.

A result is a directory that appears whole or not at all. Lasting ones are those that a link or an idempotency key
promises; recent ones only bridge the time in which a client may send a request again.
"""

import json
import os
import re
import shutil
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path

import structlog

from billing.commands import RequestId
from deployments.messages import RolloutResult

RECENT_TTL_S = 90.0
"""Longer than the window in which the same payload counts as sent again."""
_NAME = re.compile(r"req_[0-9a-f]{32}")

log = structlog.get_logger(__name__)


class ResultStore:
    """Results below `directory`; lasting ones are kept for `ttl_s` seconds. Several processes may share it."""

    def __init__(self, directory: Path, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self._lasting, self._recent = directory / "lasting", directory / "recent"
        for kind in (self._lasting, self._recent):
            kind.mkdir(parents=True, exist_ok=True)

    def put(self, result: RolloutResult, lasting: bool) -> None:
        """Store `result` whole; a lasting one is on disk when this returns. Storing it again changes nothing.

        Raises:
            OSError: it cannot be stored.
        """
        target = self._directory(self._lasting if lasting else self._recent, result.request_id)
        if target.exists():
            return
        partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".partial", dir=target.parent))
        try:
            for index, video in enumerate(result.videos):
                _write(partial / f"{index:03d}.mp4", video, lasting)
            record = asdict(replace(result, videos=())) | {"num_videos": len(result.videos)}
            _write(partial / "result.json", json.dumps(record).encode(), lasting)
            try:
                if lasting:
                    _sync(partial)
                partial.rename(target)
                if lasting:
                    _sync(target.parent)
            except OSError:  # it was stored meanwhile
                if not target.exists():
                    raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def get(self, request_id: RequestId) -> RolloutResult | None:
        """The stored result, or None if there is none or it has expired."""
        for kind in (self._lasting, self._recent):
            directory = self._directory(kind, request_id)
            try:
                record = json.loads((directory / "result.json").read_bytes())
                num_videos = record.pop("num_videos")
                videos = tuple((directory / f"{index:03d}.mp4").read_bytes() for index in range(num_videos))
            except FileNotFoundError:
                continue
            return RolloutResult(**record | {"videos": videos})
        return None

    def video(self, request_id: RequestId) -> Path | None:
        """The file of a lasting result's first video, or None if it is not there."""
        path = self._directory(self._lasting, request_id) / "000.mp4"
        return path if path.is_file() else None

    def sweep(self) -> int:
        """Delete what has expired, and what a process that died left half made; returns how many."""
        now, swept = time.time(), 0
        for kind, ttl_s in ((self._lasting, self.ttl_s), (self._recent, RECENT_TTL_S)):
            for path in kind.iterdir():
                try:
                    if path.stat().st_mtime < now - ttl_s:
                        shutil.rmtree(path)
                        swept += 1
                except FileNotFoundError:  # another ingress replica was faster
                    continue
                except OSError as error:
                    log.warning("result_not_swept", name=path.name, error=type(error).__name__)
        return swept

    def _directory(self, kind: Path, request_id: RequestId) -> Path:
        if not _NAME.fullmatch(request_id):
            raise ValueError(f"{request_id!r} is not a request id")
        return kind / request_id


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write(path: Path, content: bytes, durable: bool) -> None:
    with path.open("wb") as file:
        file.write(content)
        if durable:
            file.flush()
            os.fsync(file.fileno())
