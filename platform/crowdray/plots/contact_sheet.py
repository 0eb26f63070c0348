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
from matplotlib.gridspec import SubplotSpec
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
_MARGIN, _BETWEEN = 0.14, 0.2
"""Inches around the sheet, and between tiles."""
_HEADER, _CAPTION = 0.56, 0.3
"""Inches above the sheet, and above each row."""
_TILE = (_INCHES - 2 * _MARGIN - (COLUMNS - 1) * _BETWEEN) / COLUMNS
"""Width of a tile in inches: a photo, and its maps at half its size on the right."""
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
    splits = [list(found) for _, found in groupby(samples, key=lambda sample: sample.split)]
    rows = [group[start : start + COLUMNS] for group in splits for start in range(0, len(group), COLUMNS)]
    photo_height = 2 / 3 * _TILE * float(np.clip(np.median([s.height / s.width for s in samples]), 0.5, 1.2))
    height = _HEADER + len(rows) * (_CAPTION + photo_height) + _MARGIN
    figure = Figure(figsize=(_INCHES, height), dpi=style.DPI, facecolor="white")
    edges = {"left": _MARGIN / _INCHES, "right": 1 - _MARGIN / _INCHES, "bottom": _MARGIN / height}
    edges |= {"top": 1 - (_HEADER + _CAPTION) / height, "wspace": _BETWEEN / _TILE, "hspace": _CAPTION / photo_height}
    grid = figure.add_gridspec(len(rows), COLUMNS, **edges)
    for row, group in enumerate(rows):
        for column, sample in enumerate(group):
            _draw_tile(figure, grid[row, column], sample, target)
    note = (
        "Right of each photo: depth (bright is far) and crowd segmentation, "
        f"sigma {target.sigma:g} pixels, threshold {target.threshold:g}. "
        "Dashed: region of interest. Red: heads outside it, or outside the image."
    )
    options: dict[str, Any] = {"ha": "left", "va": "top"}
    figure.text(_MARGIN / _INCHES, 1 - 0.13 / height, title, size=11, color=style.INK, weight="bold", **options)
    figure.text(_MARGIN / _INCHES, 1 - 0.38 / height, note, size=8, color=style.FAINT, **options)
    style.save_figure(figure, path)


def _draw_tile(figure: Figure, slot: SubplotSpec, sample: Sample, target: TargetConfig) -> None:
    """Draw a caption, photo, depth and crowd."""
    box, count = slot.get_position(figure), f"{len(sample.points):,} head{'s' * (len(sample.points) != 1)}"
    caption, limit = f"{sample.split}/{sample.name}", int(_TILE / _CHARACTER_WIDTH) - len(count) - 2
    if len(caption) > limit:
        caption = f"…{caption[1 - limit :]}"
    base = box.y1 + 0.06 / figure.get_size_inches()[1]
    figure.text(box.x0, base, caption, size=8.5, color=style.INK, va="baseline")
    figure.text(box.x1, base, count, size=8.5, color=style.FAINT, va="baseline", ha="right")
    panels = slot.subgridspec(2, 2, width_ratios=(2, 1), wspace=0.015, hspace=0.02)
    parts: tuple[Any, ...] = (np.s_[:, 0], np.s_[0, 1], np.s_[1, 1])
    photo, upper, lower = (figure.add_subplot(panels[part], anchor="NW") for part in parts)
    pixels = photo.get_window_extent()
    reduce = max(1, round(max(sample.width / pixels.width, sample.height / pixels.height) / 1.5))
    decoded = load_image(sample, 0, reduce, use_roi=True)
    rows, columns = decoded.size
    _draw_photo(photo, sample, decoded, reduce, min(pixels.width / columns, pixels.height / rows) / style.DPI)
    if decoded.depth is None:
        upper.text(0.5, 0.5, "no depth", transform=upper.transAxes, ha="center", size=7.5, color=style.FAINT)
    else:
        depth = crop_map(decoded.depth, decoded.size, slice(rows), slice(columns)).astype(np.float32)
        style.draw_map(upper, depth, style.DEPTH_CMAP, interpolation="nearest")
    crowd = image_targets(decoded, target.sigma / reduce, target.threshold, 1).segmentation
    pixels = lower.get_window_extent()
    cell = -(-rows // int(min(pixels.height, pixels.width * rows / columns)))
    pooled = max_pool2d(crowd, cell, ceil_mode=True)[0, 0].numpy()  # so that a single head stays visible
    style.draw_map(lower, pooled, style.SEGMENTATION_CMAP, cell=cell, interpolation="nearest")
    for axes in (photo, upper, lower):
        axes.set(xlim=(0, columns), ylim=(rows, 0))
        axes.set_axis_off()


def _draw_photo(axes: Axes, sample: Sample, decoded: DecodedImage, reduce: int, scale: float) -> None:
    """Draw a photo reduced by a factor; heads outside the image are moved to its border."""
    height, width = decoded.size
    axes.imshow(decoded.image, extent=(0, width, height, 0), interpolation="antialiased")
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
