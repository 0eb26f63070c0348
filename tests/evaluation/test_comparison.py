"""Intervals, paired comparisons and power, against scipy, closed forms and simulation."""

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from crowdray.evaluation.comparison import compare_errors, power, required_seeds, summarise_errors
from crowdray.evaluation.intervals import Interval, mean_interval

RNG = np.random.default_rng(7)


def two_way(generator: np.random.Generator, seeds: int, images: int, seed_std: float) -> NDArray[np.float64]:
    """Values of mean 0 with an effect of the seed, an effect of the image and their interaction."""
    effects = seed_std * generator.normal(size=(seeds, 1)) + generator.normal(size=(1, images))
    return np.asarray(effects + 0.5 * generator.normal(size=(seeds, images)))


def test_mean_interval_of_one_seed_equals_bootstrap_of_scipy() -> None:
    values = RNG.gamma(2.0, 1.5, 200)
    expected = stats.bootstrap((values,), np.mean, method="percentile", rng=RNG).confidence_interval
    interval = mean_interval(values)
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high), abs=0.02)


def test_mean_interval_of_blocks_has_width_of_their_means() -> None:
    blocks = RNG.normal(size=100)
    interval = mean_interval(np.repeat(blocks, 5), block=5)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * blocks.std() / np.sqrt(100), rel=0.05)
    alone = mean_interval(np.repeat(blocks, 5))
    assert (interval.high - interval.low) / (alone.high - alone.low) == pytest.approx(np.sqrt(5), rel=0.04)


def test_mean_interval_of_equal_seeds_is_that_of_one() -> None:
    values = RNG.normal(size=70)
    one, four = mean_interval(values, 3), mean_interval(np.tile(values, (4, 1)), 3)
    assert (four.low, four.high) == pytest.approx((one.low, one.high), abs=1e-12)


def test_mean_interval_of_equal_images_is_t_interval_over_seeds() -> None:
    seeds = RNG.normal(size=12)
    low, high = stats.t.interval(0.95, 11, seeds.mean(), seeds.std(ddof=1) / np.sqrt(12))
    interval = mean_interval(np.repeat(seeds[:, None], 6, axis=1))
    assert (interval.low, interval.high) == pytest.approx((low, high), abs=0.1 * (high - low) / 2)


