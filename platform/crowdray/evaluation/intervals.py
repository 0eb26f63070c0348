"""Confidence intervals of mean errors, by bootstrap over images."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 2000
"""Bootstrap samples of an interval."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95% confidence interval."""

    low: float
    """2.5th percentile."""
    high: float
    """97.5th percentile."""


def mean_interval(values: Sequence[float]) -> Interval:
    """95% interval of a mean: percentiles of the means of resampled values, the same at every call.

    Args:
        values: A value for each image, such as its absolute error, or the difference of two models' errors on it.
            Frames of one video resemble each other: their interval is too narrow.
    """
    array, generator = np.asarray(values, dtype=np.float64), np.random.default_rng(0)
    draws = (array[generator.integers(len(array), size=len(array))].mean() for _ in range(RESAMPLES))
    low, high = np.percentile(np.fromiter(draws, np.float64, RESAMPLES), (2.5, 97.5))
    return Interval(float(low), float(high))
