"""Figures of a search: progress, importance of each field, and error over each field (Figure 5)."""

import math
import os
from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator

from crowdray.plots import style
from crowdray.tune.importance import MIN_TRIALS
from crowdray.tune.record import StudyRecord, TrialRecord, Value, is_weight
from crowdray.tune.space import PAPER_POINT

MARKERS: dict[str, dict[str, Any]] = {
    "complete": {"marker": "o", "color": style.BLUE, "s": 20, "linewidths": 0.4, "edgecolors": "white"},
    "pruned": {"marker": "v", "facecolors": "none", "edgecolors": style.ORANGE, "s": 20, "linewidths": 1.0},
    "running": {"marker": "D", "facecolors": "none", "edgecolors": style.GREEN, "s": 16, "linewidths": 1.0},
    "failed": {"marker": "x", "color": style.VERMILION, "s": 20, "linewidths": 1.2},
}
"""Marker of trials by state."""
BEST: dict[str, Any] = {
    "marker": "*",
    "color": style.VERMILION,
    "s": 110,
    "linewidths": 0.7,
    "edgecolors": "white",
    "zorder": 6,
}
MAE = "best validation MAE, heads"
_EARLY_TO_LATE = LinearSegmentedColormap.from_list("trials", ["#a9d3ee", style.BLUE, "#08253d"])
_STRIP = 0.07
"""Fraction of an MAE axis, at its far end, for trials beyond its limit or without an MAE."""


def draw_optimization(study: StudyRecord, path: str | os.PathLike[str]) -> None:
    """Draw the MAE of each trial and the best so far, over trials and over worker time, as a PNG.

    A dashed line shows the best so far over the time that the search would have taken without the stage cache.
    """
    if not study.trials:
        return style.text_figure(study.name, "no trial has started yet", path)
    figure = Figure(figsize=(9.6, 3.9), dpi=style.DPI, layout="constrained", facecolor="white")
    over_trials, over_time = figure.subplots(1, 2, sharey=True)
    scale = MaeScale(study.trials)
    divisor, unit = time_unit(study.spent + study.saved)
    numbers, ended = [float(trial.number) for trial in study.trials], study.by_end()
    spent = list(accumulate(trial.spent / divisor for trial in ended))
    without_cache = list(accumulate((trial.spent + trial.saved) / divisor for trial in ended))
    for axes, trials, positions in ((over_trials, study.trials, numbers), (over_time, ended, spent)):
        scatter(axes, trials, positions, scale)
        _draw_best_so_far(axes, trials, positions, color=style.INK, linewidth=1.3, zorder=4)
        axes.axhspan(scale.edge, scale.top, color=style.PAPER, alpha=0.4, linewidth=0, zorder=0)
    if study.saved > 0:
        _draw_best_so_far(over_time, ended, without_cache, color=style.FAINT, linewidth=1.1, linestyle="--", zorder=3)
    over_trials.set(xlabel="trial", ylabel=MAE, ylim=(scale.bottom, scale.top))
    over_trials.set_xlim(min(numbers) - 0.02 * len(numbers) - 0.5, max(numbers) + 0.02 * len(numbers) + 0.5)
    over_trials.xaxis.set_major_locator(MaxNLocator(integer=True) if len(numbers) > 8 else FixedLocator(numbers))
    over_time.set(xlabel=f"worker-{unit} of all trials so far", xlim=(0, 1.03 * without_cache[-1] or 1.0))
    for axes in (over_trials, over_time):
        style.style_axes(axes)
    lines = [Line2D([], [], color=style.INK, linewidth=1.3, label="best so far")]
    if study.saved > 0:
        label = "without the stage cache"
        lines.append(Line2D([], [], color=style.FAINT, linewidth=1.1, linestyle="--", label=label))
    legend(figure, study.trials, lines, scale)
    figure.suptitle(f"{study.name}: {_summary(study)}", size=10, color=style.INK)
    style.save_figure(figure, path)


def draw_importance(study: StudyRecord, importances: Mapping[str, float], path: str | os.PathLike[str]) -> None:
    """Draw the importance of each field as bars, as a PNG; with too few trials, a figure that says so."""
    complete = sum(trial.state == "complete" for trial in study.trials)
    if not importances:
        text = f"importances need {MIN_TRIALS} complete trials with different values and MAEs,\nthere are {complete}"
        return style.text_figure(study.name, text, path)
    names = sorted(importances, key=lambda name: importances[name])
    figure = Figure(figsize=(6.4, 1.2 + 0.34 * len(names)), dpi=style.DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    percents = [100 * importances[name] for name in names]
    axes.barh(names, percents, 0.62, color=style.BLUE)
    for row, percent in enumerate(percents):
        note: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "size": 8}
        axes.annotate(f"{percent:.0f}%" if percent >= 1 else "<1%", (percent, row), color=style.INK, **note)
    axes.set(xlim=(0, 1.12 * max(percents)), ylim=(-0.6, len(names) - 0.4))
    axes.set_xlabel(
        f"% of the variance of the validation MAE that single fields explain\nfANOVA over {complete} complete trials"
    )
    style.style_axes(axes)
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0, labelcolor=style.INK, labelsize=8.5)
    axes.set_title(f"{study.name}: importance of each field", size=10, color=style.INK)
    style.save_figure(figure, path)


