"""What this package raises.

    WorldModelError
    ├── CheckpointError     a checkpoint that must not be served: names the tensor or the file
    └── InvalidInputError   a value that the caller sent and may correct: names the field

Both keep their fields positional, so that they survive being pickled between processes.
"""

from __future__ import annotations


class WorldModelError(Exception):
    """Root of the tree: catch this to catch everything the package raises on purpose."""


class CheckpointError(WorldModelError):
    """A checkpoint is missing, truncated, foreign, or does not fit the model; nothing of it was used."""

    def __init__(self, subject: str, reason: str) -> None:
        super().__init__(subject, reason)
        self.subject = subject  # the tensor's name or the file's path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.subject}: {self.reason}"


class InvalidInputError(WorldModelError, ValueError):
    """One field of a request is outside its range, shape or type."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field = field
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}"
