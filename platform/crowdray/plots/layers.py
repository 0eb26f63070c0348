"""Layers of a photo for an HTML page: the photo, a density over it and what lies outside the region of interest.

Shape legend: H W photo, h w density, N heads.
"""

import base64
import io

import numpy as np
from matplotlib.colors import PowerNorm
from numpy.typing import NDArray
from PIL import Image

from crowdray.plots import style

PHOTO_SIDE, DENSITY_SIDE = 720, 360
"""Longer sides in pixels to which a photo and a density are reduced."""
_MIN_PEAK = 0.001
"""Smallest top of the colour scale, in heads per pixel, so that noise in a nearly empty map stays dark."""


def photo_layer(image: NDArray[np.uint8]) -> str:
    """Return a photo (H, W, 3) as a data URI."""
    return _data_uri(Image.fromarray(image), PHOTO_SIDE, quality=72)


def density_layer(density: NDArray[np.float32], cell: int, top: float) -> str:
    """Return a density over a photo as a data URI; it is transparent where there are no heads.

    Args:
        density: (h, w) heads per cell.
        cell: Side of a cell in pixels of the photo.
        top: Heads per pixel of the photo at the top of the colour scale.
    """
    scaled = PowerNorm(style.GAMMA, 0, max(top, _MIN_PEAK), clip=True)(density / np.float32(cell**2))
    colours = style.density_colormap()(np.asarray(scaled), bytes=True)
    return _data_uri(Image.fromarray(colours), DENSITY_SIDE, quality=70)


def roi_layer(roi: NDArray[np.bool_]) -> str:
    """Return a shade over the pixels outside a region of interest (H, W) as a data URI."""
    shade = np.zeros((*roi.shape, 4), dtype=np.uint8)
    shade[..., 3] = 128 * ~roi
    return _data_uri(Image.fromarray(shade), DENSITY_SIDE, quality=60)


def points_path(points: NDArray[np.floating]) -> str:
    """Return heads (N, 2), x y in pixels of the photo, as dots of an SVG path with round caps."""
    return "".join(f"M{x:.0f} {y:.0f}h0" for x, y in points)


def point_size(points: NDArray[np.floating], size: tuple[int, int]) -> float:
    """Diameter in pixels of a head's dot in a photo of a size (H, W): smaller in a dense crowd."""
    height, width = size
    spacing = np.sqrt(height * width / max(1, len(points)))
    return float(np.clip(0.25 * spacing, width / 180, width / 80))


def _data_uri(image: Image.Image, side: int, quality: int) -> str:
    image.thumbnail((side, side), Image.Resampling.BOX)
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=4)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
