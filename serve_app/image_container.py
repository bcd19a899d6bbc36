"""PNG and JPEG files reduced to what their pixels need, so that no decoder reads the rest.

Metadata is where a small file hides large work: profiles and texts that inflate a thousandfold, EXIF in a million
pieces, images behind the image. Of all that, only the orientation is read. Knows nothing of pixels: a file that is
broken stays broken, for the decoder to refuse.
"""

import re
from dataclasses import dataclass
from typing import Literal

from serve_app.errors import InvalidRequest

MAX_JPEG_SCANS = 64
"""Each scan of a progressive JPEG visits the whole image and may be 30 bytes long; encoders write about 10."""

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_PNG_KEPT = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})

_JPEG_SIGNATURE = b"\xff\xd8"
_JPEG_MARKER = re.compile(rb"\xff([\xc0-\xcf\xd9-\xfe])")
"""Any marker that ends entropy-coded data; those below have no length."""
_JPEG_EOI, _JPEG_SOS, _JPEG_APP1 = 0xD9, 0xDA, 0xE1
_JPEG_KEPT = frozenset({*range(0xC0, 0xC8), *range(0xC9, 0xD0), _JPEG_SOS, 0xDB, 0xDC, 0xDD, 0xE0, 0xEE})
"""Frames, tables, scans, restart intervals, and the two application segments that say which colours are stored."""
_EXIF = b"Exif\0\0"
_EXIF_ORIENTATION = 0x0112


@dataclass(frozen=True, slots=True)
class BareImage:
    kind: Literal["PNG", "JPEG"]
    data: bytes
    """A whole file of that kind, without metadata and without further images."""
    orientation: int
    """As EXIF counts it, 1 to 8; 1 is upright."""


def bare_image(data: bytes, field: str) -> BareImage | None:
    """`data` without metadata; None if it is neither PNG nor JPEG."""
    if data.startswith(_PNG_SIGNATURE):
        return _bare_png(data)
    if data.startswith(_JPEG_SIGNATURE):
        return _bare_jpeg(data, field)
    return None


def _bare_png(data: bytes) -> BareImage:
    """The first image of an animated PNG is the only one in IDAT, and so the only one kept."""
    kept, exif, offset = [_PNG_SIGNATURE], b"", len(_PNG_SIGNATURE)
    while offset < len(data):
        kind = data[offset + 4 : offset + 8]
        end = offset + 12 + int.from_bytes(data[offset : offset + 4], "big")
        if kind in _PNG_KEPT:
            kept.append(data[offset:end])
        elif kind == b"eXIf":
            exif = exif or data[offset + 8 : end - 4]
        if kind == b"IEND":
            break
        offset = end
    return BareImage("PNG", b"".join(kept), _orientation(exif))


def _bare_jpeg(data: bytes, field: str) -> BareImage:
    """Up to the first end of image. Junk between segments is dropped, as decoders do."""
    kept, exif, offset, num_scans = [_JPEG_SIGNATURE], b"", len(_JPEG_SIGNATURE), 0
    while marker := _JPEG_MARKER.search(data, offset):
        if num_scans:
            kept.append(data[offset : marker.start()])
        kind, body = marker[1][0], marker.end() + 2
        if kind == _JPEG_EOI:
            kept.append(marker[0])
            break
        offset = marker.end() + int.from_bytes(data[marker.end() : body], "big")
        if kind == _JPEG_SOS:
            num_scans += 1
            if num_scans > MAX_JPEG_SCANS:
                raise InvalidRequest(field, f"is a JPEG of more scans than the {MAX_JPEG_SCANS} that are accepted")
        if kind in _JPEG_KEPT:
            kept.append(data[marker.start() : offset])
        elif kind == _JPEG_APP1 and data.startswith(_EXIF, body):
            exif = exif or data[body + len(_EXIF) : offset]
    return BareImage("JPEG", b"".join(kept), _orientation(exif))


def _orientation(exif: bytes) -> int:
    """Of the first image in `exif` (a TIFF header and its first directory); 1 if it says nothing that can be read."""
    byte_order: Literal["little", "big"]
    if exif.startswith(b"II*\0"):
        byte_order = "little"
    elif exif.startswith(b"MM\0*"):
        byte_order = "big"
    else:
        return 1
    directory = int.from_bytes(exif[4:8], byte_order)
    entries = directory + 2
    num_entries = int.from_bytes(exif[directory:entries], byte_order)
    for entry in range(entries, min(entries + 12 * num_entries, len(exif) - 11), 12):
        if int.from_bytes(exif[entry : entry + 2], byte_order) == _EXIF_ORIENTATION:
            orientation = int.from_bytes(exif[entry + 8 : entry + 10], byte_order)
            return orientation if 1 <= orientation <= 8 else 1
    return 1
