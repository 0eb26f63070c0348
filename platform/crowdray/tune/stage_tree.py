"""The picture of a search's stage tree: what was trained once, and who used it."""

import math
import os
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.ticker import MaxNLocator

from crowdray.plots import style
from crowdray.tune.figures import MAE, MaeScale, scatter, time_unit
from crowdray.tune.record import StudyRecord, TrialRecord
from crowdray.tune.stage_layout import MANY, Family, Layout, Segment, arrange, grow

STAGES = {"baseline": style.BLUE, "decoders": style.ORANGE, "joint": style.GREEN}
_WIDTH, _HEAD, _FOOT = 720.0, 64.0, 76.0
_TREE, _DOTS = (22.0, 442.0), (566.0, 700.0)
"""In points: the figure, and where the tree and the MAEs beside it begin and end."""
_SMALLEST = 6.5
"""Size of the small print; a row lower than it goes without."""
_TIMES = "\N{MULTIPLICATION SIGN}"


def draw_stage_tree(study: StudyRecord, path: str | os.PathLike[str]) -> None:
    """Draw each stretch of training once, as wide as its use, and beside each trial's end its MAE, as a PNG.

    From left to right the epochs of a training. In a large search, trials that part ways at one place have
    one label together. The way to the best trial has a dark rim.
    """
    layout = arrange(grow(study))
    if not layout.families:
        return style.text_figure(study.name, "no trial has trained yet", path)
    height = layout.height + _HEAD + _FOOT
    figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=style.DPI, facecolor="white")
    tree, dots = (
        figure.add_axes((left / _WIDTH, _FOOT / height, (right - left) / _WIDTH, layout.height / height))
        for left, right in (_TREE, _DOTS)
    )
    best = study.best()
    _draw_tree(tree, layout, best)
    for family in layout.families:
        _draw_label(tree, family, best)
    _draw_dots(dots, study, layout)
    _draw_words(figure, study, layout, height)
    style.save_figure(figure, path)


def _draw_tree(axes: Axes, layout: Layout, best: TrialRecord | None) -> None:
    segments = layout.segments()
    end = max(segment.end for segment in segments)
    unit = end / (_TREE[1] - _TREE[0])
    axes.set(xlim=(0, end), ylim=(layout.height, 0))
    axes.set_xlabel("epochs of a training")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    style.style_axes(axes)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    axes.grid(axis="x", color="#eaeef2", linewidth=0.6)
    axes.set_yticks([])
    for segment in segments:
        on_the_way = best is not None and any(trial is best for trial in segment.trials)
        colour = STAGES.get(segment.stage, style.PINK)
        for child in segment.children:
            _draw_stroke(axes, (segment.end, segment.y), child, unit, best)
        for tip in (tip for family in layout.families for tip in family.tips if tip.segment is segment):
            if segment.children or len(segment.ended) > 1:
                rim = style.INK if tip.trial is best else None
                _draw_curve(axes, (segment.end, segment.y), (segment.end + 5 * unit, tip.y), 5 * unit, 1.1, colour, rim)
        if segment in layout.roots:
            _draw_stroke(axes, (0, segment.y), segment, unit, best)
        _draw_use(axes, segment, unit, colour, on_the_way)


def _draw_stroke(
    axes: Axes, parent: tuple[float, float], child: Segment, unit: float, best: TrialRecord | None
) -> None:
    on_the_way = best is not None and any(trial is best for trial in child.trials)
    bend = min(22 * unit, 0.6 * (child.end - child.start))
    width = 1.1 + 1.5 * math.log2(len(child.trials))
    rim = style.INK if on_the_way else None
    colour = STAGES.get(child.stage, style.PINK)
    _draw_curve(axes, parent, (child.end, child.y), bend, width, colour, rim)


def _draw_curve(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    bend: float,
    width: float,
    colour: str,
    rim: str | None,
) -> None:
    """A stroke that swings from one row to another within `bend`, then runs level."""
    (x, y), (right, row) = start, end
    points = [(x, y), (x + bend / 2, y), (x + bend / 2, row), (x + bend, row), (right, row)]
    codes = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4, Path.LINETO]
    look: dict[str, Any] = {"facecolor": "none", "capstyle": "round", "joinstyle": "round", "clip_on": False}
    if rim:
        axes.add_patch(PathPatch(Path(points, codes), edgecolor=rim, linewidth=width + 2.2, zorder=3, **look))
    order = 4 if rim else 2 + width / 20
    axes.add_patch(PathPatch(Path(points, codes), edgecolor=colour, linewidth=width, zorder=order, **look))


def _draw_use(axes: Axes, segment: Segment, unit: float, colour: str, on_the_way: bool) -> None:
    """How many trials share a segment, where it is long enough for the words."""
    text = f"{len(segment.trials)}{_TIMES}"
    if len(segment.trials) < 2 or (segment.end - segment.start) / unit < 4 * len(text) + 4:
        return
    box = {"boxstyle": "round,pad=0.22", "facecolor": "white", "edgecolor": style.INK if on_the_way else colour}
    place: dict[str, Any] = {"xytext": (-5, 0), "textcoords": "offset points", "ha": "right", "va": "center_baseline"}
    bbox = box | {"linewidth": 0.9}
    axes.annotate(text, (segment.end, segment.y), size=_SMALLEST, color=style.INK, zorder=7, bbox=bbox, **place)


