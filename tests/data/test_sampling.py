"""Sampling: draws are pure functions, each is used once per epoch, and all pixels count equally."""

import dataclasses

import numpy as np
import pytest

from crowdray.config import SamplingConfig
from crowdray.data.sampling import (
    Window,
    WindowConfig,
    coverage,
    draw_window,
    epoch_batches,
    loss_weight,
    rank_slice,
    window_spans,
)
from crowdray.data.splits import draw_subset, split_validation

SAMPLING = SamplingConfig(crop=32, context=12, brightness=0.2, contrast=0.3)
CONFIG = WindowConfig(SAMPLING, margin=10, stride=4)


@pytest.mark.parametrize("method", ["random", "run"])
def test_split_validation_is_a_partition_of_the_given_size(method: str) -> None:
    rows = np.arange(100, 900)
    train, held_out = split_validation(rows, 1 / 6, method, seed=3)  # type: ignore[arg-type]
    assert len(held_out) == 133
    assert sorted([*train, *held_out]) == rows.tolist()
    again = split_validation(rows, 1 / 6, method, seed=3)  # type: ignore[arg-type]
    assert np.array_equal(again[0], train)
    assert (held_out.max() - held_out.min() == 132) == (method == "run")


def test_draw_subset_is_nested_ascending_and_depends_on_the_seed() -> None:
    rows = np.arange(100, 900)
    subsets = [draw_subset(rows, number, seed=3) for number in (10, 50, 800)]
    assert [len(set(subset.tolist())) for subset in subsets] == [10, 50, 800]
    assert set(subsets[0]) < set(subsets[1]) < set(subsets[2]) == set(rows)
    assert all(np.all(np.diff(subset) > 0) for subset in subsets)
    assert not np.array_equal(subsets[0], draw_subset(rows, 10, seed=4))


@pytest.mark.parametrize("repeats", [1, 3])
def test_epoch_batches_contain_each_draw_once_except_the_remainder(repeats: int) -> None:
    batches = epoch_batches(50, 8, seed=1, epoch=4, repeats=repeats)
    draws = np.concatenate(batches)
    assert len(draws) == len(set(draws.tolist())) == 50 * repeats // 8 * 8
    assert set(draws.tolist()) <= set(range(50 * repeats))
    assert not np.array_equal(draws, np.concatenate(epoch_batches(50, 8, seed=1, epoch=5, repeats=repeats)))


@pytest.mark.parametrize("world", [1, 2, 64])
def test_rank_slices_partition_each_global_batch(world: int) -> None:
    for batch in epoch_batches(500, 128, seed=0, epoch=1):
        slices = [rank_slice(batch, rank, world) for rank in range(world)]
        assert sorted(np.concatenate(slices).tolist()) == sorted(batch.tolist())
        assert max(map(len, slices)) - min(map(len, slices)) <= 1


def test_draw_window_depends_on_seed_epoch_sample_and_repeat_only() -> None:
    def draw(**change: int) -> object:
        return draw_window(CONFIG, (240, 320), **{"seed": 1, "epoch": 2, "sample": 3, "repeat": 0, **change})

    assert draw() == draw()
    others = [draw(seed=2), draw(epoch=3), draw(sample=4), draw(repeat=1)]
    assert all(other != draw() for other in others)


@pytest.mark.parametrize("size", [(240, 320), (50, 61), (33, 240), (20, 24)])
def test_draw_window_contains_its_crop_on_the_stride_inside_the_image(size: tuple[int, int]) -> None:
    for sample in range(200):
        window = draw_window(CONFIG, size, seed=0, epoch=0, sample=sample)
        for start, extent, crop, length in (
            (window.top, window.height, window.crop_top, size[0]),
            (window.left, window.width, window.crop_left, size[1]),
        ):
            assert extent % CONFIG.stride == crop % CONFIG.stride == start % CONFIG.stride == 0
            assert 0 <= crop <= extent - SAMPLING.crop
            assert start == 0 or (start > 0 and start + extent < length + CONFIG.stride)


def test_window_of_the_whole_image_has_equal_weights() -> None:
    whole = WindowConfig(dataclasses.replace(SAMPLING, context=400), margin=10, stride=4)
    window = draw_window(whole, (240, 320), seed=0, epoch=0, sample=5)
    assert (window.top, window.left, window.height, window.width) == (0, 0, 240, 320)
    for weights in loss_weight(whole, (240, 320), window):
        np.testing.assert_array_equal(weights, 1)


@pytest.mark.parametrize("length", [24, 33, 61, 240])
def test_loss_weight_counts_all_pixels_equally_in_expectation(length: int) -> None:
    """Average over all windows along one axis; the other axis is whole."""
    total = np.zeros(length)
    spans = window_spans(CONFIG, length)
    for start, extent, crop in spans:
        window = Window(0, start, 32, extent, 0, crop, False, 0.0, 0.0, (0.0, 0.0, 0.0))
        _, weight = loss_weight(CONFIG, (32, length), window)
        inside = min(extent, length - start)
        total[start : start + inside] += weight[:inside] / extent
        assert (weight[inside:] == 0).all()
    np.testing.assert_allclose(total / len(spans), 1 / length, rtol=1e-5)
    assert (coverage(CONFIG, length) > 0).all()


def test_loss_weight_is_zero_near_cut_edges_but_not_at_the_image_border() -> None:
    config = WindowConfig(dataclasses.replace(SAMPLING, flip=0.0), margin=10, stride=4)
    seen = set()
    for sample in range(300):
        window = draw_window(config, (56, 240), seed=0, epoch=0, sample=sample)
        _, weight = loss_weight(config, (56, 240), window)
        assert (weight[:10] == 0).all() == (window.left > 0)
        seen.add(window.left > 0)
    assert seen == {False, True}
