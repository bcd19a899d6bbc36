import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from deployments.world_model.metrics import psnr, psnr_per_frame, ssim, ssim_per_frame


def image(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (32, 32, 3), dtype=np.uint8)


def test_psnr_of_one_level_off_everywhere_is_48_13_db() -> None:
    a = np.full((8, 8, 3), 100, np.uint8)
    assert psnr(a + np.uint8(1), a) == pytest.approx(20 * np.log10(255))


def test_psnr_of_black_against_white_is_0_db() -> None:
    assert psnr(np.zeros((8, 8, 3), np.uint8), np.full((8, 8, 3), 255, np.uint8)) == 0


def test_psnr_of_equal_images_is_infinite() -> None:
    assert psnr(image(), image()) == float("inf")


def test_psnr_is_the_same_for_levels_and_for_the_unit_range() -> None:
    a, b = image(0), image(1)
    unit = psnr(torch.from_numpy(a).double() / 255, torch.from_numpy(b).double() / 255)
    assert psnr(a, b) == pytest.approx(unit)


def test_psnr_per_frame_is_the_psnr_of_each_frame() -> None:
    video, other = np.stack([image(0), image(1)]), np.stack([image(2), image(3)])
    assert psnr_per_frame(video, other).tolist() == pytest.approx([psnr(image(0), image(2)), psnr(image(1), image(3))])


def test_ssim_of_equal_images_is_1() -> None:
    assert ssim(image(), image()) == pytest.approx(1)


def test_ssim_of_two_flat_images_is_their_luminance_term() -> None:
    a, b = np.full((16, 16, 3), 0.2), np.full((16, 16, 3), 0.6)
    assert ssim(a, b) == pytest.approx((2 * 0.2 * 0.6 + 1e-4) / (0.2**2 + 0.6**2 + 1e-4))


def test_ssim_of_an_inverted_image_is_negative() -> None:
    assert ssim(image(), 255 - image()) < 0


@pytest.mark.parametrize("noise", [2, 20, 200])
def test_both_agree_with_scikit_image(noise: int) -> None:
    """Of a smooth image, on which SSIM's window matters, with noise added."""
    ramp = np.linspace(0, 255, 48)
    a = np.stack([ramp[:40, None] + 0 * ramp, ramp + 0 * ramp[:40, None], (ramp[:40, None] + ramp) / 2], axis=-1)
    b = np.clip(a + np.random.default_rng(0).normal(size=a.shape) * noise, 0, 255).astype(np.uint8)
    a = a.astype(np.uint8)
    assert psnr(b, a) == pytest.approx(peak_signal_noise_ratio(a, b), rel=1e-9)
    # scikit-image pads, takes the mean over where the window fits, and of colours the mean over channels.
    expected = structural_similarity(
        a, b, channel_axis=-1, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=255
    )
    assert ssim(b / 255, a / 255) == pytest.approx(expected, abs=1e-9)
    assert ssim(b, a) == pytest.approx(expected, abs=5e-6)


@pytest.mark.parametrize("level", [0, 3, 128, 252])
def test_the_similarity_of_flat_frames_is_as_near_in_single_precision(level: int) -> None:
    """Where variances are small differences of large squares."""
    flat = np.full((4, 64, 64, 3), level, np.uint8)
    noisy = flat + np.random.default_rng(0).integers(0, 4, flat.shape, np.uint8)
    assert ssim_per_frame(noisy, flat) == pytest.approx(ssim_per_frame(noisy / 255, flat / 255), abs=5e-6)
    assert ssim_per_frame(flat, flat) == pytest.approx(1, abs=1e-12)


def test_the_decibels_of_a_frame_are_the_same_alone_among_others_and_as_floats() -> None:
    frames, others = np.random.default_rng(3).integers(0, 256, (2, 4, 480, 640, 3), np.uint8)
    expected = [psnr(frame, other) for frame, other in zip(frames, others, strict=True)]
    assert psnr_per_frame(frames, others) == pytest.approx(expected)
    assert psnr_per_frame(frames / 255, others / 255) == pytest.approx(expected)
    assert psnr_per_frame(frames[0], others[0]) == pytest.approx(expected[0])


def test_the_similarity_of_a_frame_is_the_same_alone_and_among_others() -> None:
    frames, others = np.random.default_rng(3).integers(0, 256, (2, 4, 16, 24, 3), np.uint8)
    expected = [ssim(frame, other) for frame, other in zip(frames, others, strict=True)]
    assert ssim_per_frame(frames, others) == pytest.approx(expected)


def test_images_of_different_types_are_not_compared() -> None:
    with pytest.raises(ValueError, match="cannot compare"):
        psnr(image(), image().astype(np.float32))


def test_an_image_smaller_than_the_window_has_no_ssim() -> None:
    with pytest.raises(ValueError, match="at least 11x11"):
        ssim(np.zeros((10, 16, 3)), np.zeros((10, 16, 3)))
