"""Finished rollout videos on disk until they expire. A name is published only once its file can be read whole."""

import os
import re
import time
from pathlib import Path

import structlog

_NAME = re.compile(r"rollout_[0-9a-f]{32}")

log = structlog.get_logger(__name__)


class ResultStore:
    """Files `<rollout id>.mp4` in `directory`, each kept for `ttl_s` seconds."""

    def __init__(self, directory: Path, ttl_s: float) -> None:
        self._directory = directory
        self.ttl_s = ttl_s
        directory.mkdir(parents=True, exist_ok=True)

    def put(self, rollout_id: str, video: bytes) -> None:
        """Whole and on disk, or not there.

        Raises:
            OSError: it cannot be stored.
        """
        path = self.path(rollout_id)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        with partial.open("wb") as file:
            file.write(video)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)

    def path(self, rollout_id: str) -> Path:
        """Where the video is, if it is still there."""
        if not _NAME.fullmatch(rollout_id):
            raise ValueError(f"{rollout_id!r} is not a rollout id")
        return self._directory / f"{rollout_id}.mp4"

    def sweep(self) -> int:
        """Delete what has expired; returns how many files."""
        oldest = time.time() - self.ttl_s
        swept = 0
        for path in self._directory.iterdir():
            try:
                if path.stat().st_mtime < oldest:
                    path.unlink()
                    swept += 1
            except FileNotFoundError:  # another ingress replica was faster
                continue
            except OSError as error:
                log.warning("result_not_swept", name=path.name, error=type(error).__name__)
        return swept
