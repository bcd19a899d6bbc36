"""Published files, built here at reduced width, become a checkpoint that serves; or one line says why not."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, save
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.nn import functional

from deployments.world_model import PRESETS, CheckpointError, ChunkInput, WorldModel, WorldModelConfig
from deployments.world_model.checkpoint import convert as converting
from deployments.world_model.checkpoint import manifest, read_checkpoint, write_checkpoint
from deployments.world_model.checkpoint.__main__ import main
from deployments.world_model.checkpoint.convert import convert
from deployments.world_model.checkpoint.published import open_published
from deployments.world_model.dit import DiT
from deployments.world_model.vae import WanTokenizer
from tests.support.weights import randomise

Tensors = dict[str, Tensor]

WEIGHT = "net.blocks.1.mlp.layer2.weight"
TOKENS, TEXT_DIM = 3, 20


@pytest.fixture(scope="session")
def config() -> WorldModelConfig:
    full = PRESETS["dreamdojo-2b"]
    return replace(
        full,
        name="reduced",
        resolution=(16, 32),
        dit=replace(
            full.dit,
            width=32,
            num_blocks=2,
            num_heads=2,
            adaln_rank=8,
            context_dim=12,
            text_dim=TEXT_DIM,
            text_tokens=TOKENS,
        ),
        tokenizer=replace(full.tokenizer, width=8),
    )


@pytest.fixture(scope="session")
def denoiser(config: WorldModelConfig) -> Tensors:
    """The averaged weights, named as in training."""
    dit = DiT(config.dit, config.grouped_action_dim)
    randomise(dit)
    return {f"net_ema.{name}": tensor for name, tensor in dit.state_dict().items()}


@pytest.fixture(scope="session")
def tokenizer_file(config: WorldModelConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = WanTokenizer(config.tokenizer)
    randomise(tokenizer)
    path = tmp_path_factory.mktemp("vae") / "Wan2.1_VAE.pth"
    torch.save(tokenizer.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def published(denoiser: Tensors) -> dict[str, Any]:
    """What a training checkpoint holds: the last weights, the averaged ones, and what serving has no use for."""
    last = {name.replace("net_ema.", "net."): torch.zeros_like(tensor).bfloat16() for name, tensor in denoiser.items()}
    rest = {
        "net.pos_embedder.seq": torch.arange(128),
        "net_ema.pos_embedder.dim_spatial_range": torch.rand(21),
        "net_ema.pos_embedder.dim_temporal_range": torch.rand(22),
        "net.accum_video_sample_counter": torch.tensor(3),
        "net_ema.blocks.0.self_attn.q_norm._extra_state": io.BytesIO(b"state"),
    }
    return denoiser | last | rest


def write_distributed(directory: Path, content: dict[str, Any]) -> Path:
    """A distributed checkpoint in several files, as many ranks leave behind."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        save(content, storage_writer=FileSystemWriter(directory, single_file_per_rank=False), no_dist=True)
    return directory


