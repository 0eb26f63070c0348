"""Batches: what is in them, that ranks share them, and that a mirrored window has mirrored targets."""

import dataclasses

import numpy as np
import pytest
import torch

from crowdray.data.loader import Loader, PictureStore, collate, rescaled, shrink
from crowdray.data.sampling import Window, WindowRule, draw_window, loss_weight
from crowdray.data.shards import Dataset
from crowdray.data.targets import make_targets

RULE = WindowRule(crop=32, context=8, margin=8, stride=4)


@pytest.fixture(scope="module")
def store(discs: Dataset) -> PictureStore:
    return PictureStore(discs, downsample=1, use_roi=True, cache_bytes=1e8)


def loader(store: PictureStore, *, rank: int = 0, world: int = 1, repeats: int = 2) -> Loader:
    rule = dataclasses.replace(RULE, flip=0.5, brightness=0.1, colour=0.1, scale=0.3)
    rows = store.dataset.rows("train")
    return Loader(store, rows, rule, batch=6, repeats=repeats, seed=3, rank=rank, world=world)


def test_a_batch_is_cut_from_its_pictures(store: PictureStore) -> None:
    picture = store[4]
    window = draw_window(RULE, picture.size, seed=0, epoch=1, sample=4)
    batch = collate([(picture, window)], RULE)
    cut = (slice(window.top, window.top + window.height), slice(window.left, window.left + window.width))
    np.testing.assert_array_equal(batch.image[0].permute(1, 2, 0).numpy(), picture.image[cut])
    assert picture.roi is not None
    np.testing.assert_array_equal(batch.roi[0, 0].numpy(), picture.roi[cut])
    expected = loss_weight(RULE, picture.size, window) * picture.roi[cut]
    np.testing.assert_array_equal(batch.weight[0, 0].numpy(), expected)
    corner = np.array([window.left, window.top])
    np.testing.assert_allclose(batch.points[0].numpy() + corner, picture.points, atol=1e-5)
    inside = picture.points - corner - np.array([window.crop_left, window.crop_top])
    assert batch.count.item() == ((inside >= 0) & (inside < RULE.crop)).all(axis=1).sum()


def test_a_mirrored_window_has_mirrored_pixels_targets_and_the_same_count(store: PictureStore) -> None:
    pictures = [store[row] for row in (4, 7, 8)]
    windows = [draw_window(RULE, p.size, seed=0, epoch=1, sample=p.row) for p in pictures]
    straight = collate([*zip(pictures, windows, strict=True)], RULE)
    mirrored = collate([(p, dataclasses.replace(w, flip=True)) for p, w in zip(pictures, windows, strict=True)], RULE)
    size = tuple(straight.roi.shape[-2:])
    there, here = (
        make_targets(b.points, b.present, size, b.depth, sigma=2.0, threshold=0.3, extent=b.extent, roi=b.roi)  # type: ignore[arg-type]
        for b in (straight, mirrored)
    )
    assert torch.equal(mirrored.image.flip(-1), straight.image)
    assert torch.equal(mirrored.weight.flip(-1), straight.weight)
    torch.testing.assert_close(here.density.flip(-1), there.density)
    torch.testing.assert_close(here.depth.flip(-1), there.depth)
    assert torch.equal(mirrored.count, straight.count)
    width = straight.image.shape[-1]
    torch.testing.assert_close(mirrored.corners[:, 1] * 4 + RULE.crop, width - straight.corners[:, 1] * 4)


def test_two_ranks_together_see_what_one_sees(store: PictureStore) -> None:
    alone = list(loader(store).epoch(2))
    shares = [list(loader(store, rank=rank, world=2).epoch(2)) for rank in range(2)]
    assert len(alone) == len(shares[0]) == len(shares[1]) == loader(store).steps()
    for whole, *parts in zip(alone, *shares, strict=True):
        for rank, part in enumerate(parts):
            assert torch.equal(part.rows, whole.rows[rank::2])
            assert torch.equal(part.image, whole.image[rank::2])
            assert torch.equal(part.count, whole.count[rank::2])
            assert part.total == whole.total == len(whole.rows)


@pytest.mark.parametrize(("number", "sizes"), [(1, [6]), (2, [3, 3]), (4, [2, 1, 1, 2]), (9, [1] * 6)])
def test_parts_are_the_batch_in_order(store: PictureStore, number: int, sizes: list[int]) -> None:
    batch = next(loader(store).epoch(2))
    parts = batch.parts(number)
    assert [len(part.rows) for part in parts] == sizes
    for name, value in vars(batch).items():
        if name != "total":
            assert torch.equal(torch.cat([getattr(part, name) for part in parts]), value)
    assert {part.total for part in parts} == {batch.total}


