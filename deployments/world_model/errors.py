"""What this package raises.

    WorldModelError
    ├── CheckpointError     a checkpoint that must not be served: names the tensor or the file
    ├── ContextLost         a stream's context is not kept here, and must be sent along
    └── InvalidInputError   a value that the caller sent and may correct: names the field

They keep their fields positional, so that they survive being pickled between processes.
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


class ContextLost(WorldModelError):
    """A stream was to go on from a context that is not, or no longer, kept here."""

    def __init__(self, stream: str) -> None:
        super().__init__(stream)
        self.stream = stream

    def __str__(self) -> str:
        return f"the context of stream {self.stream!r} is not kept here; send its traces"


class InvalidInputError(WorldModelError, ValueError):
    """One field of a request is outside its range, shape or type."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(field, reason)
        self.field = field
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.field}: {self.reason}"
