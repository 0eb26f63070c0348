"""Figures of an ablation: gains of its arms, sweeps of a loss weight, and counts by density.

Shape legend: S seeds, N images.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator
from numpy.typing import NDArray

from crowdray.evaluation.comparison import Comparison
from crowdray.evaluation.intervals import Interval, mean_interval
from crowdray.evaluation.metrics import ImageCount
from crowdray.plots import style

GROUPS = 10
"""Groups of images by true count, as in the paper's Figure 4a."""


@dataclass(frozen=True)
class ArmGain:
    """One arm in the figure of gains."""

    name: str
    """Name of the arm."""
    mae: float
    """Its mean absolute error."""
    gain: Comparison
    """Gain over the plain baseline."""
    paper: float | None = None
    """The gain that the paper reports."""


@dataclass(frozen=True)
class SweepPoint:
    """One weight of a sweep."""

    weight: float
    """Loss weight of the task."""
    mae: float
    """Mean absolute error over all seeds."""
    interval: Interval | None
    """95% interval of its paired difference from weight 0, about that weight's error; None for weight 0."""


@dataclass(frozen=True)
class GroupCounts:
    """Mean counts of a group of images."""

    truth: tuple[int, int]
    """Fewest and most annotated heads of an image."""
    mean_truth: float
    predicted: tuple[float, ...]
    """Mean predicted count of each model."""
    intervals: tuple[Interval, ...]
    """95% intervals of `predicted`, over seeds and images, for the images' true counts."""


def draw_gains(
    arms: Sequence[ArmGain],
    path: str | os.PathLike[str],
    *,
    reference_mae: float,
    placebo: Comparison | None = None,
    title: str = "",
    note: str = "",
) -> None:
    """Draw the gain of each arm over the plain baseline with its interval and seeds; save a PNG at a path or URI.

    A line marks the baseline, a band the interval of the placebo's gain, hollow diamonds what the paper reports.

    Args:
        arms: Arms from top to bottom.
        path: Path or URI of the PNG.
        reference_mae: MAE of the plain baseline.
        placebo: Gain of the placebo over it.
        title: Dataset and split.
        note: What the figure shows besides.
    """
    if not arms:
        return style.text_figure(title, "no arm to compare with none", path)
    figure = Figure(figsize=(7.0, 1.7 + 0.36 * len(arms)), dpi=style.DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    if placebo is not None:
        span = axes.axvspan(placebo.interval.low, placebo.interval.high, color=style.ORANGE, alpha=0.22, linewidth=0)
        span.set_label(f"placebo {placebo.gain:+.2f}, 95%")
        axes.axvline(placebo.gain, color=style.ORANGE, linewidth=1.2)
    axes.axvline(0, color=style.INK, linewidth=1, label=f"none: MAE {reference_mae:.2f}")
    for row, arm in enumerate(arms):
        gain, first = arm.gain, row == 0
        axes.plot([gain.interval.low, gain.interval.high], [row, row], color=style.BLUE, linewidth=2.2, zorder=3)
        axes.plot(gain.gain, row, "o", color=style.BLUE, markersize=7, zorder=4, label="gain, 95%" if first else "_")
        seeds: dict[str, Any] = {"color": style.FAINT, "markersize": 6, "label": "a seed" if first else "_"}
        axes.plot(gain.seed_gains, np.full(len(gain.seed_gains), row + 0.26), "|", zorder=3, **seeds)
    papers = [(arm.paper, row) for row, arm in enumerate(arms) if arm.paper is not None]
    if papers:
        hollow: dict[str, Any] = {"markerfacecolor": "white", "markeredgecolor": style.VERMILION, "markersize": 6.5}
        axes.plot(*zip(*papers, strict=True), "D", linestyle="none", label="paper", zorder=5, **hollow)
    axes.set_yticks(range(len(arms)), [arm.name for arm in arms])
    axes.set(ylim=(len(arms) - 0.4, -0.6), xlabel="gain over none: heads of mean absolute error, right is better")
    for row, arm in enumerate(arms):
        options: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "va": "center", "size": 8}
        axes.text(1.02, row, f"{arm.mae:.2f}", color=style.INK, **options)
    axes.text(1.02, -0.75, "MAE", transform=axes.get_yaxis_transform(), size=8, color=style.FAINT, va="bottom")
    axes.set_title(title, size=9, color=style.INK, loc="left", pad=14)
    style.style_axes(axes)
    axes.tick_params(axis="y", labelcolor=style.INK, labelsize=8.5, length=0)
    axes.grid(axis="y", visible=False)
    axes.grid(axis="x", color="#d0d7de", linewidth=0.5)
    figure.legend(frameon=False, fontsize=8, loc="outside lower center", ncols=5)
    if note:
        figure.supxlabel(note, size=7, color=style.FAINT)
    style.save_figure(figure, path)


