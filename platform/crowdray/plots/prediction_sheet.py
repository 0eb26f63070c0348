"""Contact sheet of a prediction: the densest photos, and those that are most unlike the training data.

Shape legend: H W photo, h w density.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from crowdray.plots import style

COLUMNS = 3
_INCHES, _MARGIN, _HEADER, _KIND, _CAPTION = 12.0, 0.15, 0.45, 0.22, 0.42
"""Width of the sheet and its margin, and the heights of the header, the name of a kind and a caption."""
_MAX_SIDE = 640
"""Longer side in pixels to which a photo is reduced."""


@dataclass(frozen=True, eq=False)
class SheetPhoto:
    """A photo on the sheet."""

    name: str
    image: NDArray[np.uint8]
    """(H, W, 3) RGB, reduced."""
    density: NDArray[np.float32]
    """(h, w) heads per cell."""
    extent: tuple[float, float]
    """Width and height of the density in photos: its last cells may extend beyond one."""
    note: str

    @classmethod
    def of(
        cls,
        name: str,
        image: NDArray[np.uint8],
        density: NDArray[np.float32],
        cell: int,
        warnings: Sequence[str],
    ) -> Self:
        """Reduce a photo (H, W, 3), whose density (h, w) has cells of `cell` pixels."""
        height, width = image.shape[:2]
        scale = min(1.0, _MAX_SIDE / max(height, width))
        shown = max(1, round(width * scale)), max(1, round(height * scale))
        reduced = np.asarray(Image.fromarray(image).resize(shown, Image.Resampling.BOX))
        extent = density.shape[1] * cell / width, density.shape[0] * cell / height
        return cls(name, reduced, density, extent, warnings[0] if warnings else "")


def draw_prediction_sheet(photos: Mapping[str, Sequence[SheetPhoto]], title: str, path: str | os.PathLike[str]) -> None:
    """Draw photos with their density, in rows of three under the name of their kind, as a PNG at a path or URI."""
    rows = [
        ("" if start else kind, group[start : start + COLUMNS])
        for kind, group in photos.items()
        for start in range(0, len(group), COLUMNS)
    ]
    tile = (_INCHES - (COLUMNS + 1) * _MARGIN) / COLUMNS
    heights = [
        tile * float(np.clip(max(p.image.shape[0] / p.image.shape[1] for p in row), 0.4, 1.4)) for _, row in rows
    ]
    total = _HEADER + sum(heights) + len(rows) * _CAPTION + sum(_KIND for kind, _ in rows if kind)
    figure = Figure(figsize=(_INCHES, total), dpi=100, facecolor="white")
    top = total - _HEADER
    text: dict[str, Any] = {"ha": "left", "va": "top"}
    figure.text(_MARGIN / _INCHES, 1 - 0.12 / total, title, size=12, color=style.INK, weight="bold", **text)
    for (kind, row), height in zip(rows, heights, strict=True):
        if kind:
            figure.text(_MARGIN / _INCHES, top / total, kind, size=10, color=style.INK, **text)
            top -= _KIND
        top -= height
        for column, photo in enumerate(row):
            left = _MARGIN + column * (tile + _MARGIN)
            _draw_photo(figure.add_axes((left / _INCHES, top / total, tile / _INCHES, height / total)), photo)
            caption = _shortened(photo.name, 52) + (f"\n{_shortened(photo.note, 68)}" if photo.note else "")
            figure.text(left / _INCHES, (top - 0.05) / total, caption, size=7.5, color=style.FAINT, **text)
        top -= _CAPTION
    style.save_figure(figure, path)


def _draw_photo(axes: Axes, photo: SheetPhoto) -> None:
    axes.imshow(photo.image, extent=(0, 1, 1, 0), interpolation="antialiased", aspect="auto")
    top = max(float(photo.density.max()), 0.004)
    colours: dict[str, Any] = {"cmap": style.density_colormap(), "norm": PowerNorm(style.GAMMA, 0, top)}
    right, bottom = photo.extent
    axes.imshow(photo.density, extent=(0, right, bottom, 0), interpolation="bilinear", aspect="auto", **colours)
    axes.set(xlim=(0, 1), ylim=(1, 0))
    axes.set_box_aspect(photo.image.shape[0] / photo.image.shape[1])
    axes.set_axis_off()
    style.badge(axes, f"{photo.density.sum(dtype=np.float64):.1f} heads", 9)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length - 1]}…"
