"""What all figures share: colours, marks, and a PNG of a moderate size that appears whole."""

import io
import os
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from crowdray import storage

DPI = 160
INK, FAINT, PAPER = "#24292f", "#6e7781", "#d8dee4"
BLUE, SKY, ORANGE = "#0072b2", "#56b4e9", "#e69f00"
VERMILION, GREEN, PINK = "#d55e00", "#009e73", "#cc79a7"
"""Okabe and Ito's colours, which every kind of colour vision tells apart."""

HEADS = "#ffd23f"
"""Annotated heads, and the border of the true crowd."""

DENSITY_COLOURS, CROWD_COLOURS, DEPTH_COLOURS = "inferno", "bone", "cividis"
"""Colour maps that rise in lightness: they read the same for every kind of colour vision, and in grey."""
GAMMA = 0.7
"""Exponent of densities' colours: a head that stands alone stays visible beside a dense crowd."""

_WHITE, _BLACK = 255, 254


def save_figure(figure: Figure, path: str | os.PathLike[str], palette: bool = True) -> None:
    """Render a figure to a PNG at a path or URI, where it appears whole.

    With a palette of 256 colours it has less than half of the bytes.
    """
    canvas: Any = FigureCanvasAgg(figure)
    with matplotlib.rc_context({"font.family": "DejaVu Sans"}):
        canvas.draw()
    pixels = np.asarray(canvas.buffer_rgba())[..., :3].copy()
    picture = _reduced(pixels) if palette else Image.fromarray(pixels)
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=palette)
    storage.write_bytes(os.fspath(path), buffer.getvalue())


def badge(axes: Axes, text: str, size: float) -> None:
    """White text of `size` points on a dark label in the lower left corner."""
    box = {"boxstyle": "round,pad=0.3", "facecolor": "black", "edgecolor": "none", "alpha": 0.6}
    axes.annotate(
        text,
        (0, 0),
        (0.7 * size, 0.7 * size),
        xycoords="axes fraction",
        textcoords="offset points",
        size=size,
        weight="bold",
        color="white",
        ha="left",
        va="bottom",
        bbox=box,
    )


def outline(axes: Axes, mask: NDArray[Any], colour: str, width: float, style: Any = "solid", cell: int = 1) -> None:
    """The border of a mask (h, w) of zeros and ones in cells of so many pixels; nothing where it holds only one of
    them."""
    if mask.min() < mask.max():
        rows, columns = ((np.arange(side) + 0.5) * cell for side in mask.shape)
        axes.contour(columns, rows, mask, levels=[0.5], colors=[colour], linewidths=width, linestyles=[style])


def region(axes: Axes, mask: NDArray[np.bool_]) -> None:
    """A region of interest (H, W) over a photo or a map: dashed, with a veil over what is outside."""
    height, width = mask.shape
    veil = np.zeros((height, width, 4), dtype=np.float32)
    veil[..., 3] = 0.45 * ~mask
    axes.imshow(veil, extent=(0, width, height, 0), interpolation="nearest")
    outline(axes, mask.astype(np.float32), "white", 0.8, (0, (4, 2)))


def say(name: str, words: str, path: str | os.PathLike[str]) -> None:
    """A figure that says in words why there is nothing to see."""
    figure = Figure(figsize=(6.4, 1.6), dpi=DPI, facecolor="white")
    figure.text(0.5, 0.78, name, ha="center", va="center", size=10, color=INK)
    figure.text(0.5, 0.42, words, ha="center", va="center", size=9, color=FAINT, linespacing=1.5)
    save_figure(figure, path)


def from_black(name: str) -> ListedColormap:
    """A colour map whose lowest values fade to black, so that nothing looks the same in all maps."""
    steps = np.linspace(0, 1, 256)
    colours = matplotlib.colormaps[name](steps)
    colours[:, :3] *= np.clip(steps / 0.15, 0, 1)[:, None]
    return ListedColormap(colours)


def heat() -> ListedColormap:
    """The colours of densities over a photo: from nothing, which is transparent, to the brightest."""
    steps = np.linspace(0, 1, 256)
    colours = matplotlib.colormaps[DENSITY_COLOURS](0.25 + 0.75 * steps)
    colours[:, 3] = 0.8 * np.clip(steps * 2.5, 0, 1)
    return ListedColormap(colours)


def plain(axes: Axes) -> None:
    """Faint ticks and lines, no frame: the data is the darkest thing in a chart."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#afb8c1")
    axes.tick_params(which="both", color="#afb8c1", labelcolor=FAINT, labelsize=8)
    for label in (axes.xaxis.label, axes.yaxis.label):
        label.set(color=INK, size=8.5)
    axes.set_axisbelow(True)
    axes.grid(axis="y", color="#d0d7de", linewidth=0.5)


def _reduced(pixels: NDArray[np.uint8]) -> Image.Image:
    """Pixels (H, W, 3) in 256 colours, dithered, but white left white, which Pillow's own dithering tints.

    The colours are chosen for what is neither white nor nearly black: maps are mostly black, photos are not.
    """
    white = (pixels == 255).all(axis=2)
    seen = pixels[~white & (pixels.sum(axis=2) > 30)]
    source = Image.fromarray(seen[None] if len(seen) else pixels)
    colours = (source.quantize(_BLACK).getpalette() or [])[: 3 * _BLACK]
    colours += [0] * (3 * _WHITE - len(colours)) + [255] * 3
    chosen = Image.new("P", (1, 1))
    chosen.putpalette(colours)
    index = np.array(Image.fromarray(pixels).quantize(palette=chosen, dither=Image.Dither.FLOYDSTEINBERG))
    index[white] = _WHITE
    reduced = Image.fromarray(index)
    reduced.putpalette(colours)
    return reduced
