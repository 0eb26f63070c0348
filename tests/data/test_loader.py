"""Batches: their content, augmentation, division among ranks and microbatches, and preparation by threads."""

import dataclasses
import hashlib
import itertools
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from crowdray.config import SamplingConfig
from crowdray.data import decoding, image_cache
from crowdray.data.batch import Batch, Crop, collate
from crowdray.data.image_cache import DecodedImage, EncodedImage, ImageCache, scaled_size
from crowdray.data.loader import Loader
from crowdray.data.sampling import Window, WindowConfig, draw_window, loss_weight
from crowdray.data.shards import Dataset
from crowdray.data.targets import KERNEL_RADIUS, Targets, make_targets

from ..support.builders import encode, noise_sample, write_dataset

CONFIG = WindowConfig(SamplingConfig(crop=32, context=8, flip=0), margin=8, stride=4)


@pytest.fixture(scope="module")
def cache(discs: Dataset) -> ImageCache:
    return ImageCache(discs, downsample=1, use_roi=True, cache_bytes=1e8)


def loader(cache: ImageCache, *, rank: int = 0, world: int = 1) -> Loader:
    sampling = SamplingConfig(crop=32, context=8, batch=6, crops_per_image=2, brightness=0.1, colour=0.1, scale=0.3)
    config = dataclasses.replace(CONFIG, sampling=sampling)
    return Loader(cache, cache.dataset.rows("train"), config, seed=3, rank=rank, world=world)


def targets(batch: Batch, sigma: float = 2.0) -> Targets:
    heads, roi = (batch.points, batch.valid_mask, batch.size), batch.roi.float()
    return make_targets(*heads, batch.depth, sigma=sigma, threshold=0.3, extent=batch.extent, roi=roi)


def test_collate_cuts_pixels_weights_and_heads_from_the_image(cache: ImageCache) -> None:
    image = cache[4]
    window = draw_window(CONFIG, image.size, seed=0, epoch=1, sample=4)
    batch = collate([Crop(image, image.size, window)], CONFIG)
    cut = (slice(window.top, window.top + window.height), slice(window.left, window.left + window.width))
    np.testing.assert_array_equal(batch.image[0].permute(1, 2, 0).numpy(), image.image[cut])
    assert image.roi is not None
    np.testing.assert_array_equal(batch.roi[0, 0].numpy(), image.roi[cut])
    expected = np.outer(*loss_weight(CONFIG, image.size, window)) * image.roi[cut]
    np.testing.assert_array_equal(batch.weight[0, 0].numpy(), expected)
    assert image.depth is not None
    np.testing.assert_array_equal(batch.depth[0, 0].numpy(), image.depth[cut])
    corner = np.array([window.left, window.top])
    np.testing.assert_allclose(batch.points[0].numpy() + corner, image.points, atol=1e-5)
    inside = image.points - corner - np.array([window.crop_left, window.crop_top])
    assert batch.count.item() == ((inside >= 0) & (inside < CONFIG.sampling.crop)).all(axis=1).sum()


def test_flipped_crop_has_flipped_pixels_and_targets_and_the_same_count(cache: ImageCache) -> None:
    images = [cache[row] for row in (4, 7, 8)]
    crops = [Crop(p, p.size, draw_window(CONFIG, p.size, seed=0, epoch=1, sample=p.row)) for p in images]
    straight, flipped = (
        collate([c._replace(window=dataclasses.replace(c.window, flip=flip)) for c in crops], CONFIG)
        for flip in (False, True)
    )
    expected, found = targets(straight), targets(flipped)
    assert torch.equal(flipped.image.flip(-1), straight.image)
    assert torch.equal(flipped.weight.flip(-1), straight.weight)
    torch.testing.assert_close(found.density.flip(-1), expected.density)
    torch.testing.assert_close(found.depth.flip(-1), expected.depth)
    assert torch.equal(flipped.count, straight.count)
    width = straight.image.shape[-1]
    torch.testing.assert_close(flipped.corners[:, 1] * 4 + CONFIG.sampling.crop, width - straight.corners[:, 1] * 4)


