"""Parts that no well-meaning library writes: headers that lie, metadata that inflates, files within files."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from tests.support.payloads import image_bytes, png

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, RGBA = 0, 2, 6
"""Colour types of PNG."""


def png_chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_header(width: int, height: int, bit_depth: int = 8, colour_type: int = RGB) -> bytes:
    return png_chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0))


def png_of(header: bytes, rows: bytes, *before_pixels: bytes) -> bytes:
    """A PNG of these filtered rows, deflated, with chunks of your choice before its pixels."""
    pixels = png_chunk(b"IDAT", zlib.compress(rows, 9))
    return b"".join((PNG_SIGNATURE, header, *before_pixels, pixels, png_chunk(b"IEND")))


def png_that_claims(width: int, height: int) -> bytes:
    """70 bytes, whatever it claims."""
    return png_of(png_header(width, height), b"")


def png_with(*chunks: bytes) -> bytes:
    """A good 64x64 PNG with these chunks behind its header."""
    good = png()
    return good[:33] + b"".join(chunks) + good[33:]


def jpeg(height: int = 64, width: int = 64, **options: Any) -> bytes:
    """A smooth picture, so that little is lost."""
    rows, columns = np.mgrid[0:height, 0:width]
    pixels = np.stack([rows * 255 // height, columns * 255 // width, np.full_like(rows, 90)], axis=-1)
    return image_bytes(Image.fromarray(pixels.astype(np.uint8)), "JPEG", **({"quality": 95} | options))


def jpeg_that_claims(width: int, height: int) -> bytes:
    small = jpeg()
    size = small.index(b"\xff\xc0") + 5
    return small[:size] + struct.pack(">HH", height, width) + small[size + 4 :]


def jpeg_segment(marker: int, data: bytes) -> bytes:
    return bytes((0xFF, marker)) + struct.pack(">H", len(data) + 2) + data


def jpeg_with(*segments: bytes) -> bytes:
    """A good 64x64 JPEG with these segments at its start."""
    good = jpeg()
    return good[:2] + b"".join(segments) + good[2:]


def jpeg_of_scans(num_scans: int, side: int = 64) -> bytes:
    """A progressive JPEG whose last scan, a few bytes long, is repeated until there are so many."""
    image = image_bytes(Image.new("L", (side, side), 128), "JPEG", progressive=True)
    end = image.rindex(b"\xff\xd9")
    last_scan = image[image.rindex(b"\xff\xda") : end]
    return image[:end] + last_scan * (num_scans - image.count(b"\xff\xda")) + image[end:]


def exif(orientation: int, byte_order: str = "<") -> bytes:
    """A TIFF block that says only this."""
    magic = b"II*\0" if byte_order == "<" else b"MM\0*"
    entry = struct.pack(f"{byte_order}HHIHH", 0x0112, 3, 1, orientation, 0)
    return magic + struct.pack(f"{byte_order}IH", 8, 1) + entry + bytes(4)


def npy_file(
    header: str | bytes, values: bytes = b"", version: tuple[int, int] = (1, 0), header_bytes: int | None = None
) -> bytes:
    """A .npy file whose header, and the length that it claims, are yours."""
    text = header.encode() if isinstance(header, str) else header
    length = len(text) if header_bytes is None else header_bytes
    packed = struct.pack("<H" if version == (1, 0) else "<I", length)
    return b"\x93NUMPY" + bytes(version) + packed + text + values


def npy_header(shape: str, descr: str = "'<f4'", fortran_order: str = "False") -> str:
    return f"{{'descr': {descr}, 'fortran_order': {fortran_order}, 'shape': {shape}, }}\n"


def npy_of(array: np.ndarray[Any, Any], version: tuple[int, int]) -> bytes:
    """As numpy writes that version of the format."""
    output = io.BytesIO()
    np.lib.format.write_array(output, array, version=version, allow_pickle=True)
    return output.getvalue()


BOUNDARY = "x-boundary-x"
MULTIPART = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}


def multipart(*parts: tuple[str, bytes], closed: bool = True) -> bytes:
    """A form of (headers, content) parts, so that headers can be wrong; `disposition` gives right ones."""
    opened = b"".join(f"--{BOUNDARY}\r\n{headers}\r\n\r\n".encode() + content + b"\r\n" for headers, content in parts)
    return opened + (f"--{BOUNDARY}--\r\n".encode() if closed else b"")


def disposition(name: str, filename: str | None = None) -> str:
    named = f'Content-Disposition: form-data; name="{name}"'
    return named if filename is None else f'{named}; filename="{filename}"'
