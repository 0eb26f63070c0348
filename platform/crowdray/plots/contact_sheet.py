"""A look at a dataset: photos with their heads and region of interest, each beside its depth and its crowd.

Shape legend: H W photo in the pixels it is shown with, N heads.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from crowdray.config import TargetConfig
from crowdray.data.image_cache import DecodedImage, load_image, map_part
from crowdray.data.sample import Sample
from crowdray.datasets.statistics import in_roi, nearest_neighbours
from crowdray.plots import style
from crowdray.plots.training import image_targets

COLUMNS = 3
_INCHES = 12.0
"""Width of the sheet: 1920 pixels."""
_MARGIN, _BETWEEN, _INSIDE = 0.14, 0.2, 0.03
"""Inches around the sheet, between two tiles, and between the pictures of a tile."""
_HEADER, _CAPTION = 0.62, 0.24
"""Inches above the sheet, and above each row."""
_CHARACTER = 0.088
"""Inches of a character of a caption, at most."""
_STRAY = style.VERMILION


@dataclass(frozen=True, eq=False)
class _Tile:
    """One sample as it is shown."""

    caption: str
    """Its split and name."""
    picture: DecodedImage
    """Reduced to about the pixels it is shown with; its points are those that training sees."""
    heads: NDArray[np.float32]
    """(N, 2) every annotated head, those outside the image moved to its rim."""
    stray: NDArray[np.bool_]
    """(N,) heads outside the image or its region of interest."""
    crowd: NDArray[np.float32]
    """(H, W) the segmentation's target."""


def draw_contact_sheet(
    samples: Sequence[Sample], title: str, path: str | os.PathLike[str], *, target: TargetConfig | None = None
) -> None:
    """Draw each sample, split by split, in rows of three, as a PNG 1920 pixels wide at a path or URI.

    Beside the photo stand its depth and, below it, its crowd: the segmentation's target at the sigma and threshold of
    `target`, in cells as large as they are shown. Photos are decoded one at a time. Without samples it says so.
    """
    if not samples:
        return style.text_figure(title, "no image can be shown", path)
    target = target or TargetConfig()
    rows = [
        [*group[start : start + COLUMNS]]
        for _, found in groupby(samples, key=lambda sample: sample.split)
        for group in [list(found)]
        for start in range(0, len(group), COLUMNS)
    ]
    tile = (_INCHES - 2 * _MARGIN - (COLUMNS - 1) * _BETWEEN) / COLUMNS
    shape = float(np.clip(np.median([sample.height / sample.width for sample in samples]), 0.5, 1.2))
    photo = ((tile - _INSIDE) * 2 / 3, (tile - _INSIDE) * 2 / 3 * shape)
    height = _HEADER + len(rows) * (_CAPTION + photo[1] + 0.08) + _MARGIN
    figure = Figure(figsize=(_INCHES, height), dpi=style.DPI, facecolor="white")
    marked, top = False, _HEADER
    for row in rows:
        for column, sample in enumerate(row):
            shown = _tile(sample, photo, target)
            _draw_tile(figure, shown, _MARGIN + column * (tile + _BETWEEN), top, photo)
            marked = marked or bool(shown.stray.any())
        top += _CAPTION + photo[1] + 0.08
    note = "Beside each photo: its depth, bright is far, and its crowd, "
    note += f"sigma {target.sigma:g} pixels, threshold {target.threshold:g}."
    note += " Dashed: region of interest." * any(sample.roi is not None for sample in samples)
    note += " Red: heads outside it, or outside the image." * marked
    look: dict[str, Any] = {"ha": "left", "va": "top"}
    figure.text(_MARGIN / _INCHES, 1 - 0.13 / height, title, size=11, color=style.INK, weight="bold", **look)
    figure.text(_MARGIN / _INCHES, 1 - 0.38 / height, note, size=8, color=style.FAINT, **look)
    style.save_figure(figure, path, palette=False)


def _tile(sample: Sample, photo: tuple[float, float], target: TargetConfig) -> _Tile:
    pixels = _scale(sample.height, sample.width, photo) * style.DPI
    reduce = max(1, round(1 / pixels / 1.5))
    picture = load_image(sample, 0, reduce, use_roi=True)
    crowd = image_targets(picture, target.sigma / reduce, target.threshold, 1).segmentation[0, 0].numpy()
    heads = sample.points.clip(0, np.array([sample.width, sample.height], dtype=np.float32))
    stray = (heads != sample.points).any(axis=1)
    heads /= np.float32(reduce)
    if picture.roi is not None:
        stray |= ~in_roi(heads, picture.roi, *picture.size)
    return _Tile(f"{sample.split}/{sample.name}", picture, heads, stray, crowd)


