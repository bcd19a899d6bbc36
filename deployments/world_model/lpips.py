"""LPIPS (Zhang et al. 2018, version 0.1 on AlexNet), with weights that an operator brings.

The metric is a network that others trained, and does not ship. An operator names a safetensors file and its sha256; it
holds the published tensors under their published names: `features.{0,3,6,8,10}.{weight,bias}` of AlexNet and
`lin{0..4}.model.1.weight` of LPIPS. Without a file there is no LPIPS, and no other number in its place.

Shapes: F images, H and W pixels, C features.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load
from torch import Tensor
from torch.nn import functional

from deployments.world_model.errors import CheckpointError
from deployments.world_model.metrics import Image, unit_range

# Of the colours of the images that AlexNet was trained on, for values in [-1, 1].
COLOR_MEAN, COLOR_STD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


@dataclass(frozen=True)
class Convolution:
    index: int  # in the published `features`
    shape: tuple[int, int, int, int]
    stride: int
    padding: int
    pooled: bool  # whether a 3x3 maximum of stride 2 comes before it


CONVOLUTIONS = (
    Convolution(0, (64, 3, 11, 11), stride=4, padding=2, pooled=False),
    Convolution(3, (192, 64, 5, 5), stride=1, padding=2, pooled=True),
    Convolution(6, (384, 192, 3, 3), stride=1, padding=1, pooled=True),
    Convolution(8, (256, 384, 3, 3), stride=1, padding=1, pooled=False),
    Convolution(10, (256, 256, 3, 3), stride=1, padding=1, pooled=False),
)


class Lpips:
    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises CheckpointError, naming the first tensor that is missing or of another shape."""
        for name, shape in expected_shapes().items():
            if name not in tensors:
                raise CheckpointError(name, "is missing")
            if tuple(tensors[name].shape) != shape:
                raise CheckpointError(name, f"has shape {tuple(tensors[name].shape)}, must be {shape}")
        self._tensors = {name: tensors[name].float() for name in expected_shapes()}

    @classmethod
    def read(cls, path: Path | None, sha256: str = "") -> Lpips | None:
        """None without a path. Raises CheckpointError: no such file, another hash, or tensors that do not fit."""
        if path is None:
            return None
        try:
            content = path.read_bytes()
        except OSError as error:
            raise CheckpointError(str(path), error.strerror or "cannot be read") from error
        if (found := hashlib.sha256(content).hexdigest()) != sha256:
            raise CheckpointError(str(path), f"has sha256 {found}, not {sha256 or 'the one that must be given'}")
        return cls(load(content))

    @torch.inference_mode()
    def __call__(self, frames: Image, reference: Image) -> float:
        """Mean distance over the images of (..., H, W, 3), uint8 or floats in [0, 1]; 0 for equal ones."""
        a, b = (x.flatten(0, -4).movedim(-1, -3).float() for x in unit_range(frames, reference))
        distance_F = torch.zeros(len(a))
        for layer, (features_a, features_b) in enumerate(zip(self._features(a), self._features(b), strict=True)):
            difference_FCHW = (_unit_length(features_a) - _unit_length(features_b)) ** 2
            weight = self._tensors[f"lin{layer}.model.1.weight"]
            distance_F += functional.conv2d(difference_FCHW, weight).mean((1, 2, 3))
        return float(distance_F.mean())

    def _features(self, images_F3HW: Tensor) -> list[Tensor]:
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (COLOR_MEAN, COLOR_STD))
        x, found = (images_F3HW * 2 - 1 - mean) / std, []
        for layer in CONVOLUTIONS:
            if layer.pooled:
                x = functional.max_pool2d(x, 3, stride=2)
            weight, bias = (self._tensors[f"features.{layer.index}.{part}"] for part in ("weight", "bias"))
            x = functional.relu(functional.conv2d(x, weight, bias, layer.stride, layer.padding))
            found.append(x)
        return found


def expected_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer, convolution in enumerate(CONVOLUTIONS):
        shapes[f"features.{convolution.index}.weight"] = convolution.shape
        shapes[f"features.{convolution.index}.bias"] = convolution.shape[:1]
        shapes[f"lin{layer}.model.1.weight"] = (1, convolution.shape[0], 1, 1)
    return shapes


def _unit_length(features_FCHW: Tensor) -> Tensor:
    unit: Tensor = features_FCHW / (features_FCHW.norm(dim=1, keepdim=True) + 1e-10)
    return unit
