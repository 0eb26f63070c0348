"""Metrics: comparison with plain recomputation, and the properties of GAME."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from crowdray.evaluation.metrics import ImageCount, game_error, summarise

TRUTHS = [0, 3, 17, 5, 240, 0, 1]


def counts(seed: int = 0) -> list[ImageCount]:
    rng = np.random.default_rng(seed)
    return [ImageCount(row, truth, truth + rng.normal(), truth + rng.normal()) for row, truth in enumerate(TRUTHS)]


def test_summarise_equals_plain_recomputation() -> None:
    image_counts = counts()
    errors = [count.predicted - count.truth for count in image_counts]
    relative = [abs(error) / count.truth for error, count in zip(errors, image_counts, strict=True) if count.truth]
    metrics = summarise(image_counts)
    assert metrics.images == len(TRUTHS)
    assert metrics.mae == pytest.approx(sum(map(abs, errors)) / len(errors), rel=1e-12)
    assert metrics.rmse == pytest.approx(math.sqrt(sum(e * e for e in errors) / len(errors)), rel=1e-12)
    assert metrics.bias == pytest.approx(sum(errors) / len(errors), rel=1e-12)
    assert metrics.nae == pytest.approx(sum(relative) / len(relative), rel=1e-12)
    assert metrics.mae_unmasked == pytest.approx(
        sum(abs(count.unmasked - count.truth) for count in image_counts) / len(errors), rel=1e-12
    )


def test_summarise_excludes_images_without_heads_from_nae() -> None:
    empty = [ImageCount(row, 0, 0.5, 0.5) for row in range(3)]
    assert math.isnan(summarise(empty).nae)
    assert summarise([*empty, ImageCount(3, 4, 5.0, 5.0)]).nae == 0.25


@given(st.permutations(range(len(TRUTHS))))
@settings(max_examples=20, deadline=None)
def test_summarise_is_bit_identical_for_any_order(order: list[int]) -> None:
    image_counts = counts(1)
    assert summarise([image_counts[i] for i in order]) == summarise(image_counts)


def test_summarise_without_images_raises_value_error() -> None:
    with pytest.raises(ValueError, match="no images"):
        summarise([])


@st.composite
def scenes(draw: Any) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Small densities, and heads inside, at the border and outside."""
    height, width = draw(st.integers(1, 37)), draw(st.integers(1, 37))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    points = rng.uniform(-1, [width + 1, height + 1], (draw(st.integers(0, 30)), 2))
    return rng.random((height, width)) * draw(st.sampled_from([0.0, 0.01, 1.0])), points.astype(np.float32)


@given(scenes())
@settings(max_examples=50, deadline=None)
def test_game_error_is_the_count_error_at_level_0_and_never_decreases(
    scene: tuple[NDArray[np.float64], NDArray[np.float32]],
) -> None:
    density, points = scene
    errors = [game_error(density, points, level) for level in range(6)]
    assert errors[0] == pytest.approx(abs(density.sum() - len(points)), abs=1e-9)
    assert all(later >= earlier - 1e-9 for earlier, later in pairwise(errors))


@given(scenes(), st.integers(0, 4))
@settings(max_examples=50, deadline=None)
def test_game_error_equals_counting_cell_by_cell(
    scene: tuple[NDArray[np.float64], NDArray[np.float32]], level: int
) -> None:
    density, points = scene
    height, width = density.shape

    def region(cell: int, side: int) -> int:
        """The last region that starts at or before a cell."""
        return max(i for i in range(2**level) if i * side // 2**level <= cell)

    difference = np.zeros((2**level, 2**level))
    for y in range(height):
        for x in range(width):
            difference[region(y, height), region(x, width)] += density[y, x]
    for px, py in points.tolist():
        x, y = min(max(math.floor(px), 0), width - 1), min(max(math.floor(py), 0), height - 1)
        difference[region(y, height), region(x, width)] -= 1
    assert game_error(density, points, level) == pytest.approx(np.abs(difference).sum(), abs=1e-9)
