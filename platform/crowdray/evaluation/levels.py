"""Errors by the number of heads: density levels, images without heads, and the calibration of counts."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scipy.stats import linregress

from crowdray.evaluation.metrics import ImageCount, Metrics, summarise

LEVELS = ("sparse", "medium", "dense")
"""Density levels: the third of the images with the fewest heads, the next and the last third."""


@dataclass(frozen=True)
class LevelRow:
    """Errors on the images of one density level."""

    level: str
    """One of LEVELS."""
    heads: tuple[int, int]
    """Fewest and most heads in an image of this level."""
    metrics: Metrics
    """Errors on these images."""


@dataclass(frozen=True, slots=True)
class EmptyImages:
    """Counts on images without heads."""

    images: int
    """Number of these images."""
    mean: float
    """Mean predicted count, all of it false; nan without such an image."""
    max: float
    """Largest predicted count; nan without such an image."""


@dataclass(frozen=True, slots=True)
class Calibration:
    """How predicted counts follow the true ones."""

    slope: float
    """Slope of the least-squares line of predicted on true counts; 1 is ideal, nan if all images have equal counts."""
    intercept: float
    """Its value for an image without heads; 0 is ideal."""
    intervals: int
    """Number of images for which the counter states a 95% interval of its count."""
    coverage: float
    """Fraction of these images whose true count lies inside; nan without any."""


def count_groups(counts: Sequence[ImageCount], number: int) -> list[list[ImageCount]]:
    """Divide images, sorted by their heads, into a number of groups of equal size; empty groups are left out."""
    ordered = sorted(counts, key=lambda count: (count.truth, count.row))
    ends = [n * len(ordered) // number for n in range(number + 1)]
    return [ordered[start:end] for start, end in pairwise(ends) if start < end]


def error_levels(counts: Sequence[ImageCount]) -> list[LevelRow]:
    """Return the errors of each density level; of fewer levels for fewer than three images."""
    groups = count_groups(counts, len(LEVELS))
    names = LEVELS[len(LEVELS) - len(groups) :]
    return [
        LevelRow(name, (group[0].truth, group[-1].truth), summarise(group))
        for name, group in zip(names, groups, strict=True)
    ]


def empty_images(counts: Sequence[ImageCount]) -> EmptyImages:
    """Summarise the counts predicted on images without heads."""
    predicted = [count.predicted for count in counts if count.truth == 0]
    if not predicted:
        return EmptyImages(0, math.nan, float("nan"))
    return EmptyImages(len(predicted), float(np.mean(predicted)), max(predicted))


def calibrate(counts: Sequence[ImageCount], intervals: Sequence[tuple[float, float] | None]) -> Calibration:
    """Calibration of the counts of images and of the intervals around them, in the same order."""
    truth = np.array([count.truth for count in counts], dtype=np.float64)
    inside = [
        interval[0] <= count.truth <= interval[1] for count, interval in zip(counts, intervals, strict=True) if interval
    ]
    slope = intercept = math.nan
    if len(np.unique(truth)) > 1:
        line = linregress(truth, [count.predicted for count in counts])
        slope, intercept = float(line.slope), float(line.intercept)
    return Calibration(slope, intercept, len(inside), float(np.mean(inside)) if inside else math.nan)
