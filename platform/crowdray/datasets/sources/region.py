"""Rasterisation of polygonal regions of interest."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from crowdray.data.sample import MAX_DISTANCE

MAX_VERTICES = 10_000
"""Maximum number of vertices: more come from a damaged file, and would take hours."""


def polygon_mask(x: NDArray[Any], y: NDArray[Any], height: int, width: int) -> NDArray[np.bool_]:
    """Bool (height, width) mask of the pixels whose centre lies inside a polygon with vertices at (x, y).

    Self-intersections follow the even-odd rule. A centre on an edge belongs to the side with larger coordinates, so
    adjacent polygons neither overlap nor leave gaps.

    Raises:
        ValueError: Too few or too many vertices, or a vertex that is far outside the image.
    """
    vertices = np.stack([np.ravel(x), np.ravel(y)], axis=1).astype(np.float64)
    if not 3 <= len(vertices) <= MAX_VERTICES:
        raise ValueError(f"a polygon of {len(vertices)} vertices, expected 3 to {MAX_VERTICES}")
    if not (np.abs(vertices) <= MAX_DISTANCE).all():
        raise ValueError(f"a vertex more than {MAX_DISTANCE:g} pixels from the image's corner")
    rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
    inside = np.zeros((height, width), dtype=bool)
    for (x0, y0), (x1, y1) in zip(vertices, np.roll(vertices, -1, axis=0), strict=True):
        crossed = (y0 <= rows) != (y1 <= rows)
        if crossed.any():
            crossing = x0 + (rows[crossed] - y0) * (x1 - x0) / (y1 - y0)
            inside[crossed] ^= columns < crossing[:, None]
    return inside
