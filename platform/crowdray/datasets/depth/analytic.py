"""Depth teachers that need no picture: a perspective map, a plane fitted to the heads, the source's own depth."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from crowdray.datasets.depth.teacher import DepthTeacher, View
from crowdray.errors import DataError

SCALES: NDArray[np.float64] = np.geomspace(0.02, 1.0, 80)
"""Candidate ratios of head sizes, top row to bottom row; at most 1, since the top is never nearer."""

NEIGHBOURS = 3
"""Neighbours over which spacing is averaged: one alone would measure couples."""

ROW_WEIGHT = 0.5
"""Weight of a distance across rows: foreshortening shrinks it faster than heads."""

LEAST_SPREAD = 0.4
"""Least deviation that spacings are believed to have: two heads that fit a plane exactly prove nothing."""

POINTS_STRIDE = 4
"""Pixels of the image for each of a fitted plane: it is smooth, and its map is decoded for every image."""

TYPICAL_SCALE = 0.2
"""Ratio expected of a camera of which nothing is known: one that looks down on a square or a street."""

PRIOR_SPREAD = 0.5
"""Deviation of the logarithm by which an image's ratio is expected to differ from its prior."""


class Perspective(DepthTeacher):
    """Depth from the dataset's own perspective map: the inverse of a person's size in pixels."""

    name = "perspective-1"

    def depth(self, view: View) -> NDArray[np.float32] | None:
        """Depth proportional to 1 / size; a DataError when there is no map or it is not positive."""
        if view.person_size is None:
            raise DataError("this source has no perspective map; use --depth points or --depth none")
        if not (view.person_size > 0).all():
            raise DataError("the perspective map holds sizes that are not positive; use --depth points")
        return (1.0 / view.person_size).astype(np.float32)


class Points(DepthTeacher):
    """Depth from nothing but annotated heads: a ground plane fitted to how far apart neighbours are."""

    name = "points-1"

    def depth(self, view: View) -> NDArray[np.float32] | None:
        """Depth of a plane whose head sizes grow linearly from top to bottom; constant along a row.

        The plane is the view's own when its camera is fixed; else it is fitted to the image's heads, held by
        the fit of the split as far as those heads are few.
        """
        scale = view.head_scale or TYPICAL_SCALE
        if not view.fixed_camera:
            scale = fit_head_scale([(view.points, view.height)], prior=scale)
        height, width = (-(-side // POINTS_STRIDE) for side in (view.height, view.width))
        return np.broadcast_to(plane_depth(scale, height)[:, None], (height, width)).astype(np.float32)


class Own(DepthTeacher):
    """The depth that the source itself knows, such as that of rendered scenes."""

    name = "own-1"

    def depth(self, view: View) -> NDArray[np.float32] | None:
        """The source's depth as it is; a DataError when it has none."""
        if view.own_depth is None:
            raise DataError("this source knows no depth of its own; use --depth points or --depth none")
        return view.own_depth.astype(np.float32)


class Nothing(DepthTeacher):
    """No depth: samples are stored without a map."""

    name = "none"

    def depth(self, view: View) -> NDArray[np.float32] | None:
        """Always None."""
        return None


def plane_depth(scale: float, height: int) -> NDArray[np.float64]:
    """(H,) depth along the rows of a ground plane, 1 at the bottom, whose head sizes at the top are `scale`.

    Under a pinhole camera the size of a head over a plane is linear in its row, and depth is its inverse.
    """
    rows = (np.arange(height) + 0.5) / height
    return np.asarray(1.0 / (scale + (1.0 - scale) * rows))


def fit_head_scale(
    images: Sequence[tuple[NDArray[Any], int]], *, one_camera: bool = False, prior: float = TYPICAL_SCALE
) -> float:
    """Ratio of head sizes, top row to bottom row, that best explains how far apart neighbouring heads are.

    `images` holds pairs of (N, 2) heads and the image's height in pixels. The spacing of a head to its
    nearest neighbour is taken as proportional to its size a + b y; its logarithm is fitted with least
    absolute deviations, which a few pairs and loners do not move. Each image has its own overall spacing,
    unless all are from `one_camera`. It is the maximum a posteriori fit: Laplace residuals, and a ratio that
    is log-normal around `prior` with PRIOR_SPREAD, which decides alone where no two heads can be compared.
    Images with a head that is no finite number are left out: who loads them reports it.
    """
    usable = [_spacing(points, height) for points, height in images if len(points) > 1 and np.isfinite(points).all()]
    if not usable:
        return prior
    if one_camera:
        usable = [(np.concatenate([row for row, _ in usable]), np.concatenate([log for _, log in usable]))]
    deviations = np.zeros(len(SCALES))
    for rows, logs in usable:
        residuals = logs - np.log(SCALES[:, None] + (1.0 - SCALES[:, None]) * rows)
        residuals -= np.median(residuals, axis=1, keepdims=True)
        deviations += np.abs(residuals).sum(axis=1)
    spread = max(deviations.min() / sum(len(rows) for rows, _ in usable), LEAST_SPREAD)
    return float(SCALES[(deviations / spread + 0.5 * (np.log(SCALES / prior) / PRIOR_SPREAD) ** 2).argmin()])


def _spacing(points: NDArray[Any], height: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows of heads in [0, 1], and mean logarithms of the pixels to their nearest neighbours."""
    heads = np.asarray(points, dtype=np.float64)
    neighbours = min(NEIGHBOURS, len(heads) - 1)
    flattened = heads * [1.0, ROW_WEIGHT]
    distances = cKDTree(flattened).query(flattened, k=neighbours + 1)[0][:, 1:]
    return np.clip(heads[:, 1] / height, 0.0, 1.0), np.log(np.maximum(distances, 0.5)).mean(axis=1)
