"""Histograms of a dataset: heads per image and distances between heads."""

import os
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter
from numpy.typing import NDArray

from crowdray.datasets.validation import ValidationReport
from crowdray.plots import style

_COLOURS = (style.BLUE, style.ORANGE, style.GREEN, style.PINK, style.SKY, style.VERMILION)
_LOG_RATIO = 50
"""Ratio of the largest to the smallest count from which their axis is logarithmic."""
_BINS = 30
_MIN_SPACING = 0.5
"""Smallest plotted distance in pixels: coinciding heads have no logarithm."""


def draw_histograms(report: ValidationReport, path: str | os.PathLike[str]) -> None:
    """Draw heads per image and median head distances of each split; save them as a PNG at a path or URI.

    Bars are percentages of a split, dashed lines are medians. If counts span orders of magnitude, their axis is
    logarithmic and the legend states the number of empty images.
    """
    splits = [split for split, stats in report.splits.items() if stats.images]
    if not splits:
        return style.text_figure(report.source, "no usable image", path)
    layout = ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06, wspace=0.04)
    figure = Figure(figsize=(9.6, 3.7), dpi=style.DPI, layout=layout, facecolor="white")
    counts, spacing = figure.subplots(1, 2)
    _draw_counts(counts, {s: np.array([i.heads for i in report.images if i.split == s]) for s in splits})
    spacings = {s: [i.spacing for i in report.images if i.split == s and i.spacing is not None] for s in splits}
    _draw_spacing(spacing, {split: np.array(values).clip(_MIN_SPACING) for split, values in spacings.items()})
    for axes in (counts, spacing):
        style.style_axes(axes)
    images, heads = len(report.images), sum(stats.heads for stats in report.splits.values())
    figure.suptitle(f"{report.source}: {images:,} images, {heads:,} heads", size=10, color=style.INK)
    style.save_figure(figure, path)


def _draw_counts(axes: Axes, counts: dict[str, NDArray[np.int64]]) -> None:
    all_counts = np.concatenate(list(counts.values()))
    positive = all_counts[all_counts > 0]
    logarithmic = len(positive) > 0 and positive.max() >= _LOG_RATIO * positive.min()
    edges = _count_edges(positive if logarithmic else all_counts, logarithmic)
    for (split, values), colour in zip(counts.items(), cycle(_COLOURS), strict=False):
        empty = f", {(values == 0).sum():,} empty" if logarithmic and (values == 0).any() else ""
        label = f"{split}: median {np.median(values):,.10g}{empty}"
        _draw_bars(axes, np.histogram(values, edges)[0] / len(values), edges, colour, float(np.median(values)), label)
    if logarithmic:
        _use_log_scale(axes)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    axes.set(xlabel="heads per image", ylabel="images of the split, %", xlim=(edges[0], edges[-1]))
    _legend(axes)


def _count_edges(counts: NDArray[np.int64], logarithmic: bool) -> NDArray[np.float64]:
    """Return bin edges at half-integers, so that every bin contains an integer."""
    low, high = int(counts.min()), int(counts.max()) + 1
    bins = _bins(counts)
    if logarithmic:
        return np.unique(np.geomspace(low, high, bins + 1, dtype=np.float64).round()) - 0.5
    step = -(-(high - low) // bins)
    return np.arange(low, high + step, step, dtype=np.float64) - 0.5


def _draw_spacing(axes: Axes, spacing: dict[str, NDArray[np.float64]]) -> None:
    every = np.concatenate(list(spacing.values()))
    axes.set(xlabel="pixels to the nearest other head, median of an image", ylabel="images of the split, %")
    if not len(every):
        axes.text(0.5, 0.5, "no image has two heads", transform=axes.transAxes, ha="center", color=style.FAINT)
        axes.set(xticks=[], yticks=[])
        return
    edges = np.geomspace(every.min() / 1.01, every.max() * 1.01, _bins(every) + 1)
    for (split, values), colour in zip(spacing.items(), cycle(_COLOURS), strict=False):
        if len(values):
            median = float(np.median(values))
            fractions = np.histogram(values, edges)[0] / len(values)
            _draw_bars(axes, fractions, edges, colour, median, f"{split}: median {median:.1f} pixels")
    _use_log_scale(axes)
    axes.set_xlim(edges[0], edges[-1])
    _legend(axes)


def _bins(values: NDArray[Any]) -> int:
    return int(np.clip(2 * len(values) ** (1 / 3), 5, _BINS))


def _draw_bars(
    axes: Axes, fractions: NDArray[np.float64], edges: NDArray[np.float64], colour: str, median: float, label: str
) -> None:
    axes.stairs(100 * fractions, edges, fill=True, color=colour, alpha=0.18, linewidth=0)
    axes.stairs(100 * fractions, edges, color=colour, linewidth=1.3, label=label)
    axes.axvline(median, color=colour, linewidth=1.0, linestyle="--")


def _use_log_scale(axes: Axes) -> None:
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _legend(axes: Axes) -> None:
    axes.legend(frameon=False, fontsize=8, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=3, borderaxespad=0.2)
