"""Hostile bytes to validated arrays. Every limit is checked before the memory it bounds is allocated.

Knows nothing of models beyond the shapes it is given. Raises `InvalidRequest` naming the field, what was wrong and
what is accepted.
"""

import io
import re
import zlib
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from deployments.messages import Actions, Frame
from serve_app.errors import InvalidRequest

_NPY_MAGIC = b"\x93NUMPY"
_NPY_HEADER = re.compile(
    rb"\{\s*'descr':\s*'(?P<descr>[^']{1,8})',\s*'fortran_order':\s*(?P<fortran>True|False),"
    rb"\s*'shape':\s*\((?P<shape>[0-9, ]{0,64})\),?\s*\}\s*"
)
_DTYPES: dict[bytes, np.dtype[Any]] = {b"<f4": np.dtype("<f4"), b"<f2": np.dtype("<f2")}
_ACCEPTED_ACTIONS = "a .npy file, gzipped or not, of float32 or float16"
_IMAGE_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})


def decode_start_frame(data: bytes, field: str, resolution: tuple[int, int], max_pixels: int) -> tuple[Frame, bool]:
    """The image as uint8 (H, W, 3) RGB at `resolution`, and whether it had to be resized.

    A PNG or JPEG of another size is cropped about its centre to the model's aspect ratio and resized (bilinear,
    antialiased), as the DreamDojo data was prepared. EXIF orientation is applied; transparency is put on black.
    """
    if not data:
        raise InvalidRequest(field, "is empty; a PNG or JPEG image is accepted")
    try:
        with Image.open(io.BytesIO(data), formats=("PNG", "JPEG")) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise InvalidRequest(field, f"has {width}x{height} pixels; at most {max_pixels} are accepted")
            if image.mode not in _IMAGE_MODES:
                raise InvalidRequest(field, f"has pixels of kind {image.mode}; 8 bits per channel are accepted")
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                upright = Image.alpha_composite(
                    Image.new("RGBA", upright.size, (0, 0, 0, 255)), upright.convert("RGBA")
                )
            rgb = upright.convert("RGB")
    except InvalidRequest:
        raise
    except Exception as error:  # Pillow's parsers raise many kinds on hostile bytes; none is our fault
        raise InvalidRequest(field, "cannot be decoded; a whole PNG or JPEG image is accepted") from error
    height, width = resolution
    if rgb.size == (width, height):
        return np.array(rgb, np.uint8), False
    fitted = ImageOps.fit(rgb, (width, height), Image.Resampling.BILINEAR)
    return np.array(fitted, np.uint8), True


def decode_actions(data: bytes, field: str, action_dim: int, max_actions: int) -> Actions:
    """The `.npy` file as float32 (T, A), 1 <= T <= `max_actions`. Its header is read before anything is allocated."""
    max_bytes = 1024 + max_actions * action_dim * 4
    if not data:
        raise InvalidRequest(field, f"is empty; {_ACCEPTED_ACTIONS} is accepted")
    if data[:2] == b"\x1f\x8b":
        data = _gunzip(data, field, max_bytes)
    dtype, fortran_order, shape, offset = _read_npy_header(data, field)
    if len(shape) != 2 or shape[1] != action_dim:
        raise InvalidRequest(field, f"has shape {shape}; (T, {action_dim}) is accepted")
    if not 1 <= shape[0] <= max_actions:
        raise InvalidRequest(field, f"has {shape[0]} actions; 1 to {max_actions} are accepted")
    expected = shape[0] * shape[1] * dtype.itemsize
    if len(data) - offset != expected:
        raise InvalidRequest(field, f"has {len(data) - offset} bytes of values where its header promises {expected}")
    values = np.frombuffer(data, dtype, offset=offset)
    actions = values.reshape(shape, order="F" if fortran_order else "C").astype(np.float32)
    if not np.isfinite(actions).all():
        raise InvalidRequest(field, "has values that are not finite numbers")
    return np.ascontiguousarray(actions)


def _read_npy_header(data: bytes, field: str) -> tuple[np.dtype[Any], bool, tuple[int, ...], int]:
    """dtype, Fortran order, shape, and where the values begin. A regular expression, since numpy's own reader
    evaluates the header as Python."""
    not_npy = InvalidRequest(field, f"is not a .npy file; {_ACCEPTED_ACTIONS} is accepted")
    if len(data) < 10 or data[:6] != _NPY_MAGIC:
        raise not_npy
    length_bytes = {1: 2, 2: 4, 3: 4}.get(data[6])
    if length_bytes is None:
        raise not_npy
    start = 8 + length_bytes
    offset = start + int.from_bytes(data[8:start], "little")
    header = _NPY_HEADER.fullmatch(data, start, min(offset, start + 4096, len(data)))
    if header is None:
        raise InvalidRequest(field, f"has a .npy header that is not plain numbers; {_ACCEPTED_ACTIONS} is accepted")
    dtype = _DTYPES.get(header["descr"])
    if dtype is None:
        raise InvalidRequest(field, f"has dtype {header['descr'].decode('ascii', 'replace')}; float32 is accepted")
    try:
        shape = tuple(int(size) for size in header["shape"].split(b",") if size.strip())
    except ValueError:
        raise InvalidRequest(field, "has a shape that cannot be read; (T, action_dim) is accepted") from None
    return dtype, header["fortran"] == b"True", shape, offset


def _gunzip(data: bytes, field: str, max_bytes: int) -> bytes:
    inflater = zlib.decompressobj(wbits=31)
    try:
        inflated = inflater.decompress(data, max_bytes + 1)
    except zlib.error:
        raise InvalidRequest(field, f"is not a whole gzip file; {_ACCEPTED_ACTIONS} is accepted") from None
    if len(inflated) > max_bytes:
        raise InvalidRequest(field, f"inflates to more than the {max_bytes} bytes that are accepted")
    if not inflater.eof:
        raise InvalidRequest(field, f"is a gzip file that ends early; {_ACCEPTED_ACTIONS} is accepted")
    return inflated
