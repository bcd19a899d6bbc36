"""From the files that models are published in to a checkpoint of ours.

Of a training checkpoint the averaged weights are kept. The autoencoder and the empty prompt's embedding are published
as files of their own and become part of the checkpoint, so that what is served is one file with one hash. Everything
is checked by name and shape before any weights are read.

The weights are written tensor by tensor, so memory holds one, and a conversion that was stopped goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor
from torch.nn import functional
from tqdm import tqdm

from deployments.world_model.checkpoint import (
    CONTEXT,
    WEIGHTS_FILE,
    check_shapes,
    check_values,
    manifest,
    write_description,
    write_whole,
)
from deployments.world_model.checkpoint.published import Published, open_published, read_tensor
from deployments.world_model.config import WorldModelConfig
from deployments.world_model.errors import CheckpointError

AVERAGED, LATEST = "net_ema.", "net."  # prefixes in a training checkpoint
IGNORED = re.compile(r"\.pos_embedder\.(seq|dim_spatial_range|dim_temporal_range)$|\.accum_[^.]*$|\._extra_state$")

DTYPES = {"bfloat16": (torch.bfloat16, "BF16"), "float32": (torch.float32, "F32")}
PARTIAL_FILE, JOB_FILE = WEIGHTS_FILE + ".partial", WEIGHTS_FILE + ".job.json"
BLOCK_BYTES = 2**20

Shapes = dict[str, tuple[int, ...]]


def convert(
    config: WorldModelConfig,
    source: Path,
    destination: Path,
    *,
    tokenizer: Path | None = None,
    text: Path | None = None,
    progress: bool = True,
) -> None:
    """Write `destination`, a directory that `read_checkpoint` accepts.

    `source` is a distributed checkpoint or a `.pt` file; `tokenizer` the autoencoder's file, needed unless the source
    holds `tokenizer.*` too; `text` the embedding of the empty prompt, or None for zeros, which the published models saw
    a fifth of the time in training.

    Raises:
        CheckpointError: a file cannot be read or is foreign, or a tensor is missing, extra, mis-shaped or not finite.
    """
    parts = _gather(open_published(source), None if tokenizer is None else open_published(tokenizer))
    expected = manifest(config)
    _check(parts, expected, tokenizer)
    embedding_LE = None if text is None else _read_embedding(text, config)
    shapes = {CONTEXT: (config.dit.text_tokens, config.dit.context_dim)} | expected

    def read(name: str) -> Tensor:
        if name == CONTEXT:
            weight, bias = (parts.read(f"net.crossattn_proj.0.{kind}") for kind in ("weight", "bias"))
            return project(weight, bias, embedding_LE, config.dit.text_tokens)
        return parts.read(name)

    files = [*parts.files, *([text] if text else [])]
    num_bytes, sha256 = _write_weights(destination, config, shapes, read, files, progress)
    write_description(destination, config, num_bytes, sha256)
    (destination / JOB_FILE).unlink(missing_ok=True)


def project(weight: Tensor, bias: Tensor, embedding_LE: Tensor | None, tokens: int) -> Tensor:
    """What the denoiser attends to, as its own `crossattn_proj` computes it, in float32; None for a text of zeros."""
    if embedding_LE is None:
        return functional.gelu(bias.float()).expand(tokens, -1)
    return functional.gelu(functional.linear(embedding_LE.float(), weight.float(), bias.float()))


@dataclass(frozen=True)
class _Parts:
    """The tensors to convert, by our names: where each is, and under which name."""

    at: Mapping[str, tuple[Published, str]]

    @property
    def shapes(self) -> Shapes:
        return {name: tuple(published.shapes[theirs]) for name, (published, theirs) in self.at.items()}

    @property
    def files(self) -> list[Path]:
        return sorted({file for published, _ in self.at.values() for file in published.files})

    def read(self, name: str) -> Tensor:
        published, theirs = self.at[name]
        tensor = published.read(theirs)
        check_values(name, tensor)
        return tensor


def _gather(source: Published, tokenizer: Published | None) -> _Parts:
    names = [name for name in source.shapes if not IGNORED.search(name)]
    averaged = any(name.startswith(AVERAGED) for name in names)
    if not averaged and source.path.is_dir():
        raise CheckpointError(str(source.path), f"has no {AVERAGED}* tensors, which are the ones to serve")
    at: dict[str, tuple[Published, str]] = {}
    for name in names:
        if name.startswith(AVERAGED):
            at[LATEST + name.removeprefix(AVERAGED)] = (source, name)
        elif not (averaged and name.startswith(LATEST)):
            at[name] = (source, name)
    if tokenizer is not None:
        at |= {f"tokenizer.{name}": (tokenizer, name) for name in tokenizer.shapes}
    return _Parts(at)


def _check(parts: _Parts, expected: Shapes, tokenizer: Path | None) -> None:
    shapes = parts.shapes
    if tokenizer is None and not any(name.startswith("tokenizer.") for name in shapes):
        raise CheckpointError("tokenizer", "is not part of the source: name its own file, Wan2.1_VAE.pth")
    check_shapes(shapes, expected)


def _read_embedding(path: Path, config: WorldModelConfig) -> Tensor:
    embedding = read_tensor(path)
    shape = (config.dit.text_tokens, config.dit.text_dim)
    if tuple(embedding.shape) not in (shape, (1, *shape)):
        raise CheckpointError(str(path), f"has shape {tuple(embedding.shape)}, the model needs {shape}")
    check_values(str(path), embedding)
    return embedding.view(shape)


def _write_weights(
    destination: Path,
    config: WorldModelConfig,
    shapes: Shapes,
    read: Callable[[str], Tensor],
    files: list[Path],
    progress: bool,
) -> tuple[int, str]:
    """The safetensors file, in place and complete; its size and hash."""
    dtype, code = DTYPES[config.dtype]
    header = _header(shapes, code, dtype.itemsize)
    job = {
        "sources": [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files],
        "header_sha256": hashlib.sha256(header).hexdigest(),
    }
    destination.mkdir(parents=True, exist_ok=True)
    partial = destination / PARTIAL_FILE
    done = _resumable(partial, destination / JOB_FILE, job, header, shapes, dtype.itemsize)
    write_whole(destination / JOB_FILE, (json.dumps(job, indent=2) + "\n").encode())

    with partial.open("r+b" if done else "wb") as file:
        digest = hashlib.sha256()
        if done:
            kept = len(header) + sum(_num_bytes(shapes[name], dtype.itemsize) for name in done)
            for block in _blocks(file, kept):
                digest.update(block)
            file.seek(kept)
            file.truncate()
        else:
            file.write(header)
            digest.update(header)
        total = len(header) + sum(_num_bytes(shape, dtype.itemsize) for shape in shapes.values())
        with tqdm(total=total, initial=file.tell(), unit="B", unit_scale=True, disable=not progress) as bar:
            bar.set_description(destination.name)
            for name in sorted(shapes)[len(done) :]:
                content = _content(read(name), dtype)
                file.write(content)
                digest.update(content)
                file.flush()
                os.fsync(file.fileno())
                bar.update(len(content))
    partial.replace(destination / WEIGHTS_FILE)
    return total, digest.hexdigest()


def _resumable(
    partial: Path, job_path: Path, job: Mapping[str, object], header: bytes, shapes: Shapes, itemsize: int
) -> list[str]:
    """The names of the tensors that an earlier run of the same job has written for certain, in order."""
    try:
        same = json.loads(job_path.read_bytes()) == job
        with partial.open("rb") as file:
            same = same and file.read(len(header)) == header
    except (OSError, ValueError):
        return []
    if not same:
        return []
    left, done = partial.stat().st_size - len(header), []
    for name in sorted(shapes):
        left -= _num_bytes(shapes[name], itemsize)
        if left < 0:
            break
        done.append(name)
    return done[:-1]  # each is synced before the next is begun: only the last may not have reached the disk whole


def _header(shapes: Shapes, code: str, itemsize: int) -> bytes:
    """Of a safetensors file: the length of what follows, then where each tensor is, padded to eight bytes."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name in sorted(shapes):
        end = at + _num_bytes(shapes[name], itemsize)
        entries[name] = {"dtype": code, "shape": list(shapes[name]), "data_offsets": [at, end]}
        at = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _num_bytes(shape: tuple[int, ...], itemsize: int) -> int:
    size = itemsize
    for length in shape:
        size *= length
    return size


def _content(tensor: Tensor, dtype: torch.dtype) -> bytes:
    return tensor.to(dtype).contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _blocks(file: BinaryIO, num_bytes: int) -> Iterator[bytes]:
    while num_bytes and (block := file.read(min(BLOCK_BYTES, num_bytes))):
        num_bytes -= len(block)
        yield block
