"""Checkpoints on disk: `model.safetensors` and `config.json`, which holds the configuration and the file's sha256.

What is read fits the model exactly, or CheckpointError names the tensor or the file and nothing of it is used.
Tensors are named `net.*` (the denoiser, as published) and `tokenizer.*`. A checkpoint may also have `context`, the
projected text of the constant prompt; without it the text is zero. `convert.py` makes checkpoints of published files.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from deployments.world_model.config import WorldModelConfig
from deployments.world_model.dit import DiT
from deployments.world_model.errors import CheckpointError
from deployments.world_model.tokenizer import build_tokenizer

FORMAT = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"
CONTEXT = "context"


def read_checkpoint(directory: Path) -> tuple[WorldModelConfig, dict[str, Tensor]]:
    """The configuration and every tensor it calls for, checked. Raises CheckpointError."""
    config_path, weights_path = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    config, weights = _read_config(config_path)
    num_bytes, digest = _size_and_digest(weights_path)
    if num_bytes != weights["bytes"]:
        raise CheckpointError(str(weights_path), f"is {num_bytes} bytes, {CONFIG_FILE} says {weights['bytes']}")
    if digest != weights["sha256"]:
        raise CheckpointError(str(weights_path), f"has sha256 {digest}, {CONFIG_FILE} says {weights['sha256']}")
    try:
        tensors = load_file(weights_path)  # mapped, not copied: 14B parameters would not fit in memory twice
    except SafetensorError as error:
        raise CheckpointError(str(weights_path), f"is not a safetensors file ({error})") from error
    check_tensors(tensors, manifest(config) | context_manifest(config, tensors))
    return config, tensors


def write_checkpoint(directory: Path, config: WorldModelConfig, tensors: dict[str, Tensor]) -> None:
    """Write both files, each complete or not at all; the configuration last, since it vouches for the weights."""
    check_tensors(tensors, manifest(config) | context_manifest(config, tensors))
    content = save({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / WEIGHTS_FILE, content)
    write_description(directory, config, len(content), hashlib.sha256(content).hexdigest())


def write_description(directory: Path, config: WorldModelConfig, num_bytes: int, sha256: str) -> None:
    """`config.json`, which vouches for a weights file of this size and hash that is in place already."""
    weights = {"file": WEIGHTS_FILE, "bytes": num_bytes, "sha256": sha256}
    description = {"format": FORMAT, "model": config.to_json(), "weights": weights}
    write_whole(directory / CONFIG_FILE, (json.dumps(description, indent=2) + "\n").encode())


def manifest(config: WorldModelConfig) -> dict[str, tuple[int, ...]]:
    """The name and shape of every tensor of a checkpoint, built without allocating any."""
    with torch.device("meta"):
        modules = {"net.": DiT(config.dit, config.grouped_action_dim), "tokenizer.": build_tokenizer(config)}
    return {
        prefix + name: tuple(tensor.shape)
        for prefix, module in modules.items()
        for name, tensor in module.state_dict().items()
    }


def context_manifest(config: WorldModelConfig, names: Collection[str]) -> dict[str, tuple[int, ...]]:
    """The shape of `context`, for a checkpoint that has it: the model's text tokens, projected."""
    return {CONTEXT: (config.dit.text_tokens, config.dit.context_dim)} if CONTEXT in names else {}


def check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError naming the first tensor that is missing, extra, mis-shaped, not floating or not finite."""
    check_shapes({name: tuple(tensor.shape) for name, tensor in tensors.items()}, expected)
    for name, tensor in tensors.items():
        check_values(name, tensor)


def check_shapes(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError naming the first tensor that is missing, extra or mis-shaped."""
    if missing := sorted(expected.keys() - shapes.keys()):
        raise CheckpointError(missing[0], f"is missing from the checkpoint ({len(missing)} missing in all)")
    if extra := sorted(shapes.keys() - expected.keys()):
        raise CheckpointError(extra[0], f"is no tensor of this model ({len(extra)} extra in all)")
    for name, shape in expected.items():
        if shapes[name] != shape:
            raise CheckpointError(name, f"has shape {shapes[name]}, the model needs {shape}")


def check_values(name: str, tensor: Tensor) -> None:
    """Raises CheckpointError unless the tensor is floating and finite."""
    if not tensor.is_floating_point():
        raise CheckpointError(name, f"has dtype {tensor.dtype}, must be a floating type")
    if not torch.isfinite(tensor).all():
        raise CheckpointError(name, "holds NaN or infinity")


def write_whole(path: Path, content: bytes) -> None:
    """Replace `path` in one step: a reader sees the old file or the new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)


def _read_config(path: Path) -> tuple[WorldModelConfig, dict[str, Any]]:
    try:
        description = json.loads(_read_bytes(path))
    except ValueError as error:
        raise CheckpointError(str(path), f"is not JSON ({error})") from error
    if not isinstance(description, dict) or description.get("format") != FORMAT:
        raise CheckpointError(str(path), f"is not a checkpoint description of format {FORMAT}")
    weights = description.get("weights")
    if not isinstance(weights, dict) or not {"bytes", "sha256"} <= weights.keys():
        raise CheckpointError(str(path), "does not give the weights' bytes and sha256")
    try:
        return WorldModelConfig.from_json(description["model"]), weights
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(str(path), f"does not describe a model ({error})") from error


def _size_and_digest(path: Path) -> tuple[int, str]:
    try:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return file.tell(), digest
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read ({error.strerror})") from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read ({error.strerror})") from error
