"""Similarity of a predicted density map to the true one: PSNR and SSIM.

Shape legend: H W image, h w density = ceil(H / k), ceil(W / k), N heads.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import interpolate

from crowdray.data.targets import density_map

SIGMA = 4.0
"""Standard deviation in image pixels of the Gaussian of one head in the true map."""
_WINDOW, _WINDOW_SIGMA = 11, 1.5
"""Side and standard deviation in pixels of the Gaussian window of SSIM (Wang et al., 2004)."""


@dataclass(frozen=True, slots=True)
class MapQuality:
    """Similarity of density maps, the larger the better."""

    psnr: float
    """Peak signal-to-noise ratio in dB, at most 138; the peak is the maximum of the true map."""
    ssim: float
    """Mean structural similarity, at most 1."""


def map_quality(
    cells: NDArray[np.float64],
    points: NDArray[np.float32],
    size: tuple[int, int],
    cell: int,
    roi: NDArray[np.bool_] | None = None,
) -> MapQuality | None:
    """Compare a density with the true map of an image, at the resolution of the image.

    The true map is a sum of Gaussians of SIGMA pixels and of unit mass. The predicted one is brought to heads per pixel
    and interpolated bilinearly. Both are divided by the maximum of the true map. PSNR and SSIM (Gaussian window of 11
    pixels and deviation 1.5, K1 = 0.01, K2 = 0.03, Wang et al., IEEE TIP 2004) are means over the pixels of the region
    of interest, SSIM's without a border of 5 pixels, as scikit-image defines it.

    Args:
        cells: (h, w) heads per cell, 0 outside the region of interest.
        points: (N, 2) heads in the region of interest, x y in image pixels.
        size: (H, W) of the image.
        cell: Side of a cell in pixels.
        roi: (H, W) region of interest; None: everywhere.

    Returns:
        None without heads, whose map has no maximum, and for images smaller than SSIM's window.
    """
    from skimage.metrics import structural_similarity  # takes a second to import

    if not len(points) or min(size) < _WINDOW:
        return None
    where = np.ones(size, dtype=bool) if roi is None else roi
    heads = torch.from_numpy(points)[None]
    mask = torch.from_numpy(where.astype(np.float32))[None, None]
    truth = density_map(heads, torch.ones(heads.shape[:2]), size, sigma=SIGMA, roi=None if roi is None else mask)
    coarse = torch.from_numpy(cells / cell**2).float()[None, None]
    fine = interpolate(coarse, scale_factor=cell, mode="bilinear")[..., : size[0], : size[1]] * mask
    peak = truth.max()
    true_map, predicted = (truth / peak)[0, 0].numpy(), (fine / peak)[0, 0].numpy()
    _, similarity = structural_similarity(  # type: ignore[no-untyped-call]
        true_map, predicted, data_range=1.0, gaussian_weights=True, sigma=_WINDOW_SIGMA, use_sample_covariance=False,
        full=True,
    )  # fmt: skip
    border = (_WINDOW - 1) // 2
    inner = (slice(border, -border),) * 2
    squared = float(np.mean((true_map - predicted)[where] ** 2, dtype=np.float64))
    if not where[inner].any():
        return None
    psnr = -10 * math.log10(max(squared, float(np.finfo(np.float32).eps) ** 2))
    return MapQuality(psnr, float(similarity[inner][where[inner]].mean(dtype=np.float64)))