def draw_slices(study: StudyRecord, path: str | os.PathLike[str]) -> None:
    """Draw the MAE over each searched field, one panel per field, later trials darker, as a PNG.

    Like the paper's Figure 5. Weights have a log axis, with a separate column at the left for 0, a dropped task.
    """
    names = study.fields()
    if not names or not any(trial.is_scored for trial in study.trials):
        return style.text_figure(study.name, "no trial has been validated yet", path)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    size = (max(6.6, 3.3 * columns), 0.9 + 2.55 * rows)
    layout = ConstrainedLayoutEngine(hspace=0.06, wspace=0.03)
    figure = Figure(figsize=size, dpi=style.DPI, layout=layout, facecolor="white")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    scale = MaeScale([trial for trial in study.trials if trial.is_scored])
    for axes, name in zip(panels, names, strict=False):
        _draw_slice(axes, study, name, scale)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes in panels[::columns]:
        axes.set_ylabel(MAE)
    shades = [Line2D([], [], marker="o", linestyle="", markersize=4.5, color=_EARLY_TO_LATE(s)) for s in (0.0, 1.0)]
    shades[0].set_label("complete, early")
    shades[1].set_label("complete, late")
    if PAPER_POINT.keys() & set(names):
        shades.append(Line2D([], [], color=style.PINK, linewidth=1.0, label="the paper's weight"))
    legend(figure, [trial for trial in study.trials if trial.is_scored], shades, scale, complete=False)
    figure.suptitle(f"{study.name}: {_summary(study)}", size=10, color=style.INK)
    style.save_figure(figure, path)


class MaeScale:
    """An MAE axis from the best to a multiple of the median, with a strip at its end for all other trials."""

    def __init__(self, trials: Sequence[TrialRecord]) -> None:
        maes = np.array([trial.mae for trial in trials if trial.is_scored], dtype=np.float64)
        low, high = (maes.min(), maes.max()) if len(maes) else (0.0, 1.0)
        if len(maes) > 7:
            high = min(high, low + (4 * (np.median(maes) - low) or high - low))
        margin = 0.06 * (high - low) or 0.05 * high or 0.5
        self.limit = float(high)
        """Highest MAE on the axis."""
        self.bottom, self.edge = float(low - margin), float(high + margin)
        """Ends of the axis without the strip."""
        self.failed = any(_is_shown(trial) and not trial.is_scored for trial in trials)
        """Whether the strip contains trials without an MAE."""
        self.beyond = bool((maes > high).any())
        """Whether the strip contains trials above the limit."""
        self.top = self.edge + _STRIP * (self.edge - self.bottom) * (self.failed or self.beyond)
        """End of the strip."""

    def strip_label(self) -> str:
        """What the strip contains; empty without one."""
        kinds = ["no MAE"] * self.failed + [f"an MAE above {self.limit:.3g}"] * self.beyond
        return " or ".join(kinds)

    def __call__(self, trial: TrialRecord) -> float:
        """Coordinate of a trial."""
        if trial.mae is not None and trial.is_scored and trial.mae <= self.limit:
            return trial.mae
        return (self.edge + self.top) / 2


def scatter(
    axes: Axes,
    trials: Sequence[TrialRecord],
    positions: Sequence[float],
    scale: MaeScale,
    *,
    vertical: bool = True,
    size: float = 1.0,
    **complete: Any,
) -> None:
    """Mark trials by their state, the best by a star.

    Args:
        axes: Where to draw.
        trials: The trials.
        positions: Their coordinates on the other axis.
        scale: The MAE axis.
        vertical: Whether the MAE axis is vertical.
        size: Factor of the markers' area, except the star's.
        complete: Marker options of complete trials that replace those of MARKERS.
    """
    best = StudyRecord("", tuple(trials)).best()
    for state, mark in MARKERS.items():
        chosen = [n for n, trial in enumerate(trials) if trial.state == state and _is_shown(trial)]
        if state == "complete" and complete:
            mark = {key: value for key, value in mark.items() if key != "color"} | complete
        x, y = [positions[n] for n in chosen], [scale(trials[n]) for n in chosen]
        axes.scatter(*((x, y) if vertical else (y, x)), zorder=5, **mark | {"s": size * mark["s"]})
    for position, trial in zip(positions, trials, strict=True):
        if trial is best:
            at = (position, scale(trial)) if vertical else (scale(trial), position)
            axes.scatter([at[0]], [at[1]], **BEST)


def legend(
    figure: Figure, trials: Sequence[TrialRecord], first: list[Line2D], scale: MaeScale, complete: bool = True
) -> None:
    """Draw a legend under the figure: the lines `first`, occurring states, best trial and strip."""
    handles: list[Any] = list(first)
    axes = figure.axes[0]
    for state in MARKERS:
        if any(trial.state == state for trial in trials) and (complete or state != "complete"):
            handles.append(axes.scatter([], [], label=state, **MARKERS[state]))
    if StudyRecord("", tuple(trials)).best():
        handles.append(axes.scatter([], [], label="best", **BEST))
    title = f"in the gray strip at the top: {scale.strip_label()}" if scale.strip_label() else None
    options: dict[str, Any] = {"ncols": 7, "frameon": False, "fontsize": 8, "labelcolor": style.INK}
    box = figure.legend(handles=handles, loc="outside lower center", title=title, **options)
    box.get_title().set(size=7.5, color=style.FAINT)


