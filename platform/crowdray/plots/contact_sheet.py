"""Contact sheet of a dataset: photos with heads and region of interest, depth and crowd segmentation.

Shape legend: H W photo in displayed pixels, N heads.
"""

import os
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch.nn.functional import max_pool2d

from crowdray.config import TargetConfig
from crowdray.data.image_cache import DecodedImage, crop_map, load_image
from crowdray.data.sample import Sample
from crowdray.datasets.statistics import in_roi, nearest_neighbours
from crowdray.plots import style
from crowdray.plots.training import image_targets

COLUMNS = 3
_INCHES = 12.0
"""Width of the sheet: 1920 pixels."""
_MARGIN, _BETWEEN, _INSIDE = 0.14, 0.2, 0.03
"""Inches around the sheet, between tiles, and between the panels of a tile."""
_HEADER, _CAPTION = 0.62, 0.24
"""Inches above the sheet, and above each row."""
_CHARACTER_WIDTH = 0.088
"""Largest width of a caption's character in inches."""


def draw_contact_sheet(
    samples: Sequence[Sample], title: str, path: str | os.PathLike[str], *, target: TargetConfig | None = None
) -> None:
    """Draw samples by split in rows of three and save them as a PNG, 1920 pixels wide, at a path or URI.

    Each photo is shown with its depth and the crowd segmentation target at the sigma and threshold of `target`. Photos
    are decoded one at a time.
    """
    if not samples:
        return style.text_figure(title, "no usable image", path)
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
    top = _HEADER
    for row in rows:
        for column, sample in enumerate(row):
            _draw_tile(figure, sample, target, _MARGIN + column * (tile + _BETWEEN), top, photo)
        top += _CAPTION + photo[1] + 0.08
    note = (
        "Right of each photo: depth (bright is far) and crowd segmentation, "
        f"sigma {target.sigma:g} pixels, threshold {target.threshold:g}. "
        "Dashed: region of interest. Red: heads outside it, or outside the image."
    )
    options: dict[str, Any] = {"ha": "left", "va": "top"}
    figure.text(_MARGIN / _INCHES, 1 - 0.13 / height, title, size=11, color=style.INK, weight="bold", **options)
    figure.text(_MARGIN / _INCHES, 1 - 0.38 / height, note, size=8, color=style.FAINT, **options)
    style.save_figure(figure, path)


def _draw_tile(
    figure: Figure, sample: Sample, target: TargetConfig, left: float, top: float, photo: tuple[float, float]
) -> None:
    """Draw a caption, photo, depth and crowd; left and top are inches from the sheet's upper left corner."""
    inches_per_pixel = min(photo[0] / sample.width, photo[1] / sample.height)
    reduce = max(1, round(1 / (inches_per_pixel * style.DPI) / 1.5))
    decoded = load_image(sample, 0, reduce, use_roi=True)
    rows, columns = decoded.size
    scale = min(photo[0] / columns, photo[1] / rows)
    width, height = columns * scale, rows * scale
    map_height = (height - _INSIDE) / 2
    map_width = map_height * width / height
    page = figure.get_size_inches()[1]

    def panel(x: float, y: float, w: float, h: float) -> Axes:
        return figure.add_axes((x / _INCHES, 1 - (y + h) / page, w / _INCHES, h / page))

    count = f"{len(sample.points):,} head{'s' * (len(sample.points) != 1)}"
    total_width = width + _INSIDE + map_width
    caption = f"{sample.split}/{sample.name}"
    limit = int(total_width / _CHARACTER_WIDTH) - len(count) - 2
    if len(caption) > limit:
        caption = f"…{caption[1 - limit :]}"
    base = 1 - (top + _CAPTION - 0.06) / page
    figure.text(left / _INCHES, base, caption, size=8.5, color=style.INK, va="baseline")
    figure.text((left + total_width) / _INCHES, base, count, size=8.5, color=style.FAINT, va="baseline", ha="right")
    top += _CAPTION
    _draw_photo(panel(left, top, width, height), sample, decoded, reduce, scale)
    maps_left = left + width + _INSIDE
    upper = panel(maps_left, top, map_width, map_height)
    lower = panel(maps_left, top + map_height + _INSIDE, map_width, map_height)
    depth = None if decoded.depth is None else crop_map(decoded.depth, decoded.size, slice(rows), slice(columns))
    _draw_map(upper, depth, style.DEPTH_CMAP, decoded.size)
    crowd = image_targets(decoded, target.sigma / reduce, target.threshold, 1).segmentation
    cell = -(-rows // int(map_height * style.DPI))
    pooled = max_pool2d(crowd, cell, ceil_mode=True)[0, 0].numpy()  # so that a single head stays visible
    _draw_map(lower, pooled, style.SEGMENTATION_CMAP, decoded.size, cell)


def _draw_photo(axes: Axes, sample: Sample, decoded: DecodedImage, reduce: int, scale: float) -> None:
    """Draw a photo reduced by a factor; heads outside the image are moved to its border."""
    height, width = decoded.size
    axes.imshow(decoded.image, extent=(0, width, height, 0), interpolation="antialiased", aspect="auto")
    heads = sample.points.clip(0, np.array([sample.width, sample.height], dtype=np.float32))
    outside = (heads != sample.points).any(axis=1)
    heads /= np.float32(reduce)
    if decoded.roi is not None:
        outside |= ~in_roi(heads, decoded.roi, *decoded.size)
        style.draw_roi(axes, decoded.roi)
    spacing = nearest_neighbours(heads)
    points_apart = float(np.median(spacing)) * scale * 72 if len(spacing) else 8.0
    marker = float(np.clip(0.6 * points_apart, 1.3, 4.5))
    for chosen, colour in ((~outside, style.HEAD_COLOUR), (outside, style.VERMILION)):
        options: dict[str, Any] = {"edgecolors": "black", "linewidths": min(0.4, 0.12 * marker), "clip_on": False}
        x, y = heads[chosen].T
        axes.scatter(x, y, s=marker**2, color=colour, **options)
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()


def _draw_map(axes: Axes, values: NDArray[Any] | None, colours: str, size: tuple[int, int], cell: int = 1) -> None:
    """Draw a map in [0, 1] with cells of `cell` pixels of a photo (H, W); "no depth" if it is None."""
    if values is None:
        axes.text(0.5, 0.5, "no depth", ha="center", va="center", size=7.5, color=style.FAINT)
        axes.set_axis_off()
        return
    rows, columns = (side * cell for side in values.shape)  # the last cells may extend beyond the photo
    options: dict[str, Any] = {"extent": (0, columns, rows, 0), "interpolation": "nearest", "aspect": "auto"}
    axes.imshow(values.astype(np.float32), cmap=style.fade_to_black(colours), vmin=0, vmax=1, **options)
    axes.set(xlim=(0, size[1]), ylim=(size[0], 0))
    axes.set_axis_off()
