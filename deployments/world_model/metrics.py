"""PSNR and SSIM of frames, on uint8 (0..255) or float (0..1) arrays of shape (..., H, W, C).

SSIM is that of Wang et al. 2004: Gaussian window 11x11 with standard deviation 1.5, K1 = 0.01, K2 = 0.03, population
variances, averaged over the positions where the window fits, over channels and over frames. LPIPS is in `lpips.py`.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Image = npt.NDArray[np.generic] | Tensor

WINDOW = 11
WINDOW_STD = 1.5
K1, K2 = 0.01, 0.03


def psnr(image: Image, reference: Image) -> float:
    """Peak signal-to-noise ratio in dB over all values together; infinite for equal images."""
    a, b = unit_range(image, reference)
    error = float(((a - b) ** 2).mean())
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def psnr_per_frame(frames: Image, reference: Image) -> npt.NDArray[np.float64]:
    """PSNR in dB of each image of (..., H, W, C); what a table averages."""
    a, b = unit_range(frames, reference)
    error = ((a - b) ** 2).mean((-3, -2, -1)).numpy()
    with np.errstate(divide="ignore"):
        decibels: npt.NDArray[np.float64] = -10 * np.log10(error)
    return decibels


def ssim(image: Image, reference: Image) -> float:
    """Structural similarity, 1 for equal images. Both sides must be at least 11 pixels."""
    return float(_similarity(image, reference).mean())


def ssim_per_frame(frames: Image, reference: Image) -> npt.NDArray[np.float64]:
    """SSIM of each image of (..., H, W, C)."""
    similarity: npt.NDArray[np.float64] = _similarity(frames, reference).mean((-3, -2, -1)).numpy()
    return similarity


def _similarity(image: Image, reference: Image) -> Tensor:
    """(..., C, H - 10, W - 10): of each channel at each position where the window fits."""
    a, b = (x.movedim(-1, -3) for x in unit_range(image, reference))  # (..., C, H, W)
    if min(a.shape[-2:]) < WINDOW:
        raise ValueError(f"images are {tuple(a.shape[-2:])}, SSIM needs at least {WINDOW}x{WINDOW}")
    rows, columns = (_window_matrix(side) for side in a.shape[-2:])

    def blur(x: Tensor) -> Tensor:
        return rows @ x @ columns.T

    mean_a, mean_b = blur(a), blur(b)
    variance_a = blur(a * a) - mean_a**2
    variance_b = blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    c1, c2 = K1**2, K2**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (variance_a + variance_b + c2)
    return luminance * structure


@lru_cache(maxsize=16)
def _window_matrix(side: int) -> Tensor:
    """The Gaussian window at each position where it fits, (side - WINDOW + 1, side): faster than a convolution."""
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * WINDOW_STD**2))
    weights = weights / weights.sum()
    matrix = torch.zeros(side - WINDOW + 1, side, dtype=torch.float64)
    for position in range(len(matrix)):
        matrix[position, position : position + WINDOW] = weights
    return matrix


def unit_range(*images: Image) -> list[Tensor]:
    """The images in [0, 1] and double precision. Raises ValueError unless shape and dtype are the same."""
    tensors = [torch.as_tensor(image).cpu() for image in images]
    if tensors[0].shape != tensors[1].shape or tensors[0].dtype != tensors[1].dtype:
        raise ValueError(f"cannot compare {[(tuple(t.shape), str(t.dtype)) for t in tensors]}")
    scale = 255.0 if tensors[0].dtype == torch.uint8 else 1.0
    return [tensor.double() / scale for tensor in tensors]
