"""Checkpoints from wherever they are kept to a directory that a model can be loaded from.

Anything that fsspec can read is a source (`https://`, `s3://`, `file://`, ...); credentials are the file system's own
business, from the environment. What is copied is checked by whoever loads it: `config.json` holds the sha256.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import fsspec
import structlog

FILES = ("config.json", "model.safetensors")

PARTIAL = ".partial"
PARTIAL_TTL_S = 6 * 3600.0

log = structlog.get_logger(__name__)


class CheckpointUnavailable(Exception):
    """A checkpoint cannot be had from its source; the message names the file."""


def local_checkpoint(source: str, cache_dir: Path) -> Path:
    """`source` itself if it is a path, else a copy of it under `cache_dir`, made once, whole and checked or not at all.

    Raises:
        CheckpointUnavailable: the source cannot be read, or its weights are not those that its config names.
    """
    if "://" not in source:
        return Path(source)
    if "?" in source:
        raise CheckpointUnavailable("a checkpoint's URL names a directory and takes no query; use credentials instead")
    target = cache_dir / hashlib.sha256(source.encode()).hexdigest()[:32]
    if target.is_dir():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    _sweep_partial_copies(cache_dir)
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=PARTIAL, dir=cache_dir))
    try:
        for name in FILES:
            log.info("copying_checkpoint", file=name)
            try:
                files, root = fsspec.core.url_to_fs(source.rstrip("/"))
                files.get_file(f"{root}/{name}", str(partial / name))
            except Exception as error:  # every file system raises its own kinds, with the URL and so its password
                raise CheckpointUnavailable(f"{name} of {_public(source)}: {type(error).__name__}") from None
        _check(partial, source)
        try:
            os.rename(partial, target)
        except OSError:  # another replica was faster: its copy counts
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _check(directory: Path, source: str) -> None:
    """Before it is kept: a copy that was kept broken would be broken at every start."""
    try:
        expected = json.loads((directory / "config.json").read_bytes())["weights"]["sha256"]
    except (ValueError, KeyError, TypeError):
        raise CheckpointUnavailable(f"config.json of {_public(source)} names no sha256 of its weights") from None
    with (directory / "model.safetensors").open("rb") as weights:
        found = hashlib.file_digest(weights, "sha256").hexdigest()
    if found != expected:
        raise CheckpointUnavailable(f"model.safetensors of {_public(source)} has sha256 {found}, not {expected}")


def _sweep_partial_copies(cache_dir: Path) -> None:
    """What processes that were killed left behind."""
    for path in cache_dir.glob(f"*{PARTIAL}"):
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_mtime < time.time() - PARTIAL_TTL_S:
                shutil.rmtree(path, ignore_errors=True)


def _public(url: str) -> str:
    """What stands before an @ is nobody's business."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.split('@')[-1]}"
