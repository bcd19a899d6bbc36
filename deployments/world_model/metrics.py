"""PSNR and SSIM of frames, on uint8 (0..255) or float (0..1) arrays of shape (..., H, W, C).

SSIM is that of Wang et al. 2004: Gaussian window 11x11 with standard deviation 1.5, K1 = 0.01, K2 = 0.03, population
variances, averaged over the positions where the window fits, over channels and over frames; of uint8 in single
precision, which is within 5e-6 of it and takes half the time. LPIPS is in `lpips.py`.
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
BLOCK = 4
"""Images at a time: what fits in a core's cache takes two thirds of the time."""
K1, K2 = 0.01, 0.03


def psnr(image: Image, reference: Image) -> float:
    """Peak signal-to-noise ratio in dB over all values together; infinite for equal images."""
    a, b = unit_range(image, reference)
    error = float(((a - b) ** 2).mean())
    return float("inf") if error == 0 else -10 * float(np.log10(error))


def psnr_per_frame(frames: Image, reference: Image) -> npt.NDArray[np.float64]:
    """PSNR in dB of each image of (..., H, W, C); what a table averages."""
    a, b = _comparable(frames, reference)
    if a.dtype == torch.uint8:  # in whole numbers: exact, and a tenth of the time
        difference = a.numpy().astype(np.int32) - b.numpy()
        error = np.einsum("...hwc,...hwc->...", difference, difference, dtype=np.int64) / (
            255.0**2 * a.shape[-3:].numel()
        )
    else:
        a, b = unit_range(frames, reference)
        error = ((a - b) ** 2).mean((-3, -2, -1)).numpy()
    with np.errstate(divide="ignore"):
        decibels: npt.NDArray[np.float64] = -10 * np.log10(error)
    return decibels


def ssim(image: Image, reference: Image) -> float:
    """Structural similarity, 1 for equal images. Both sides must be at least 11 pixels."""
    return float(ssim_per_frame(image, reference).mean())


def ssim_per_frame(frames: Image, reference: Image) -> npt.NDArray[np.float64]:
    """SSIM of each image of (..., H, W, C)."""
    a, b = _comparable(frames, reference)
    if min(a.shape[-3:-1]) < WINDOW:
        raise ValueError(f"images are {tuple(a.shape[-3:-1])}, SSIM needs at least {WINDOW}x{WINDOW}")
    leading = a.shape[:-3]
    a, b = (images.reshape(-1, *images.shape[-3:]) for images in (a, b))
    blocks = [slice(first, first + BLOCK) for first in range(0, len(a), BLOCK)]
    similarity = torch.cat([_similarity(a[block], b[block]) for block in blocks])
    found: npt.NDArray[np.float64] = similarity.reshape(leading).numpy()
    return found


def _similarity(images: Tensor, references: Tensor) -> Tensor:
    """(N,) of (N, H, W, C). The five blurred products of the definition are four of the sum and the difference."""
    dtype, peak = (torch.float32, 255.0) if images.dtype == torch.uint8 else (torch.float64, 1.0)
    a, b = (x.to(dtype).movedim(-1, -3).contiguous() for x in (images, references))  # (N, C, H, W)
    rows, columns = (_window_matrix(side, dtype) for side in a.shape[-2:])
    total, difference = a + b, a - b
    blurred = rows @ torch.stack([total, difference, total * total, difference * difference]) @ columns.T
    total, difference, total_2, difference_2 = blurred.unbind()
    total.square_(), difference.square_()
    means = total + difference  # 2 (mean_a^2 + mean_b^2)
    product = total.sub_(difference)  # 4 mean_a mean_b
    variances = (total_2 + difference_2).sub_(means)  # twice
    covariance = total_2.sub_(difference_2).sub_(product)  # four times
    c1, c2 = 2 * (K1 * peak) ** 2, 2 * (K2 * peak) ** 2
    similarity = product.add_(c1).mul_(covariance.add_(c2)).div_(means.add_(c1).mul_(variances.add_(c2)))
    return similarity.mean((-3, -2, -1)).double()


@lru_cache(maxsize=16)
def _window_matrix(side: int, dtype: torch.dtype) -> Tensor:
    """The Gaussian window at each position where it fits, (side - WINDOW + 1, side): faster than a convolution."""
    offsets = torch.arange(WINDOW, dtype=torch.float64) - WINDOW // 2
    weights = torch.exp(-(offsets**2) / (2 * WINDOW_STD**2))
    weights = weights / weights.sum()
    matrix = torch.zeros(side - WINDOW + 1, side, dtype=torch.float64)
    for position in range(len(matrix)):
        matrix[position, position : position + WINDOW] = weights
    return matrix.to(dtype)


def unit_range(*images: Image) -> list[Tensor]:
    """The images in [0, 1] and double precision. Raises ValueError unless shape and dtype are the same."""
    tensors = _comparable(*images)
    scale = 255.0 if tensors[0].dtype == torch.uint8 else 1.0
    return [tensor.double() / scale for tensor in tensors]


def _comparable(*images: Image) -> list[Tensor]:
    """Raises ValueError unless shape and dtype are the same."""
    tensors = [torch.as_tensor(image).cpu() for image in images]
    if tensors[0].shape != tensors[1].shape or tensors[0].dtype != tensors[1].dtype:
        raise ValueError(f"cannot compare {[(tuple(t.shape), str(t.dtype)) for t in tensors]}")
    return tensors
