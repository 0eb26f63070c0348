"""From what a network or a file gives to a map of depth: checked, at most of the image's size, larger = farther.

Shape legend: H W image, h w map.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crowdray.datasets.depth.teacher import View
from crowdray.errors import DataError

RANGE = 10.0
"""Farthest over nearest depth that inverse depth is spread over, unless `range` says otherwise: twice what the heads
of an unknown camera are taken to span (TYPICAL_SCALE), since there is more behind a crowd."""

TRIM = 0.01
"""Share of the pixels beyond the nearest and the farthest that are believed: a few wild ones must not set the scale."""


def depth_map(values: NDArray[Any], view: View, *, inverse: bool, ratio: float = RANGE) -> NDArray[np.float32]:
    """Depth of a view from a map (h, w) of depth, or of inverse depth; not larger than the image.

    Infinite depth (sky) becomes the farthest that is finite. Raises DataError for NaN, for inverse depth that is not
    finite, for negative depth, and for a map that is the same everywhere.
    """
    found = np.asarray(values, dtype=np.float32)
    wrong = ~np.isfinite(found) if inverse else ~(found >= 0)
    if wrong.any():
        what = "not finite" if inverse else "no number, or negative,"
        raise DataError(f"its depth is {what} at {int(wrong.sum())} of {wrong.size} pixels; mend what made it")
    if not inverse:
        found = np.minimum(found, found[found < np.inf].max(initial=0.0))
    if not np.ptp(found) > 0:
        raise DataError(f"its depth is {found.max():g} everywhere, which teaches nothing; use another teacher, or none")
    found = shrunk(found, view.height, view.width)
    return depth_of_inverse(found, ratio) if inverse else found


def depth_of_inverse(values: NDArray[Any], ratio: float = RANGE) -> NDArray[np.float32]:
    """Depth (h, w) in [1, ratio] from inverse depth that is known but for a positive scale and a shift.

    Such maps say 1 / z = a d + b for some unknown a > 0 and b, as MiDaS is trained (Ranftl et al., TPAMI 2022, section
    5). Both are fixed by stating where the map ends: its nearest pixel (its 99th percentile) lies at 1 and its
    farthest (the 1st) at `ratio`, so 1 / z = n (1 - 1 / ratio) + 1 / ratio with n the map stretched to [0, 1] and cut
    off there. What follows is blind to a and b, keeps planes plane, and never divides by a pixel near 0; the plain
    1 / d does neither.
    """
    exact = np.asarray(values, dtype=np.float64)
    farthest, nearest = np.quantile(exact, (TRIM, 1.0 - TRIM))
    if not nearest > farthest:
        raise DataError(f"its inverse depth is {nearest:g} nearly everywhere, which teaches nothing")
    nearness = ((exact - farthest) / (nearest - farthest)).clip(0.0, 1.0)
    return np.asarray(1.0 / (nearness * (1.0 - 1.0 / ratio) + 1.0 / ratio), dtype=np.float32)


def shrunk(values: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """A finite map (h, w) averaged down to (min(h, height), min(w, width)): more than the image no map can say."""
    size = (min(values.shape[1], width), min(values.shape[0], height))
    if size == values.shape[::-1]:
        return values
    return np.asarray(Image.fromarray(values).resize(size, Image.Resampling.BOX))