def draw_sweeps(
    sweeps: Mapping[str, Sequence[SweepPoint]],
    paper: Mapping[str, Mapping[float, float]],
    path: str | os.PathLike[str],
    *,
    title: str = "",
    paper_title: str = "",
) -> None:
    """Draw the error against the loss weight of each task, above the paper's Figure 5; save a PNG at a path or URI.

    The weights are logarithmic, with 0 on their left; both curves of a task have the same weights below each other.

    Args:
        sweeps: Points of each task, the weight 0 among them.
        paper: The paper's MAE by weight of each task.
        path: Path or URI of the PNG.
        title: Dataset and split of `sweeps`.
        paper_title: Dataset of `paper`.
    """
    if not sweeps:
        return style.text_figure(title, "no sweep of a loss weight", path)
    figure = Figure(figsize=(7.0, 4.6), dpi=style.DPI, layout="constrained", facecolor="white")
    grid = figure.subplots(2, len(sweeps), squeeze=False, sharey="row")
    shown = [list(paper[task].values()) for task in sweeps if task in paper]
    # Much larger errors are cut off, so that a gain is visible.
    top = max((errors[0] + max(0.5, 2.5 * (errors[0] - min(errors))) for errors in shown), default=0.0)
    for (above, below), (task, points) in zip(grid.T, sweeps.items(), strict=True):
        ours, theirs = sorted(points, key=lambda point: point.weight), sorted(paper.get(task, {}).items())
        weights = sorted({point.weight for point in ours} | {weight for weight, _ in theirs})
        for point in ours:
            if point.interval:
                x = _log_positions([point.weight] * 2, weights)
                above.plot(x, [point.interval.low, point.interval.high], color=style.BLUE, linewidth=1.6, alpha=0.6)
        x = _log_positions([point.weight for point in ours], weights)
        above.plot(x, [point.mae for point in ours], "o-", color=style.BLUE, linewidth=1.4, markersize=5)
        above.axhline(ours[0].mae, color=style.FAINT, linewidth=0.8, linestyle="--")
        if theirs:
            _draw_cut(below, _log_positions([weight for weight, _ in theirs], weights), [mae for _, mae in theirs], top)
        for axes in (above, below):
            _weight_axis(axes, weights)
        above.set_title(task, size=9, color=style.INK)
        below.set_xlabel(f"weight of {task}")
    grid[0, 0].set_ylabel(f"MAE, {title}" if title else "MAE")
    grid[1, 0].set_ylabel(f"MAE, paper{paper_title and f', {paper_title}'}")
    for axes in grid.flat:
        style.style_axes(axes)
    figure.supxlabel("Bars: 95% of the paired difference from weight 0 (dashed).", size=7.5, color=style.FAINT)
    style.save_figure(figure, path)


def _draw_cut(axes: Axes, x: NDArray[np.float64], errors: Sequence[float], top: float) -> None:
    """Draw errors by weight; those above `top` are drawn there, with their number."""
    hollow: dict[str, Any] = {"markerfacecolor": "white", "markersize": 5.5, "linewidth": 1.2}
    axes.plot(x, np.minimum(errors, top), "D--", color=style.VERMILION, **hollow)
    for position, error in zip(x, errors, strict=True):
        if error > top:
            offset: dict[str, Any] = {"xytext": (-6, -3), "textcoords": "offset points", "ha": "right", "va": "center"}
            axes.annotate(f"{error:.1f} ↑", (position, top), size=8, color=style.VERMILION, **offset)
    axes.axhline(errors[0], color=style.FAINT, linewidth=0.8, linestyle="--")


def _log_positions(values: Sequence[float], weights: Sequence[float]) -> NDArray[np.float64]:
    """Positions of weights on an axis of decimal logarithms, 0 two thirds of a decade left of the smallest."""
    smallest = min((weight for weight in weights if weight > 0), default=1.0)
    return np.array([np.log10(value) if value > 0 else np.log10(smallest) - 2 / 3 for value in values])


