"""Hostile bytes to validated arrays: what is read is read right, and nothing else gets through or costs memory."""

import gzip
import io
import pickle
import struct
import tracemalloc
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image, ImageOps

from serve_app.errors import InvalidRequest
from serve_app.uploads import decode_actions, decode_start_frame
from tests.support import hostile
from tests.support.payloads import actions, image_bytes, npy, png

MAX_PIXELS = 4096 * 4096
ACTION_DIM = 8
MAX_ACTIONS = 100
MIB = 2**20

fuzz = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def decode(data: bytes, height: int = 64, width: int = 64) -> np.ndarray[Any, np.dtype[np.uint8]]:
    frame, _ = decode_start_frame(data, "frame", (height, width), MAX_PIXELS)
    assert frame.dtype == np.uint8
    assert frame.shape == (height, width, 3)
    return frame


def read(data: bytes, action_dim: int = ACTION_DIM) -> np.ndarray[Any, np.dtype[np.float32]]:
    values = decode_actions(data, "actions", action_dim, MAX_ACTIONS)
    assert values.dtype == np.float32
    assert values.flags.c_contiguous
    return values


def peak_bytes(function: Callable[[], object]) -> int:
    """Memory that Python and numpy took at most."""
    tracemalloc.start()
    try:
        function()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def pixel_blocks(function: Callable[[], object]) -> int:
    """Blocks of memory that Pillow took for pixels."""
    pillow: Any = Image
    pillow.core.reset_stats()
    function()
    stats = pillow.core.get_stats()
    return int(stats["allocated_blocks"] + stats["reused_blocks"])


def refused_frame(data: bytes) -> str:
    with pytest.raises(InvalidRequest) as refusal:
        decode(data)
    assert refusal.value.field == "frame"
    return str(refusal.value)


def refused_actions(data: bytes) -> str:
    with pytest.raises(InvalidRequest) as refusal:
        read(data)
    assert refusal.value.field == "actions"
    return str(refusal.value)