def test_loader_ranks_partition_the_batches_of_one_rank(cache: ImageCache) -> None:
    alone = list(loader(cache).epoch(2))
    ranks = [list(loader(cache, rank=rank, world=2).epoch(2)) for rank in range(2)]
    assert len(alone) == len(ranks[0]) == len(ranks[1]) == loader(cache).steps()
    for whole, *parts in zip(alone, *ranks, strict=True):
        for name in ("rows", "image", "count"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        assert all(part.global_size == whole.global_size == len(whole.rows) for part in parts)


@pytest.mark.parametrize(("number", "sizes"), [(1, [6]), (2, [3, 3]), (4, [2, 1, 1, 2]), (9, [1] * 6)])
def test_microbatches_concatenate_to_the_batch(cache: ImageCache, number: int, sizes: list[int]) -> None:
    batch = next(loader(cache).epoch(2))
    parts = batch.microbatches(number)
    assert [len(part.rows) for part in parts] == sizes
    for name, value in vars(batch).items():
        values = [getattr(part, name) for part in parts]
        assert set(values) == {value} if name == "global_size" else torch.equal(torch.cat(values), value)


def differing_fields(one: Batch, other: Batch) -> set[str]:
    pairs = {name: (torch.as_tensor(value), torch.as_tensor(getattr(other, name))) for name, value in vars(one).items()}
    return {name for name, pair in pairs.items() if not torch.equal(*pair)}


@pytest.mark.parametrize("ahead", [1, 3, 50])
def test_loader_threads_do_not_change_batches(cache: ImageCache, ahead: int) -> None:
    """Not even after batches were prepared for another epoch, another depth or an abandoned iterator."""
    threaded = loader(cache)
    threaded.ahead = ahead
    requests = [(2, True), (3, True), (4, False), (4, False), (9, True), (10, True)]
    for number, depth in requests:
        for one, other in zip(loader(cache).epoch(number, depth), threaded.epoch(number, depth), strict=True):
            assert not differing_fields(one, other)
        next(abandoned := threaded.epoch(number + 1, depth))
        if number == 4:
            abandoned.close()


class CountingCache(ImageCache):
    """Records the rows of all accesses."""

    def __init__(self, dataset: Dataset) -> None:
        super().__init__(dataset, 1, True, 1e8)
        self.accessed: list[int] = []

    def open(self, row: int) -> DecodedImage | EncodedImage:
        self.accessed.append(row)
        return super().open(row)


def test_loader_prepares_first_batches_of_the_next_epoch(discs: Dataset) -> None:
    serial, parallel = CountingCache(discs), CountingCache(discs)
    threaded = loader(parallel)
    threaded.ahead = 2
    list(threaded.epoch(2))
    list(loader(serial).epoch(2))
    list(itertools.islice(loader(serial).epoch(3), 2))
    deadline = time.monotonic() + 20
    while len(parallel.accessed) < len(serial.accessed) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sorted(parallel.accessed) == sorted(serial.accessed)


def test_loader_replays_an_epoch_with_different_repeats_of_a_sample(cache: ImageCache) -> None:
    first, again = (list(loader(cache).epoch(5)) for _ in range(2))
    assert not any(itertools.starmap(differing_fields, zip(first, again, strict=True)))
    rows = torch.cat([b.rows for b in first])
    brightness = torch.cat([b.brightness for b in first])
    twice = next(row for row in rows.tolist() if (rows == row).sum() == 2)
    assert len(set(brightness[rows == twice].tolist())) == 2


def test_loader_decodes_a_sample_once_for_all_its_repeats(discs: Dataset) -> None:
    images = CountingCache(discs)
    rows = torch.cat([batch.rows for batch in loader(images).epoch(2)]).tolist()
    assert len(rows) == 2 * len(set(rows))
    assert sorted(images.accessed) == sorted(set(rows))


def photos(folder: Path, **options: Any) -> Dataset:
    """Eight JPEGs of two sizes with heads, regions of interest and depth; `options` are those of Pillow's encoder."""
    listed, rng = [], np.random.default_rng(0)
    for number in range(8):
        size = (120, 96) if number % 3 else (75, 101)
        sample = noise_sample(number, "train", size, 5, roi=number % 2 == 0, depth=size)
        pixels = Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8))
        content = encode(pixels if number % 4 else pixels.convert("L"), "JPEG", **options)
        listed.append(dataclasses.replace(sample, image=content, sha256=hashlib.sha256(content).hexdigest()))
    return write_dataset(str(folder), listed)


