"""Depth teachers without a network: a plane from head spacing, and depth that the source knows."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from crowdray.datasets.depth.teacher import DepthInput, DepthTeacher

SCALES: NDArray[np.float64] = np.geomspace(0.02, 1.0, 80)
"""Candidate ratios of head size, top row to bottom row; at most 1, since the top is never nearer."""

NEIGHBOURS = 3
"""Neighbours over which spacing is averaged; a single one would measure couples."""

ROW_WEIGHT = 0.5
"""Weight of distances across rows, because foreshortening shrinks them more than heads."""

MIN_DEVIATION = 0.4
"""Minimum deviation assumed for spacings, so that two heads that fit a plane exactly prove nothing."""

POINTS_STRIDE = 4
"""Image pixels per pixel of an estimated plane: it is smooth, and its map is decoded for every image."""

DEFAULT_HEAD_SCALE = 0.2
"""Expected ratio of head size for an unknown camera, which looks down on a square or a street."""

PRIOR_DEVIATION = 0.5
"""Standard deviation of the logarithm of an image's ratio around its prior."""


class PointSpacingDepth(DepthTeacher):
    """Depth of a ground plane estimated from the spacing of annotated heads."""

    name = "points-1"

    def depth(self, inputs: DepthInput) -> NDArray[np.float32] | None:
        """Depth of a plane whose head sizes grow linearly from top to bottom; constant along a row.

        A fixed camera uses its own fit. Any other image uses the fit of its own heads, with that of its split as prior.
        """
        scale = inputs.head_scale or DEFAULT_HEAD_SCALE
        if not inputs.fixed_camera:
            scale = fit_head_scale([(inputs.sample.points, inputs.sample.height)], prior=scale)
        height, width = (-(-side // POINTS_STRIDE) for side in (inputs.sample.height, inputs.sample.width))
        return np.broadcast_to(plane_depth(scale, height)[:, None], (height, width)).astype(np.float32)


class SourceDepth(DepthTeacher):
    """Depth that the source itself knows: from perspective maps, or exactly for rendered scenes."""

    def __init__(self, name: str) -> None:
        self.name = name

    def depth(self, inputs: DepthInput) -> NDArray[np.float32] | None:
        """The source's depth; open_teacher refuses this teacher for a source that has none."""
        assert inputs.source_depth is not None
        return inputs.source_depth.astype(np.float32)


class NoDepth(DepthTeacher):
    """No depth: samples are stored without a map."""

    name = "none"

    def depth(self, inputs: DepthInput) -> NDArray[np.float32] | None:
        """Always None."""
        return None


def plane_depth(scale: float, height: int) -> NDArray[np.float64]:
    """(H,) depth along the rows of a ground plane, 1 at the bottom, with head size `scale` at the top.

    Under a pinhole camera the size of a head above a plane is linear in its row, and depth is its inverse.
    """
    rows = (np.arange(height) + 0.5) / height
    return np.asarray(1.0 / (scale + (1.0 - scale) * rows))


def fit_head_scale(
    images: Sequence[tuple[NDArray[Any], int]], *, one_camera: bool = False, prior: float = DEFAULT_HEAD_SCALE
) -> float:
    """Ratio of head size, top row to bottom row, that best explains the spacing of neighbouring heads.

    The spacing of a head and its nearest neighbours is proportional to its size a + b y. Its logarithm is fit by
    least absolute deviations, which few pairs and loners do not move. This is the maximum a posteriori fit with Laplace
    residuals and a ratio that is log-normal around `prior` with PRIOR_DEVIATION; the prior alone decides if no two
    heads can be compared.

    Args:
        images: Pairs of (N, 2) heads and image height in pixels. Images with points that are not finite are skipped:
            loading them reports the error.
        one_camera: All images share one overall spacing; else each has its own.
        prior: Expected ratio.
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
    deviation = max(deviations.min() / sum(len(rows) for rows, _ in usable), MIN_DEVIATION)
    return float(SCALES[(deviations / deviation + 0.5 * (np.log(SCALES / prior) / PRIOR_DEVIATION) ** 2).argmin()])


def _spacing(points: NDArray[Any], height: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Rows of heads in [0, 1], and mean logarithms of the distance in pixels to their nearest neighbours."""
    heads = np.asarray(points, dtype=np.float64)
    neighbours = min(NEIGHBOURS, len(heads) - 1)
    flattened = heads * [1.0, ROW_WEIGHT]
    distances = cKDTree(flattened).query(flattened, k=neighbours + 1)[0][:, 1:]
    return np.clip(heads[:, 1] / height, 0.0, 1.0), np.log(np.maximum(distances, 0.5)).mean(axis=1)
