"""Checkpoints on disk: `model.safetensors` and `config.json`, which holds the configuration and the file's sha256.

What is read fits the model exactly, or CheckpointError names the tensor or the file and nothing of it is used.
Tensors are named `net.*` (the denoiser, as published) and `tokenizer.*`.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from deployments.world_model.config import WorldModelConfig
from deployments.world_model.dit import DiT
from deployments.world_model.errors import CheckpointError
from deployments.world_model.tokenizer import build_tokenizer

FORMAT = 1
WEIGHTS_FILE = "model.safetensors"
CONFIG_FILE = "config.json"


def read_checkpoint(directory: Path) -> tuple[WorldModelConfig, dict[str, Tensor]]:
    """The configuration and every tensor it calls for, checked. Raises CheckpointError."""
    config_path, weights_path = directory / CONFIG_FILE, directory / WEIGHTS_FILE
    config, weights = _read_config(config_path)
    content = _read_bytes(weights_path)
    if len(content) != weights["bytes"]:
        raise CheckpointError(str(weights_path), f"is {len(content)} bytes, {CONFIG_FILE} says {weights['bytes']}")
    if (digest := hashlib.sha256(content).hexdigest()) != weights["sha256"]:
        raise CheckpointError(str(weights_path), f"has sha256 {digest}, {CONFIG_FILE} says {weights['sha256']}")
    try:
        tensors = load(content)
    except SafetensorError as error:
        raise CheckpointError(str(weights_path), f"is not a safetensors file ({error})") from error
    check_tensors(tensors, manifest(config))
    return config, tensors


def write_checkpoint(directory: Path, config: WorldModelConfig, tensors: dict[str, Tensor]) -> None:
    """Write both files, each complete or not at all; the configuration last, since it vouches for the weights."""
    check_tensors(tensors, manifest(config))
    content = save({name: tensors[name].detach().cpu().contiguous() for name in sorted(tensors)})
    weights = {"file": WEIGHTS_FILE, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    description = {"format": FORMAT, "model": config.to_json(), "weights": weights}
    directory.mkdir(parents=True, exist_ok=True)
    write_whole(directory / WEIGHTS_FILE, content)
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


def check_tensors(tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError naming the first tensor that is missing, extra, mis-shaped, not floating or not finite."""
    if missing := sorted(expected.keys() - tensors.keys()):
        raise CheckpointError(missing[0], f"is missing from the checkpoint ({len(missing)} missing in all)")
    if extra := sorted(tensors.keys() - expected.keys()):
        raise CheckpointError(extra[0], f"is no tensor of this model ({len(extra)} extra in all)")
    for name, shape in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape:
            raise CheckpointError(name, f"has shape {tuple(tensor.shape)}, the model needs {shape}")
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


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(str(path), f"cannot be read ({error.strerror})") from error
