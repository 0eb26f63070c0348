"""Checked depth maps, at most as large as the image, from depth or inverse depth.

Shape legend: H W image, h w map.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from crowdray.data.sample import Sample
from crowdray.errors import DataError

RANGE = 10.0
"""Default ratio of farthest to nearest depth for inverse depth: twice what the heads of an unknown camera span
(DEFAULT_HEAD_SCALE), since there is more behind a crowd."""

TRIM = 0.01
"""Fraction of pixels clipped at each end: a few outliers must not decide the scale."""


def depth_map(
    values: NDArray[Any], sample: Sample, origin: str, *, inverse: bool, ratio: float = RANGE
) -> NDArray[np.float32]:
    """Depth of an image from a map (h, w) of depth or inverse depth, reduced to at most the image's size.

    Infinite depth (sky) becomes the farthest finite depth. DataError, which names the `origin`, for NaN, negative
    depth, inverse depth that is not finite, and a constant map.
    """
    found = np.asarray(values, dtype=np.float32)
    try:
        wrong = ~np.isfinite(found) if inverse else ~(found >= 0)
        if wrong.any():
            what = "not finite" if inverse else "NaN or negative"
            raise DataError(f"its depth is {what} at {int(wrong.sum())} of {wrong.size} pixels; fix its producer")
        if not inverse:
            found = np.minimum(found, found[found < np.inf].max(initial=0.0))
        if not np.ptp(found) > 0:
            raise DataError(f"its depth is {found.max():g} everywhere; use another --depth, or none")
        size = (min(found.shape[1], sample.width), min(found.shape[0], sample.height))
        if size != found.shape[::-1]:
            found = np.asarray(Image.fromarray(found).resize(size, Image.Resampling.BOX))  # averages pixels
        return depth_of_inverse(found, ratio) if inverse else found
    except DataError as error:
        raise DataError(f"{origin}: {error}") from error


def depth_of_inverse(values: NDArray[Any], ratio: float = RANGE) -> NDArray[np.float32]:
    """Depth (h, w) in [1, ratio] from inverse depth with unknown positive scale and shift.

    MiDaS-like networks give d with 1 / z = a d + b for unknown a > 0 and b (Ranftl et al., TPAMI 2022, section 5). Both
    are fixed by the ends of the map: its 99th percentile lies at depth 1 and its 1st at `ratio`, so
    1 / z = n (1 - 1 / ratio) + 1 / ratio, with n the map stretched and clipped to [0, 1]. The result does not depend on
    a and b, keeps planes plane, and never divides by a pixel near 0; the plain 1 / d does neither.
    """
    exact = np.asarray(values, dtype=np.float64)
    farthest, nearest = np.quantile(exact, (TRIM, 1.0 - TRIM))
    if not nearest > farthest:
        raise DataError(f"its inverse depth is {nearest:g} nearly everywhere; use another --depth, or none")
    nearness = ((exact - farthest) / (nearest - farthest)).clip(0.0, 1.0)
    return np.asarray(1.0 / (nearness * (1.0 - 1.0 / ratio) + 1.0 / ratio), dtype=np.float32)
