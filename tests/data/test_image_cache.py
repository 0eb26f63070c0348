"""Decoded pictures: what is kept, how they are brought to size, and parts of maps that are never made whole."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from crowdray.data.image_cache import ImageCache, image_part, map_part, shrink
from crowdray.data.shards import Dataset


def test_the_first_pictures_stay_as_long_as_they_have_room(discs: Dataset) -> None:
    unbounded = ImageCache(discs, 1, True, cache_bytes=1e9)
    request_timeout = ImageCache(discs, 1, True, cache_bytes=unbounded[0].nbytes + unbounded[1].nbytes)
    for row in (0, 1, 2, 3, 0, 2):
        np.testing.assert_array_equal(request_timeout[row].image, unbounded[row].image)
    assert [request_timeout[row] is request_timeout[row] for row in range(4)] == [True, True, False, False]


@pytest.mark.parametrize("downsample", [1, 2])
def test_what_a_picture_takes_is_known_before_its_depth_is_decoded(discs: Dataset, downsample: int) -> None:
    picture = ImageCache(discs, downsample, True, 0)[4]
    expected = picture.nbytes
    assert picture.depth is not None
    assert picture.encoded_depth is not None
    held = (picture.image.nbytes, picture.points.nbytes, picture.depth.nbytes, len(picture.encoded_depth))
    assert expected == picture.nbytes == sum(held)


def test_shrinking_averages_squares_and_scales_points(discs: Dataset) -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    expected = np.rint(image.reshape(3, 2, 4, 2, 3).mean(axis=(1, 3)))
    np.testing.assert_array_equal(shrink(image, 2), expected)
    picture = ImageCache(discs, 2, True, 0)[4]
    whole = ImageCache(discs, 1, True, 0)[4]
    np.testing.assert_allclose(picture.points * 2, whole.points)
    assert picture.size == (32, 48)
    assert picture.depth is not None
    assert whole.depth is not None
    assert picture.depth.shape == (32, 48)
    expected = whole.depth.astype(np.float32).reshape(32, 2, 48, 2).mean(axis=(1, 3))
    np.testing.assert_allclose(picture.depth, expected, atol=1e-3)


def test_heads_outside_the_region_of_interest_do_not_count(discs: Dataset) -> None:
    picture = ImageCache(discs, 1, True, 0)[8]
    everything = ImageCache(discs, 1, False, 0)[8]
    assert picture.roi is not None
    assert (picture.points[:, 1] >= 8).all()
    assert len(everything.points) == (everything.points[:, 1] >= 0).sum() >= len(picture.points)
    assert everything.roi is None


@pytest.mark.parametrize("size", [(768, 1024), (97, 61), (48, 64), (40, 50), (1, 1)])
def test_a_part_of_a_stretched_map_is_cut_from_the_whole(size: tuple[int, int]) -> None:
    """torch's bilinear interpolation as the reference, also where the map is made smaller."""
    rng = np.random.default_rng(0)
    values = rng.random((48, 64)).astype(np.float16)
    whole = F.interpolate(torch.from_numpy(values.astype(np.float32))[None, None], size, mode="bilinear")[0, 0].numpy()
    for _ in range(50):
        rows, columns = (slice(*np.sort(rng.choice(side + 1, 2, replace=False)).tolist()) for side in size)
        np.testing.assert_allclose(map_part(values, size, rows, columns), whole[rows, columns], atol=1e-5)


def test_a_part_of_a_resized_image_is_cut_from_the_whole() -> None:
    """Pillow's resizing of whole images as the reference, up to how it rounds after each of its two passes."""
    rng = np.random.default_rng(1)
    for _ in range(200):
        have, want = rng.integers(8, 90, (2, 2))
        image = rng.integers(0, 256, (*have, 3)).astype(np.uint8)
        whole = np.asarray(Image.fromarray(image).resize(want[::-1].tolist(), Image.Resampling.BILINEAR))
        rows, columns = (slice(rng.integers(side), side) for side in want.tolist())
        part = image_part(image, tuple(want.tolist()), rows, columns)
        off = np.abs(part.astype(int) - whole[rows, columns].astype(int))
        assert off.max() <= 2
        assert (off > 0).mean() < 0.5
