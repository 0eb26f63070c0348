"""Charts of evaluations: errors and predictions against counts, groups of images by count, counters on datasets."""

import os
from collections.abc import Sequence
from itertools import cycle
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from crowdray.errors import escaped
from crowdray.evaluation.levels import Calibration, count_groups
from crowdray.evaluation.metrics import ImageCount
from crowdray.evaluation.report import EvaluationReport, ModelResult
from crowdray.plots import style

COLOURS = (style.BLUE, style.ORANGE, style.GREEN, style.PINK, style.SKY, style.VERMILION)
"""Colours of counters, in their order; repeated if there are more."""
GROUPS = 10
"""Groups of images of `draw_deciles`."""

_SIZE = (3.7, 3.3)
"""Width and height of a chart in inches: text of 9 points stays legible on a phone."""
_RASTERISED = 300
"""Images from which points are drawn as pixels instead of one element each."""
_WORST_RATIO = 8.0
"""Error relative to the constant at which the matrix has its darkest red; its inverse has the darkest blue."""


def draw_errors(counts: Sequence[ImageCount], colour: str, limits: tuple[float, float] | None = None) -> Figure:
    """Draw the error of each image against its annotated heads.

    Args:
        counts: At least one image.
        colour: Colour of the counter.
        limits: Lowest and highest error of the axis, to compare charts; None: those of these images.
    """
    truth, predicted = _columns(counts)
    figure, axes = _chart("annotated heads", "predicted minus annotated")
    axes.axhline(0, color=style.INK, linewidth=1)
    _scatter(axes, truth, predicted - truth, colour)
    low, high = limits or error_limits([counts])
    axes.set_ylim(low, high)
    return figure


def error_limits(counters: Sequence[Sequence[ImageCount]]) -> tuple[float, float]:
    """Return limits of `draw_errors` that contain the errors of all counters."""
    errors = np.concatenate([predicted - truth for truth, predicted in map(_columns, counters)])
    low, high = min(0.0, float(errors.min())), max(0.0, float(errors.max()))
    margin = 0.06 * (high - low) + 0.1
    return low - margin, high + margin


def draw_calibration(counts: Sequence[ImageCount], calibration: Calibration | None, colour: str) -> Figure:
    """Draw the predicted against the annotated heads of each image, with the least-squares line."""
    truth, predicted = _columns(counts)
    figure, axes = _chart("annotated heads", "predicted heads")
    low, high = min(truth.min(), predicted.min(), 0.8 * truth.min()), max(truth.max(), predicted.max())
    ends = np.array([low if low > 0.3 * high else min(low, 0.0), high + 0.04 * (high - low) + 0.5])
    axes.plot(ends, ends, color=style.INK, linewidth=1)
    _scatter(axes, truth, predicted, colour)
    if calibration is not None and np.isfinite(calibration.slope):
        axes.plot(ends, calibration.intercept + calibration.slope * ends, "--", color=style.VERMILION, linewidth=1.2)
    axes.set(xlim=ends, ylim=ends, aspect="equal")
    return figure


def draw_deciles(counters: Sequence[Sequence[ImageCount]]) -> Figure:
    """Draw the mean annotated heads of up to ten groups of images by count, and the mean that each counter predicts.

    The same images for all counters; the first one defines the groups.
    """
    figure, axes = _chart("annotated heads, groups of images", "mean heads")
    groups = count_groups(counters[0], GROUPS)
    positions = np.arange(len(groups))
    axes.bar(positions, [np.mean([c.truth for c in group]) for group in groups], 0.8, color=style.PAPER)
    offsets = np.linspace(-0.12, 0.12, len(counters)) if len(counters) > 1 else np.zeros(1)
    for counts, colour, marker, offset in zip(counters, cycle(COLOURS), cycle("osD^v"), offsets, strict=False):
        predicted = {count.row: count.predicted for count in counts}
        means = [np.mean([predicted[c.row] for c in group if c.row in predicted] or np.nan) for group in groups]
        axes.plot(positions + offset, means, marker, color=colour, markersize=5)
    axes.set_xticks(positions, [head_range(group) for group in groups], rotation=45, ha="right", rotation_mode="anchor")
    axes.set_ylim(bottom=0)
    return figure


