"""Samples: lossless encodings, decoding of many formats, and rejection of invalid content."""

import io
import pickle
import struct
from collections.abc import Callable

import numpy as np
import pytest
import simplejpeg
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from crowdray.data.sample import (
    check_image,
    decode_depth,
    decode_image,
    decode_roi,
    encode_depth,
    encode_roi,
    make_sample,
    points_outside,
    validate_points,
)
from crowdray.errors import DataError

from ..support.builders import encode, jpeg

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 31, 3), dtype=np.uint8)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_roi_encoding_is_lossless(height: int, width: int, seed: int) -> None:
    mask = np.random.default_rng(seed).random((height, width)) < 0.5
    np.testing.assert_array_equal(decode_roi(encode_roi(mask)), mask)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(1e-3, 1e6), st.integers(0, 2**32 - 1))
def test_depth_encoding_preserves_ratios_within_16_bits(height: int, width: int, metres: float, seed: int) -> None:
    depth = np.random.default_rng(seed).uniform(0.01, 1.0, (height, width)) * metres
    decoded = decode_depth(encode_depth(depth))
    assert decoded.dtype == np.float32 and decoded.max() == 1.0
    np.testing.assert_allclose(decoded, depth / depth.max(), atol=0.5 / 65535 + 1e-7)


def test_depth_encoding_maps_infinity_to_the_maximum() -> None:
    decoded = decode_depth(encode_depth(np.array([[1.0, 4.0], [np.inf, 2.0]])))
    np.testing.assert_allclose(decoded, [[0.25, 1.0], [1.0, 0.5]], atol=1e-4)


@pytest.mark.parametrize("depth", [[[0.0, 0.0]], [[np.nan, 1.0]], [[-1.0, 1.0]], [1.0, 2.0]])
def test_encode_depth_rejects_invalid_maps(depth: list[float]) -> None:
    with pytest.raises(DataError, match="depth"):
        encode_depth(np.array(depth))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1"])
def test_decode_image_equals_pillow_for_png(mode: str) -> None:
    image = Image.fromarray(PIXELS).convert(mode)
    np.testing.assert_array_equal(decode_image(encode(image)), np.asarray(image.convert("RGB")))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_decode_image_agrees_with_pillow_for_jpeg(mode: str) -> None:
    smooth = np.broadcast_to(np.arange(0, 248, 8, dtype=np.uint8)[None, :, None], (24, 31, 3)).copy()
    content = encode(Image.fromarray(smooth).convert(mode), "JPEG")
    with Image.open(io.BytesIO(content)) as image:
        reference = np.asarray(image.convert("RGB")).astype(int)
    assert np.abs(decode_image(content).astype(int) - reference).max() <= 2


@pytest.mark.parametrize("cut", [0, 3, 300, -2])
def test_decode_image_and_check_image_reject_corrupt_images(cut: int) -> None:
    content = simplejpeg.encode_jpeg(np.repeat(PIXELS, 4, axis=0), quality=90)
    for decode in (decode_image, check_image):
        with pytest.raises(DataError, match="cannot be decoded"):
            decode(content[:cut])


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"keep_rgb": True}], ids=str)
def test_check_image_agrees_with_decode_image(mode: str, options: dict[str, bool]) -> None:
    """Wherever a JPEG is truncated: the check decodes only its luma."""
    content = encode(Image.fromarray(np.repeat(PIXELS, 3, axis=0)).convert(mode), "JPEG", **options)
    assert check_image(content) == decode_image(content).shape[:2] == (72, 31)

    def outcome(decode: Callable[[bytes], object], cut: int) -> str:
        try:
            decode(content[:cut])
        except DataError as error:
            return str(error)
        return "valid"

    cuts = range(len(content) // 2, len(content), len(content) // 16)
    assert [outcome(check_image, cut) for cut in cuts] == [outcome(decode_image, cut) for cut in cuts]


def test_decode_image_rejects_more_pixels_than_the_file_can_encode() -> None:
    # A few hundred bytes that claim 60,000 x 60,000 pixels, ten gigabytes when decoded.
    content = bytearray(jpeg(1))
    start = content.index(b"\xff\xc0") + 5
    content[start : start + 4] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(DataError, match=r"bytes cannot encode 60000x60000 pixels"):
        decode_image(bytes(content))


def test_make_sample_reads_size_and_hash_and_result_can_be_pickled() -> None:
    image = encode(Image.fromarray(PIXELS))
    sample = make_sample(name="a", split="train", scene="s", image=image, points=np.array([[1.5, 2.5]]))
    assert (sample.height, sample.width) == (24, 31) and sample.points.dtype == np.float32
    copy = pickle.loads(pickle.dumps(sample))
    assert bytes(copy.image) == image and copy.sha256 == sample.sha256
    np.testing.assert_array_equal(copy.points, sample.points)


def test_validate_points_accepts_any_empty_array_of_points() -> None:
    for empty in (np.zeros((0, 2)), np.zeros((0, 0)), np.array([])):
        assert validate_points(empty).shape == (0, 2)


@pytest.mark.parametrize(
    ("points", "problem"),
    [
        ([[1.0, np.nan], [np.inf, 1.0]], "2 of 2 points are not finite"),
        ([[1.0, 2.0, 3.0]], r"points have shape \(1, 3\)"),
        ([[1.0, -1e9]], r"a point is 1e\+09 pixels from the image's corner"),
    ],
)
def test_make_sample_rejects_invalid_points(points: list[list[float]], problem: str) -> None:
    with pytest.raises(DataError, match=f"a: {problem}"):
        make_sample(name="a", split="t", scene="s", image=b"", points=np.array(points), shape=(2, 3))


def test_points_outside_counts_the_border_as_inside() -> None:
    points = np.array([[0, 0], [31, 24], [31.5, 1], [-0.1, 1], [1, 24.1]], dtype=np.float32)
    assert points_outside(points, 24, 31) == 3
