"""Batches: what is in them, that ranks share them, and that a mirrored window has mirrored targets."""

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image

from crowdray.data import image_cache
from crowdray.data.batch import Batch, View, collate
from crowdray.data.image_cache import DecodedImage, ImageCache, load_image, scaled_size
from crowdray.data.loader import Loader
from crowdray.data.sample import Sample
from crowdray.data.sampling import Window, WindowRule, draw_window, loss_weight
from crowdray.data.shards import Dataset
from crowdray.data.targets import REACH, Targets, make_targets

RULE = WindowRule(crop=32, context=8, margin=8, stride=4)


@pytest.fixture(scope="module")
def store(discs: Dataset) -> ImageCache:
    return ImageCache(discs, downsample=1, use_roi=True, cache_bytes=1e8)


def loader(store: ImageCache, *, rank: int = 0, world: int = 1, repeats: int = 2) -> Loader:
    rule = dataclasses.replace(RULE, flip=0.5, brightness=0.1, colour=0.1, scale=0.3)
    rows = store.dataset.rows("train")
    return Loader(store, rows, rule, batch=6, repeats=repeats, seed=3, rank=rank, world=world)


def targets(batch: Batch, sigma: float = 2.0) -> Targets:
    size = (batch.roi.shape[-2], batch.roi.shape[-1])
    return make_targets(
        batch.points,
        batch.present,
        size,
        batch.depth,
        sigma=sigma,
        threshold=0.3,
        extent=batch.extent,
        roi=batch.roi.float(),
    )


def test_a_batch_is_cut_from_its_pictures(store: ImageCache) -> None:
    picture = store[4]
    window = draw_window(RULE, picture.size, seed=0, epoch=1, sample=4)
    batch = collate([View(picture, picture.size, window)], RULE)
    cut = (slice(window.top, window.top + window.height), slice(window.left, window.left + window.width))
    np.testing.assert_array_equal(batch.image[0].permute(1, 2, 0).numpy(), picture.image[cut])
    assert picture.roi is not None
    np.testing.assert_array_equal(batch.roi[0, 0].numpy(), picture.roi[cut])
    expected = np.outer(*loss_weight(RULE, picture.size, window)) * picture.roi[cut]
    np.testing.assert_array_equal(batch.weight[0, 0].numpy(), expected)
    assert picture.depth is not None
    np.testing.assert_array_equal(batch.depth[0, 0].numpy(), picture.depth[cut])
    corner = np.array([window.left, window.top])
    np.testing.assert_allclose(batch.points[0].numpy() + corner, picture.points, atol=1e-5)
    inside = picture.points - corner - np.array([window.crop_left, window.crop_top])
    assert batch.count.item() == ((inside >= 0) & (inside < RULE.crop)).all(axis=1).sum()


def test_a_mirrored_window_has_mirrored_pixels_targets_and_the_same_count(store: ImageCache) -> None:
    pictures = [store[row] for row in (4, 7, 8)]
    windows = [draw_window(RULE, p.size, seed=0, epoch=1, sample=p.row) for p in pictures]
    straight, mirrored = (
        collate(
            [View(p, p.size, dataclasses.replace(w, flip=flip)) for p, w in zip(pictures, windows, strict=True)], RULE
        )
        for flip in (False, True)
    )
    there, here = (targets(b) for b in (straight, mirrored))
    assert torch.equal(mirrored.image.flip(-1), straight.image)
    assert torch.equal(mirrored.weight.flip(-1), straight.weight)
    torch.testing.assert_close(here.density.flip(-1), there.density)
    torch.testing.assert_close(here.depth.flip(-1), there.depth)
    assert torch.equal(mirrored.count, straight.count)
    width = straight.image.shape[-1]
    torch.testing.assert_close(mirrored.corners[:, 1] * 4 + RULE.crop, width - straight.corners[:, 1] * 4)