class TestStartFrame:
    def test_a_png_of_the_models_size_is_taken_pixel_for_pixel(self) -> None:
        frame, resized = decode_start_frame(png(), "frame", (64, 64), MAX_PIXELS)
        assert not resized
        np.testing.assert_array_equal(frame, np.array(Image.open(io.BytesIO(png()))))

    @pytest.mark.parametrize("options", [{}, {"progressive": True}, {"optimize": True}, {"restart_marker_rows": 1}])
    def test_a_jpeg_is_taken_as_its_decoder_reads_it(self, options: dict[str, Any]) -> None:
        data = hostile.jpeg(**options)
        np.testing.assert_array_equal(decode(data), np.array(Image.open(io.BytesIO(data)).convert("RGB")))

    def test_another_size_is_cropped_about_its_centre_and_said_to_be_resized(self) -> None:
        pixels = np.zeros((50, 150, 3), np.uint8)
        pixels[:, :50, 0] = pixels[:, 100:, 0] = 255
        pixels[:, 50:100, 1] = 255
        frame, resized = decode_start_frame(image_bytes(Image.fromarray(pixels), "PNG"), "frame", (64, 64), MAX_PIXELS)
        assert resized
        np.testing.assert_array_equal(frame[:, 2:-2], np.broadcast_to([0, 255, 0], (64, 60, 3)))

    @pytest.mark.parametrize(("width", "height"), [(1, 1), (5000, 1), (1, 5000), (64, 63)])
    def test_any_proportions_fill_the_models_frame(self, width: int, height: int) -> None:
        data = image_bytes(Image.new("RGB", (width, height), (10, 20, 30)), "PNG")
        np.testing.assert_array_equal(decode(data), np.broadcast_to([10, 20, 30], (64, 64, 3)))

    def test_resolution_is_height_then_width(self) -> None:
        frame, resized = decode_start_frame(png(height=32, width=96), "frame", (32, 96), MAX_PIXELS)
        assert frame.shape == (32, 96, 3)
        assert not resized

    @pytest.mark.parametrize(
        ("image", "colour"),
        [
            (Image.new("L", (64, 64), 77), (77, 77, 77)),
            (Image.new("1", (64, 64), 1), (255, 255, 255)),
            (Image.new("P", (64, 64), 0), (0, 0, 0)),
            (Image.new("RGB", (64, 64), (1, 2, 3)).quantize(4), (1, 2, 3)),
            (Image.new("RGBA", (64, 64), (200, 100, 50, 255)), (200, 100, 50)),
            (Image.new("RGBA", (64, 64), (200, 100, 50, 0)), (0, 0, 0)),
            (Image.new("LA", (64, 64), (200, 0)), (0, 0, 0)),
            (Image.new("LA", (64, 64), (200, 255)), (200, 200, 200)),
        ],
        ids=["grey", "1 bit", "palette", "quantized", "opaque", "transparent", "grey transparent", "grey opaque"],
    )
    def test_every_8_bit_kind_of_png_becomes_rgb_on_black(
        self, image: Image.Image, colour: tuple[int, int, int]
    ) -> None:
        np.testing.assert_array_equal(decode(image_bytes(image, "PNG")), np.broadcast_to(colour, (64, 64, 3)))

    def test_half_transparency_is_half_of_the_colour(self) -> None:
        frame = decode(image_bytes(Image.new("RGBA", (64, 64), (200, 100, 50, 128)), "PNG"))
        np.testing.assert_allclose(frame[0, 0], [100, 50, 25], atol=1)

    @pytest.mark.parametrize("kind", ["P", "L", "RGB"])
    def test_a_transparent_colour_is_black(self, kind: str) -> None:
        grey = Image.new("RGB", (64, 64), (90, 90, 90))
        image = grey.quantize(2) if kind == "P" else grey.convert(kind)
        assert decode(image_bytes(image, "PNG")).all()
        assert not decode(image_bytes(image, "PNG", transparency=image.getpixel((0, 0)))).any()

    def test_cmyk_and_grey_jpegs_become_rgb(self) -> None:
        cmyk = image_bytes(Image.new("CMYK", (64, 64), (255, 0, 255, 0)), "JPEG", quality=100)
        np.testing.assert_allclose(decode(cmyk)[0, 0], [0, 255, 0], atol=3)
        grey = image_bytes(Image.new("L", (64, 64), 77), "JPEG", quality=100)
        np.testing.assert_allclose(decode(grey)[0, 0], [77, 77, 77], atol=2)

    def test_16_bit_colour_keeps_its_upper_8_bits(self) -> None:
        row = b"\0" + struct.pack(">HHH", 0x1234, 0xFF01, 0x80FF) * 64
        data = hostile.png_of(hostile.png_header(64, 64, bit_depth=16), row * 64)
        np.testing.assert_array_equal(decode(data)[5, 5], [0x12, 0xFF, 0x80])

    def test_16_bit_grey_is_refused(self) -> None:
        assert "8 bits per channel are accepted" in refused_frame(image_bytes(Image.new("I;16", (64, 64), 9), "PNG"))

    @pytest.mark.parametrize("orientation", range(1, 9))
    @pytest.mark.parametrize("byte_order", "<>")
    def test_exif_orientation_is_applied_to_both_formats(self, orientation: int, byte_order: str) -> None:
        block = hostile.exif(orientation, byte_order)
        stored_png = hostile.png_with(hostile.png_chunk(b"eXIf", block))
        stored_jpeg = hostile.jpeg_with(hostile.jpeg_segment(0xE1, b"Exif\0\0" + block))
        for stored in (stored_png, stored_jpeg):
            upright = ImageOps.exif_transpose(Image.open(io.BytesIO(stored)))
            np.testing.assert_array_equal(decode(stored), np.array(upright.convert("RGB")))

    def test_a_rotated_image_is_fitted_as_it_is_seen(self) -> None:
        image = Image.new("RGB", (96, 32), (9, 9, 9))
        turned = image_bytes(image, "PNG", exif=hostile.exif(6))
        frame, resized = decode_start_frame(turned, "frame", (96, 32), MAX_PIXELS)
        assert frame.shape == (96, 32, 3)
        assert not resized

    @pytest.mark.parametrize(
        "block",
        [
            b"",
            b"II*\0",
            b"nonsense",
            hostile.exif(0),
            hostile.exif(9),
            hostile.exif(6)[:-8],
            b"II*\0" + struct.pack("<IH", 2**32 - 1, 1),
            b"II*\0" + struct.pack("<IH", 8, 65535),
        ],
        ids=["empty", "no directory", "nonsense", "0", "9", "truncated", "directory far away", "65535 entries"],
    )
    def test_exif_that_cannot_be_read_is_ignored(self, block: bytes) -> None:
        stored = hostile.png_with(hostile.png_chunk(b"eXIf", block))
        np.testing.assert_array_equal(decode(stored), decode(png()))
        assert decode(hostile.jpeg_with(hostile.jpeg_segment(0xE1, b"Exif\0\0" + block))).any()

    def test_an_animated_png_is_its_first_image(self) -> None:
        first, second = (Image.new("RGB", (64, 64), (level, 0, 0)) for level in (50, 200))
        animated = image_bytes(first, "PNG", save_all=True, append_images=[second])
        assert b"acTL" in animated
        np.testing.assert_array_equal(decode(animated)[0, 0], [50, 0, 0])

    def test_what_follows_the_image_is_ignored(self) -> None:
        np.testing.assert_array_equal(decode(png() + b"PK\x03\x04" + bytes(1000)), decode(png()))
        np.testing.assert_array_equal(decode(hostile.jpeg() + bytes(1000)), decode(hostile.jpeg()))

    @pytest.mark.parametrize(
        "data",
        [
            b"\0",
            b"a picture of a robot",
            b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n",
            b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>',
            image_bytes(Image.new("RGB", (64, 64)), "GIF"),
            image_bytes(Image.new("RGB", (64, 64)), "BMP"),
            image_bytes(Image.new("RGB", (64, 64)), "TIFF"),
            image_bytes(Image.new("RGB", (64, 64)), "ICO"),
            image_bytes(Image.new("RGB", (64, 64)), "PPM"),
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n",
            b" " + png(),
            hostile.PNG_SIGNATURE[:-1],
        ],
        ids=[
            "nul",
            "text",
            "pdf",
            "svg",
            "gif",
            "bmp",
            "tiff",
            "ico",
            "ppm",
            "eps",
            "png after a space",
            "half a name",
        ],
    )
    def test_other_files_are_refused_whatever_they_are(self, data: bytes) -> None:
        assert "is neither PNG nor JPEG" in refused_frame(data)

    def test_an_archive_is_refused(self) -> None:
        output = io.BytesIO()
        with zipfile.ZipFile(output, "w") as archive:
            archive.writestr("frame.png", png())
        assert "is neither PNG nor JPEG" in refused_frame(output.getvalue())

    def test_an_empty_file_is_refused(self) -> None:
        assert "is empty" in refused_frame(b"")

    def test_a_truncated_jpeg_is_refused_wherever_it_ends(self) -> None:
        whole = hostile.jpeg()
        for size in range(2, len(whole), 7):
            assert "a whole PNG or JPEG image is accepted" in refused_frame(whole[:size])

    def test_a_truncated_png_is_refused_unless_all_its_pixels_are_there(self) -> None:
        whole = png(16, 16)
        for size in range(8, len(whole)):
            try:
                frame = decode(whole[:size], 16, 16)
            except InvalidRequest as refusal:
                assert "a whole PNG or JPEG image is accepted" in str(refusal)  # noqa: PT017 - either may be right
            else:
                assert len(whole) - size < len("adlrcrc.len.IENDcrc.") + 2
                np.testing.assert_array_equal(frame, decode(whole, 16, 16))

    @pytest.mark.parametrize("claim", [hostile.png_that_claims, hostile.jpeg_that_claims])
    @pytest.mark.parametrize(("width", "height"), [(10_000, 10_000), (65_000, 65_000), (4097, 4096), (65_535, 257)])
    def test_too_many_pixels_are_refused_before_one_is_allocated(
        self, claim: Callable[[int, int], bytes], width: int, height: int
    ) -> None:
        data = claim(width, height)
        assert len(data) < 4096
        assert pixel_blocks(lambda: decode(png())) > 0
        assert pixel_blocks(lambda: refused_frame(data)) == 0
        assert peak_bytes(lambda: refused_frame(data)) < MIB
        assert refused_frame(data) == f"frame: has {width}x{height} pixels; at most {MAX_PIXELS} are accepted"

    @pytest.mark.parametrize(("width", "height"), [(2**31 - 1, 2**31 - 1), (2**32 - 1, 1), (2**31, 2**31)])
    def test_a_png_that_claims_billions_of_pixels_is_refused(self, width: int, height: int) -> None:
        assert peak_bytes(lambda: refused_frame(hostile.png_that_claims(width, height))) < MIB

    @pytest.mark.parametrize(("width", "height"), [(0, 0), (0, 64), (64, 0)])
    def test_an_image_without_pixels_is_refused(self, width: int, height: int) -> None:
        refused_frame(hostile.png_that_claims(width, height))
        refused_frame(hostile.jpeg_that_claims(width, height))

    def test_the_limit_itself_is_accepted_and_one_column_more_is_not(self) -> None:
        decode_start_frame(png(20, 30), "frame", (64, 64), max_pixels=600)
        with pytest.raises(InvalidRequest, match="has 31x20 pixels; at most 600 are accepted"):
            decode_start_frame(png(20, 31), "frame", (64, 64), max_pixels=600)

    def test_a_second_header_does_not_smuggle_pixels_past_the_limit(self) -> None:
        bomb = hostile.png_with(hostile.png_header(20_000, 20_000))
        assert pixel_blocks(lambda: refused_frame(bomb)) == 0

    @pytest.mark.parametrize(
        "kind_and_prefix",
        [(b"iCCP", b"profile\0\0"), (b"zTXt", b"Comment\0\0"), (b"iTXt", b"Comment\0\1\0\0\0")],
        ids=["iCCP", "zTXt", "iTXt"],
    )
    def test_metadata_that_inflates_is_never_inflated(self, kind_and_prefix: tuple[bytes, bytes]) -> None:
        kind, prefix = kind_and_prefix
        bomb = hostile.png_chunk(kind, prefix + zlib.compress(bytes(100 * MIB), 9))
        data = hostile.png_with(*[bomb] * 10)
        assert peak_bytes(lambda: decode(data)) < 2 * len(data)
        np.testing.assert_array_equal(decode(data), decode(png()))

    def test_a_jpegs_metadata_never_reaches_its_decoder(self) -> None:
        exif_piece = hostile.jpeg_segment(0xE1, b"Exif\0\0" + b"x")
        further_images = hostile.jpeg_segment(0xE2, b"MPF\0" + hostile.exif(1))
        resources = hostile.jpeg_segment(0xED, b"Photoshop 3.0\0" + b"8BIM\x03\xed" + bytes(4) + b"\xff" * 4)
        hidden = hostile.jpeg_segment(0xF0, exif_piece * 1000)
        data = hostile.jpeg_with(*[exif_piece] * 20_000, further_images, resources, hidden)
        np.testing.assert_array_equal(decode(data), decode(hostile.jpeg()))

    def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(self) -> None:
        assert decode(hostile.jpeg_of_scans(64)).any()
        assert "more scans than the 64 that are accepted" in refused_frame(hostile.jpeg_of_scans(65))
        # 4096x4096 and a thousand scans are 100 kB, and would take a core for a quarter of a minute.
        assert "scans" in refused_frame(hostile.jpeg_of_scans(1000, side=4096))

    def test_scans_cannot_hide_behind_a_segment_without_a_length(self) -> None:
        scans = hostile.jpeg_of_scans(100)
        first, last = scans.index(b"\xff\xda"), scans.rindex(b"\xff\xda")
        for marker in (b"\xff\x01", b"\xff\x02", b"\xff\xd0", b"\xff\xbf", b"\xff\x00"):
            for where in (first, last):
                hiding = scans[:where] + marker + b"\x7f\x7f" + scans[where:]
                assert "scans" in refused_frame(hiding)

    @fuzz
    @given(
        original=st.sampled_from(
            [
                png(16, 16),
                hostile.jpeg(16, 16),
                hostile.jpeg(16, 16, progressive=True),
                image_bytes(Image.new("RGBA", (16, 16), (1, 2, 3, 4)).quantize(8), "PNG", transparency=b"\0\x80\xff"),
                image_bytes(Image.new("CMYK", (16, 16)), "JPEG"),
                image_bytes(Image.new("L", (16, 16), 3), "PNG", transparency=3, exif=hostile.exif(5)),
            ]
        ),
        edits=st.lists(st.tuples(st.floats(0, 1), st.binary(max_size=6), st.integers(0, 6)), min_size=1, max_size=4),
    )
    def test_a_damaged_image_is_decoded_or_refused_and_nothing_else(
        self, original: bytes, edits: list[tuple[float, bytes, int]]
    ) -> None:
        data = original
        for where, new, num_replaced in edits:
            start = int(where * len(data))
            data = data[:start] + new + data[start + num_replaced :]
        try:
            decode_start_frame(data, "frame", (16, 16), max_pixels=10_000)
        except InvalidRequest as refusal:
            assert refusal.field == "frame"  # noqa: PT017 - either outcome is right

    @fuzz
    @given(
        signature=st.sampled_from([hostile.PNG_SIGNATURE, b"\xff\xd8", b"\xff\xd8\xff\xda", b""]),
        rest=st.lists(st.one_of(st.binary(max_size=30), st.sampled_from([b"\xff", b"\xff\xda", b"\xff\xd9"]))),
    )
    def test_any_bytes_behind_a_signature_are_refused(self, signature: bytes, rest: list[bytes]) -> None:
        refused_frame(signature + b"".join(rest))

    @fuzz
    @given(
        kinds=st.lists(st.sampled_from([b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"eXIf", b"IEND", b"acTL", b"fdAT"])),
        data=st.data(),
    )
    def test_well_formed_chunks_of_any_content_are_decoded_or_refused(
        self, kinds: list[bytes], data: st.DataObject
    ) -> None:
        header = hostile.png_header(
            width=data.draw(st.integers(0, 9)),
            height=data.draw(st.integers(0, 9)),
            bit_depth=data.draw(st.sampled_from([1, 2, 4, 8, 16, 3])),
            colour_type=data.draw(st.integers(0, 7)),
        )
        chunks = [hostile.png_chunk(kind, data.draw(st.binary(max_size=40))) for kind in kinds]
        try:
            decode(hostile.png_of(header, data.draw(st.binary(max_size=500)), *chunks))
        except InvalidRequest as refusal:
            assert refusal.field == "frame"  # noqa: PT017


