"""Confidence intervals of mean errors over images and seeds, by bootstrap.

Shape legend: S seeds, N images, B blocks, R resamples.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtri, stdtrit

RESAMPLES = 5000
"""Bootstrap samples of an interval."""
TAIL = 0.025
"""Probability on each side of a 95% interval."""
VIDEO_BLOCK = 50
"""Consecutive frames of a video that are resampled together, because they resemble each other."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A 95% confidence interval."""

    low: float
    """2.5th percentile."""
    high: float
    """97.5th percentile."""


def mean_interval(values: ArrayLike, block: int = 1, *, crossed: bool = True) -> Interval:
    """95% interval of a mean: percentiles of the means of resampled values, the same at every call.

    Where all seeds count the same images, seeds and images are crossed: both are resampled, independently of each
    other, and their deviations from the mean are added. Where each seed has its own images, the seeds alone are
    resampled, since their means differ by their images too. The order of the seeds does not matter.

    Args:
        values: (N,) a value for each image, such as its absolute error, or the difference of two models' errors on
            it; (S, N) for several seeds. A single seed yields no information on other seeds: its interval is that of
            the images alone.
        block: Number of consecutive images that are resampled together; above 1 for the frames of a video, whose
            interval would otherwise be too narrow. At most half of the images: a single block has no variance.
        crossed: Whether all seeds count the same images, such as a test split.
    """
    array = np.atleast_2d(np.asarray(values, dtype=np.float64))
    generator, deviations = np.random.default_rng(0), np.zeros(RESAMPLES)
    if crossed or len(array) == 1:
        starts = np.arange(0, array.shape[1], min(block, max(1, array.shape[1] // 2)))
        sizes = np.diff(np.append(starts, array.shape[1])).astype(np.float64)
        deviations += _deviations(np.add.reduceat(array.mean(axis=0), starts), sizes, generator)
    if len(array) > 1:
        seeds = np.sort(array.mean(axis=1))
        deviations += _deviations(seeds, np.ones(len(seeds)), generator)
    low, high = array.mean() + np.percentile(deviations, (100 * TAIL, 100 * (1 - TAIL)))
    return Interval(float(low), float(high))


def _deviations(
    sums: NDArray[np.float64], sizes: NDArray[np.float64], generator: np.random.Generator
) -> NDArray[np.float64]:
    """Deviations (R,) of resampled means from the mean, of groups with these sums and sizes.

    Percentiles of n resampled values are too narrow by sqrt((n - 1) / n) z / t, much for few seeds: the deviations are
    expanded by the inverse (the expanded percentile interval of Hesterberg, The American Statistician 2015).
    """
    n = len(sums)
    if n == 1:
        return np.zeros(RESAMPLES)
    drawn = generator.integers(n, size=(RESAMPLES, n)) + n * np.arange(RESAMPLES)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=RESAMPLES * n).reshape(RESAMPLES, n)
    expansion = stdtrit(n - 1, 1 - TAIL) / ndtri(1 - TAIL) * np.sqrt(n / (n - 1))
    deviations: NDArray[np.float64] = expansion * ((counts @ sums) / (counts @ sizes) - sums.sum() / sizes.sum())
    return deviations
