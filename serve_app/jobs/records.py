"""What an evaluation has found so far: a file per episode, written whole, so that a job that was killed goes on."""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

Item = TypeVar("Item")

KNOWN_FOR_S = 24 * 3600.0
"""How long the service answers the same words with the same result."""


@dataclass(frozen=True, slots=True)
class Record:
    """One episode's outcome. Lists have one value per generated frame, the start frame left out."""

    episode_id: str
    status: Literal["ok", "bad"]
    reason: str = ""
    num_frames: int = 0
    cost_usd: float = 0.0
    """Its frames' part of what its request cost."""
    request_id: str = ""
    """Of the request that it was part of, with other episodes."""
    engine_ms: float = 0.0
    """For which the engine worked on that request."""
    psnr_db: list[float] = field(default_factory=list)
    copy_first_psnr_db: list[float] = field(default_factory=list)
    """Of showing the start frame all the time: what a model must beat."""
    ssim: list[float] = field(default_factory=list)
    lpips: list[float] | None = None
    """None without LPIPS weights."""
    score: float | None = None
    """What a policy evaluation's scoring function says of the rollout."""
    clip: str = ""
    """File of the recording beside the rollout; empty for most."""


class Records:
    """In `directory`; `run` names what is evaluated, and another run's records are refused."""

    def __init__(self, directory: Path, run: str) -> None:
        """Raises ValueError for another run's directory, OSError."""
        self._directory = directory / "episodes"
        self._directory.mkdir(parents=True, exist_ok=True)
        named = directory / "run.txt"
        if not named.exists():
            write_whole(named, run)
        elif named.read_text() != run:
            raise ValueError(f"{directory} holds another evaluation: {named.read_text()!r}, not {run!r}")

    def put(self, record: Record) -> None:
        """Raises OSError: the record is not there, or as it was."""
        write_whole(self._file(record.episode_id), json.dumps(asdict(record)))

    def get(self, episode_id: str) -> Record | None:
        return _read(self._file(episode_id))

    def __iter__(self) -> Iterator[Record]:
        for file in sorted(self._directory.glob("*.json")):
            record = _read(file)
            if record is not None:
                yield record

    def _file(self, episode_id: str) -> Path:
        return self._directory / f"{hashlib.sha256(episode_id.encode()).hexdigest()[:24]}.json"


class Groups:
    """Which episodes were asked for in one request, written before it is sent: while one of them has no record they are
    asked for together again, in the same words, and so are not paid for a second time."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory / "groups"
        self._directory.mkdir(parents=True, exist_ok=True)

    def begin(self, episode_ids: Sequence[str]) -> None:
        """Once more changes nothing. Raises OSError."""
        file = self._file(episode_ids)
        if len(episode_ids) > 1 and not file.exists():  # one alone is in the same words whenever it is asked for
            write_whole(file, json.dumps(list(episode_ids)))

    def halve(self, episode_ids: Sequence[str]) -> None:
        """They were refused together, and are asked for in halves. Raises OSError."""
        for half in halves(episode_ids):
            self.begin(half)
        self._file(episode_ids).unlink(missing_ok=True)

    def __iter__(self) -> Iterator[list[str]]:
        """Those that began within the time for which the service knows them, the largest first; no episode twice."""
        taken: set[str] = set()
        since = time.time() - KNOWN_FOR_S
        young = [file for file in self._directory.glob("*.json") if file.stat().st_mtime > since]
        for episode_ids in sorted((json.loads(file.read_text()) for file in young), key=len, reverse=True):
            if taken.isdisjoint(episode_ids):
                taken.update(episode_ids)
                yield episode_ids

    def _file(self, episode_ids: Sequence[str]) -> Path:
        return self._directory / f"{hashlib.sha256(json.dumps(list(episode_ids)).encode()).hexdigest()[:24]}.json"


def halves(group: Sequence[Item]) -> tuple[Sequence[Item], Sequence[Item]]:
    return group[: len(group) // 2], group[len(group) // 2 :]


def write_whole(file: Path, content: str | bytes) -> None:
    """`content`, or what was there before. Raises OSError."""
    descriptor, partial = tempfile.mkstemp(dir=file.parent, suffix=".partial")
    try:
        with os.fdopen(descriptor, "wb") as opened:
            opened.write(content.encode() if isinstance(content, str) else content)
        os.chmod(partial, 0o644)
        os.replace(partial, file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(partial)
        raise


def _read(file: Path) -> Record | None:
    """None where a file is missing, or was cut off when the machine lost its power: that episode is done again."""
    try:
        return Record(**json.loads(file.read_text()))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        print(f"{file} is no record ({error}); its episode is done again", file=sys.stderr)
        return None
