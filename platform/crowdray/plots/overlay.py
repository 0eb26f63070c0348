"""One photo under the heat of its density, with the count: what a prediction looks like."""

import os

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from crowdray.plots.style import GAMMA, badge, density_colormap, save_figure

_SIDES = (640, 1280)
"""Pixels of an overlay's longer side: smaller photos are enlarged, larger ones reduced."""
_FAINTEST_PEAK = 0.004
"""Heads per cell that the colours span at least: a nearly empty map must not glow with its noise."""


def draw_overlay(image: NDArray[np.uint8], density: NDArray[np.float32], path: str | os.PathLike[str]) -> None:
    """Draw a photo, (H, W, 3), under its density, (h, w) heads per cell, as a PNG at a path or URI.

    The count in its corner is the sum of the density. The longer side has 640 to 1280 pixels.
    """
    height, width = image.shape[:2]
    longest = max(height, width)
    scale = float(np.clip(longest, *_SIDES)) / longest
    shown = (max(1, round(width * scale)) / 100, max(1, round(height * scale)) / 100)
    figure = Figure(figsize=shown, dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    smooth = "bicubic" if scale > 1 else "antialiased"
    axes.imshow(image, extent=(0, width, height, 0), interpolation=smooth, aspect="auto")
    rows, columns = density.shape
    # Cells at the rim reach beyond the photo where their size does not divide it.
    cell = max(1, round(longest / max(rows, columns)))
    top = max(float(density.max()), _FAINTEST_PEAK)
    axes.imshow(
        density,
        cmap=density_colormap(),
        norm=PowerNorm(GAMMA, 0, top),
        extent=(0, columns * cell, rows * cell, 0),
        interpolation="bilinear",
        aspect="auto",
    )
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    size = float(np.clip(min(height, width) * scale * 0.032, 8, 26))
    badge(axes, f"{density.sum(dtype=np.float64):.1f} heads", size)
    save_figure(figure, path, palette=False)
