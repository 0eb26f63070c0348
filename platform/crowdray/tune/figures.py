"""Figures of a search: progress, importance of each field, and error over each field (Figure 5)."""

import math
import os
from collections.abc import Mapping, Sequence
from itertools import accumulate, compress
from statistics import median
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from crowdray.plots import style
from crowdray.tune.importance import MIN_TRIALS
from crowdray.tune.record import StudyRecord, TrialRecord, is_weight
from crowdray.tune.space import PAPER_POINT

MARKERS: dict[str, dict[str, Any]] = {
    "complete": {"marker": "o", "color": style.BLUE, "s": 20, "linewidths": 0.4, "edgecolors": "white"},
    "pruned": {"marker": "v", "facecolors": "none", "edgecolors": style.ORANGE, "s": 20, "linewidths": 1.0},
    "running": {"marker": "D", "facecolors": "none", "edgecolors": style.GREEN, "s": 16, "linewidths": 1.0},
    "failed": {"marker": "x", "color": style.VERMILION, "s": 20, "linewidths": 1.2},
}
"""Marker of trials by state."""
BEST: dict[str, Any] = MARKERS["complete"] | {"marker": "*", "color": style.VERMILION, "s": 110, "zorder": 6}
SUFFICIENT_TRIALS = 30
"""Complete trials below which the figure of importances warns."""
_BESIDE: dict[str, Any] = {"textcoords": "offset points", "va": "center"}
MAE = "best validation MAE, heads"


def draw_optimization(study: StudyRecord, path: str | os.PathLike[str]) -> None:
    """Draw the MAE of each trial and the best so far, over trials and over worker time, as a PNG.

    A dashed line shows the best so far over the time that the search would have taken without the stage cache.
    """
    if not study.trials:
        return style.text_figure(study.name, "no trial has started yet", path)
    figure = Figure(figsize=(9.6, 3.9), dpi=style.DPI, layout="constrained", facecolor="white")
    over_trials, over_time = figure.subplots(1, 2, sharey=True)
    limit = mae_limit(study.trials)
    divisor, unit = time_unit(study.spent + study.saved)
    numbers, ended = [float(trial.number) for trial in study.trials], study.by_end()
    spent = list(accumulate(trial.spent / divisor for trial in ended))
    without_cache = list(accumulate((trial.spent + trial.saved) / divisor for trial in ended))
    for axes, trials, positions in ((over_trials, study.trials, numbers), (over_time, ended, spent)):
        scatter(axes, trials, positions, limit)
        _draw_best_so_far(axes, trials, positions, color=style.INK, linewidth=1.3, zorder=4)
        style.style_axes(axes)
    lines = [Line2D([], [], color=style.INK, linewidth=1.3, label="best so far")]
    if study.saved > 0:
        dashed: dict[str, Any] = {"color": style.FAINT, "linewidth": 1.1, "linestyle": "--"}
        _draw_best_so_far(over_time, ended, without_cache, zorder=3, **dashed)
        lines.append(Line2D([], [], label="without the stage cache", **dashed))
    over_trials.set(xlabel="trial", ylabel=MAE)
    over_trials.xaxis.set_major_locator(MaxNLocator(integer=True))
    over_time.set(xlabel=f"worker-{unit} of all trials so far", xlim=(0, 1.03 * without_cache[-1] or 1.0))
    legend(figure, study.trials, lines, limit)
    figure.suptitle(f"{study.name}: {_summary(study)}", size=10, color=style.INK)
    style.save_figure(figure, path)


