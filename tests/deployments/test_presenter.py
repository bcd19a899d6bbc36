"""What a replica makes of frames, before they travel."""

import io
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from deployments.messages import ChunkForm, ChunkRow, Frames, Goal, Metric
from deployments.presenter import MAX_PICTURE_BYTES, Presenter, png
from deployments.world_model.metrics import psnr, ssim
from tests.support.payloads import actions

SHAPE = (64, 64)


def picture(level: int) -> Any:
    """Smooth, so that JPEG keeps it."""
    rows, columns = np.mgrid[0:64, 0:64]
    return np.stack([rows + level, columns + level, np.full_like(rows, level)], axis=-1).astype(np.uint8)


FRAMES: Frames = np.stack([picture(level) for level in (10, 20, 30)])
ROW = ChunkRow(picture(0), actions(3), 0, 0, 0, 1, 0.0)


class Doubled:
    """A model whose latents are twice the pixels."""

    def latents(self, frames: Frames) -> Any:
        return frames.astype(np.float32) * 2


@pytest.fixture
def presenter() -> Presenter:
    return Presenter(Doubled(), SHAPE, 10, lpips=lambda a, b: float(np.abs(a.astype(int) - b).max()))


@pytest.mark.parametrize(("form", "kind", "off_by"), [("png", "PNG", 0), ("jpeg", "JPEG", 6)])
def test_pictures_are_one_per_frame_and_the_first_chunk_begins_with_the_start_frame(
    presenter: Presenter, form: ChunkForm, kind: str, off_by: int
) -> None:
    done = presenter.present(replace(ROW, form=form), FRAMES)
    shown = [Image.open(io.BytesIO(data)) for data in done.pictures]
    assert [image.format for image in shown] == [kind] * 4
    for image, frame in zip(shown, [ROW.start_frame, *FRAMES], strict=True):
        assert np.abs(np.asarray(image).astype(int) - frame).max() <= off_by
    assert len(presenter.present(replace(ROW, form=form, chunk=1), FRAMES).pictures) == 3
    assert (done.video, done.frames) == (b"", None)


def test_raw_frames_are_those_after_the_start_frame(presenter: Presenter) -> None:
    done = presenter.present(replace(ROW, form="raw"), FRAMES)
    assert np.array_equal(done.frames, FRAMES)
    assert np.array_equal(done.last_frame, FRAMES[-1])


def test_nothing_travels_that_was_not_asked_for(presenter: Presenter) -> None:
    done = presenter.present(replace(ROW, form="none"), FRAMES)
    assert (done.video, done.pictures, done.frames, done.distance, done.closeness) == (b"", (), None, None, None)


def test_a_png_too_large_for_one_message_travels_as_jpeg() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    encoded = png(noise)
    assert len(encoded) <= MAX_PICTURE_BYTES
    assert Image.open(io.BytesIO(encoded)).format == "JPEG"
    assert Image.open(io.BytesIO(png(FRAMES[0]))).format == "PNG"


@pytest.mark.parametrize(
    ("metric", "distance"),
    [
        ("mse", 10 ** (-psnr(FRAMES[-1], FRAMES[0]) / 10)),
        ("psnr", 10 ** (-psnr(FRAMES[-1], FRAMES[0]) / 10)),
        ("ssim", 1 - ssim(FRAMES[-1], FRAMES[0])),
        ("lpips", 20.0),
        ("latent", 4 * 20.0**2),
    ],
)
def test_the_last_frame_is_measured_against_the_goal(presenter: Presenter, metric: Metric, distance: float) -> None:
    done = presenter.present(replace(ROW, goal=Goal(FRAMES[0], metric)), FRAMES)
    assert done.distance == pytest.approx(distance)
    assert presenter.present(replace(ROW, goal=Goal(FRAMES[-1], metric)), FRAMES).distance == pytest.approx(0)


def test_all_frames_are_measured_against_their_references(presenter: Presenter) -> None:
    reference = np.stack([picture(level) for level in (10, 20, 60)])
    closeness = presenter.present(replace(ROW, reference=reference), FRAMES).closeness
    assert closeness is not None
    assert closeness.mse == pytest.approx(10 ** (-psnr(FRAMES, reference) / 10))
    assert closeness.ssim == pytest.approx(ssim(FRAMES, reference))
    assert closeness.lpips == 30


def test_without_the_networks_weights_lpips_is_absent_and_never_another_number() -> None:
    bare = Presenter(Doubled(), SHAPE, 10)
    closeness = bare.present(replace(ROW, reference=FRAMES), FRAMES).closeness
    assert closeness is not None
    assert closeness.lpips is None
    with pytest.raises(ValueError, match="not installed"):
        bare.present(replace(ROW, goal=Goal(FRAMES[0], "lpips")), FRAMES)


def test_a_world_models_latents_are_what_its_tokenizer_makes_of_each_frame() -> None:
    from deployments.world_model.rollout import WorldModel
    from serve_app.catalog import PACKAGED_CHECKPOINTS

    model = WorldModel.load(PACKAGED_CHECKPOINTS["tiny-pusher"])
    latents = model.latents(FRAMES[:2])
    assert latents.dtype == np.float32
    assert np.allclose(latents[0], model.latents(FRAMES[:1])[0], atol=1e-5)
    assert not np.allclose(latents[0], latents[1], atol=1e-3)