def _weight_axis(axes: Axes, weights: Sequence[float]) -> None:
    """Label 0 and the weights of an axis that lie far enough apart to be read."""
    positions = _log_positions(weights, weights)
    padding = 0.06 * max(0.5, positions[-1] - positions[0])
    axes.set_xlim(positions[0] - padding, positions[-1] + padding)
    apart = (positions[-1] - positions[0]) / 7
    shown: list[int] = []
    for index, position in enumerate(positions):
        if not shown or position - positions[shown[-1]] >= apart:
            shown.append(index)
    axes.xaxis.set_major_locator(FixedLocator([float(positions[index]) for index in shown]))
    axes.xaxis.set_ticklabels([f"{weights[index]:g}" for index in shown])
    axes.xaxis.set_minor_locator(NullLocator())


def group_counts(models: Sequence[Sequence[Sequence[ImageCount]]], block: int = 1) -> list[GroupCounts]:
    """Sort images by true count into GROUPS groups and average the counts of each.

    Args:
        models: Counts of each model and seed, of the same images in any order.
        block: Consecutive images that a bootstrap resamples together; a group contains a tenth of them.
    """
    ordered = [[sorted(seed, key=lambda count: count.row) for seed in seeds] for seeds in models]
    truth = np.array([count.truth for count in ordered[0][0]])
    predicted = [np.array([[count.predicted for count in seed] for seed in seeds]) for seeds in ordered]
    groups = np.array_split(np.argsort(truth, kind="stable"), min(GROUPS, len(truth)))
    found = []
    for group in map(np.sort, groups):  # in the dataset's order, so that blocks are consecutive frames
        heads = truth[group]
        errors = [counts[:, group] - heads for counts in predicted]
        intervals = (mean_interval(error, -(-block // len(groups))) for error in errors)
        mean = float(heads.mean())
        found.append(
            GroupCounts(
                (int(heads.min()), int(heads.max())),
                mean,
                tuple(mean + float(error.mean()) for error in errors),
                tuple(Interval(mean + interval.low, mean + interval.high) for interval in intervals),
            )
        )
    return found


def draw_groups(
    groups: Sequence[GroupCounts], names: Sequence[str], path: str | os.PathLike[str], title: str = ""
) -> None:
    """Draw the paper's Figure 4a: mean true and predicted counts of images by true count; save a PNG.

    Args:
        groups: Groups of images from `group_counts`.
        names: Names of the models.
        path: Path or URI of the PNG.
        title: Dataset and split.
    """
    figure = Figure(figsize=(7.0, 5.0), dpi=style.DPI, layout="constrained", facecolor="white")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    positions = np.arange(1, len(groups) + 1)
    above.bar(positions, [group.mean_truth for group in groups], 0.78, color=style.PAPER, label="ground truth")
    below.axhline(0, color=style.INK, linewidth=1)
    truth = np.array([group.mean_truth for group in groups])
    looks = ((style.ORANGE, "s"), (style.BLUE, "o"), (style.GREEN, "^"))
    for number, (name, (colour, marker)) in enumerate(zip(names, looks, strict=False)):
        means = np.array([group.predicted[number] for group in groups])
        intervals = [group.intervals[number] for group in groups]
        ends = np.array([[interval.low for interval in intervals], [interval.high for interval in intervals]])
        x = positions + 0.26 * (number - (len(names) - 1) / 2)
        above.plot(x, means, marker, color=colour, markersize=5.5, label=name)
        below.vlines(x, *(ends - truth), color=colour, linewidth=1.6, alpha=0.7)
        below.plot(x, means - truth, marker, color=colour, markersize=5.5)
    below.set_xticks(positions, [_range(group.truth) for group in groups])
    below.set(xlabel="annotated heads of the images in each group", ylabel="predicted minus true, 95%")
    above.set_ylabel("mean heads per image")
    above.set_title(title, size=9, color=style.INK, loc="left")
    above.legend(frameon=False, fontsize=8, loc="upper left")
    for axes in (above, below):
        style.style_axes(axes)
    style.save_figure(figure, path)


def _range(ends: tuple[int, int]) -> str:
    return f"{ends[0]}" if ends[0] == ends[1] else f"{ends[0]}-{ends[1]}"