def test_threads_change_nothing(store: PictureStore) -> None:
    threaded = loader(store)
    threaded.ahead = 3
    for one, other in zip(loader(store).epoch(2), threaded.epoch(2), strict=True):
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(getattr(other, n))) for n, v in vars(one).items())


def test_an_epoch_can_be_replayed_and_repeats_of_a_sample_differ(store: PictureStore) -> None:
    first, again = (list(loader(store).epoch(5)) for _ in range(2))
    assert all(torch.equal(a.image, b.image) for a, b in zip(first, again, strict=True))
    rows = torch.cat([b.rows for b in first])
    brightness = torch.cat([b.brightness for b in first])
    twice = next(row for row in rows.tolist() if (rows == row).sum() == 2)
    assert len(set(brightness[rows == twice].tolist())) == 2


def test_a_smaller_picture_is_padded_without_weight(store: PictureStore) -> None:
    picture = store[4]
    small = dataclasses.replace(picture, image=picture.image[:20, :30], roi=None, depth=None)
    window = draw_window(RULE, small.size, seed=0, epoch=0, sample=0)
    batch = collate([(small, window)], RULE)
    assert batch.image.shape[-2:] == (32, 32)
    assert batch.weight[..., 20:, :].sum() == 0
    assert batch.weight[..., :, 30:].sum() == 0
    assert batch.has_depth.item() == 0


def test_the_cache_is_bounded_and_changes_nothing(discs: Dataset) -> None:
    unbounded = PictureStore(discs, 1, True, cache_bytes=1e9)
    bounded = PictureStore(discs, 1, True, cache_bytes=2.5 * unbounded[0].nbytes)
    for row in (0, 1, 2, 3, 0, 2):
        np.testing.assert_array_equal(bounded[row].image, unbounded[row].image)
    assert len(bounded._kept) == 2


def test_shrinking_averages_squares_and_scales_points(discs: Dataset) -> None:
    image = np.random.default_rng(0).integers(0, 256, (6, 8, 3)).astype(np.uint8)
    expected = np.rint(image.reshape(3, 2, 4, 2, 3).mean(axis=(1, 3)))
    np.testing.assert_array_equal(shrink(image, 2), expected)
    picture = PictureStore(discs, 2, True, 0)[4]
    whole = PictureStore(discs, 1, True, 0)[4]
    np.testing.assert_allclose(picture.points * 2, whole.points)
    assert picture.size == (32, 48)


def test_heads_outside_the_region_of_interest_do_not_count(discs: Dataset) -> None:
    picture = PictureStore(discs, 1, True, 0)[8]
    everything = PictureStore(discs, 1, False, 0)[8]
    assert picture.roi is not None
    assert (picture.points[:, 1] >= 8).all()
    assert len(everything.points) == (everything.points[:, 1] >= 0).sum() >= len(picture.points)
    assert everything.roi is None


def test_a_rescaled_picture_keeps_its_heads_on_their_pixels(store: PictureStore) -> None:
    picture = store[8]
    larger = rescaled(picture, 1.27, 4)
    assert larger.size == (80, 120)
    np.testing.assert_allclose(larger.points, picture.points * 1.25, rtol=1e-6)
    assert larger.roi is not None
    assert picture.roi is not None
    assert larger.roi.mean() == pytest.approx(picture.roi.mean(), abs=0.02)
    centres = [
        p[tuple((s.points[:, ::-1]).astype(int).T)] for s, p in ((picture, picture.image), (larger, larger.image))
    ]
    np.testing.assert_allclose(centres[0], centres[1], atol=40)
    assert rescaled(picture, 1.0, 4) is picture


def test_augmentation_is_its_formula(store: PictureStore) -> None:
    batch = next(loader(store).epoch(1))
    expected = batch.image.double() * (1 + batch.colour.double())[:, :, None, None]
    expected = (expected - 127.5) * (1 + batch.contrast.double())[:, None, None, None]
    expected = (expected + 127.5 + 255 * batch.brightness.double()[:, None, None, None]).clamp(0, 255)
    torch.testing.assert_close(batch.augmented().double(), expected, atol=1e-3, rtol=1e-5)


def test_window_type_is_plain_data() -> None:
    window = draw_window(RULE, (64, 96), seed=0, epoch=0, sample=0)
    assert window == Window(**dataclasses.asdict(window))
