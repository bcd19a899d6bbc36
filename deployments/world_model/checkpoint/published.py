"""Reading the files that models are published in: a PyTorch distributed checkpoint, or one file of `torch.save`.

Names and shapes come first, without reading any weights; each tensor is read when it is asked for, so a model larger
than memory can be converted. Published files are pickles: nothing in them is called but what rebuilds tensors.
"""

from __future__ import annotations

import io
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from enum import Enum, EnumType
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

from deployments.world_model.errors import CheckpointError

METADATA_FILE = ".metadata"
LATEST_FILE = "latest_checkpoint.txt"

# What the metadata of a distributed checkpoint is made of. Any other global in it is refused: a pickle may call it.
METADATA_GLOBALS = {
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath", "WindowsPath", "PureWindowsPath"},
    "torch": {"Size", "device", *(str(dtype).removeprefix("torch.") for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
        torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool,
    ))},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
        "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
}  # fmt: skip


class Published(Protocol):
    """Tensors by name. `files` are all that the tensors come from."""

    path: Path
    files: list[Path]
    shapes: dict[str, tuple[int, ...]]

    def read(self, name: str) -> Tensor:
        """One tensor. Raises CheckpointError where the file that holds it cannot be read."""


def open_published(path: Path) -> Published:
    """A checkpoint directory, a directory that leads to one, or a file. Raises CheckpointError."""
    if not path.is_dir():
        return TorchFile(path)
    candidates = [path, path / "model"]
    if (path / LATEST_FILE).is_file():
        latest = path / (path / LATEST_FILE).read_text().strip()
        candidates += [latest, latest / "model"]
    for directory in candidates:
        if (directory / METADATA_FILE).is_file():
            return DistributedCheckpoint(directory)
    raise CheckpointError(str(path), f"has no {METADATA_FILE}: it is no distributed checkpoint")


class TorchFile:
    def __init__(self, path: Path) -> None:
        self.path = path
        self.files = [path]
        self._tensors = _tensors(path, _load(path))
        self.shapes = {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


class DistributedCheckpoint:
    def __init__(self, directory: Path) -> None:
        self.path = directory
        self._reader = _Reader(directory)
        stored = self._reader.metadata.state_dict_metadata
        # What is not a tensor, such as the state of a quantiser, has no shape and is left out.
        self._stored = {name: entry for name, entry in stored.items() if isinstance(entry, TensorStorageMetadata)}
        self.shapes = {name: tuple(entry.size) for name, entry in self._stored.items()}
        self.files = [*sorted(directory.glob("*.distcp")), directory / METADATA_FILE]

    def read(self, name: str) -> Tensor:
        tensors = {name: torch.empty(self._stored[name].size, dtype=self._stored[name].properties.dtype)}
        try:
            with warnings.catch_warnings():
                # One process is what is wanted here.
                warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
                load_distributed(tensors, storage_reader=self._reader, no_dist=True)
        except (CheckpointException, Exception) as error:  # the first is no Exception
            raise CheckpointError(name, f"cannot be read from {self.path} ({_first_line(error)})") from error
        return tensors[name]


class _Reader(FileSystemReader):
    """Reads the metadata once, and unpickles it with care."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        path = directory / METADATA_FILE
        try:
            with path.open("rb") as file:
                metadata = _MetadataUnpickler(file).load()
        except Exception as error:
            raise CheckpointError(str(path), f"is not the metadata of a checkpoint ({_first_line(error)})") from error
        if not isinstance(metadata, Metadata):
            raise CheckpointError(str(path), "is not the metadata of a checkpoint")
        if metadata.storage_meta is None:
            metadata.storage_meta = StorageMeta()
        self.metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # early Pythons 3.11 write a member of an enum so
            return _enum_member
        if name not in METADATA_GLOBALS.get(module, ()):
            raise pickle.UnpicklingError(f"it calls {module}.{name}")
        return super().find_class(module, name)


def _enum_member(enum: Any, name: Any) -> Enum:
    if not isinstance(enum, EnumType):
        raise pickle.UnpicklingError(f"it takes an attribute of {enum!r}")
    return enum[name]


def read_tensor(path: Path) -> Tensor:
    """The one tensor that a file of `torch.save` holds. Raises CheckpointError."""
    content = _load(path)
    if not isinstance(content, Tensor):
        raise CheckpointError(str(path), f"holds a {type(content).__name__}, must be a tensor")
    return content


def _load(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([io.BytesIO]):  # what a quantiser's state is stored as; it is left out
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read ({error.strerror or error})") from error
    except Exception as error:
        raise CheckpointError(str(path), f"is no file of tensors ({_first_line(error)})") from error


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, Mapping) or not all(isinstance(name, str) for name in content):
        raise CheckpointError(str(path), f"holds a {type(content).__name__}, must be a dictionary of tensors")
    return {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}


def _first_line(error: BaseException) -> str:
    """What happened, in one line."""
    if isinstance(error, CheckpointException) and error.failures:
        cause = next(iter(error.failures.values()))[0]
        return _first_line(cause)
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
