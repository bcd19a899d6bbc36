"""What an evaluation has found so far: a file per episode, written whole, so that a job that was killed goes on."""

import contextlib
import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal


@dataclass(frozen=True, slots=True)
class Record:
    """One episode's outcome. Lists have one value per generated frame, the start frame left out."""

    episode_id: str
    status: Literal["ok", "bad"]
    reason: str = ""
    num_frames: int = 0
    cost_usd: float = 0.0
    request_id: str = ""
    engine_ms: float = 0.0
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
