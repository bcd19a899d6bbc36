import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save
from torch import nn

from deployments.world_model import CheckpointError
from deployments.world_model.lpips import Lpips, expected_shapes


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    """Random, with the spread of trained weights; LPIPS's own are never negative."""
    generator = torch.Generator().manual_seed(0)
    drawn = {}
    for name, shape in expected_shapes().items():
        values = torch.randn(shape, generator=generator) / max(1, int(np.prod(shape[1:]))) ** 0.5
        drawn[name] = values.abs() if name.startswith("lin") else values
    return drawn


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (2, 64, 64, 3), dtype=np.uint8)


def test_without_weights_there_is_no_lpips() -> None:
    assert Lpips.read(None) is None


def test_equal_images_are_at_distance_0_and_others_further_the_more_they_differ(
    tensors: dict[str, torch.Tensor],
) -> None:
    lpips = Lpips(tensors)
    a, noise = image(0).astype(np.float64) / 255, np.random.default_rng(1).normal(size=(2, 64, 64, 3))
    near, far = (np.clip(a + size * noise, 0, 1) for size in (0.02, 0.2))
    assert lpips(a, a) == 0
    assert 0 < lpips(a, near) < lpips(a, far)
    assert lpips(a, far) == pytest.approx(lpips(far, a))


def test_it_is_the_published_formula_on_the_published_network(tensors: dict[str, torch.Tensor]) -> None:
    """Built a second time, from torch's layers in the published order."""
    shapes = {index: tensors[f"features.{index}.weight"].shape for index in (0, 3, 6, 8, 10)}
    layers = nn.Sequential(
        nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(), nn.MaxPool2d(3, 2),
        nn.Conv2d(192, 384, 3, padding=1), nn.ReLU(),
        nn.Conv2d(384, 256, 3, padding=1), nn.ReLU(),
        nn.Conv2d(256, 256, 3, padding=1), nn.ReLU(),
    )  # fmt: skip
    layers.load_state_dict({n.removeprefix("features."): t for n, t in tensors.items() if n.startswith("features.")})
    assert all(layers[index].weight.shape == shape for index, shape in shapes.items())
    a, b = image(0), image(1)
    expected = 0.0
    x, y = (
        (torch.from_numpy(each).permute(0, 3, 1, 2) / 127.5 - 1 - torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1))
        / torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1)
        for each in (a, b)
    )
    tap = 0
    with torch.inference_mode():
        for layer in layers:
            x, y = layer(x), layer(y)
            if isinstance(layer, nn.ReLU):
                difference = nn.functional.normalize(x, dim=1) - nn.functional.normalize(y, dim=1)
                expected += float((tensors[f"lin{tap}.model.1.weight"] * difference**2).sum(1).mean())
                tap += 1
    assert Lpips(tensors)(a, b) == pytest.approx(expected, rel=1e-4)


def test_weights_are_read_from_a_file_of_the_given_hash_only(tensors: dict[str, torch.Tensor], tmp_path: Path) -> None:
    path, content = tmp_path / "lpips.safetensors", save(tensors)
    path.write_bytes(content)
    read = Lpips.read(path, hashlib.sha256(content).hexdigest())
    assert read is not None
    assert read(image(0), image(1)) == Lpips(tensors)(image(0), image(1))
    for other in ("", "0" * 64):
        with pytest.raises(CheckpointError, match="sha256"):
            Lpips.read(path, other)
    with pytest.raises(CheckpointError, match=r"gone\.safetensors"):
        Lpips.read(tmp_path / "gone.safetensors", "0" * 64)


def test_a_tensor_that_is_missing_or_does_not_fit_is_named(tensors: dict[str, torch.Tensor]) -> None:
    with pytest.raises(CheckpointError, match=r"lin3\.model\.1\.weight: is missing"):
        Lpips({name: tensor for name, tensor in tensors.items() if name != "lin3.model.1.weight"})
    with pytest.raises(CheckpointError, match=r"features\.0\.bias: has shape \(1,\), must be \(64,\)"):
        Lpips(tensors | {"features.0.bias": torch.zeros(1)})
