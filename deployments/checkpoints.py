"""Checkpoints from wherever they are kept to a directory that a model can be loaded from.

Anything that fsspec can read is a source (`https://`, `s3://`, `file://`, ...); credentials are the file system's own
business, from the environment. What is copied is checked by whoever loads it: `config.json` holds the sha256.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

import fsspec
import structlog

FILES = ("config.json", "model.safetensors")

log = structlog.get_logger(__name__)


class CheckpointUnavailable(Exception):
    """A checkpoint cannot be copied from its source; the message names the file."""


def local_checkpoint(source: str, cache_dir: Path) -> Path:
    """`source` itself if it is a path, else a copy of it under `cache_dir`, made once, whole or not at all.

    Raises:
        CheckpointUnavailable: the source cannot be read.
    """
    if "://" not in source:
        return Path(source)
    target = cache_dir / hashlib.sha256(source.encode()).hexdigest()[:32]
    if target.is_dir():
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".partial", dir=cache_dir))
    try:
        for name in FILES:
            log.info("copying_checkpoint", file=name)
            try:
                files, root = fsspec.core.url_to_fs(source.rstrip("/"))
                files.get_file(f"{root}/{name}", str(partial / name))
            except Exception as error:  # every file system raises its own kinds
                raise CheckpointUnavailable(f"{name} of {_without_query(source)}: {type(error).__name__}") from error
        try:
            os.rename(partial, target)
        except OSError:  # another replica was faster: its copy counts
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _without_query(url: str) -> str:
    """A signed URL's signature, and whatever stands before an @, are nobody's business."""
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.split('?')[0].split('@')[-1]}"
