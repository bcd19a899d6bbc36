"""What must hold of the student that ships: the teacher's bars, where it meets them, frame by frame from a cache."""

import json
from pathlib import Path

import numpy as np
import pytest

from deployments.world_model import WorldModel
from deployments.world_model.causal import CausalWorldModel
from deployments.world_model.checkpoint import WEIGHTS_FILE
from deployments.world_model.evaluate import HELD_OUT_SEED, Accuracy, accuracy, held_out_episodes


@pytest.fixture(scope="module")
def directory(shipped: Path) -> Path:
    return shipped.with_name("tiny-pusher-student")


@pytest.fixture(scope="module")
def metrics(directory: Path) -> dict[str, dict[str, float]]:
    read: dict[str, dict[str, float]] = json.loads((directory / "metrics.json").read_text())
    assert read["seed"] == HELD_OUT_SEED
    return read


@pytest.fixture(scope="module")
def student(directory: Path) -> CausalWorldModel:
    return CausalWorldModel.load(directory)


@pytest.fixture(scope="module")
def measured(student: CausalWorldModel, shipped_model: WorldModel, metrics: dict[str, dict[str, float]]) -> Accuracy:
    """With one denoising pass per latent frame."""
    episodes = held_out_episodes(shipped_model, int(metrics["episodes"]))  # type: ignore[call-overload]
    count = len(episodes.actions)
    frames = student.rollouts(list(episodes.frames[:, 0]), list(episodes.actions), range(count), num_steps=1)
    return accuracy(np.stack(frames), episodes)


def test_its_tensors_are_the_teachers_and_smaller_than_10_mb(
    student: CausalWorldModel, shipped_model: WorldModel, directory: Path
) -> None:
    shapes = {name: tensor.shape for name, tensor in student.dit.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in shipped_model.dit.state_dict().items()}
    assert (directory / WEIGHTS_FILE).stat().st_size < 10_000_000


def test_its_first_chunk_has_27_db_and_its_rollouts_3_5_more_than_a_still_frame(
    measured: Accuracy, shipped: Path
) -> None:
    still = json.loads((shipped / "metrics.json").read_text())["held_out"]["copy_first_psnr_db"]
    assert measured.psnr_db_1_12 >= 27
    assert measured.psnr_db >= still + 3.5


def test_the_published_figures_are_what_is_measured(
    measured: Accuracy, metrics: dict[str, dict[str, float]], directory: Path
) -> None:
    card = (directory / "MODEL_CARD.md").read_text()
    for name, value in measured.to_json().items():
        published = metrics["student_1_steps"][name]
        assert published == pytest.approx(value, rel=0.02, abs=0.1 if name.endswith("_px") else 0.02), name
        assert f"| `{name}` | {metrics['teacher'][name]:g} | {published:g} |" in card


def test_its_teachers_figures_are_those_that_the_teacher_publishes(
    metrics: dict[str, dict[str, float]], shipped: Path
) -> None:
    teacher = json.loads((shipped / "metrics.json").read_text())["held_out"]
    for name, value in metrics["teacher"].items():
        assert teacher[name] == pytest.approx(value, rel=0.02, abs=0.1), name