def test_mean_interval_ignores_order_of_seeds() -> None:
    values = two_way(RNG, 5, 40, 1.0)
    ordered, permuted = mean_interval(values), mean_interval(values[[3, 1, 4, 0, 2]])
    assert (ordered.low, ordered.high) == pytest.approx((permuted.low, permuted.high), abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(("seeds", "images", "seed_std"), [(1, 60, 0.0), (3, 60, 0.3), (5, 200, 0.3), (8, 60, 0.1)])
def test_mean_interval_covers_true_mean_in_95_percent_of_experiments(
    seeds: int, images: int, seed_std: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("crowdray.evaluation.intervals.RESAMPLES", 1000)
    generator = np.random.default_rng(1)
    intervals = [mean_interval(two_way(generator, seeds, images, seed_std)) for _ in range(300)]
    covered = np.mean([interval.low <= 0 <= interval.high for interval in intervals])
    assert 0.92 <= covered <= 0.99  # four standard errors are 0.05; interactions make it wider than needed


def test_summarise_errors_of_several_seeds_pools_their_squares() -> None:
    errors = np.array([[3.0, -1.0], [0.0, 2.0]])
    summary = summarise_errors(errors)
    assert (summary.seeds, summary.images, summary.seed_mae) == (2, 2, (2.0, 1.0))
    assert (summary.mae, summary.bias, summary.rmse) == pytest.approx((1.5, 1.0, np.sqrt(14 / 4)))
    assert summary.mae_interval.low <= 1.5 <= summary.mae_interval.high
    assert summarise_errors([2.0, -2.0]).rmse_interval == Interval(2.0, 2.0)


def test_compare_errors_equals_paired_t_test_of_scipy() -> None:
    reference, other = two_way(RNG, 6, 30, 1.0), two_way(RNG, 6, 30, 1.0)
    comparison = compare_errors(reference, other)
    first, second = (np.abs(errors).mean(axis=1) for errors in (reference, other))
    assert comparison.p_value == pytest.approx(stats.ttest_rel(first, second).pvalue, rel=1e-9)
    assert comparison.seed_gains == pytest.approx(first - second)
    assert comparison.gain == pytest.approx(np.mean(first - second))
    assert comparison.seed_std == pytest.approx(np.std(first - second, ddof=1))


def test_compare_errors_pairs_images() -> None:
    reference = RNG.normal(5.0, 50.0, (3, 100))
    better = np.sign(reference) * (np.abs(reference) - 0.3)
    better[np.abs(reference) < 0.3] = 0.0
    comparison = compare_errors(reference, better)
    assert comparison.gain > 0 and comparison.interval.low > 0.25  # the photos' own errors of 50 heads cancel
    opposite = compare_errors(better, reference)
    assert opposite.gain == pytest.approx(-comparison.gain) and opposite.p_value == comparison.p_value


def test_compare_errors_of_one_seed_has_no_test_over_seeds() -> None:
    comparison = compare_errors([1.0, 2.0], [1.0, 1.0])
    assert (comparison.gain, comparison.p_value, comparison.seed_std) == (0.5, None, None)
    assert comparison.required_seeds is None
    assert compare_errors([[1.0], [2.0]], [[1.0], [2.0]]).p_value == 1.0
    with pytest.raises(ValueError, match="cannot be paired"):
        compare_errors([1.0, 2.0], [1.0])
    with pytest.raises(ValueError, match="not those of seeds and images"):
        summarise_errors([])


def test_power_equals_simulated_frequency_of_significance() -> None:
    gains = np.random.default_rng(3).normal(0.5, 0.6, (20_000, 6))
    frequency = np.mean(stats.ttest_1samp(gains, 0, axis=1).pvalue < 0.05)
    assert power(6, 0.6) == pytest.approx(frequency, abs=0.012)
    assert power(6, 0.6, 0.0) == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("seeds", "effect", "expected"), [(5, 0.5, 0.40), (8, 0.5, 0.68), (10, 0.5, 0.80), (5, 1, 0.91)]
)
def test_power_of_known_experiments(seeds: int, effect: float, expected: float) -> None:
    assert power(seeds, 0.5, effect) == pytest.approx(expected, abs=0.005)


@pytest.mark.parametrize("std", [0.0, 0.1, 0.5, 3.0, 200.0])
def test_required_seeds_is_fewest_with_power(std: float) -> None:
    seeds = required_seeds(std)
    assert power(seeds, std) >= 0.8
    assert seeds == 2 or power(seeds - 1, std) < 0.8


def test_mean_interval_of_seeds_with_own_images_is_that_of_their_means() -> None:
    values = RNG.normal(size=(6, 30))
    nested, means = mean_interval(values, crossed=False), mean_interval(np.repeat(values.mean(axis=1)[:, None], 9, 1))
    assert (nested.low, nested.high) == pytest.approx((means.low, means.high), abs=0.01)  # other random numbers


def test_mean_interval_of_less_than_a_block_has_a_width() -> None:
    interval = mean_interval([1.0, 2.0, 3.0, 4.0], block=50)
    assert interval.high - interval.low > 3  # two blocks say next to nothing
    assert mean_interval([1.0], block=50) == Interval(1.0, 1.0)


def test_intervals_of_errors_of_unequal_seeds_are_not_negative() -> None:
    summary = summarise_errors(np.outer([1.0, 2.0, 90.0], np.ones(4)))
    assert mean_interval(np.outer([1.0, 2.0, 90.0], np.ones(4))).low < 0
    assert summary.mae_interval.low == summary.rmse_interval.low == 0 and summary.bias_interval.low < 0
