"""Rows decoded from a strip equal those of the whole image, and damage is the same error."""

import shutil
import subprocess
from typing import Any

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image

from crowdray.data.decoding import decode_image, decode_rows
from crowdray.data.jpeg_strips import cut_strip, has_restart_rows, read_jpeg_header
from crowdray.errors import DataError

from ..support.builders import encode

SUBSAMPLINGS = ["4:4:4", "4:2:2", "4:2:0", "L"]


def pixels(height: int, width: int) -> NDArray[np.uint8]:
    """Noise on a gradient, so that every block differs from its neighbours."""
    noise = np.random.default_rng((height, width)).integers(0, 120, (height, width, 3))
    return (noise + np.arange(height)[:, None, None] % 130).astype(np.uint8)


def marked_jpeg(height: int, width: int, subsampling: str = "4:2:0", **options: Any) -> bytes:
    """A JPEG with a restart marker after each row of MCUs."""
    image = Image.fromarray(pixels(height, width))
    options = {"restart_marker_rows": 1, **options}
    if subsampling == "L":
        return encode(image.convert("L"), "JPEG", **options)
    return encode(image, "JPEG", subsampling=subsampling, **options)


@settings(deadline=None, max_examples=300)
@given(
    st.sampled_from(SUBSAMPLINGS), st.integers(1, 200), st.integers(1, 50), st.tuples(st.floats(0, 1), st.floats(0, 1))
)
def test_decoded_rows_equal_those_of_the_whole_image(
    subsampling: str, height: int, width: int, ends: tuple[float, float]
) -> None:
    content = marked_jpeg(height, width, subsampling)
    first, last = (round(end * height) for end in sorted(ends))
    first, last = min(first, height - 1), max(last, first + 1)
    assert cut_strip(content, first, last)
    np.testing.assert_array_equal(decode_rows(content, first, last), decode_image(content)[first:last])


@pytest.mark.parametrize("subsampling", SUBSAMPLINGS)
def test_decoded_rows_equal_those_of_the_whole_image_for_every_range(subsampling: str) -> None:
    """First and last rows, single ones, and all; of a height that rows of MCUs do not divide."""
    content = memoryview(marked_jpeg(77, 41, subsampling))
    whole = decode_image(content)
    for first in range(77):
        for last in range(first + 1, 78):
            np.testing.assert_array_equal(decode_rows(content, first, last), whole[first:last])


@pytest.mark.skipif(shutil.which("jpegtran") is None, reason="jpegtran is not installed")
@pytest.mark.parametrize("subsampling", ["444", "422", "420", "440", "411", "Gray"])
def test_decoded_rows_of_jpegtrans_output_equal_those_of_its_input(subsampling: str) -> None:
    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 150, (10, 2)).tolist():
        image = pixels(height, width)
        grey = subsampling == "Gray"
        colours = {"colorspace": "GRAY" if grey else "RGB", "colorsubsampling": subsampling}
        content = simplejpeg.encode_jpeg(image[:, :, :1].copy() if grey else image, **colours)
        marked = subprocess.run(["jpegtran", "-restart", "1"], input=content, capture_output=True, check=True).stdout
        whole = decode_image(content)
        for _ in range(10):
            first = int(rng.integers(height))
            last = int(rng.integers(first + 1, height + 1))
            assert cut_strip(marked, first, last)
            np.testing.assert_array_equal(decode_rows(marked, first, last), whole[first:last])


def test_decoded_rows_of_grey_with_a_sampling_factor_equal_those_of_the_whole_image() -> None:
    """Factors of the only component change nothing, but some cameras write them."""
    content = marked_jpeg(77, 41, "L")
    factors = content.index(b"\xff\xc0") + 11
    content = content[:factors] + b"\x22" + content[factors + 1 :]
    whole = decode_image(content)
    for first in range(70):
        assert cut_strip(content, first, first + 7)
        np.testing.assert_array_equal(decode_rows(content, first, first + 7), whole[first : first + 7])


@pytest.mark.parametrize("first", [0, 100, 180])
def test_strip_contains_its_rows_and_at_most_two_more_rows_of_mcus(first: int) -> None:
    content = marked_jpeg(200, 30)
    strip = cut_strip(content, first, first + 20)
    assert strip and len(strip.content) < len(content) / 2
    height = simplejpeg.decode_jpeg_header(strip.content)[0]
    assert strip.top <= max(first - 16, 0) and strip.top + height >= min(first + 36, 200)
    assert height <= 20 + 4 * 16


@pytest.mark.parametrize(
    "content",
    [
        marked_jpeg(50, 50, restart_marker_rows=0),
        marked_jpeg(50, 50, restart_marker_rows=2),
        marked_jpeg(50, 50, restart_marker_rows=0, restart_marker_blocks=3),
        marked_jpeg(50, 50, progressive=True),
        encode(Image.fromarray(pixels(50, 50)).convert("CMYK"), "JPEG", restart_marker_rows=1),
        encode(Image.fromarray(pixels(50, 50))),
    ],
    ids=["none", "every-other-row", "within-rows", "progressive", "cmyk", "png"],
)
def test_other_images_are_decoded_whole(content: bytes) -> None:
    assert cut_strip(content, 10, 20) is None and not has_restart_rows(content)
    np.testing.assert_array_equal(decode_rows(content, 10, 20), decode_image(content)[10:20])


@pytest.mark.parametrize("subsampling", ["4:2:0", "L"])
def test_decoded_rows_of_a_damaged_image_are_those_of_the_whole_or_its_error(subsampling: str) -> None:
    """Or undamaged rows of an image whose other rows are damaged."""
    content = marked_jpeg(120, 40, subsampling)
    header = read_jpeg_header(content)
    assert header
    clean, rng = decode_image(content), np.random.default_rng(0)
    seen = {"equal": 0, "error": 0, "elsewhere": 0}

    def outcome(decode: Any) -> Any:
        try:
            return decode()
        except DataError as error:
            return str(error)

    for case in range(1500):
        damaged = bytearray(content[: rng.integers(1, len(content))] if case % 10 == 0 else content)
        if case % 10:
            damaged[rng.integers(header.scan, len(damaged))] = rng.choice([0xFF, 0xD3, 0xD9, int(rng.integers(256))])
        first = int(rng.integers(100))
        whole = outcome(lambda damaged=damaged: decode_image(bytes(damaged)))
        rows = outcome(lambda damaged=damaged, first=first: decode_rows(bytes(damaged), first, first + 20))
        if not isinstance(whole, str):
            np.testing.assert_array_equal(rows, whole[first : first + 20])
            seen["equal"] += 1
        elif isinstance(rows, str):
            assert rows == whole
            seen["error"] += 1
        else:
            np.testing.assert_array_equal(rows, clean[first : first + 20])
            seen["elsewhere"] += 1
    assert min(seen.values()) > 20


def test_header_of_any_bytes_is_read_without_exceptions() -> None:
    content, rng = marked_jpeg(40, 40), np.random.default_rng(0)
    for cut in range(len(content)):
        read_jpeg_header(content[:cut])
        damaged = bytearray(content[: 400 + cut])
        damaged[rng.integers(2, min(len(damaged), 700))] = rng.integers(256)
        cut_strip(bytes(damaged), 0, 40)
