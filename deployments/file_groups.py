"""Groups of small files at an fsspec URL: a group appears whole or not at all, and is deleted whole. A file may stand
alone too, which costs a fraction of a group of one.

Knows nothing of what the files hold. A directory of this machine is made durable file by file; an object store, such
as `s3://bucket/prefix`, is durable once it has answered.
"""

import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import fsspec

_MODIFIED = ("mtime", "LastModified", "last_modified", "updated", "created")
"""What the file systems call the time at which a file was written, the surest first."""


class FileGroups(ABC):
    """Names are relative paths of known parts (`lasting/req_...`); callers check whatever they did not make."""

    is_local: bool

    @abstractmethod
    def put(self, name: str, files: Mapping[str, bytes], durable: bool) -> None:
        """Store the group unless it is there already; a durable one survives a power cut once this returns.

        Raises:
            OSError: it cannot be stored.
        """

    @abstractmethod
    def read(self, name: str, file: str) -> bytes:
        """Raises FileNotFoundError if there is no such group, or it has no such file."""

    @abstractmethod
    def put_file(self, name: str, content: bytes) -> None:
        """Store a file alone, not durably, in place of one that is there. Raises OSError if it cannot be stored."""

    @abstractmethod
    def read_file(self, name: str) -> bytes:
        """Of one that was stored alone. Raises FileNotFoundError if it is not there."""

    @abstractmethod
    def path(self, name: str, file: str) -> Path | None:
        """Where the file is on this machine, if that is where it is."""

    @abstractmethod
    def remove(self, name: str) -> None:
        """Delete the group, or the file that stands alone; FileNotFoundError if there is none."""

    @abstractmethod
    def ages(self, kind: str) -> Iterator[tuple[str, float]]:
        """The name of each group and lone file below `kind`, half-made ones too, and when it was last written to."""


def open_file_groups(url: str) -> FileGroups:
    """Groups below `url`: a path, or any URL whose fsspec implementation is installed.

    Raises:
        ValueError, ImportError: nothing that is installed can read that URL.
    """
    files, root = fsspec.core.url_to_fs(url, use_listings_cache=False)
    protocols = (files.protocol,) if isinstance(files.protocol, str) else files.protocol
    return LocalFileGroups(Path(root)) if "file" in protocols else RemoteFileGroups(files, root)


class LocalFileGroups(FileGroups):
    """Each group is a directory, and each lone file a file, that is renamed into place. Several processes may share
    them."""

    is_local = True

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def put(self, name: str, files: Mapping[str, bytes], durable: bool) -> None:
        target = self._directory / name
        if target.exists():
            return
        partial = target.with_name(f"{target.name}.{uuid4().hex}.partial")
        try:
            partial.mkdir(mode=0o700)
        except FileNotFoundError:  # the first of its kind
            target.parent.mkdir(parents=True, exist_ok=True)
            partial.mkdir(mode=0o700)
        try:
            for file, content in files.items():
                _write(partial / file, content, durable)
            try:
                if durable:
                    _sync(partial)
                partial.rename(target)
                if durable:
                    _sync(target.parent)
            except OSError:  # it was stored meanwhile
                if not target.exists():
                    raise
                shutil.rmtree(partial, ignore_errors=True)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise

    def read(self, name: str, file: str) -> bytes:
        return (self._directory / name / file).read_bytes()

    def put_file(self, name: str, content: bytes) -> None:
        target = self._directory / name
        partial = target.with_name(f"{target.name}.{uuid4().hex}.partial")
        try:
            try:
                _write(partial, content, durable=False)
            except FileNotFoundError:  # the first of its kind
                target.parent.mkdir(parents=True, exist_ok=True)
                _write(partial, content, durable=False)
            partial.rename(target)
        except BaseException:
            partial.unlink(missing_ok=True)
            raise

    def read_file(self, name: str) -> bytes:
        return (self._directory / name).read_bytes()

    def path(self, name: str, file: str) -> Path | None:
        return self._directory / name / file

    def remove(self, name: str) -> None:
        path = self._directory / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()

    def ages(self, kind: str) -> Iterator[tuple[str, float]]:
        directory = self._directory / kind
        if not directory.is_dir():
            return
        for path in directory.iterdir():
            try:
                yield f"{kind}/{path.name}", path.stat().st_mtime
            except FileNotFoundError:  # another process was faster
                continue


class RemoteFileGroups(FileGroups):
    """Each file is an object; a group is there once `complete`, which is written last, is."""

    is_local = False
    _MARK = "complete"

    def __init__(self, files: Any, root: str) -> None:
        self._files = files
        self._root = root.rstrip("/")

    def put(self, name: str, files: Mapping[str, bytes], durable: bool) -> None:
        if self._files.exists(self._object(name, self._MARK)):
            return
        for file, content in {**files, self._MARK: uuid4().bytes}.items():
            self._files.pipe_file(self._object(name, file), content)

    def read(self, name: str, file: str) -> bytes:
        if not self._files.exists(self._object(name, self._MARK)):
            raise FileNotFoundError(name)
        content: bytes = self._files.cat_file(self._object(name, file))
        return content

    def put_file(self, name: str, content: bytes) -> None:
        self._files.pipe_file(f"{self._root}/{name}", content)

    def read_file(self, name: str) -> bytes:
        content: bytes = self._files.cat_file(f"{self._root}/{name}")
        return content

    def path(self, name: str, file: str) -> Path | None:
        return None

    def remove(self, name: str) -> None:
        """The mark goes first: what is half deleted is not read."""
        if self._files.exists(self._object(name, self._MARK)):
            self._files.rm_file(self._object(name, self._MARK))
        self._files.rm(f"{self._root}/{name}", recursive=True)

    def ages(self, kind: str) -> Iterator[tuple[str, float]]:
        newest: dict[str, float] = {}
        prefix = f"{self._root}/{kind}/"
        for found, about in self._files.find(prefix, detail=True).items():
            group = str(found).split(prefix.lstrip("/"), 1)[1].split("/", 1)[0]
            newest[group] = max(newest.get(group, 0.0), _modified(about))
        for group, modified in newest.items():
            yield f"{kind}/{group}", modified

    def _object(self, name: str, file: str) -> str:
        return f"{self._root}/{name}/{file}"


def _modified(about: Mapping[str, Any]) -> float:
    when = next(about[key] for key in _MODIFIED if about.get(key) is not None)
    return when.timestamp() if isinstance(when, datetime) else float(when)


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