def _draw_label(axes: Axes, family: Family, best: TrialRecord | None) -> None:
    """Number, MAE and state of each trial, or of a fan the number of its trials and the range of their MAEs."""
    has_best = any(tip.trial is best for tip in family.tips)
    if family.fan:
        ys = [tip.y for tip in family.tips]
        edge: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "clip_on": False, "linewidth": 0.8}
        axes.plot([1.012, 1.02, 1.02, 1.012], [ys[0], ys[0], ys[-1], ys[-1]], color=style.FAINT, **edge)
        if family.height > _SMALLEST or has_best:
            _write(axes, (ys[0] + ys[-1]) / 2, 14, "left", _fan_words(family), has_best)
        return
    pitch = family.height / len(family.tips)
    for tip in (tip for tip in family.tips if pitch > _SMALLEST or tip.trial is best):
        faint: dict[str, Any] = {"color": style.PAPER, "linewidth": 0.6, "clip_on": False, "zorder": 1}
        axes.plot([tip.segment.end, axes.get_xlim()[1] * 1.02], [tip.y, tip.y], linestyle=(0, (1, 2)), **faint)
        bold = tip.trial is best
        _write(axes, tip.y, 32, "right", f"{tip.trial.number}", bold)
        if tip.trial.is_scored:
            _write(axes, tip.y, 66, "right", f"{tip.trial.mae:.2f}", bold)
        if tip.trial.state != "complete":
            _write(axes, tip.y, 74, "left", tip.trial.state, bold)


def _fan_words(family: Family) -> str:
    maes = [tip.trial.mae for tip in family.tips if tip.trial.mae is not None and tip.trial.is_scored]
    found = f"{min(maes):.2f} to {max(maes):.2f}" if maes else "no MAE"
    return f"{len(family.tips)} trials: {found}"


def _write(axes: Axes, y: float, right: float, align: str, text: str, bold: bool) -> None:
    """Small print beside the tree, `right` points from its end."""
    place: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    look: dict[str, Any] = {"ha": align, "va": "center_baseline", "weight": "bold" if bold else "normal"}
    axes.annotate(text, (1, y), (right, 0), size=_SMALLEST + 0.5, color=style.INK, **place, **look)


def _draw_dots(axes: Axes, study: StudyRecord, layout: Layout) -> None:
    tips = [tip for family in layout.families for tip in family.tips]
    scale = MaeScale(study.trials)
    size = 0.4 if len(tips) > MANY else 0.8
    scatter(axes, [tip.trial for tip in tips], [tip.y for tip in tips], scale, upright=False, size=size)
    axes.set(xlim=(scale.bottom, scale.top), ylim=(layout.height, 0))
    axes.axvspan(scale.edge, scale.top, color=style.PAPER, alpha=0.4, linewidth=0, zorder=0)
    axes.set_xlabel(MAE)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    style.style_axes(axes)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color="#eaeef2", linewidth=0.6)


def _draw_words(figure: Figure, study: StudyRecord, layout: Layout, height: float) -> None:
    """Title and legend above, what the tree saved below."""
    count = len(study.trials)
    title = f"{study.name}: stage tree of {count} trial{'s' * (count != 1)}, each stretch of training drawn once"
    left = _TREE[0] / _WIDTH
    figure.text(left, 1 - 14 / height, title, size=10, va="center", color=style.INK)
    columns = [(32, "right", "trial"), (66, "right", "MAE")]
    if any(family.fan for family in layout.families):
        columns = [(14, "left", "trials and their MAEs")]
    for right, align, head in columns:
        at = ((_TREE[1] + right) / _WIDTH, 1 - (_HEAD - 10) / height)
        figure.text(*at, head, size=_SMALLEST + 0.5, ha=align, va="center", color=style.FAINT)
    entries: list[tuple[Any, str]] = [(_line(colour, 4), stage) for stage, colour in STAGES.items()]
    if best := study.best():
        rim = (_line(style.INK, 5.5), _line(STAGES["joint"], 3))
        entries.append((rim, f"the way to the best: trial {best.number}, MAE {best.mae:.2f}"))
    if (most := max(len(root.trials) for root in layout.roots)) > 1:
        sign: dict[str, Any] = {
            "marker": f"${most}{_TIMES}$",
            "markersize": 7 + 3.5 * len(f"{most}"),
            "markeredgewidth": 0.0,
        }
        entries.append((Line2D([], [], color=style.INK, linestyle="", **sign), f"trained once, used by {most} trials"))
    look: dict[str, Any] = {
        "frameon": False,
        "fontsize": 8,
        "borderpad": 0,
        "handlelength": 1.6,
        "labelcolor": style.INK,
    }
    look |= {"loc": "center left", "bbox_to_anchor": (left, 1 - 32 / height), "ncols": len(entries)}
    figure.legend([handle for handle, _ in entries], [label for _, label in entries], **look)
    figure.text(left, 24 / height, _price(study), size=8, va="center", color=style.INK, linespacing=1.5)


def _line(colour: str, width: float) -> Line2D:
    return Line2D([], [], color=colour, linewidth=width, solid_capstyle="butt")


def _price(study: StudyRecord) -> str:
    divisor, unit = time_unit(study.spent)
    words = f"{study.spent / divisor:.1f} worker-{unit} spent, {study.saved / divisor:.1f} saved: "
    words += f"{study.speedup:.2f} times as much training as was paid for.\n"
    words += f"A tree in which nothing is trained twice: {study.max_speedup:.2f} times."
    if study.speedup > study.max_speedup * 1.001:
        words += " Part was found in the store from before."
    idle = sum(not any(leg.epochs for leg in trial.stage_costs) for trial in study.trials)
    words += f" Not drawn: {idle} that trained nothing." if idle else ""
    beyond = MaeScale(study.trials).words()
    return words + (f" In the grey strip at the right: {beyond}." if beyond else "")
