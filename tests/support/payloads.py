"""Well-formed request parts, to be broken one way at a time."""

import io
from typing import Any

import numpy as np
from PIL import Image


def png(height: int = 64, width: int = 64, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return image_bytes(Image.fromarray(pixels), "PNG")


def image_bytes(image: Image.Image, format: str, **options: Any) -> bytes:  # noqa: A002 - Pillow's own name
    output = io.BytesIO()
    image.save(output, format, **options)
    return output.getvalue()


def npy(array: Any) -> bytes:
    output = io.BytesIO()
    np.save(output, array, allow_pickle=True)
    return output.getvalue()


def actions(num_actions: int = 48, action_dim: int = 8, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """float32 (T, A); the columns that stand-in models read as requests for a fault are zero."""
    values = np.random.default_rng(seed).uniform(-1, 1, (num_actions, action_dim)).astype(np.float32)
    values[:, -3:] = 0
    return values
