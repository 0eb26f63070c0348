"""Style shared by all figures: colours, axes, annotations, and writing a compact PNG."""

import io
import os
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from crowdray import storage
from crowdray.errors import escaped

DPI = 160
INK, FAINT, PAPER = "#24292f", "#6e7781", "#d8dee4"
BLUE, SKY, ORANGE = "#0072b2", "#56b4e9", "#e69f00"
VERMILION, GREEN, PINK = "#d55e00", "#009e73", "#cc79a7"
"""The Okabe-Ito palette, safe for colour-blind readers."""

HEAD_COLOUR = "#ffd23f"
"""Colour of annotated heads and of the outline of the true crowd."""

DENSITY_CMAP, SEGMENTATION_CMAP, DEPTH_CMAP = "inferno", "bone", "viridis"
"""Perceptually ordered colormaps: lightness rises monotonically, so they also work in greyscale."""
GAMMA = 0.7
"""Exponent of the density colour scale; below 1 keeps an isolated head visible next to a dense crowd."""


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Render a figure to a PNG at a path or URI; formulas and control characters in its texts are shown as they are."""
    for text in [*figure.texts, *(text for axes in figure.axes for text in (axes.title, *axes.texts))]:
        text.set_parse_math(False)  # names of datasets and photos may contain two dollar signs
        text.set_text("\n".join(map(escaped, text.get_text().split("\n"))))
    canvas: Any = FigureCanvasAgg(figure)
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        canvas.draw()
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3]).save(buffer, format="PNG")
    storage.write_bytes(os.fspath(path), buffer.getvalue())


def badge(axes: Axes, text: str, size: float, *, top: bool = False) -> None:
    """Add white text (`size` in points) on a dark box in the lower left corner, or the upper left one."""
    box = {"boxstyle": "round,pad=0.3", "facecolor": "black", "edgecolor": "none", "alpha": 0.6}
    position: dict[str, Any] = {
        "xycoords": "axes fraction",
        "textcoords": "offset points",
        "ha": "left",
        "va": "top" if top else "bottom",
    }
    offset = (0.7 * size, -0.7 * size if top else 0.7 * size)
    axes.annotate(text, (0, int(top)), offset, size=size, weight="bold", color="white", bbox=box, **position)


def draw_outline(
    axes: Axes, mask: NDArray[Any], colour: str, width: float, style: Any = "solid", cell: int = 1
) -> None:
    """Draw the border of a 0/1 mask (h, w) whose cells are `cell` pixels wide; a constant mask has no border."""
    if mask.min() < mask.max():
        rows, columns = ((np.arange(side) + 0.5) * cell for side in mask.shape)
        axes.contour(columns, rows, mask, levels=[0.5], colors=[colour], linewidths=width, linestyles=[style])


def draw_roi(axes: Axes, roi: NDArray[np.bool_]) -> None:
    """Draw the dashed border of a region of interest (H, W) and darken everything outside it."""
    height, width = roi.shape
    shade = np.zeros((height, width, 4), dtype=np.float32)
    shade[..., 3] = 0.45 * ~roi
    axes.imshow(shade, extent=(0, width, height, 0), interpolation="nearest")
    draw_outline(axes, roi.astype(np.float32), "white", 0.8, (0, (4, 2)))


def draw_map(
    axes: Axes, values: NDArray[Any], colours: str, norm: Normalize | None = None, cell: int = 1, **options: Any
) -> None:
    """Draw a map (h, w), by default from 0 to 1, in cells of `cell` pixels; the last may extend beyond the photo."""
    rows, columns = (side * cell for side in values.shape)
    colormap, extent = fade_to_black(colours), (0, columns, rows, 0)
    axes.imshow(values, cmap=colormap, norm=norm or Normalize(0, 1), extent=extent, **options)


def text_figure(title: str, message: str, path: str | os.PathLike[str]) -> None:
    """Save a figure that holds only a title and a message, in place of a plot without data."""
    figure = Figure(figsize=(6.4, 1.6), dpi=DPI, facecolor="white")
    figure.text(0.5, 0.78, title, ha="center", va="center", size=10, color=INK)
    figure.text(0.5, 0.42, message, ha="center", va="center", size=9, color=FAINT, linespacing=1.5)
    save_figure(figure, path)


def fade_to_black(name: str) -> ListedColormap:
    """Return a colormap whose lowest values fade to black, so that zero looks the same in every map."""
    steps = np.linspace(0, 1, 256)
    colours = matplotlib.colormaps[name](steps)
    colours[:, :3] *= np.clip(steps / 0.15, 0, 1)[:, None]
    return ListedColormap(colours)


def density_colormap() -> ListedColormap:
    """Return the colormap for a density over a photo: zero is transparent."""
    steps = np.linspace(0, 1, 256)
    colours = matplotlib.colormaps[DENSITY_CMAP](0.25 + 0.75 * steps)
    colours[:, 3] = 0.8 * np.clip(steps * 2.5, 0, 1)
    return ListedColormap(colours)


def style_axes(axes: Axes) -> None:
    """Apply the common style: light ticks, horizontal grid lines and no frame."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#afb8c1")
    axes.tick_params(which="both", color="#afb8c1", labelcolor=FAINT, labelsize=8)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, size=8.5)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#d0d7de", linewidth=0.5)
