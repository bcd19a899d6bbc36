"""What an evaluation has found so far: a file per episode, written whole, so that a job that was killed goes on."""

import hashlib
import json
import os
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
    """File of the recording beside the rollout."""


class Records:
    """In `directory`; `run` names what is evaluated, and another run's records are refused."""

    def __init__(self, directory: Path, run: str) -> None:
        self._directory = directory / "episodes"
        self._directory.mkdir(parents=True, exist_ok=True)
        named = directory / "run.txt"
        if not named.exists():
            named.write_text(run)
        elif named.read_text() != run:
            raise ValueError(f"{directory} holds another evaluation: {named.read_text()!r}, not {run!r}")

    def put(self, record: Record) -> None:
        file = self._file(record.episode_id)
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(record)))
        os.replace(partial, file)

    def has(self, episode_id: str) -> bool:
        return self._file(episode_id).exists()

    def __iter__(self) -> Iterator[Record]:
        for file in sorted(self._directory.glob("*.json")):
            yield Record(**json.loads(file.read_text()))

    def _file(self, episode_id: str) -> Path:
        return self._directory / f"{hashlib.sha256(episode_id.encode()).hexdigest()[:24]}.json"
