"""Samples: lossless encodings, and rejection of invalid content."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from crowdray.data.sample import (
    decode_depth,
    decode_roi,
    encode_depth,
    encode_roi,
    make_sample,
    points_outside,
    validate_points,
)
from crowdray.errors import DataError

from ..support.builders import encode

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