def head_range(counts: Sequence[ImageCount]) -> str:
    """Fewest and most annotated heads of some images; a single number where they are equal."""
    low, high = min(c.truth for c in counts), max(c.truth for c in counts)
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"


def draw_matrix(report: EvaluationReport) -> Figure:
    """Draw the MAE of each counter on each dataset.

    The colour is the MAE divided by that of a constant, the mean count of the split: blue is better than that, red is
    worse. A frame marks a counter on the dataset that it was trained on.
    """
    rows, columns = len(report.models), len(report.datasets)
    figure = Figure(figsize=(1.9 + 1.5 * columns, 1.1 + 0.75 * rows), dpi=style.DPI, layout="constrained")
    axes = figure.add_subplot()
    norm = LogNorm(1 / _WORST_RATIO, _WORST_RATIO, clip=True)
    colours = colormaps["RdBu_r"]
    for y, model in enumerate(report.models):
        for x, dataset in enumerate(report.datasets):
            result = report.result(model, dataset)
            ratio = result.relative_mae
            colour = (0.9, 0.9, 0.9, 1.0) if ratio is None else colours(norm(ratio))
            axes.add_patch(Rectangle((x - 0.5, y - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=2))
            _cell_text(axes, x, y, result, ratio, "black" if np.dot(colour[:3], (0.3, 0.6, 0.1)) > 0.5 else "white")
            if result.trained_here:
                frame: dict[str, Any] = {"fill": False, "edgecolor": style.HEAD_COLOUR, "linewidth": 3}
                axes.add_patch(Rectangle((x - 0.46, y - 0.44), 0.92, 0.88, **frame))
    axes.set(xlim=(-0.5, columns - 0.5), ylim=(rows - 0.5, -0.5))
    axes.set_xticks(range(columns), [_name(f"{d.name}\n{d.split}, {d.images:,} images") for d in report.datasets])
    axes.set_yticks(range(rows), [_name(model.label) for model in report.models])
    axes.tick_params(
        length=0, labelsize=9, labelcolor=style.INK, top=True, labeltop=True, bottom=False, labelbottom=False
    )
    axes.spines[:].set_visible(False)
    return figure


def save_matrix(report: EvaluationReport, path: str | os.PathLike[str]) -> None:
    """Save `draw_matrix` as a PNG at a path or URI."""
    figure = draw_matrix(report)
    figure.set_facecolor("white")
    note = "MAE in heads; below it, relative to always answering the mean count. Framed: trained on this dataset."
    figure.supxlabel(note, size=7, color=style.FAINT)
    style.save_figure(figure, path)


def _cell_text(axes: Axes, x: int, y: int, result: ModelResult, ratio: float | None, colour: str) -> None:
    overall = result.evaluation.overall
    centred: dict[str, Any] = {"ha": "center", "va": "center", "color": colour}
    axes.text(x, y - 0.1, "-" if overall is None else f"{overall.mae:.2f}", size=13, weight="bold", **centred)
    if ratio is not None:
        axes.text(x, y + 0.22, f"{ratio:.2f} x constant", size=7.5, **centred)


def _name(text: str, longest: int = 32) -> str:
    lines = [line if len(line) <= longest else f"…{line[1 - longest :]}" for line in text.split("\n")]
    return "\n".join(map(escaped, lines))


def _chart(xlabel: str, ylabel: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=_SIZE, dpi=200, layout="constrained")
    axes = figure.add_subplot()
    axes.set(xlabel=xlabel, ylabel=ylabel)
    style.style_axes(axes)
    for axis in (axes.xaxis, axes.yaxis):
        axis.label.set_fontsize(9)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure, axes


def _scatter(axes: Axes, x: NDArray[np.float64], y: NDArray[np.float64], colour: str) -> None:
    many = len(x) > _RASTERISED
    axes.scatter(x, y, s=7 if many else 18, alpha=0.45 if many else 0.75, color=colour, linewidths=0, rasterized=many)


def _columns(counts: Sequence[ImageCount]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Annotated and predicted heads."""
    return np.array([c.truth for c in counts], np.float64), np.array([c.predicted for c in counts], np.float64)