def time_unit(seconds: float) -> tuple[float, str]:
    """A unit that suits a duration, as its number of seconds and its name."""
    return (3600.0, "hours") if seconds >= 3 * 3600 else (60.0, "minutes") if seconds >= 180 else (1.0, "seconds")


def _is_shown(trial: TrialRecord) -> bool:
    """Whether a trial is drawn on an MAE axis; failed ones without an MAE are, in the strip."""
    return trial.is_scored or trial.state == "failed"


def _summary(study: StudyRecord) -> str:
    best, count = study.best(), len(study.trials)
    trials = f"{count} trial{'s' * (count != 1)}"
    return f"{trials}, none complete" if best is None else f"MAE {best.mae:.2f} by trial {best.number}, of {trials}"


def _draw_best_so_far(axes: Axes, trials: Sequence[TrialRecord], positions: Sequence[float], **options: Any) -> None:
    """Draw the best MAE of the complete trials so far as a step line."""
    maes = [trial.mae if trial.state == "complete" and trial.is_scored else None for trial in trials]
    best = list(accumulate((math.inf if mae is None else mae for mae in maes), min))
    seen = [(position, mae) for position, mae in zip(positions, best, strict=True) if mae < math.inf]
    if seen:
        axes.step(*zip(*seen, strict=True), where="post", **options)


def _draw_slice(axes: Axes, study: StudyRecord, name: str, scale: MaeScale) -> None:
    trials = [trial for trial in study.trials if name in trial.values and trial.is_scored]
    values = [trial.values[name] for trial in trials]
    reference = PAPER_POINT.get(name)
    if is_weight(name, values):
        positions = _log_axis(axes, [float(value) for value in values], reference)
        if reference is not None:
            axes.axvline(math.log10(reference), color=style.PINK, linewidth=1.0, zorder=2)
        axes.set_xlabel(f"{name}, weight" if name.startswith("loss.") else name)
    else:
        positions = _linear_axis(axes, values)
        axes.set_xlabel(f"{name.removesuffix('.epochs')}, epochs" if name.endswith(".epochs") else name)
    done = [trial.number for trial in trials if trial.state == "complete"]
    last = max((trial.number for trial in study.trials), default=0) or 1
    scatter(axes, trials, positions, scale, c=[_EARLY_TO_LATE(number / last) for number in done])
    axes.axhspan(scale.edge, scale.top, color=style.PAPER, alpha=0.4, linewidth=0, zorder=0)
    axes.set_ylim(scale.bottom, scale.top)
    style.style_axes(axes)


def _log_axis(axes: Axes, values: Sequence[float], reference: float | None) -> list[float]:
    """Return coordinates of weights on a log axis with a separate column for 0; set ticks and limits."""
    logs = [math.log10(value) for value in [*values, reference or 0.0] if value > 0] or [0.0]
    low, high = min(logs), max(logs)
    margin = 0.06 * (high - low) or 0.3
    zero = low - 3.5 * margin
    tens = range(math.floor(low), math.ceil(high) + 1)
    fine = [(10.0**ten * step, step) for ten in tens for step in (1, 2, 5)]
    inside = [(value, step) for value, step in fine if low - margin <= math.log10(value) <= high + margin]
    ticks = [value for value, step in inside if len(inside) <= 5 or step == 1]
    ticks = ticks[:: -(-len(ticks) // 5)] if len(ticks) > 1 else sorted({10**low, 10**high})
    left = low - margin
    if 0 in values:
        left = zero - 1.5 * margin
        axes.axvspan(left, zero + 1.5 * margin, color=style.PAPER, alpha=0.4, linewidth=0, zorder=0)
    labels = [f"{value:.3g}" for value in ticks]
    has_zero = 0 in values
    axes.set_xticks([zero] * has_zero + [math.log10(tick) for tick in ticks], ["0\ndropped"] * has_zero + labels)
    axes.set_xlim(left, high + margin)
    return [math.log10(value) if value > 0 else zero for value in values]


def _linear_axis(axes: Axes, values: Sequence[Value]) -> list[float]:
    """Return coordinates of numbers as they are, of other values by their order; set ticks and limits."""
    numbers = [float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)]
    if not values or len(numbers) < len(values):
        names = sorted({str(value) for value in values})
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.6, len(names) - 0.4)
        return [float(names.index(str(value))) for value in values]
    margin = 0.06 * (max(numbers) - min(numbers)) or 1.0
    axes.set_xlim(min(numbers) - margin, max(numbers) + margin)
    if len(set(numbers)) <= 6:
        axes.set_xticks(sorted(set(numbers)))
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=all(number == int(number) for number in numbers)))
    return numbers
