"""Finished rollouts until they expire: what a link leads to, and what a repeated request is answered with.

Lasting results are those that a link or an idempotency key promises; recent ones only bridge the time in which a client
may send a request again.
"""

import json
import re
import time
from dataclasses import asdict, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import structlog

from billing.commands import RequestId
from deployments.file_groups import FileGroups, open_file_groups
from deployments.messages import Closeness, RolloutResult

RECENT_TTL_S = 90.0
"""Longer than the window in which the same payload counts as sent again."""
MP4_MARK = b"ftyp"
"""What an mp4 says of itself; a batch may have asked for pictures instead."""
LASTING, RECENT = "lasting", "recent"
RECORD = "result.json"
VIDEOS = "videos.mp4"
"""One after the other, as a file for each would cost several times as much; of one rollout it is its mp4."""
_REQUEST_ID = re.compile(r"req_[0-9a-f]{32}")

log = structlog.get_logger(__name__)


class ResultStore:
    """Results below `url`, a path or an fsspec URL; lasting ones are kept for `ttl_s` seconds. Processes may share it.

    Raises:
        ValueError, ImportError: nothing that is installed can read that URL.
    """

    def __init__(self, url: str | Path, ttl_s: float) -> None:
        self.ttl_s = ttl_s
        self._groups: FileGroups = open_file_groups(str(url))
        self.sweep_every_s = 30.0 if self._groups.is_local else 600.0
        """Listing an object store costs money; its bucket may well expire objects by itself."""

    def put(self, result: RolloutResult, lasting: bool) -> None:
        """Store `result` whole; a lasting one is durable when this returns. Storing it again changes nothing.

        Raises:
            OSError: it cannot be stored.
        """
        about = asdict(replace(result, videos=())) | {"video_bytes": [len(video) for video in result.videos]}
        record, videos = json.dumps(about).encode(), b"".join(result.videos)
        if lasting:
            self._groups.put(_name(LASTING, result.request_id), {VIDEOS: videos, RECORD: record}, durable=True)
        else:
            self._groups.put_file(_name(RECENT, result.request_id), record + b"\n" + videos)

    def get(self, request_id: RequestId) -> RolloutResult | None:
        """The stored result, or None if there is none or it has expired."""
        name = _name(LASTING, request_id)
        try:
            record, videos = self._groups.read(name, RECORD), self._groups.read(name, VIDEOS)
        except FileNotFoundError:
            try:
                record, _, videos = self._groups.read_file(_name(RECENT, request_id)).partition(b"\n")
            except FileNotFoundError:
                return None
        about = json.loads(record)
        ends = accumulate(about.pop("video_bytes"), initial=0)
        return _result(about | {"videos": tuple(videos[start:end] for start, end in pairwise(ends))})

    def linked(self, request_id: RequestId) -> RolloutResult | None:
        """The result of one rollout that a link leads to, without its video; None if there is none."""
        name = _name(LASTING, request_id)
        try:
            record = json.loads(self._groups.read(name, RECORD))
        except FileNotFoundError:
            return None
        is_video = len(record.pop("video_bytes")) == 1 and self._groups.read(name, VIDEOS)[4:8] == MP4_MARK
        return _result(record | {"videos": ()}) if is_video else None

    def video(self, request_id: RequestId) -> Path | bytes | None:
        """The video of one lasting rollout: its file if that is on this machine, else its bytes; None if not there."""
        name = _name(LASTING, request_id)
        path = self._groups.path(name, VIDEOS)
        if path is not None:
            return path if path.is_file() else None
        try:
            return self._groups.read(name, VIDEOS)
        except FileNotFoundError:
            return None

    def sweep(self) -> int:
        """Delete what has expired, and what a process that died left half made; returns how many."""
        now, swept = time.time(), 0
        for kind, ttl_s in ((LASTING, self.ttl_s), (RECENT, RECENT_TTL_S)):
            for name, written_at in self._groups.ages(kind):
                if written_at >= now - ttl_s:
                    continue
                try:
                    self._groups.remove(name)
                    swept += 1
                except FileNotFoundError:  # another ingress replica was faster
                    continue
                except OSError as error:
                    log.warning("result_not_swept", name=name, error=type(error).__name__)
        return swept


def _result(record: dict[str, Any]) -> RolloutResult:
    """The stored fields with the types that JSON has not."""
    for name in ("candidate_frames", "distances"):
        record[name] = tuple(record.get(name, ()))
    if record.get("closeness") is not None:
        record["closeness"] = Closeness(**record["closeness"])
    return RolloutResult(**record)


def _name(kind: str, request_id: RequestId) -> str:
    if not _REQUEST_ID.fullmatch(request_id):
        raise ValueError(f"{request_id!r} is not a request id")
    return f"{kind}/{request_id}"