class TestActions:
    @pytest.mark.parametrize("num_actions", [1, 48, MAX_ACTIONS])
    def test_float32_is_taken_as_it_is(self, num_actions: int) -> None:
        np.testing.assert_array_equal(read(npy(actions(num_actions))), actions(num_actions))

    def test_float16_is_widened(self) -> None:
        narrow = actions().astype(np.float16)
        np.testing.assert_array_equal(read(npy(narrow)), narrow.astype(np.float32))

    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_gzip_is_inflated(self, dtype: type[np.floating[Any]]) -> None:
        full = actions(MAX_ACTIONS).astype(dtype)
        np.testing.assert_array_equal(read(gzip.compress(npy(full))), full.astype(np.float32))

    def test_fortran_order_is_read_in_its_order(self) -> None:
        data = npy(np.asfortranarray(actions()))
        assert b"'fortran_order': True" in data
        np.testing.assert_array_equal(read(data), actions())

    @pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
    def test_every_version_of_the_format_is_read(self, version: tuple[int, int]) -> None:
        np.testing.assert_array_equal(read(hostile.npy_of(actions(), version)), actions())

    @fuzz
    @given(
        values=hnp.arrays(
            hnp.floating_dtypes(endianness="<", sizes=(16, 32)),
            st.tuples(st.integers(1, 5), st.integers(1, 5)),
            elements=st.floats(-10, 10, width=16),
        ),
        fortran_order=st.booleans(),
        version=st.sampled_from([(1, 0), (2, 0), (3, 0)]),
        gzipped=st.booleans(),
    )
    def test_what_numpy_writes_is_read_as_numpy_reads_it(
        self, values: np.ndarray[Any, Any], fortran_order: bool, version: tuple[int, int], gzipped: bool
    ) -> None:
        data = hostile.npy_of(np.asfortranarray(values) if fortran_order else values, version)
        found = read(gzip.compress(data) if gzipped else data, action_dim=values.shape[1])
        np.testing.assert_array_equal(found, np.load(io.BytesIO(data)).astype(np.float32))

    @pytest.mark.parametrize(
        ("array", "why"),
        [
            (actions().astype(np.float64), "has dtype <f8"),
            (actions().astype(np.int32), "has dtype <i4"),
            (actions().astype(np.uint8), "has dtype |u1"),
            (actions().astype(bool), "has dtype |b1"),
            (actions().astype(np.complex64), "has dtype <c8"),
            (actions().astype(">f4"), "has dtype >f4"),
            (actions().astype("S4"), "has dtype |S4"),
            (actions().astype("U4"), "has dtype <U4"),
            (actions().astype(object), "has dtype |O"),
            (np.zeros(48, [("x", "<f4"), ("y", "<f4")]), "is not plain numbers"),
            (np.zeros(48, np.dtype(("<f4", (8,)))).view([("x", "<f4", (8,))]), "is not plain numbers"),
            (np.zeros((48, 8), "M8[us]"), "has dtype <M8[us]"),
        ],
        ids=lambda case: str(case.dtype) if isinstance(case, np.ndarray) else "",
    )
    def test_other_dtypes_are_refused_and_named(self, array: np.ndarray[Any, Any], why: str) -> None:
        refusal = refused_actions(npy(array))
        assert why in refusal
        assert "float32 or float16 is accepted" in refusal

    @pytest.mark.parametrize(
        ("shape", "why"),
        [
            ((), "has shape (); (T, 8) is accepted"),
            ((384,), "has shape (384,); (T, 8) is accepted"),
            ((1, 48, 8), "has shape (1, 48, 8); (T, 8) is accepted"),
            ((48, 7), "has shape (48, 7); (T, 8) is accepted"),
            ((8, 48), "has shape (8, 48); (T, 8) is accepted"),
            ((48, 0), "has shape (48, 0); (T, 8) is accepted"),
            ((0, 8), "has 0 actions; 1 to 100 are accepted"),
            ((MAX_ACTIONS + 1, 8), "has 101 actions; 1 to 100 are accepted"),
        ],
    )
    def test_other_shapes_are_refused_and_named(self, shape: tuple[int, ...], why: str) -> None:
        assert refused_actions(npy(np.zeros(shape, np.float32))) == f"actions: {why}"

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
    @pytest.mark.parametrize("dtype", [np.float32, np.float16])
    def test_one_value_that_is_not_a_finite_number_is_refused(
        self, value: float, dtype: type[np.floating[Any]]
    ) -> None:
        values = actions().astype(dtype)
        values[47, 7] = value
        assert "not finite numbers" in refused_actions(npy(values))

    @pytest.mark.parametrize("rows", [10**9, 2**31, 2**63, 2**64, 10**40])
    @pytest.mark.parametrize("gzipped", [False, True])
    def test_rows_that_only_the_header_has_take_no_memory(self, rows: int, gzipped: bool) -> None:
        data = hostile.npy_file(hostile.npy_header(f"({rows}, 8)"), bytes(64))
        data = gzip.compress(data) if gzipped else data
        assert peak_bytes(lambda: refused_actions(data)) < MIB
        assert f"has {rows} actions; 1 to 100 are accepted" in refused_actions(data)

    @pytest.mark.parametrize(
        "shape",
        [
            "(-1, 8)",
            "(-48, -8)",
            "(48, 8",
            "48, 8)",
            "[48, 8]",
            "(4 8, 8)",
            "(48.0, 8)",
            "(4_8, 8)",
            "(0x30, 8)",
            "(True, 8)",
            "(None, 8)",
            "(48, 8) * 10**9",
            "(" + "9" * 5000 + ", 8)",
            "(" + "1, " * 5000 + ")",
            "((48, 8),)",
            "(__import__('os').getpid(), 8)",
            "(٤٨, 8)",
        ],
        ids=lambda shape: str(shape)[:20],
    )
    def test_a_shape_that_is_not_plain_numbers_is_refused(self, shape: str) -> None:
        data = hostile.npy_file(hostile.npy_header(shape), actions().tobytes())
        assert peak_bytes(lambda: refused_actions(data)) < MIB

    @pytest.mark.parametrize(
        "header",
        [
            "",
            "\n",
            "{}",
            "{'descr': '<f4', 'shape': (48, 8), 'fortran_order': False, }\n",
            "{'descr': '<f4', 'fortran_order': False, 'shape': (48, 8), 'more': 1, }\n",
            "{'descr': '<f4', 'fortran_order': 0, 'shape': (48, 8), }\n",
            "{'descr': '', 'fortran_order': False, 'shape': (48, 8), }\n",
            "{'descr': '<f4<f4<f4<f4', 'fortran_order': False, 'shape': (48, 8), }\n",
            "[" * 10_000,
            hostile.npy_header("(48, 8)") + " " * 60_000,
        ],
        ids=["none", "blank", "empty", "other order", "more keys", "0", "no dtype", "long dtype", "nested", "padded"],
    )
    def test_a_header_unlike_numpys_is_refused(self, header: str) -> None:
        assert "is accepted" in refused_actions(hostile.npy_file(header, actions().tobytes()))

    @pytest.mark.parametrize("claimed", [0, 1, 10, 57, 10**4, 65535])
    @pytest.mark.parametrize("version", [(1, 0), (2, 0)])
    def test_a_header_that_lies_about_its_length_is_refused(self, claimed: int, version: tuple[int, int]) -> None:
        header = hostile.npy_header("(48, 8)")
        assert len(header) != claimed
        refused_actions(hostile.npy_file(header, actions().tobytes(), version, header_bytes=claimed))

    def test_a_header_of_4_gib_is_refused_without_being_looked_for(self) -> None:
        data = hostile.npy_file(hostile.npy_header("(48, 8)"), actions().tobytes(), (2, 0), header_bytes=2**32 - 1)
        assert peak_bytes(lambda: refused_actions(data)) < MIB

    @pytest.mark.parametrize("version", [(0, 0), (4, 0), (255, 255)])
    def test_an_unknown_version_is_refused(self, version: tuple[int, int]) -> None:
        assert "is not a .npy file" in refused_actions(hostile.npy_file(hostile.npy_header("(48, 8)"), b"", version))

    @pytest.mark.parametrize("change", [-384 * 4, -4, -1, 1, 4, 1000])
    def test_values_must_be_exactly_those_that_the_header_promises(self, change: int) -> None:
        values = actions().tobytes()
        changed = values[:change] if change < 0 else values + bytes(change)
        refusal = refused_actions(hostile.npy_file(hostile.npy_header("(48, 8)"), changed))
        assert refusal == f"actions: has {1536 + change} bytes of values where its header promises 1536"

    def test_a_truncated_file_is_refused_wherever_it_ends(self) -> None:
        for whole in (npy(actions(2)), gzip.compress(npy(actions(2)))):
            for size in range(len(whole)):
                refused_actions(whole[:size])

    @pytest.mark.parametrize(
        "data",
        [b"\0", b"1,2,3\n", png(), b"\x93NUMPY", b"\x93NUMPX" + npy(actions())[6:]],
        ids=["nul", "text", "png", "half a name", "another name"],
    )
    def test_other_files_are_refused(self, data: bytes) -> None:
        assert "is not a .npy file" in refused_actions(data)

    def test_an_empty_file_is_refused(self) -> None:
        assert "is empty" in refused_actions(b"")

    def test_a_pickle_is_refused_and_never_loaded(self, tmp_path: Path) -> None:
        proof = tmp_path / "loaded"
        trap = np.empty((48, 8), object)
        trap[0, 0] = _Trap(proof)
        for data in (npy(trap), pickle.dumps(_Trap(proof)), gzip.compress(npy(trap))):
            refused_actions(data)
        assert not proof.exists()
        pickle.loads(pickle.dumps(_Trap(proof)))
        assert proof.exists(), "the trap works"

    def test_an_npz_archive_is_refused(self) -> None:
        output = io.BytesIO()
        np.savez(output, actions=actions())
        assert "is not a .npy file" in refused_actions(output.getvalue())

    @pytest.mark.parametrize("prefix", [b"", npy(actions())], ids=["zeros", "behind good actions"])
    def test_a_gzip_bomb_is_inflated_no_further_than_the_limit(self, prefix: bytes) -> None:
        bomb = gzip.compress(prefix + bytes(64 * MIB), 9)
        assert peak_bytes(lambda: refused_actions(bomb)) < MIB
        assert "inflates to more than" in refused_actions(bomb)

    def test_a_gzip_within_a_gzip_is_refused(self) -> None:
        assert "is not a .npy file" in refused_actions(gzip.compress(gzip.compress(npy(actions()))))

    def test_a_damaged_gzip_is_refused(self) -> None:
        whole = gzip.compress(npy(actions()))
        flipped = whole[:-8] + bytes((whole[-8] ^ 1,)) + whole[-7:]
        assert "is not a whole gzip file" in refused_actions(flipped)
        assert "is not a whole gzip file" in refused_actions(b"\x1f\x8b" + bytes(100))

    @pytest.mark.parametrize(
        "more", [b"\0", gzip.compress(b""), gzip.compress(npy(actions()))], ids=["nul", "nothing", "another"]
    )
    def test_what_follows_a_gzip_file_is_refused(self, more: bytes) -> None:
        assert "goes on after its gzip file" in refused_actions(gzip.compress(npy(actions())) + more)

    @fuzz
    @given(
        edits=st.lists(st.tuples(st.integers(0, 200), st.binary(max_size=6), st.integers(0, 6)), max_size=4),
        gzipped=st.booleans(),
    )
    def test_a_damaged_file_is_read_as_numpy_reads_it_or_refused(
        self, edits: list[tuple[int, bytes, int]], gzipped: bool
    ) -> None:
        data = npy(actions(3))
        for start, new, num_replaced in edits:
            data = data[:start] + new + data[start + num_replaced :]
        try:
            values = read(gzip.compress(data) if gzipped else data)
        except InvalidRequest as refusal:
            assert refusal.field == "actions"  # noqa: PT017
        else:
            np.testing.assert_array_equal(values, np.load(io.BytesIO(data)))

    @fuzz
    @given(
        descr=st.sampled_from(["'<f4'", "'<f2'", "'|O'", "'<f8'", "[('a', '<f4')]"]),
        shape=st.text("0123456789,- ()_", max_size=12),
        values=st.binary(max_size=200),
        version=st.sampled_from([(1, 0), (2, 0), (3, 0), (9, 9)]),
    )
    def test_any_header_is_read_or_refused_and_nothing_else(
        self, descr: str, shape: str, values: bytes, version: tuple[int, int]
    ) -> None:
        try:
            read(hostile.npy_file(hostile.npy_header(f"({shape})", descr), values, version), action_dim=3)
        except InvalidRequest as refusal:
            assert refusal.field == "actions"  # noqa: PT017


class _Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, proof: Path) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._proof,)