def test_two_ranks_together_see_what_one_sees(store: ImageCache) -> None:
    alone = list(loader(store).epoch(2))
    shares = [list(loader(store, rank=rank, world=2).epoch(2)) for rank in range(2)]
    assert len(alone) == len(shares[0]) == len(shares[1]) == loader(store).steps()
    for whole, *parts in zip(alone, *shares, strict=True):
        for name in ("rows", "image", "count"):
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
        assert all(part.total == whole.total == len(whole.rows) for part in parts)


@pytest.mark.parametrize(("number", "sizes"), [(1, [6]), (2, [3, 3]), (4, [2, 1, 1, 2]), (9, [1] * 6)])
def test_parts_are_the_batch_in_order(store: ImageCache, number: int, sizes: list[int]) -> None:
    batch = next(loader(store).epoch(2))
    parts = batch.parts(number)
    assert [len(part.rows) for part in parts] == sizes
    for name, value in vars(batch).items():
        if name != "total":
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), value)
    assert {part.total for part in parts} == {batch.total}


def assert_same(one: Batch, other: Batch) -> None:
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(getattr(other, n))) for n, v in vars(one).items())


@pytest.mark.parametrize("ahead", [1, 3, 50])
def test_threads_change_nothing(store: ImageCache, ahead: int) -> None:
    """Nor do batches that were begun for an epoch, a depth or a consumer that did not come."""
    threaded = loader(store)
    threaded.ahead = ahead
    asked = [(2, True), (3, True), (4, False), (4, False), (9, True), (10, True)]
    for number, depth in asked:
        for one, other in zip(loader(store).epoch(number, depth), threaded.epoch(number, depth), strict=True):
            assert_same(one, other)
        next(abandoned := threaded.epoch(number + 1, depth))
        if number == 4:
            abandoned.close()


def test_the_next_epoch_is_begun_while_the_last_batches_are_used(store: ImageCache) -> None:
    threaded = loader(store)
    threaded.ahead = 2
    list(threaded.epoch(2))
    number, depth, [first, _] = threaded._begun
    assert (number, depth) == (3, True)
    assert next(threaded.epoch(3)) is first.result()


