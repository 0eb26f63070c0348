"""Localisation: peaks of known densities, and matches against an optimal assignment."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from crowdray.evaluation.localisation import MATCH_RADII, HeadMatches, head_points, match_heads, summarise_matches


def test_head_points_are_the_highest_maxima() -> None:
    density = np.zeros((30, 40), np.float32)
    heads = {(5, 7): 1.0, (12, 30): 0.9, (20, 20): 0.8}
    for (row, column), height in heads.items():
        density[row, column] = height
        density[row, column + 1] = 0.1
    np.testing.assert_array_equal(head_points(density, 4), [[30, 22], [122, 50], [82, 82]])
    assert len(head_points(density * 0.6, 4)) == 2  # as many as heads
    assert len(head_points(np.zeros((3, 3), np.float32), 4)) == 0


def test_match_heads_uses_each_head_once_and_matches_as_many_as_possible() -> None:
    truth = np.array([[0.0, 0.0], [6.0, 0.0], [100.0, 100.0]])
    # The nearest prediction of both first heads is the first one; the second reaches only the first head.
    predicted = np.array([[2.5, 0.0], [-3.5, 0.0], [100.0, 108.0], [50.0, 50.0]])
    assert match_heads(predicted, truth) == HeadMatches(4, (2, 3))
    assert match_heads(truth, truth) == HeadMatches(3, (3, 3))
    empty = np.zeros((0, 2))
    assert match_heads(empty, truth) == HeadMatches(0, (0, 0)) and match_heads(truth, empty) == HeadMatches(3, (0, 0))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_match_heads_equals_an_optimal_assignment(predicted: int, heads: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Whole numbers, so that distances equal to a radius and to 0 occur.
    first, second = rng.integers(0, 20, (predicted, 2)).astype(float), rng.integers(0, 20, (heads, 2)).astype(float)
    within = np.linalg.norm(first[:, None] - second[None], axis=2)[..., None] <= MATCH_RADII
    expected = []
    for number in range(len(MATCH_RADII)):
        pairs = within[..., number]
        expected.append(int(pairs[linear_sum_assignment(pairs, maximize=True)].sum()))
    assert match_heads(first, second) == HeadMatches(predicted, tuple(expected))


def test_summarise_matches_divides_sums() -> None:
    small, large = summarise_matches([HeadMatches(4, (2, 3)), HeadMatches(1, (0, 1)), HeadMatches(0, (0, 0))], heads=10)
    assert (small.precision, small.recall) == (0.4, 0.2)
    assert small.f1 == pytest.approx(2 * 0.4 * 0.2 / 0.6)
    assert (large.radius, large.precision, large.recall) == (8.0, 0.8, 0.4)
    nothing = summarise_matches([HeadMatches(0, (0, 0))], heads=0)[0]
    assert all(math.isnan(value) for value in (nothing.precision, nothing.recall, nothing.f1))
