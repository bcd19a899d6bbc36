import hashlib
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from deployments.world_model import CheckpointError, WorldModel, WorldModelConfig
from deployments.world_model.checkpoint import read_checkpoint, write_checkpoint

WEIGHT = "net.blocks.1.mlp.layer2.weight"


@pytest.fixture
def checkpoint(small_checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_checkpoint, tmp_path / "checkpoint"))


def rewrite(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors and make the description vouch for the result, so that only the tensors are wrong."""
    path = checkpoint / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    description = json.loads((checkpoint / "config.json").read_text())
    content = path.read_bytes()
    description["weights"] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "config.json").write_text(json.dumps(description))


def refusal(checkpoint: Path) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        WorldModel.load(checkpoint)
    return caught.value


def test_what_was_written_is_read_back(small_checkpoint: Path, small_config: WorldModelConfig) -> None:
    config, tensors = read_checkpoint(small_checkpoint)
    assert config == small_config
    assert WEIGHT in tensors


def test_a_missing_tensor_is_named(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.pop(WEIGHT))
    assert str(refusal(checkpoint)).startswith(f"{WEIGHT}: is missing")


def test_an_extra_tensor_is_named(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update({"net.blocks.2.bias": torch.zeros(1)}))
    assert str(refusal(checkpoint)).startswith("net.blocks.2.bias: is no tensor of this model")


def test_a_mis_shaped_tensor_is_named_with_both_shapes(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].T.contiguous()}))
    assert str(refusal(checkpoint)) == f"{WEIGHT}: has shape (128, 32), the model needs (32, 128)"


def test_a_tensor_of_integers_is_named(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update({WEIGHT: tensors[WEIGHT].to(torch.int32)}))
    assert refusal(checkpoint).subject == WEIGHT


def test_a_tensor_that_holds_nan_is_named(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors[WEIGHT].view(-1)[0].fill_(float("nan")))
    assert str(refusal(checkpoint)) == f"{WEIGHT}: holds NaN or infinity"


def test_a_wrong_hash_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    error = refusal(checkpoint)
    assert error.subject == str(path)
    assert "sha256" in error.reason


def test_a_truncated_file_is_refused(checkpoint: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    assert "bytes, config.json says" in refusal(checkpoint).reason


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 a zip file", b"\xff" * 64], ids=["empty", "zip", "noise"])
def test_a_foreign_file_is_refused_though_its_hash_is_right(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "model.safetensors").write_bytes(content)
    description = json.loads((checkpoint / "config.json").read_text())
    description["weights"] |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "config.json").write_text(json.dumps(description))
    assert "is not a safetensors file" in refusal(checkpoint).reason


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_an_absent_file_is_named(checkpoint: Path, name: str) -> None:
    (checkpoint / name).unlink()
    error = refusal(checkpoint)
    assert error.subject == str(checkpoint / name)
    assert "cannot be read" in error.reason


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": 2}',
        '{"format": 1, "weights": {}}',
        '{"format": 1, "weights": {"bytes": 1, "sha256": ""}}',
    ],
)
def test_a_description_that_is_none_is_refused(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_text(text)
    assert refusal(checkpoint).subject == str(checkpoint / "config.json")


def test_a_description_of_another_architecture_is_refused_by_field(checkpoint: Path) -> None:
    path = checkpoint / "config.json"
    description = json.loads(path.read_text())
    description["model"]["dit"]["window"] = 4
    path.write_text(json.dumps(description))
    assert "DiTConfig has no field 'window'" in refusal(checkpoint).reason


def test_incomplete_tensors_are_never_written(small_config: WorldModelConfig, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        write_checkpoint(tmp_path / "new", small_config, {})
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(CheckpointError("net.x", "is missing")))
    assert (error.subject, error.reason, str(error)) == ("net.x", "is missing", "net.x: is missing")