def _scale(height: int, width: int, photo: tuple[float, float]) -> float:
    """Inches of a pixel of a photo that is as large as its place allows."""
    return min(photo[0] / width, photo[1] / height)


def _draw_tile(figure: Figure, tile: _Tile, left: float, top: float, photo: tuple[float, float]) -> None:
    """Photo, depth and crowd below a caption; left and top in inches from the sheet's upper left corner."""
    rows, columns = tile.picture.size
    scale = _scale(rows, columns, photo)
    width, height = columns * scale, rows * scale
    low = (height - _INSIDE) / 2
    narrow = low * width / height
    page = figure.get_size_inches()[1]

    def place(x: float, y: float, w: float, h: float) -> Axes:
        return figure.add_axes((x / _INCHES, 1 - (y + h) / page, w / _INCHES, h / page))

    count = f"{len(tile.heads):,} head{'s' * (len(tile.heads) != 1)}"
    whole = width + _INSIDE + narrow
    name = _shortened(tile.caption, int(whole / _CHARACTER) - len(count) - 2)
    base = 1 - (top + _CAPTION - 0.06) / page
    figure.text(left / _INCHES, base, name, size=8.5, color=style.INK, va="baseline")
    figure.text((left + whole) / _INCHES, base, count, size=8.5, color=style.FAINT, va="baseline", ha="right")
    top += _CAPTION
    _draw_photo(place(left, top, width, height), tile, scale)
    beside = left + width + _INSIDE
    axes, under = place(beside, top, narrow, low), place(beside, top + low + _INSIDE, narrow, low)
    depth = tile.picture.depth
    stretched = None if depth is None else map_part(depth, tile.picture.size, slice(rows), slice(columns))
    _draw_map(axes, stretched, style.DEPTH_CMAP, tile.picture.size)
    cell = -(-rows // int(low * style.DPI))
    _draw_map(under, _coarser(tile.crowd, cell), style.SEGMENTATION_CMAP, tile.picture.size, cell)


def _shortened(name: str, room: int) -> str:
    """A name without its middle where it has more characters than there is room for."""
    if len(name) <= room:
        return name
    kept = max(2, room - 1)
    return f"{name[: kept // 2]}…{name[-(kept - kept // 2) :]}"


def _coarser(crowd: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """The largest value in each square of so many cells: the crowd of a single head must not fade with its size."""
    height, width = crowd.shape
    padded = np.pad(crowd, ((0, -height % factor), (0, -width % factor)))
    squares = padded.reshape(padded.shape[0] // factor, factor, padded.shape[1] // factor, factor)
    largest: NDArray[np.float32] = squares.max(axis=(1, 3))
    return largest


def _draw_photo(axes: Axes, tile: _Tile, scale: float) -> None:
    height, width = tile.picture.size
    axes.imshow(tile.picture.image, extent=(0, width, height, 0), interpolation="antialiased", aspect="auto")
    if tile.picture.roi is not None:
        style.draw_roi(axes, tile.picture.roi)
    spacing = nearest_neighbours(tile.heads)
    apart = float(np.median(spacing)) * scale * 72 if len(spacing) else 8.0
    side = float(np.clip(0.6 * apart, 1.3, 4.5))
    for chosen, colour in ((~tile.stray, style.HEAD_COLOUR), (tile.stray, _STRAY)):
        x, y = tile.heads[chosen].T
        look: dict[str, Any] = {"edgecolors": "black", "linewidths": min(0.4, 0.12 * side), "clip_on": False}
        axes.scatter(x, y, s=side**2, color=colour, **look)
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()


def _draw_map(axes: Axes, values: NDArray[Any] | None, colours: str, size: tuple[int, int], cell: int = 1) -> None:
    """A map in [0, 1], in cells of so many pixels of a photo of size (H, W), or a word where there is none."""
    if values is None:
        axes.set_facecolor(style.PAPER)
        axes.text(0.5, 0.5, "no depth", ha="center", va="center", size=7.5, color=style.FAINT)
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        return
    rows, columns = (side * cell for side in values.shape)  # cells at the rim may reach beyond it
    look: dict[str, Any] = {"extent": (0, columns, rows, 0), "interpolation": "nearest", "aspect": "auto"}
    axes.imshow(values.astype(np.float32), cmap=style.fade_to_black(colours), vmin=0, vmax=1, **look)
    axes.set(xlim=(0, size[1]), ylim=(size[0], 0))
    axes.set_axis_off()
