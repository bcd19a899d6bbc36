"""Hostile bytes to validated arrays. Every limit is checked before the memory it bounds is allocated.

Knows nothing of models beyond the shapes it is given. Raises `InvalidRequest` naming the field, what was wrong and
what is accepted.
"""

import io
import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile

from deployments.messages import Actions, Frame, Frames
from serve_app.errors import InvalidRequest
from serve_app.image_container import bare_image

_NPY_MAGIC = b"\x93NUMPY"
_NPY_HEADER = re.compile(
    rb"\{\s*'descr':\s*'(?P<descr>[^']{1,8})',\s*'fortran_order':\s*(?P<fortran>True|False),"
    rb"\s*'shape':\s*\((?P<shape>[0-9, ]{0,64})\),?\s*\}\s*"
)
_MAX_HEADER_BYTES = 4096
_DTYPES: dict[bytes, np.dtype[Any]] = {b"<f4": np.dtype("<f4"), b"<f2": np.dtype("<f2")}
_FRAME_DTYPES: dict[bytes, np.dtype[Any]] = {b"|u1": np.dtype(np.uint8)}
_ACCEPTED_ACTIONS = "a .npy file, gzipped or not, of float32 or float16"
_ACCEPTED_FRAMES = "a .npy file, gzipped or not, of uint8"
_IMAGE_MODES = frozenset({"1", "L", "LA", "P", "RGB", "RGBA", "CMYK"})
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each EXIF orientation."""


def decode_start_frame(data: bytes, field: str, resolution: tuple[int, int], max_pixels: int) -> tuple[Frame, bool]:
    """The image as uint8 (H, W, 3) RGB at `resolution`, and whether it had to be resized.

    A PNG or JPEG of another size is cropped about its centre to the model's aspect ratio and resized (bilinear,
    antialiased), as the DreamDojo data was prepared. EXIF orientation is applied; transparency is put on black; colour
    of 16 bits per channel keeps its upper 8, while 16-bit grey, which is rarely a picture, is refused.
    """
    if not data:
        raise InvalidRequest(field, "is empty; a PNG or JPEG image is accepted")
    bare = bare_image(data, field)
    if bare is None:
        raise InvalidRequest(field, "is neither PNG nor JPEG; one image of these is accepted")
    try:
        # The decoder is named, not guessed: Pillow's own way in would try a JPEG's other images and judge its size.
        with (PngImageFile if bare.kind == "PNG" else JpegImageFile)(io.BytesIO(bare.data)) as image:
            width, height = image.size
            if width * height > max_pixels:
                raise InvalidRequest(field, f"has {width}x{height} pixels; at most {max_pixels} are accepted")
            if image.mode not in _IMAGE_MODES:
                raise InvalidRequest(field, f"has pixels of kind {image.mode}; 8 bits per channel are accepted")
            rgb = _on_black(image).convert("RGB")
    except InvalidRequest:
        raise
    except Exception as error:  # Pillow's parsers raise many kinds on hostile bytes; none is our fault
        raise InvalidRequest(field, "cannot be decoded; a whole PNG or JPEG image is accepted") from error
    if bare.orientation != 1:
        rgb = rgb.transpose(_UPRIGHT[bare.orientation])
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
        data = _gunzip(data, field, max_bytes, _ACCEPTED_ACTIONS)
    dtype, fortran_order, shape, offset = _read_npy_header(data, field, _DTYPES, _ACCEPTED_ACTIONS)
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


def decode_frames(data: bytes, field: str, shape: tuple[int, ...]) -> Frames:
    """The `.npy` file as uint8 of exactly that (T, H, W, 3)."""
    if data[:2] == b"\x1f\x8b":
        data = _gunzip(data, field, 1024 + math.prod(shape), _ACCEPTED_FRAMES)
    dtype, fortran_order, found, offset = _read_npy_header(data, field, _FRAME_DTYPES, _ACCEPTED_FRAMES)
    if found != shape or fortran_order:
        raise InvalidRequest(field, f"has shape {found}; {shape}, in C order, is accepted")
    if len(data) - offset != math.prod(shape):
        raise InvalidRequest(field, f"has {len(data) - offset} bytes where its header promises {math.prod(shape)}")
    return np.frombuffer(data, dtype, offset=offset).reshape(shape)


def _on_black(image: Image.Image) -> Image.Image:
    if image.mode not in ("RGBA", "LA") and "transparency" not in image.info:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, (0, 0, 0, 255)), image.convert("RGBA"))


def _read_npy_header(
    data: bytes, field: str, dtypes: Mapping[bytes, np.dtype[Any]], accepted: str
) -> tuple[np.dtype[Any], bool, tuple[int, ...], int]:
    """dtype, Fortran order, shape, and where the values begin. A regular expression, since numpy's own reader
    evaluates the header as Python."""
    not_npy = InvalidRequest(field, f"is not a .npy file; {accepted} is accepted")
    if len(data) < 10 or data[:6] != _NPY_MAGIC:
        raise not_npy
    length_bytes = {1: 2, 2: 4, 3: 4}.get(data[6])
    if length_bytes is None:
        raise not_npy
    start = 8 + length_bytes
    offset = start + int.from_bytes(data[8:start], "little")
    header = None
    if offset <= min(start + _MAX_HEADER_BYTES, len(data)):
        header = _NPY_HEADER.fullmatch(data, start, offset)
    if header is None:
        raise InvalidRequest(field, f"has a .npy header that is not plain numbers; {accepted} is accepted")
    dtype = dtypes.get(header["descr"])
    if dtype is None:
        descr = header["descr"].decode("ascii", "replace")
        raise InvalidRequest(field, f"has dtype {descr}; {accepted} is accepted")
    try:
        shape = tuple(int(size) for size in header["shape"].split(b",") if size.strip())
    except ValueError:
        raise InvalidRequest(field, f"has a shape that cannot be read; {accepted} is accepted") from None
    return dtype, header["fortran"] == b"True", shape, offset


def _gunzip(data: bytes, field: str, max_bytes: int, accepted: str) -> bytes:
    inflater = zlib.decompressobj(wbits=31)
    try:
        inflated = inflater.decompress(data, max_bytes + 1)
    except zlib.error:
        raise InvalidRequest(field, f"is not a whole gzip file; {accepted} is accepted") from None
    if len(inflated) > max_bytes:
        raise InvalidRequest(field, f"inflates to more than the {max_bytes} bytes that are accepted")
    if not inflater.eof:
        raise InvalidRequest(field, f"is a gzip file that ends early; {accepted} is accepted")
    if inflater.unused_data:
        raise InvalidRequest(field, f"goes on after its gzip file; {accepted} is accepted")
    return inflated
