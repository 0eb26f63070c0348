"""A region of interest given as a polygon, as a mask of pixels."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from crowdray.data.sample import FARTHEST

MOST_VERTICES = 10_000
"""More vertices than anybody clicks: a damaged file, which would take hours."""


def polygon_mask(x: NDArray[Any], y: NDArray[Any], height: int, width: int) -> NDArray[np.bool_]:
    """Bool (height, width): the pixels whose centre lies inside the closed polygon (x, y) of continuous pixels.

    Where the outline crosses itself, inside is what an odd number of edges encloses. A centre on an edge
    belongs to the side with the larger coordinates, so that polygons with a common edge share no pixel and
    lose none. Raises ValueError for what is no polygon.
    """
    vertices = np.stack([np.ravel(x), np.ravel(y)], axis=1).astype(np.float64)
    if not 3 <= len(vertices) <= MOST_VERTICES:
        raise ValueError(f"a polygon of {len(vertices)} vertices, expected 3 to {MOST_VERTICES}")
    if not (np.abs(vertices) <= FARTHEST).all():
        raise ValueError(f"a vertex more than {FARTHEST:g} pixels from the image's corner")
    rows, columns = np.arange(height) + 0.5, np.arange(width) + 0.5
    inside = np.zeros((height, width), dtype=bool)
    for (x0, y0), (x1, y1) in zip(vertices, np.roll(vertices, -1, axis=0), strict=True):
        crossed = (y0 <= rows) != (y1 <= rows)
        if crossed.any():
            crossing = x0 + (rows[crossed] - y0) * (x1 - x0) / (y1 - y0)
            inside[crossed] ^= columns < crossing[:, None]
    return inside