def draw_importance(
    study: StudyRecord,
    importances: Mapping[str, float],
    path: str | os.PathLike[str],
    intervals: Mapping[str, tuple[float, float]] | None = None,
) -> None:
    """Draw the importance of each field as bars, as a PNG; with too few trials, a figure that says so.

    Lines span `intervals`, the range of each importance over resampled trials.
    """
    complete = sum(trial.state == "complete" for trial in study.trials)
    if not importances:
        text = f"importances need {MIN_TRIALS} complete trials with different values and MAEs,\nthere are {complete}"
        return style.text_figure(study.name, text, path)
    names = sorted(importances, key=lambda name: importances[name])
    figure = Figure(figsize=(6.4, 1.4 + 0.34 * len(names)), dpi=style.DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    percents = [100 * importances[name] for name in names]
    axes.barh(names, percents, 0.62, color=style.BLUE)
    ranges = [intervals.get(name) for name in names] if intervals else [None] * len(names)
    for position, percent, found in zip(range(len(names)), percents, ranges, strict=True):
        ends = [100 * end for end in found] if found else [percent]
        axes.plot(ends, [position] * len(ends), color=style.INK, linewidth=1.2, marker="|", markersize=6)
        label = "<1%" if percent < 1 else f"{percent:.0f}%"
        label += f"  ({ends[0]:.0f} to {ends[1]:.0f}%)" if found else ""
        axes.annotate(label, (max(*ends, percent), position), (6, 0), size=8, color=style.INK, **_BESIDE)
    axes.margins(x=0.25)
    few = f"\ntoo few to rank them: {SUFFICIENT_TRIALS} or more narrow the ranges"
    axes.set_xlabel(
        "% of the variance of the validation MAE that single fields explain\n"
        f"fANOVA over {complete} complete trials; line: range over resampled trials"
        f"{few if complete < SUFFICIENT_TRIALS else ''}"
    )
    style.style_axes(axes)
    axes.grid(visible=False)
    axes.tick_params(axis="y", length=0, labelcolor=style.INK, labelsize=8.5)
    axes.set_title(f"{study.name}: importance of each field", size=10, color=style.INK)
    style.save_figure(figure, path)


def draw_slices(study: StudyRecord, path: str | os.PathLike[str]) -> None:
    """Draw the MAE over each searched field, one panel per field, as a PNG.

    Like the paper's Figure 5. Weights have a log axis that is linear near 0, a dropped task.
    """
    names = study.fields()
    if not names or not any(trial.is_scored for trial in study.trials):
        return style.text_figure(study.name, "no trial has been validated yet", path)
    columns = min(3, len(names))
    rows = -(-len(names) // columns)
    size = (max(6.6, 3.3 * columns), 0.9 + 2.55 * rows)
    figure = Figure(figsize=size, dpi=style.DPI, layout="constrained", facecolor="white")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False).ravel()
    limit = mae_limit(study.trials)
    for axes, name in zip(panels, names, strict=False):
        _draw_slice(axes, study, name, limit)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    for axes in panels[::columns]:
        axes.set_ylabel(MAE)
    paper = Line2D([], [], color=style.PINK, linewidth=1.0, label="the paper's weight")
    legend(figure, study.trials, [paper] if PAPER_POINT.keys() & set(names) else [], limit)
    figure.suptitle(f"{study.name}: {_summary(study)}", size=10, color=style.INK)
    style.save_figure(figure, path)


def mae_limit(trials: Sequence[TrialRecord]) -> float:
    """Highest MAE on an axis, four times as far from the best as the median; infinite if most trials are equal."""
    maes = [trial.mae for trial in trials if trial.mae is not None and trial.is_scored]
    distance = median(maes) - min(maes) if len(maes) > 7 else 0.0
    return min(maes) + 4 * distance if distance else math.inf


def scatter(
    axes: Axes,
    trials: Sequence[TrialRecord],
    positions: Sequence[Any],
    limit: float,
    *,
    vertical: bool = True,
    size: float = 1.0,
) -> None:
    """Mark trials with an MAE by their state, the best by a star; an MAE above `limit` is drawn there.

    Args:
        axes: Where to draw.
        trials: The trials.
        positions: Their coordinates on the other axis.
        limit: Highest MAE on the axis.
        vertical: Whether the MAE axis is vertical.
        size: Factor of the markers' area, except the star's.
    """
    best = StudyRecord("", tuple(trials)).best()
    marks = [(mark | {"s": size * mark["s"]}, [t.state == state for t in trials]) for state, mark in MARKERS.items()]
    for mark, chosen in [*marks, (BEST, [trial is best for trial in trials])]:
        shown = [use and trial.is_scored for use, trial in zip(chosen, trials, strict=True)]
        x, y = list(compress(positions, shown)), [min(trial.mae or 0.0, limit) for trial in compress(trials, shown)]
        axes.scatter(*((x, y) if vertical else (y, x)), **{"zorder": 5} | mark)


def legend(figure: Figure, trials: Sequence[TrialRecord], lines: Sequence[Line2D], limit: float) -> None:
    """Draw a legend under the figure: the lines, occurring states, best trial, and how to read the limit."""
    marks = {state: MARKERS[state] for state in MARKERS if any(t.state == state and t.is_scored for t in trials)}
    if StudyRecord("", tuple(trials)).best():
        marks["best"] = BEST
    markers = [figure.axes[0].scatter([], [], label=label, **mark) for label, mark in marks.items()]
    beyond = any(trial.mae is not None and trial.is_scored and trial.mae > limit for trial in trials)
    title = f"an MAE above {limit:.3g} is drawn at {limit:.3g}" if beyond else None
    options: dict[str, Any] = {"ncols": 8, "frameon": False, "fontsize": 8, "labelcolor": style.INK}
    box = figure.legend(handles=[*lines, *markers], loc="outside lower center", title=title, **options)
    box.get_title().set(size=7.5, color=style.FAINT)


def time_unit(seconds: float) -> tuple[float, str]:
    """A unit that suits a duration, as its number of seconds and its name."""
    return (3600.0, "hours") if seconds >= 3 * 3600 else (60.0, "minutes") if seconds >= 180 else (1.0, "seconds")


def _summary(study: StudyRecord) -> str:
    best, count = study.best(), len(study.trials)
    trials = f"{count} trial{'s' * (count != 1)}"
    return f"{trials}, none complete" if best is None else f"MAE {best.mae:.2f} by trial {best.number}, of {trials}"


def _draw_best_so_far(axes: Axes, trials: Sequence[TrialRecord], positions: Sequence[float], **options: Any) -> None:
    """Draw the best MAE of the complete trials so far as a step line."""
    maes = [trial.mae if trial.state == "complete" and trial.is_scored else None for trial in trials]
    best = list(accumulate((math.inf if mae is None else mae for mae in maes), min))
    axes.step(positions, [math.nan if mae == math.inf else mae for mae in best], where="post", **options)


def _draw_slice(axes: Axes, study: StudyRecord, name: str, limit: float) -> None:
    values: list[Any] = [trial.values[name] for trial in study.trials]
    reference = PAPER_POINT.get(name)
    if is_weight(name, values):
        smallest = min((value for value in [*values, reference or 0.0] if value > 0), default=1.0)
        axes.set_xscale("symlog", linthresh=10 ** math.floor(math.log10(smallest)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        if reference is not None:
            axes.axvline(reference, color=style.PINK, linewidth=1.0, zorder=2)
        axes.set_xlabel(f"{name}, weight" if name.startswith("loss.") else name)
    else:
        if any(isinstance(value, bool | str) for value in values):
            values = [str(value) for value in values]
        elif len(set(values)) <= 6:
            axes.set_xticks(sorted(set(values)))
        axes.set_xlabel(f"{name.removesuffix('.epochs')}, epochs" if name.endswith(".epochs") else name)
    scatter(axes, study.trials, values, limit)
    style.style_axes(axes)
