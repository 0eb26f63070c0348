"""Errors of counts over a set of images."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

GAME_LEVELS = (0, 1, 2, 3)
"""Levels of the grid average mean absolute error (GAME) in reports."""


@dataclass(frozen=True, slots=True)
class ImageCount:
    """True and predicted count of one image."""

    row: int
    """Row in the dataset."""
    truth: int
    """Number of annotated heads, inside the region of interest where there is one."""
    predicted: float
    """Sum of the predicted density there."""
    unmasked: float
    """Sum of the predicted density over the whole image."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Errors over a set of images, in heads per image."""

    images: int
    """Number of images."""
    mae: float
    """Mean absolute error."""
    rmse: float
    """Root of the mean squared error: what crowd-counting tables print as MSE."""
    bias: float
    """Mean of prediction minus truth."""
    nae: float
    """Mean absolute error relative to the truth, over images with heads; nan without any."""
    mae_unmasked: float
    """Mean absolute error when the predicted density is summed over whole images."""


@dataclass(frozen=True, slots=True)
class GridMetrics(Metrics):
    """Metrics with the grid average mean absolute error, which needs the density and not only its sum."""

    heads: int
    """Annotated heads in all images."""
    game: tuple[float, ...]
    """GAME at GAME_LEVELS; GAME(0) is the mean absolute error."""


def summarise(counts: Sequence[ImageCount]) -> Metrics:
    """Metrics of per-image counts, equal to the last bit for any order; ValueError without an image."""
    if not counts:
        raise ValueError("no images to evaluate; the split is empty")
    ordered = sorted(counts, key=lambda count: count.row)
    columns = np.array([(count.truth, count.predicted, count.unmasked) for count in ordered], dtype=np.float64)
    truth, predicted, unmasked = np.ascontiguousarray(columns.T)
    error = predicted - truth
    nonempty = truth > 0
    nae = float(np.mean(np.abs(error[nonempty]) / truth[nonempty])) if nonempty.any() else float("nan")
    return Metrics(
        images=len(ordered),
        mae=float(np.mean(np.abs(error))),
        rmse=float(np.sqrt(np.mean(error**2))),
        bias=float(np.mean(error)),
        nae=nae,
        mae_unmasked=float(np.mean(np.abs(unmasked - truth))),
    )


def scene_mae(scenes: Mapping[str, Metrics]) -> float | None:
    """Unweighted mean over scenes of their mean absolute errors, WorldExpo'10's score; None below two scenes."""
    return float(np.mean([scenes[name].mae for name in sorted(scenes)])) if len(scenes) > 1 else None


def game_error(density: NDArray[Any], points: NDArray[Any], level: int) -> float:
    """GAME(level) of one image: the sum of the absolute errors of 4**level regions, in heads.

    The mean over images is the GAME of Guerrero-Gómez-Olmedo et al., IbPRIA 2015. Region edges lie at
    floor(i h / 2**level), so that every cell belongs to one region and each level splits the regions of the previous
    one: the error never decreases with the level, and at level 0 it is the absolute error of the count.

    Args:
        density: (h, w) heads per cell.
        points: (N, 2) heads, x y in cells; those outside count in the nearest cell.
        level: The image is divided into 2**level by 2**level regions.
    """
    height, width = density.shape
    parts = 2**level
    rows, columns = (np.arange(parts + 1) * side // parts for side in (height, width))
    # Differences of integrals: regions without a cell, on maps smaller than the grid, come out as 0.
    integral = np.pad(np.cumsum(np.cumsum(density, axis=0, dtype=np.float64), axis=1), ((1, 0), (1, 0)))
    predicted = np.diff(np.diff(integral[np.ix_(rows, columns)], axis=0), axis=1)
    row = np.clip(points[:, 1].astype(np.int64), 0, height - 1)
    column = np.clip(points[:, 0].astype(np.int64), 0, width - 1)
    # A cell belongs to the region that starts at the last edge at or below it; empty regions share that edge.
    region = (np.searchsorted(rows, row, "right") - 1, np.searchsorted(columns, column, "right") - 1)
    truth = np.zeros((parts, parts))
    np.add.at(truth, region, 1)
    return float(np.abs(predicted - truth).sum())
