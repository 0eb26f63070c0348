"""Errors of models over images and seeds, and their paired comparison.

Errors are predicted minus true counts, float64 (S, N): a row for each seed, with the same images in the same order in
each unless `crossed` is false. Shape legend: S seeds, N images.
"""

from bisect import bisect_left
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import nctdtr, stdtr, stdtrit

from crowdray.evaluation.intervals import TAIL, Interval, mean_interval

EFFECT = 0.5
"""Difference in heads of mean absolute error that an experiment should be able to show."""
POWER = 0.8
"""Probability with which it should show it."""


@dataclass(frozen=True, slots=True)
class ErrorSummary:
    """Errors of models that differ in their seed, in heads per image, with 95% intervals over seeds and images."""

    seeds: int
    """Number of seeds."""
    images: int
    """Number of images."""
    mae: float
    """Mean absolute error."""
    mae_interval: Interval
    rmse: float
    """Root of the mean squared error over all seeds and images."""
    rmse_interval: Interval
    bias: float
    """Mean of prediction minus truth."""
    bias_interval: Interval
    seed_mae: tuple[float, ...]
    """Mean absolute error of each seed."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Paired comparison of a model with a reference on the same images and seeds."""

    gain: float
    """MAE of the reference minus that of the other model, in heads: positive where the other is better."""
    interval: Interval
    """95% interval of the gain, over seeds and images."""
    seed_gains: tuple[float, ...]
    """Gain of each seed."""
    seed_std: float | None
    """Standard deviation of the seeds' gains; None for one seed."""
    p_value: float | None
    """Two-sided paired t-test over the seeds' gains; None for one seed."""

    @property
    def required_seeds(self) -> int | None:
        """Seeds with which the same experiment would show a gain of EFFECT with probability POWER; None if unknown."""
        return None if self.seed_std is None else required_seeds(self.seed_std)


def summarise_errors(errors: ArrayLike, block: int = 1, *, crossed: bool = True) -> ErrorSummary:
    """Summarise signed errors (S, N) or (N,).

    Args:
        errors: Predicted minus true counts.
        block: Number of consecutive images that are resampled together (`mean_interval`).
        crossed: Whether all seeds count the same images.

    Raises:
        ValueError: The errors are empty.
    """
    array = _seeds_by_images(errors)
    # Intervals over few seeds are widened, beyond 0 if their errors differ much.
    absolute, squares = (
        Interval(max(0.0, found.low), found.high)
        for found in (mean_interval(values, block, crossed=crossed) for values in (np.abs(array), array**2))
    )
    return ErrorSummary(
        seeds=array.shape[0],
        images=array.shape[1],
        mae=float(np.abs(array).mean()),
        mae_interval=absolute,
        rmse=float(np.sqrt(np.mean(array**2))),
        rmse_interval=Interval(float(np.sqrt(squares.low)), float(np.sqrt(squares.high))),
        bias=float(array.mean()),
        bias_interval=mean_interval(array, block, crossed=crossed),
        seed_mae=tuple(np.abs(array).mean(axis=1).tolist()),
    )


def compare_errors(reference: ArrayLike, other: ArrayLike, block: int = 1, *, crossed: bool = True) -> Comparison:
    """Compare the absolute errors of two models, paired by seed and image.

    Args:
        reference: Signed errors (S, N) or (N,) of the reference.
        other: Those of the other model, for the same seeds and images in the same order.
        block: Number of consecutive images that are resampled together (`mean_interval`).
        crossed: Whether all seeds count the same images.

    Raises:
        ValueError: The shapes differ, or the errors are empty.
    """
    first, second = _seeds_by_images(reference), _seeds_by_images(other)
    if first.shape != second.shape:
        raise ValueError(f"errors of shapes {first.shape} and {second.shape} cannot be paired")
    gains = np.abs(first) - np.abs(second)
    seeds = gains.mean(axis=1)
    std = float(seeds.std(ddof=1)) if len(seeds) > 1 else None
    return Comparison(
        gain=float(gains.mean()),
        interval=mean_interval(gains, block, crossed=crossed),
        seed_gains=tuple(seeds.tolist()),
        seed_std=std,
        p_value=None if std is None else _p_value(float(seeds.mean()), std, len(seeds)),
    )


def power(seeds: int, seed_std: float, effect: float = EFFECT) -> float:
    """Probability that a two-sided paired t-test at 5% shows a true gain.

    Args:
        seeds: Number of seeds, at least 2.
        seed_std: Standard deviation of the gains of different seeds, in heads.
        effect: True gain in heads.
    """
    if seed_std == 0:
        return float(effect != 0)
    shift = effect / seed_std * np.sqrt(seeds)  # non-centrality of Student's t
    critical = stdtrit(seeds - 1, 1 - TAIL)
    return float(1 - nctdtr(seeds - 1, shift, critical) + nctdtr(seeds - 1, shift, -critical))


def required_seeds(seed_std: float, effect: float = EFFECT, target: float = POWER) -> int:
    """Fewest seeds for which `power` reaches the target."""
    enough = int((5 * seed_std / effect) ** 2) + 10  # (1.96 + 0.84)^2 suffice for a normal distribution
    return 2 + bisect_left(range(2, enough), target, key=lambda seeds: power(seeds, seed_std, effect))


def _p_value(mean: float, std: float, seeds: int) -> float:
    if std == 0:
        return float(mean == 0)
    return float(2 * stdtr(seeds - 1, -abs(mean) / std * np.sqrt(seeds)))


def _seeds_by_images(errors: ArrayLike) -> NDArray[np.float64]:
    array = np.atleast_2d(np.asarray(errors, dtype=np.float64))
    if array.ndim != 2 or not array.size:
        raise ValueError(f"errors of shape {array.shape} are not those of seeds and images")
    return array
