"""Counting errors from per-image counts: sums first, one division last."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

GAME_LEVELS = (0, 1, 2, 3)
"""Levels of the grid average mean absolute error that reports give."""


@dataclass(frozen=True, slots=True)
class ImageCount:
    """One evaluated image."""

    row: int
    """Row in the dataset."""
    truth: int
    """Number of annotated heads that count."""
    predicted: float
    """Sum of the predicted density, inside the region of interest where there is one."""
    unmasked: float
    """Sum of the predicted density over the whole image."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Errors over a set of images, in heads."""

    images: int
    """Number of images."""
    mae: float
    """Mean absolute error."""
    rmse: float
    """Root of the mean squared error: what crowd-counting tables print as MSE."""
    bias: float
    """Mean of prediction minus truth."""
    nae: float
    """Mean absolute error relative to the truth, over images with heads; nan when there is none."""
    mae_unmasked: float
    """Mean absolute error of the whole-image sum, the region of interest ignored."""


def summarise(counts: Sequence[ImageCount]) -> Metrics:
    """Metrics of per-image counts, whatever their order and whoever evaluated them; ValueError for none."""
    if not counts:
        raise ValueError("there is no image to evaluate; the split is empty")
    ordered = sorted(counts, key=lambda count: count.row)
    truth = np.array([count.truth for count in ordered], dtype=np.float64)
    predicted = np.array([count.predicted for count in ordered], dtype=np.float64)
    unmasked = np.array([count.unmasked for count in ordered], dtype=np.float64)
    error = predicted - truth
    inhabited = truth > 0
    nae = float(np.mean(np.abs(error[inhabited]) / truth[inhabited])) if inhabited.any() else float("nan")
    return Metrics(
        images=len(ordered),
        mae=float(np.mean(np.abs(error))),
        rmse=float(np.sqrt(np.mean(error**2))),
        bias=float(np.mean(error)),
        nae=nae,
        mae_unmasked=float(np.mean(np.abs(unmasked - truth))),
    )


def scene_mean(errors: Mapping[str, float]) -> float | None:
    """The unweighted mean of the scenes' mean absolute errors, each scene counting once: WorldExpo'10's score.

    None for fewer than two scenes, which have nothing to be averaged over.
    """
    return float(np.mean([errors[scene] for scene in sorted(errors)])) if len(errors) > 1 else None


def grid_error(density: NDArray[Any], points: NDArray[Any], level: int) -> float:
    """GAME(level) of one image, in heads: the absolute error of each of 4**level regions, summed.

    density (h, w) heads per cell; points (N, 2) heads, x y in cells, those outside count in the nearest one.
    Region edges lie at floor(i h / 2**level), so that every cell belongs to one region and each level splits
    the regions of the one before it: the error never falls from a level to the next, and level 0 is the
    image's absolute error. The mean over images is the GAME of Guerrero-Gómez-Olmedo et al., IbPRIA 2015.
    """
    height, width = density.shape
    parts = 2**level
    rows, columns = (np.arange(parts + 1) * side // parts for side in (height, width))
    # Integrals at the edges: regions without any cell, on maps smaller than the grid, come out as 0.
    integral = np.pad(np.cumsum(np.cumsum(density, axis=0, dtype=np.float64), axis=1), ((1, 0), (1, 0)))
    predicted = np.diff(np.diff(integral[np.ix_(rows, columns)], axis=0), axis=1)
    line = np.clip(points[:, 1].astype(np.int64), 0, height - 1)
    column = np.clip(points[:, 0].astype(np.int64), 0, width - 1)
    # The last edge at or below a cell opens its region, also where empty regions share that edge.
    held = (np.searchsorted(rows, line, "right") - 1, np.searchsorted(columns, column, "right") - 1)
    truth = np.zeros((parts, parts))
    np.add.at(truth, held, 1)
    return float(np.abs(predicted - truth).sum())
