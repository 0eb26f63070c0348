"""Errors by the number of heads: groups contain each image once; the calibration is that of known lines."""

import math

import numpy as np
import pytest

from crowdray.evaluation.levels import calibrate, count_groups, empty_images, error_levels
from crowdray.evaluation.metrics import ImageCount

from ..support.cards import COUNTS


def test_error_levels_contain_each_image_once_in_order_of_its_heads() -> None:
    levels = error_levels(COUNTS)
    assert [level.metrics.images for level in levels] == [2, 2, 2]
    assert [level.heads for level in levels] == [(0, 3), (7, 12), (45, 90)]
    assert [level.level for level in error_levels(COUNTS[:1])] == ["dense"]


@pytest.mark.parametrize("number", [1, 3, 10])
@pytest.mark.parametrize("images", [0, 1, 4, 25])
def test_count_groups_contain_each_image_once_and_differ_by_one_at_most(images: int, number: int) -> None:
    counts = [ImageCount(row, truth, 0.0, 0.0) for row, truth in enumerate((np.arange(images) * 7 % 10).tolist())]
    groups = count_groups(counts, number)
    assert sorted(count.row for group in groups for count in group) == list(range(images))
    assert [c.truth for group in groups for c in group] == sorted(c.truth for c in counts)
    assert len({len(group) for group in groups}) <= 2 and len(groups) == min(images, number)


def test_calibrate_recovers_a_line_and_the_coverage_of_intervals() -> None:
    counts = [ImageCount(row, row, 0.8 * row + 3, 0.0) for row in range(10)]
    # Every second image has an interval; those of heads 0, 2 and 4 contain the truth.
    intervals = [(row - 1.0, row + (1.0 if row < 5 else -0.5)) if row % 2 == 0 else None for row in range(10)]
    calibration = calibrate(counts, intervals)
    assert calibration.slope == pytest.approx(0.8) and calibration.intercept == pytest.approx(3.0)
    assert (calibration.intervals, calibration.coverage) == (5, 0.6)
    constant = calibrate([ImageCount(0, 5, 4.0, 4.0)] * 3, [None] * 3)
    assert math.isnan(constant.slope) and math.isnan(constant.coverage) and constant.intervals == 0


def test_empty_images_summarise_false_counts() -> None:
    counts = [ImageCount(0, 0, 0.5, 0.5), ImageCount(1, 9, 20.0, 20.0), ImageCount(2, 0, 2.5, 2.5)]
    empty = empty_images(counts)
    assert (empty.images, empty.mean, empty.max) == (2, 1.5, 2.5)
    assert empty_images(counts[1:2]).images == 0
