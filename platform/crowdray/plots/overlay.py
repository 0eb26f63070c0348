"""Overlay of a predicted density on its photo, with the count."""

import os
from typing import Any

import numpy as np
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from crowdray.plots import style

_SIDE_LIMITS = (640, 1280)
"""Limits in pixels of an overlay's longer side; photos are resized to fit."""
_MIN_PEAK = 0.004
"""Smallest top of the colour scale, in heads per cell, so that noise in a nearly empty map stays dark."""


def draw_overlay(image: NDArray[np.uint8], density: NDArray[np.float32], path: str | os.PathLike[str]) -> None:
    """Draw a density over its photo and save it as a PNG whose longer side has 640 to 1280 pixels.

    `image` is (H, W, 3) RGB, `density` (h, w) heads per cell; its sum is the count shown in the corner.
    """
    height, width = image.shape[:2]
    longest = max(height, width)
    scale = float(np.clip(longest, *_SIDE_LIMITS)) / longest
    shown = max(1, round(width * scale)), max(1, round(height * scale))
    figure = Figure(figsize=(shown[0] / 100, shown[1] / 100), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    if scale < 1:  # matplotlib takes 55 bytes of memory for each pixel
        image = np.asarray(Image.fromarray(image).resize(shown, Image.Resampling.BOX))
    interpolation = "bicubic" if scale > 1 else "nearest"
    axes.imshow(image, extent=(0, width, height, 0), interpolation=interpolation, aspect="auto")
    rows, columns = density.shape
    # The last cells extend beyond the photo if its size is not a multiple of theirs.
    cell = max(1, round(longest / max(rows, columns)))
    top = max(float(density.max()), _MIN_PEAK)
    colours: dict[str, Any] = {"cmap": style.density_colormap(), "norm": PowerNorm(style.GAMMA, 0, top)}
    axes.imshow(density, extent=(0, columns * cell, rows * cell, 0), interpolation="bilinear", aspect="auto", **colours)
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
    size = float(np.clip(min(height, width) * scale * 0.032, 8, 26))
    style.badge(axes, f"{density.sum(dtype=np.float64):.1f} heads", size)
    style.save_figure(figure, path)
