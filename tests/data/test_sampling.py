"""Sampling laws: every draw is a pure function, every index is served once, every pixel counts the same."""

import dataclasses

import numpy as np
import pytest

from crowdray.data.sampling import (
    Window,
    WindowRule,
    _place,
    _range,
    coverage,
    draw_window,
    epoch_batches,
    loss_weight,
    rank_share,
    split_validation,
)

RULE = WindowRule(crop=32, context=12, margin=10, stride=4, flip=0.5, brightness=0.2, contrast=0.3)


@pytest.mark.parametrize("rule", ["random", "run"])
def test_validation_split_is_a_partition_of_the_asked_size(rule: str) -> None:
    rows = np.arange(100, 900)
    train, held = split_validation(rows, 1 / 6, rule, seed=3)  # type: ignore[arg-type]
    assert len(held) == 133
    assert sorted([*train, *held]) == rows.tolist()
    again = split_validation(rows, 1 / 6, rule, seed=3)  # type: ignore[arg-type]
    assert np.array_equal(again[0], train)
    assert (held.max() - held.min() == 132) == (rule == "run")


@pytest.mark.parametrize("repeats", [1, 3])
def test_an_epoch_serves_every_draw_once_except_the_dropped_remainder(repeats: int) -> None:
    batches = epoch_batches(50, 8, seed=1, epoch=4, repeats=repeats)
    draws = np.concatenate(batches)
    assert len(draws) == 50 * repeats // 8 * 8
    assert len(set(draws.tolist())) == len(draws)
    assert set(draws.tolist()) <= set(range(50 * repeats))
    assert not np.array_equal(draws, np.concatenate(epoch_batches(50, 8, seed=1, epoch=5, repeats=repeats)))


@pytest.mark.parametrize("world", [1, 2, 64])
def test_ranks_share_each_global_batch_without_overlap(world: int) -> None:
    for batch in epoch_batches(500, 128, seed=0, epoch=1):
        shares = [rank_share(batch, rank, world) for rank in range(world)]
        assert sorted(np.concatenate(shares).tolist()) == sorted(batch.tolist())
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_windows_are_pure_functions_and_differ_between_epochs_samples_and_repeats() -> None:
    def draw(**change: int) -> object:
        return draw_window(RULE, (240, 320), **{"seed": 1, "epoch": 2, "sample": 3, "repeat": 0, **change})

    assert draw() == draw()
    others = [draw(seed=2), draw(epoch=3), draw(sample=4), draw(repeat=1)]
    assert all(other != draw() for other in others)


@pytest.mark.parametrize("size", [(240, 320), (50, 61), (33, 240), (20, 24)])
def test_windows_hold_their_crop_keep_to_the_stride_and_stay_in_the_image(size: tuple[int, int]) -> None:
    for sample in range(200):
        window = draw_window(RULE, size, seed=0, epoch=0, sample=sample)
        for start, extent, crop, length in (
            (window.top, window.height, window.crop_top, size[0]),
            (window.left, window.width, window.crop_left, size[1]),
        ):
            assert extent % RULE.stride == 0
            assert crop % RULE.stride == 0
            assert 0 <= crop <= extent - RULE.crop
            assert start >= 0
            assert start % RULE.stride == 0
            assert start == 0 or start + extent < length + RULE.stride


def test_a_window_as_large_as_the_image_is_the_image_with_equal_weights() -> None:
    whole = dataclasses.replace(RULE, context=400)
    window = draw_window(whole, (240, 320), seed=0, epoch=0, sample=5)
    assert (window.top, window.left, window.height, window.width) == (0, 0, 240, 320)
    for weights in loss_weight(whole, (240, 320), window):
        np.testing.assert_array_equal(weights, 1)


@pytest.mark.parametrize("length", [24, 33, 61, 240])
def test_in_expectation_every_pixel_of_a_row_counts_the_same(length: int) -> None:
    """Averages loss_weight over all equally likely windows along one axis, the other axis being whole."""
    total = np.zeros(length)
    offsets = range(_range(RULE, length))
    for offset in offsets:
        start, extent, crop = _place(RULE, length, offset)
        window = Window(0, start, 32, extent, 0, crop, False, 0.0, 0.0, (0.0, 0.0, 0.0))
        _, weight = loss_weight(RULE, (32, length), window)
        inside = min(extent, length - start)
        total[start : start + inside] += weight[:inside] / extent
        assert (weight[inside:] == 0).all()
    np.testing.assert_allclose(total / len(offsets), 1 / length, rtol=1e-5)
    assert (coverage(RULE, length) > 0).all()


def test_pixels_near_a_cut_edge_carry_no_loss_and_those_at_the_images_border_do() -> None:
    rule = dataclasses.replace(RULE, flip=0.0)
    seen_border = seen_cut = False
    for sample in range(300):
        window = draw_window(rule, (56, 240), seed=0, epoch=0, sample=sample)
        _, weight = loss_weight(rule, (56, 240), window)
        cut = window.left > 0
        assert (weight[:10] == 0).all() == cut
        seen_cut |= cut
        seen_border |= not cut
    assert seen_border
    assert seen_cut