@pytest.mark.parametrize("crops", [1, 3])
@pytest.mark.parametrize(("downsample", "scale"), [(1, 0.0), (1, 0.3), (2, 0.0), (3, 0.3)])
def test_batches_of_jpegs_with_restart_markers_are_the_same(
    crops: int, downsample: int, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Although only the rows of their windows are decoded, of the images that are not cached."""
    sampling = SamplingConfig(crop=24, context=4, batch=6, crops_per_image=crops, scale=scale)
    config = dataclasses.replace(CONFIG, sampling=sampling)
    plain, marked = photos(tmp_path / "plain"), photos(tmp_path / "marked", restart_marker_rows=1)

    def batches(dataset: Dataset, cache_bytes: float) -> list[Batch]:
        cache = ImageCache(dataset, downsample, True, cache_bytes)
        return list(Loader(cache, dataset.rows("train"), config, seed=3).epoch(1))

    expected = batches(plain, 0)
    assert sum(len(batch.rows) for batch in expected) >= 6
    for cache_bytes in (1e4, 1e6):
        for one, other in zip(expected, batches(marked, cache_bytes), strict=True):
            assert not differing_fields(one, other)
    monkeypatch.setattr(image_cache, "decode_image", None)
    monkeypatch.setattr(decoding, "decode_image", None)
    for one, other in zip(expected, batches(marked, 0), strict=True):
        assert not differing_fields(one, other)


def test_loader_without_depth_changes_only_the_depth_fields(cache: ImageCache) -> None:
    known = False
    for whole, without in zip(loader(cache).epoch(2), loader(cache).epoch(2, depth=False), strict=True):
        known |= bool(whole.depth.any())
        assert not without.depth.any()
        assert not without.has_depth.any()
        assert differing_fields(whole, without) <= {"depth", "has_depth"}
    assert known


def test_heads_beyond_reach_change_no_target(discs: Dataset) -> None:
    """Including heads outside the image, whose kernels are moved to its border."""
    sigma, removed = 1.5, 0
    for row in range(24):
        image = ImageCache(discs, 1, False, 0)[row]
        far = np.array([[-300, 20], [50, 900], [96 + 7, -5]], np.float32)
        image = dataclasses.replace(image, points=np.concatenate([image.points, far]))
        window = draw_window(CONFIG, image.size, seed=0, epoch=1, sample=row)
        near, every = (
            collate([Crop(image, image.size, window)], dataclasses.replace(CONFIG, reach=reach))
            for reach in (KERNEL_RADIUS * sigma, math.inf)
        )
        assert torch.equal(targets(near, sigma).density, targets(every, sigma).density)
        assert torch.equal(near.count, every.count)
        removed += int(every.valid_mask.sum() - near.valid_mask.sum())
    assert removed > 24


def test_scaled_crop_has_scaled_size_and_points(cache: ImageCache) -> None:
    image = cache[8]
    for scale in (0.8, 1.0, 1.27):
        size = scaled_size(image, scale, CONFIG.stride)
        assert all(side % 4 == 0 and abs(side / now - scale) < 0.04 for side, now in zip(size, image.size, strict=True))
        whole = Window(0, 0, *size, 0, 0, False, 0.0, 0.0, (0.0, 0.0, 0.0))
        batch = collate([Crop(image, size, whole)], CONFIG)
        resized = Image.fromarray(image.image).resize(size[::-1], Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(batch.image[0].permute(1, 2, 0).numpy(), np.asarray(resized))
        expected = image.points * (np.array(size[::-1]) / image.size[::-1])
        np.testing.assert_allclose(batch.points[0].numpy(), expected, atol=1e-4)


def test_collate_pads_small_images_with_zero_weight(cache: ImageCache) -> None:
    image = cache[4]
    small = dataclasses.replace(image, size=(20, 30), image=image.image[:20, :30], roi=None, encoded_depth=None)
    window = draw_window(CONFIG, small.size, seed=0, epoch=0, sample=0)
    batch = collate([Crop(small, small.size, window)], CONFIG)
    assert batch.image.shape[-2:] == (32, 32)
    assert batch.weight[..., 20:, :].sum() == 0
    assert batch.weight[..., :, 30:].sum() == 0
    assert batch.has_depth.item() == 0


def test_augmented_images_follow_the_formula(cache: ImageCache) -> None:
    batch = next(loader(cache).epoch(1))
    expected = batch.image.double() * (1 + batch.colour.double())[:, :, None, None]
    expected = (expected - 127.5) * (1 + batch.contrast.double())[:, None, None, None]
    expected = (expected + 127.5 + 255 * batch.brightness.double()[:, None, None, None]).clamp(0, 255)
    torch.testing.assert_close(batch.augmented_images().double(), expected, atol=1e-3, rtol=1e-5)
