"""Decoded images: caching, downsampling, regions of interest, and rectangles of resized maps and images."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from crowdray.data.image_cache import DecodedImage, ImageCache, crop_image, crop_map, downsample_image
from crowdray.data.shards import Dataset


def decoded(image: NDArray[np.uint8]) -> DecodedImage:
    """An image (H, W, 3) without heads."""
    height, width = image.shape[:2]
    return DecodedImage(0, (height, width), np.zeros((0, 2), np.float32), image, None, None)


def test_image_cache_keeps_the_first_images_that_fit(discs: Dataset) -> None:
    unbounded = ImageCache(discs, 1, True, cache_bytes=1e9)
    limited = ImageCache(discs, 1, True, cache_bytes=unbounded[0].nbytes + unbounded[1].nbytes)
    for row in (0, 1, 2, 3, 0, 2):
        np.testing.assert_array_equal(limited[row].image, unbounded[row].image)
    assert [limited[row] is limited[row] for row in range(4)] == [True, True, False, False]


@pytest.mark.parametrize("downsample", [1, 2])
def test_decoded_image_nbytes_includes_depth_before_decoding(discs: Dataset, downsample: int) -> None:
    image = ImageCache(discs, downsample, True, 0)[4]
    expected = image.nbytes
    assert image.depth is not None
    assert image.encoded_depth is not None
    parts = (image.image.nbytes, image.points.nbytes, image.depth.nbytes, len(image.encoded_depth))
    assert expected == image.nbytes == sum(parts)


def test_downsampling_averages_squares_and_scales_points(discs: Dataset) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    expected = np.rint(pixels.reshape(3, 2, 4, 2, 3).mean(axis=(1, 3)))
    np.testing.assert_array_equal(downsample_image(pixels, 2), expected)
    image, whole = (ImageCache(discs, factor, True, 0)[4] for factor in (2, 1))
    np.testing.assert_allclose(image.points * 2, whole.points)
    assert image.depth is not None and whole.depth is not None
    assert image.size == image.depth.shape == (32, 48)
    expected = whole.depth.astype(np.float32).reshape(32, 2, 48, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(image.depth, expected, atol=1e-3)


def test_load_image_removes_heads_outside_the_region_of_interest(noise: Dataset) -> None:
    removed = 0
    for row in range(0, 25, 3):
        image, everything = (ImageCache(noise, 1, use_roi, 0)[row] for use_roi in (True, False))
        assert image.roi is not None and everything.roi is None
        column, line = everything.points.astype(int).T
        np.testing.assert_array_equal(image.points, everything.points[image.roi[line, column]])
        removed += len(everything.points) - len(image.points)
    assert removed > 0


@pytest.mark.parametrize("size", [(768, 1024), (97, 61), (48, 64), (40, 50), (1, 1)])
def test_crop_map_equals_the_rectangle_of_the_resized_map(size: tuple[int, int]) -> None:
    """Compare with torch's bilinear interpolation, enlarging and reducing."""
    rng = np.random.default_rng(0)
    values = rng.random((48, 64)).astype(np.float16)
    whole = F.interpolate(torch.from_numpy(values.astype(np.float32))[None, None], size, mode="bilinear")[0, 0].numpy()
    for _ in range(50):
        rows, columns = (slice(*np.sort(rng.choice(side + 1, 2, replace=False)).tolist()) for side in size)
        np.testing.assert_allclose(crop_map(values, size, rows, columns), whole[rows, columns], atol=1e-5)


def test_crop_image_equals_the_rectangle_of_the_resized_image() -> None:
    """Compare with Pillow's resizing of whole images, which rounds after each of two passes."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        source, target = rng.integers(8, 90, (2, 2))
        image = rng.integers(0, 256, (*source, 3)).astype(np.uint8)
        whole = np.asarray(Image.fromarray(image).resize(target[::-1].tolist(), Image.Resampling.BILINEAR))
        rows, columns = (slice(rng.integers(side), side) for side in target.tolist())
        part = crop_image(decoded(image), tuple(target.tolist()), rows, columns)
        off = np.abs(part.astype(int) - whole[rows, columns].astype(int))
        assert off.max() <= 2
        assert (off > 0).mean() < 0.5