@pytest.fixture(scope="session")
def distributed(published: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_distributed(tmp_path_factory.mktemp("dcp") / "model", published)


@pytest.fixture(scope="session")
def converted(
    config: WorldModelConfig, distributed: Path, tokenizer_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The distributed checkpoint, converted with a text of zeros."""
    directory = tmp_path_factory.mktemp("converted")
    convert(config, distributed, directory, tokenizer=tokenizer_file, progress=False)
    return directory


@pytest.fixture
def to_file(tmp_path: Path) -> Callable[[Any], Path]:
    def write(content: Any) -> Path:
        torch.save(content, tmp_path / "model.pt")
        return tmp_path / "model.pt"

    return write


@pytest.fixture
def refusal(config: WorldModelConfig, tokenizer_file: Path, tmp_path: Path) -> Callable[..., CheckpointError]:
    """Convert what is to be refused; nothing that could be served is left behind, and the error is one line."""

    def refuse(source: Path, **options: Any) -> CheckpointError:
        with pytest.raises(CheckpointError) as caught:
            convert(config, source, tmp_path / "out", **{"tokenizer": tokenizer_file, "progress": False} | options)
        assert not (tmp_path / "out" / "config.json").exists()
        assert not (tmp_path / "out" / "model.safetensors").exists()
        assert len(str(caught.value).splitlines()) == 1
        return caught.value

    return refuse


def assert_served(directory: Path, denoiser: Tensors) -> WorldModel:
    """The checkpoint holds the averaged weights in bfloat16, and generates."""
    _, tensors = read_checkpoint(directory)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    for name, tensor in denoiser.items():
        assert torch.equal(tensors[name.replace("net_ema.", "net.")], tensor.bfloat16()), name
    model = WorldModel.load(directory)
    frame = np.zeros((16, 32, 3), np.uint8)
    chunk = ChunkInput(frame, np.zeros((12, 384), np.float32), seed=0, candidate=0, chunk=0, num_steps=2, guidance=0.0)
    assert model.generate([chunk])[0].shape == (12, 16, 32, 3)
    return model


def assert_same_bytes(one: Path, other: Path) -> None:
    for name in ("model.safetensors", "config.json"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


def test_a_distributed_checkpoint_converts_to_its_averaged_weights_and_serves(
    distributed: Path, converted: Path, denoiser: Tensors
) -> None:
    assert len(list(distributed.glob("*.distcp"))) > 1
    assert_served(converted, denoiser)
    assert sorted(path.name for path in converted.iterdir()) == ["config.json", "model.safetensors"]


def test_a_tensor_that_ranks_wrote_in_shards_is_put_together(
    config: WorldModelConfig, published: dict[str, Any], denoiser: Tensors, tokenizer_file: Path, tmp_path: Path
) -> None:
    sharded = WEIGHT.replace("net.", "net_ema.")
    top, bottom = published[sharded].split([10, 22])
    content = {name: value for name, value in published.items() if name != sharded} | {"top": top, "bottom": bottom}
    path = write_distributed(tmp_path / "model", content) / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    stored = metadata.state_dict_metadata
    whole = stored.pop("top")
    stored.pop("bottom")
    whole.size = torch.Size(published[sharded].shape)
    whole.chunks = []
    for name, first, length in (("top", 0, 10), ("bottom", 10, 22)):
        offset = torch.Size([first, 0])
        info = metadata.storage_data.pop(MetadataIndex(name, torch.Size([0, 0])))
        metadata.storage_data[MetadataIndex(sharded, offset)] = info
        whole.chunks.append(ChunkStorageMetadata(offset, torch.Size([length, whole.size[1]])))
    stored[sharded] = whole
    path.write_bytes(pickle.dumps(metadata))
    convert(config, tmp_path / "model", tmp_path / "out", tokenizer=tokenizer_file, progress=False)
    assert_served(tmp_path / "out", denoiser)


class ByName(pickle.Pickler):
    """Writes members of enums as Python 3.11.2 does: `getattr(the enum, a name)`."""

    def reducer_override(self, value: Any) -> Any:
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


def test_metadata_that_an_early_python_3_11_wrote_is_read(distributed: Path, tmp_path: Path) -> None:
    shutil.copytree(distributed, tmp_path / "model")
    path = tmp_path / "model" / ".metadata"
    with path.open("rb") as file:
        metadata = pickle.load(file)
    with path.open("wb") as file:
        ByName(file).dump(metadata)
    assert b"getattr" in path.read_bytes()
    assert open_published(tmp_path / "model").shapes == open_published(distributed).shapes


@pytest.mark.parametrize("layout", ["iteration", "run"])
def test_a_directory_that_leads_to_a_checkpoint_is_followed(
    config: WorldModelConfig, distributed: Path, tokenizer_file: Path, tmp_path: Path, layout: str
) -> None:
    run = tmp_path / "2B_GR1_post-train"
    (run / "iter_000050000").mkdir(parents=True)
    (run / "iter_000050000" / "model").symlink_to(distributed)
    (run / "latest_checkpoint.txt").write_text("iter_000050000\n")
    source = run if layout == "run" else run / "iter_000050000"
    convert(config, source, tmp_path / "out", tokenizer=tokenizer_file, progress=False)
    WorldModel.load(tmp_path / "out")


@pytest.mark.parametrize("averaged", [True, False], ids=["with-averaged", "only-averaged-renamed"])
def test_a_pt_file_converts_to_the_same_bytes_as_the_distributed_checkpoint(
    config: WorldModelConfig,
    published: dict[str, Any],
    denoiser: Tensors,
    converted: Path,
    tokenizer_file: Path,
    to_file: Callable[[Any], Path],
    tmp_path: Path,
    averaged: bool,
) -> None:
    renamed = {name.replace("net_ema.", "net."): tensor for name, tensor in denoiser.items()}
    source = to_file(published if averaged else renamed)
    convert(config, source, tmp_path / "out", tokenizer=tokenizer_file, progress=False)
    assert_same_bytes(tmp_path / "out", converted)


# --- the constant prompt


def test_without_an_embedding_the_text_is_zeros_and_costs_one_key(converted: Path, denoiser: Tensors) -> None:
    _, tensors = read_checkpoint(converted)
    expected = functional.gelu(denoiser["net_ema.crossattn_proj.0.bias"]).expand(TOKENS, -1)
    torch.testing.assert_close(tensors["context"].float(), expected, atol=0.01, rtol=0.01)
    assert WorldModel.load(converted).context[0][0].shape[1] == 1


@pytest.mark.parametrize("shape", [(TOKENS, TEXT_DIM), (1, TOKENS, TEXT_DIM)], ids=str)
def test_the_embedding_is_folded_into_what_the_denoiser_attends_to(
    config: WorldModelConfig, distributed: Path, tokenizer_file: Path, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    embedding = torch.randn(shape, generator=torch.Generator().manual_seed(9))
    torch.save(embedding, tmp_path / "text.pt")
    convert(config, distributed, tmp_path / "out", tokenizer=tokenizer_file, text=tmp_path / "text.pt", progress=False)
    model = WorldModel.load(tmp_path / "out")
    with torch.inference_mode():
        expected = model.dit.context(embedding.view(TOKENS, TEXT_DIM))
    for (k, v), (expected_k, expected_v) in zip(model.context, expected, strict=True):
        torch.testing.assert_close(k, expected_k, atol=0.05, rtol=0.05)
        torch.testing.assert_close(v, expected_v, atol=0.05, rtol=0.05)


def test_a_context_of_another_shape_is_refused(config: WorldModelConfig, converted: Path, tmp_path: Path) -> None:
    _, tensors = read_checkpoint(converted)
    with pytest.raises(CheckpointError, match="context: has shape"):
        write_checkpoint(tmp_path / "again", config, tensors | {"context": torch.zeros(2, 12)})


# --- refusals


def test_a_missing_tensor_is_named(
    refusal: Callable[..., CheckpointError], published: dict[str, Any], to_file: Callable[[Any], Path]
) -> None:
    name = WEIGHT.replace("net.", "net_ema.")
    error = refusal(to_file({key: value for key, value in published.items() if key != name}))
    assert (error.subject, "is missing" in error.reason) == (WEIGHT, True)


@pytest.mark.parametrize("name", ["net_ema.blocks.2.mlp.layer1.weight", "optimizer.step"])
def test_an_extra_tensor_is_named(
    refusal: Callable[..., CheckpointError], published: dict[str, Any], to_file: Callable[[Any], Path], name: str
) -> None:
    error = refusal(to_file(published | {name: torch.zeros(2)}))
    assert (error.subject, "is no tensor of this model" in error.reason) == (name.replace("_ema", ""), True)


def test_a_mis_shaped_tensor_is_named(
    refusal: Callable[..., CheckpointError], published: dict[str, Any], tmp_path: Path
) -> None:
    name = WEIGHT.replace("net.", "net_ema.")
    error = refusal(write_distributed(tmp_path / "model", published | {name: published[name].T.contiguous()}))
    assert str(error) == f"{WEIGHT}: has shape (128, 32), the model needs (32, 128)"


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_tensor_that_is_not_finite_is_named(
    refusal: Callable[..., CheckpointError], published: dict[str, Any], to_file: Callable[[Any], Path], value: float
) -> None:
    name = WEIGHT.replace("net.", "net_ema.")
    broken = published[name].clone()
    broken[3, 5] = value
    assert str(refusal(to_file(published | {name: broken}))) == f"{WEIGHT}: holds NaN or infinity"


def test_a_training_checkpoint_without_averaged_weights_is_refused(
    refusal: Callable[..., CheckpointError], published: dict[str, Any], tmp_path: Path
) -> None:
    last = {name: value for name, value in published.items() if not name.startswith("net_ema.")}
    assert "has no net_ema.* tensors" in refusal(write_distributed(tmp_path / "model", last)).reason


def test_a_source_without_an_autoencoder_asks_for_its_file(
    refusal: Callable[..., CheckpointError], distributed: Path
) -> None:
    assert "Wan2.1_VAE.pth" in str(refusal(distributed, tokenizer=None))


def test_an_autoencoder_of_another_width_is_refused(
    refusal: Callable[..., CheckpointError], config: WorldModelConfig, distributed: Path, tmp_path: Path
) -> None:
    torch.save(WanTokenizer(replace(config.tokenizer, width=16)).state_dict(), tmp_path / "vae.pth")
    error = refusal(distributed, tokenizer=tmp_path / "vae.pth")
    assert error.subject.startswith("tokenizer.")
    assert "has shape" in error.reason


@pytest.mark.parametrize("shape", [(TOKENS + 1, TEXT_DIM), (TOKENS, TEXT_DIM - 1), (2, TOKENS, TEXT_DIM)], ids=str)
def test_an_embedding_of_another_shape_is_refused(
    refusal: Callable[..., CheckpointError], distributed: Path, tmp_path: Path, shape: tuple[int, ...]
) -> None:
    torch.save(torch.zeros(shape), tmp_path / "text.pt")
    error = refusal(distributed, text=tmp_path / "text.pt")
    assert (error.subject, "the model needs (3, 20)" in error.reason) == (str(tmp_path / "text.pt"), True)


def test_a_directory_that_is_no_checkpoint_is_refused(refusal: Callable[..., CheckpointError], tmp_path: Path) -> None:
    assert "is no distributed checkpoint" in refusal(tmp_path).reason


def test_an_absent_file_is_named(refusal: Callable[..., CheckpointError], tmp_path: Path) -> None:
    assert str(refusal(tmp_path / "none.pt")) == f"{tmp_path / 'none.pt'}: cannot be read (No such file or directory)"


def test_a_file_that_ends_early_is_refused(
    refusal: Callable[..., CheckpointError], published: dict[str, Any], to_file: Callable[[Any], Path]
) -> None:
    path = to_file(published)
    path.write_bytes(path.read_bytes()[:-1000])
    assert "is no file of tensors" in refusal(path).reason


def test_a_shard_that_ends_early_is_refused(
    refusal: Callable[..., CheckpointError], published: dict[str, Any], tmp_path: Path
) -> None:
    source = write_distributed(tmp_path / "model", published)
    largest = max(source.glob("*.distcp"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: -largest.stat().st_size // 2])
    assert f"cannot be read from {source}" in refusal(source).reason


def test_an_absent_shard_is_refused(
    refusal: Callable[..., CheckpointError], published: dict[str, Any], tmp_path: Path
) -> None:
    source = write_distributed(tmp_path / "model", published)
    max(source.glob("*.distcp"), key=lambda path: path.stat().st_size).unlink()
    assert f"cannot be read from {source}" in refusal(source).reason


@pytest.mark.parametrize(
    "content", [b"", b"hello", b"\x80\x04N.", pickle.dumps({"a": 1})], ids=["", "text", "none", "dict"]
)
def test_foreign_metadata_is_refused(refusal: Callable[..., CheckpointError], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / ".metadata").write_bytes(content)
    assert "is not the metadata of a checkpoint" in refusal(tmp_path / "model").reason


@pytest.mark.parametrize("content", [b"", b"hello", b"\xff" * 64], ids=["empty", "text", "noise"])
def test_a_foreign_file_is_refused(refusal: Callable[..., CheckpointError], tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.pt").write_bytes(content)
    assert "is no file of tensors" in refusal(tmp_path / "model.pt").reason


@pytest.mark.parametrize("content", [[1], torch.zeros(3), {1: torch.zeros(3)}], ids=["list", "tensor", "numbered"])
def test_a_file_of_something_else_is_refused(
    refusal: Callable[..., CheckpointError], to_file: Callable[[Any], Path], content: Any
) -> None:
    assert "must be a dictionary of tensors" in refusal(to_file(content)).reason


class Hostile:
    """Unpickled without care, it makes a directory."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.trace),)


class Attribute:
    """Asks for what no enum has."""

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (Path, "write_text")


def test_a_hostile_pickle_is_refused_and_not_run(
    refusal: Callable[..., CheckpointError], to_file: Callable[[Any], Path], tmp_path: Path
) -> None:
    hostile = Hostile(tmp_path / "trace")
    assert "is no file of tensors" in refusal(to_file({"net.x": hostile})).reason
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / ".metadata").write_bytes(pickle.dumps(hostile))
    assert "mkdir" in refusal(tmp_path / "model").reason
    (tmp_path / "model" / ".metadata").write_bytes(pickle.dumps(Attribute()))
    assert "takes an attribute of" in refusal(tmp_path / "model").reason
    assert not hostile.trace.exists()


# --- stopping and going on


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that are read, as they are."""
    names: list[str] = []
    check = converting.check_values

    def record(name: str, tensor: Tensor) -> None:
        names.append(name)
        check(name, tensor)

    monkeypatch.setattr(converting, "check_values", record)
    return names


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Callable[[], None]], None]:
    """`interrupted(count, run)`: run what is interrupted once it has read `count` tensors."""

    def run_interrupted(count: int, run: Callable[[], None]) -> None:
        left = iter(range(count))

        def check(name: str, tensor: Tensor) -> None:
            if next(left, None) is None:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(converting, "check_values", check)
            with pytest.raises(KeyboardInterrupt):
                run()

    return run_interrupted


def test_a_stopped_conversion_goes_on_and_ends_in_the_same_bytes(
    config: WorldModelConfig,
    distributed: Path,
    converted: Path,
    tokenizer_file: Path,
    tmp_path: Path,
    reads: list[str],
    interrupted: Callable[[int, Callable[[], None]], None],
) -> None:
    def run() -> None:
        convert(config, distributed, tmp_path / "out", tokenizer=tokenizer_file, progress=False)

    interrupted(100, run)
    assert not (tmp_path / "out" / "model.safetensors").exists()
    with (tmp_path / "out" / "model.safetensors.partial").open("r+b") as file:
        file.seek(-5, os.SEEK_END)  # the last tensor reached the disk in part
        file.write(b"\0" * 5)
    reads.clear()
    run()
    assert 0 < len(reads) <= len(manifest(config)) - 97
    assert_same_bytes(tmp_path / "out", converted)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["config.json", "model.safetensors"]


def test_what_another_source_left_behind_is_not_used(
    config: WorldModelConfig,
    distributed: Path,
    published: dict[str, Any],
    converted: Path,
    tokenizer_file: Path,
    to_file: Callable[[Any], Path],
    tmp_path: Path,
    interrupted: Callable[[int, Callable[[], None]], None],
) -> None:
    halved = {
        name: value / 2 if name.startswith("net_ema.b") and isinstance(value, Tensor) else value
        for name, value in published.items()
    }

    def run(source: Path) -> None:
        convert(config, source, tmp_path / "out", tokenizer=tokenizer_file, progress=False)

    interrupted(100, lambda: run(to_file(halved)))
    run(distributed)
    assert_same_bytes(tmp_path / "out", converted)


# --- the command


def test_the_command_converts_and_shows_progress(
    config: WorldModelConfig, distributed: Path, denoiser: Tensors, tokenizer_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "reduced.json").write_text(json.dumps(config.to_json()))
    main(["convert", str(distributed), str(tmp_path / "out"), "--config", str(tmp_path / "reduced.json"),
          "--tokenizer", str(tokenizer_file)])  # fmt: skip
    assert "100%" in capsys.readouterr().err
    assert_served(tmp_path / "out", denoiser)


def test_the_command_answers_a_refusal_in_one_line(tmp_path: Path) -> None:
    ran = subprocess.run(
        [
            sys.executable,
            "-W",
            "error",
            "-m",
            "deployments.world_model.checkpoint",
            "convert",
            "none.pt",
            tmp_path / "out",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == "error: none.pt: cannot be read (No such file or directory)\n"


@pytest.mark.parametrize("content", ["", "{}", "[]"])
def test_a_configuration_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(SystemExit, match="does not describe a model"):
        main(["convert", "x", str(tmp_path / "out"), "--config", str(tmp_path / "config.json")])


def test_the_command_answers_an_unwritable_destination_in_one_line(
    distributed: Path, tokenizer_file: Path, tmp_path: Path, config: WorldModelConfig
) -> None:
    (tmp_path / "reduced.json").write_text(json.dumps(config.to_json()))
    (tmp_path / "file").write_text("in the way")
    arguments = ["convert", str(distributed), str(tmp_path / "file" / "out"), "--tokenizer", str(tokenizer_file)]
    with pytest.raises(SystemExit, match="Not a directory"):
        main([*arguments, "--config", str(tmp_path / "reduced.json")])