def test_an_epoch_can_be_replayed_and_repeats_of_a_sample_differ(store: ImageCache) -> None:
    first, again = (list(loader(store).epoch(5)) for _ in range(2))
    assert all(torch.equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    rows = torch.cat([b.rows for b in first])
    brightness = torch.cat([b.brightness for b in first])
    twice = next(row for row in rows.tolist() if (rows == row).sum() == 2)
    assert len(set(brightness[rows == twice].tolist())) == 2


def test_repeats_of_a_sample_share_its_decoding(discs: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def noted(sample: Sample, row: int, *given: Any) -> DecodedImage:
        opened.append(row)
        return load_image(sample, row, *given)

    monkeypatch.setattr(image_cache, "open_picture", noted)
    epoch = loader(ImageCache(discs, 1, True, cache_bytes=0)).epoch(2)
    rows = torch.cat([batch.rows for batch in epoch]).tolist()
    assert len(rows) == 2 * len(set(rows))
    assert sorted(opened) == sorted(set(rows))


def test_depth_that_is_not_asked_for_is_not_decoded_and_changes_nothing_else(store: ImageCache) -> None:
    known = False
    for whole, without in zip(loader(store).epoch(2), loader(store).epoch(2, depth=False), strict=True):
        known |= bool(whole.depth.any())
        assert not without.depth.any()
        assert not without.has_depth.any()
        different = {
            n
            for n, v in vars(whole).items()
            if not torch.equal(torch.as_tensor(v), torch.as_tensor(getattr(without, n)))
        }
        assert different <= {"depth", "has_depth"}
    assert known


def test_heads_beyond_the_reach_of_their_kernel_change_no_target(discs: Dataset) -> None:
    """Also those that lie beyond the image, whose kernels are put at its rim."""
    sigma, left_out = 1.5, 0
    for row in range(24):
        picture = ImageCache(discs, 1, False, 0)[row]
        far = np.array([[-300, 20], [50, 900], [96 + 7, -5]], np.float32)
        picture = dataclasses.replace(picture, points=np.concatenate([picture.points, far]))
        window = draw_window(RULE, picture.size, seed=0, epoch=1, sample=row)
        near, every = (
            collate([View(picture, picture.size, window)], dataclasses.replace(RULE, reach=reach))
            for reach in (REACH * sigma, math.inf)
        )
        assert torch.equal(targets(near, sigma).density, targets(every, sigma).density)
        assert torch.equal(near.count, every.count)
        left_out += int(every.present.sum() - near.present.sum())
    assert left_out > 24


def test_a_view_of_a_scaled_picture_is_cut_from_the_whole_scaled(store: ImageCache) -> None:
    """Pillow's and torch's resizing of whole images as the references."""
    picture = store[8]
    assert picture.roi is not None
    assert picture.depth is not None
    for scale in (0.8, 1.0, 1.27):
        size = scaled_size(picture, scale, RULE.stride)
        assert all(
            side % 4 == 0 and abs(side / now - scale) < 0.04 for side, now in zip(size, picture.size, strict=True)
        )
        image = np.asarray(Image.fromarray(picture.image).resize(size[::-1], Image.Resampling.BILINEAR))
        depth, roi = (stretched(m.astype(np.float32), size) for m in (picture.depth, picture.roi))
        for epoch in range(10):
            window = draw_window(RULE, size, seed=0, epoch=epoch, sample=8)
            cut = (slice(window.top, window.top + window.height), slice(window.left, window.left + window.width))
            batch = collate([View(picture, size, window)], RULE)
            shown = batch.image[0].permute(1, 2, 0).numpy()
            off = np.abs(shown.astype(int) - image[cut].astype(int))  # Pillow rounds after each of two passes
            assert off.max() <= 2
            assert off.mean() < 0.2
            np.testing.assert_allclose(batch.depth[0, 0].numpy(), depth[cut], atol=1e-6)
            np.testing.assert_array_equal(batch.roi[0, 0].numpy(), roi[cut] >= 0.5)
            factor = np.array(size[::-1]) / picture.size[::-1]
            expected = picture.points * factor - np.array([window.left, window.top])
            np.testing.assert_allclose(batch.points[0].numpy(), expected, atol=1e-4)


def stretched(values: NDArray[np.float32], size: tuple[int, int]) -> NDArray[np.float32]:
    whole: NDArray[np.float32] = F.interpolate(torch.from_numpy(values)[None, None], size, mode="bilinear")[
        0, 0
    ].numpy()
    return whole


def test_a_smaller_picture_is_padded_without_weight(store: ImageCache) -> None:
    picture = store[4]
    small = dataclasses.replace(picture, image=picture.image[:20, :30], roi=None, encoded_depth=None)
    window = draw_window(RULE, small.size, seed=0, epoch=0, sample=0)
    batch = collate([View(small, small.size, window)], RULE)
    assert batch.image.shape[-2:] == (32, 32)
    assert batch.weight[..., 20:, :].sum() == 0
    assert batch.weight[..., :, 30:].sum() == 0
    assert batch.has_depth.item() == 0


def test_augmentation_is_its_formula(store: ImageCache) -> None:
    batch = next(loader(store).epoch(1))
    expected = batch.image.double() * (1 + batch.colour.double())[:, :, None, None]
    expected = (expected - 127.5) * (1 + batch.contrast.double())[:, None, None, None]
    expected = (expected + 127.5 + 255 * batch.brightness.double()[:, None, None, None]).clamp(0, 255)
    torch.testing.assert_close(batch.augmented().double(), expected, atol=1e-3, rtol=1e-5)


def test_window_type_is_plain_data() -> None:
    window = draw_window(RULE, (64, 96), seed=0, epoch=0, sample=0)
    assert window == Window(**dataclasses.asdict(window))
