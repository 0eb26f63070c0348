"""The stage tree of a search: every trained segment once, with all trials that pass through it."""

import math
import os
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
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

STAGE_COLORS = {"baseline": style.BLUE, "decoders": style.ORANGE, "joint": style.GREEN}
_WIDTH, _HEADER, _FOOTER = 720.0, 64.0, 76.0
_TREE, _DOTS = (22.0, 442.0), (566.0, 700.0)
"""Points from the left edge: start and end of the tree and of the MAE axis."""
_FONT_SIZE = 6.5
"""Of the small labels; rows lower than this have none."""
_TIMES = "\N{MULTIPLICATION SIGN}"
ROW, DENSE_ROW = 11.0, 3.4
"""Heights in points of a labelled trial, and of one in a fan."""
GAP = 5.0
"""Points between two groups of trials."""
MAX_LABELLED, MAX_HEIGHT = 45, 1000.0
"""Trials above which groups become fans; height of the tree in points above which rows shrink."""


@dataclass(eq=False)
class Segment:
    """Epochs of one stage key between two points where trials branch off."""

    key: str
    """Stage key."""
    stage: str
    """baseline, decoders or joint."""
    start: int
    """Epochs of the whole run before the segment."""
    end: int
    """Epochs of the whole run at its end."""
    trials: list[TrialRecord] = field(default_factory=list)
    """Trials that pass through it."""
    ended: list[TrialRecord] = field(default_factory=list)
    """Trials that end with it."""
    children: list["Segment"] = field(default_factory=list)
    """Segments that follow."""
    y: float = 0.0
    """Its row, in points from the top."""

    @property
    def mae(self) -> float:
        """Lowest MAE of its trials, infinite without any."""
        return min(map(_mae, self.trials))

    def walk(self) -> Iterator["Segment"]:
        """Yield itself and all following segments, depth first."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True)
class Leaf:
    """The end of one trial."""

    trial: TrialRecord
    segment: Segment
    """Its last segment."""
    y: float
    """Its row, in points from the top."""


@dataclass(frozen=True)
class Group:
    """Trials that branch off at the same point, by ascending MAE."""

    leaves: list[Leaf]
    is_fan: bool
    """Whether they share one label."""
    height: float
    """In points, with the gap below."""


@dataclass(frozen=True)
class Layout:
    """A stage tree with all rows assigned."""

    roots: list[Segment]
    groups: list[Group]
    height: float
    """In points."""

    def segments(self) -> list[Segment]:
        """All segments, the least shared first, so that the most shared are drawn on top."""
        found = [segment for root in self.roots for segment in root.walk()]
        return sorted(found, key=lambda segment: len(segment.trials))

    def leaves(self) -> list[Leaf]:
        """The ends of all trials, from top to bottom."""
        return [leaf for group in self.groups for leaf in group.leaves]


def build_tree(study: StudyRecord) -> list[Segment]:
    """Build the trees of a search, one per first stage key; trials that trained nothing are in none."""
    cuts: dict[str, set[int]] = defaultdict(set)
    for cost in (cost for trial in study.trials for cost in trial.stage_costs):
        cuts[cost.key].add(cost.epochs)
    roots: list[Segment] = []
    known: dict[tuple[str, int], Segment] = {}
    for trial in study.trials:
        last: Segment | None = None
        for cost in trial.stage_costs:
            for cut in (cut for cut in sorted(cuts[cost.key]) if 0 < cut <= cost.epochs):
                if (cost.key, cut) not in known:
                    start = last.end if last else 0
                    before = start - max((c for c in cuts[cost.key] if c < cut), default=0)
                    known[cost.key, cut] = Segment(cost.key, cost.stage, start, before + cut)
                    (last.children if last else roots).append(known[cost.key, cut])
                last = known[cost.key, cut]
                last.trials.append(trial)
        if last:
            last.ended.append(trial)
    return roots


def lay_out(roots: list[Segment]) -> Layout:
    """Assign rows to all segments and trials: siblings by MAE, the continuation of the same stage last."""
    groups = [group for root in _ordered(roots, "") for group in _grouped(root)]
    count = sum(map(len, groups))
    fans = [count > MAX_LABELLED and len(group) > 2 for group in groups]
    heights = [
        max(ROW, DENSE_ROW * len(group)) if fan else ROW * len(group) for group, fan in zip(groups, fans, strict=True)
    ]
    scale = min(1.0, MAX_HEIGHT / (math.fsum(heights) + GAP * len(heights) or 1.0))
    rows: dict[int, float] = {}
    placed, top = [], 0.0
    for group, fan, height in zip(groups, fans, heights, strict=True):
        pitch = DENSE_ROW if fan else ROW
        first = (height - pitch * len(group)) / 2
        ys = [top + scale * (first + pitch * (index + 0.5)) for index in range(len(group))]
        leaves = [Leaf(trial, segment, y) for (trial, segment), y in zip(group, ys, strict=True)]
        placed.append(Group(leaves, fan, scale * (height + GAP)))
        rows |= {leaf.trial.number: leaf.y for leaf in leaves}
        top += scale * (height + GAP)
    for root in roots:
        _set_rows(root, rows)
    return Layout(roots, placed, max(0.0, top - scale * GAP))


def _mae(trial: TrialRecord) -> float:
    return trial.mae if trial.mae is not None and trial.is_scored else math.inf


def _grouped(segment: Segment) -> Iterator[list[tuple[TrialRecord, Segment]]]:
    """Yield the groups of a subtree, from top to bottom."""
    single = [child for child in segment.children if _is_leaf(child)]
    leaves = [(trial, segment) for trial in segment.ended]
    leaves += [(child.ended[0], child) for child in single]
    if leaves:
        yield sorted(leaves, key=lambda leaf: (_mae(leaf[0]), leaf[0].number))
    for child in _ordered([child for child in segment.children if not _is_leaf(child)], segment.key):
        yield from _grouped(child)


def _is_leaf(segment: Segment) -> bool:
    return not segment.children and len(segment.ended) == 1


def _ordered(segments: list[Segment], key: str) -> list[Segment]:
    return sorted(segments, key=lambda segment: (segment.key == key, segment.mae, segment.trials[0].number))


def _set_rows(segment: Segment, rows: dict[int, float]) -> list[float]:
    """Center each segment on what follows it; returns its row in a list."""
    below = [y for child in segment.children for y in _set_rows(child, rows)]
    below += [rows[trial.number] for trial in segment.ended]
    segment.y = (min(below) + max(below)) / 2
    return [segment.y]


def draw_stage_tree(study: StudyRecord, path: str | os.PathLike[str]) -> None:
    """Draw each trained segment once, as wide as its use, and the MAE of each trial, as a PNG.

    Epochs run from left to right. In a large search, trials that branch off at the same point share one label. The
    path to the best trial has a dark outline.
    """
    layout = lay_out(build_tree(study))
    if not layout.groups:
        return style.text_figure(study.name, "no trial has trained yet", path)
    height = layout.height + _HEADER + _FOOTER
    figure = Figure(figsize=(_WIDTH / 72, height / 72), dpi=style.DPI, facecolor="white")
    tree, dots = (
        figure.add_axes((left / _WIDTH, _FOOTER / height, (right - left) / _WIDTH, layout.height / height))
        for left, right in (_TREE, _DOTS)
    )
    best = study.best()
    _draw_tree(tree, layout, best)
    for group in layout.groups:
        _draw_label(tree, group, best)
    _draw_dots(dots, study, layout)
    _draw_header(figure, study, layout, height)
    left, bottom = _TREE[0] / _WIDTH, 24 / height
    figure.text(left, bottom, _cost_summary(study), size=8, va="center", color=style.INK, linespacing=1.5)
    style.save_figure(figure, path)


def _draw_tree(axes: Axes, layout: Layout, best: TrialRecord | None) -> None:
    segments = layout.segments()
    end = max(segment.end for segment in segments)
    unit = end / (_TREE[1] - _TREE[0])
    axes.set(xlim=(0, end), ylim=(layout.height, 0))
    axes.set_xlabel("epochs")
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    style.style_axes(axes)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False)
    axes.grid(axis="x", color="#eaeef2", linewidth=0.6)
    axes.set_yticks([])
    for segment in segments:
        is_best = best is not None and any(trial is best for trial in segment.trials)
        color = STAGE_COLORS.get(segment.stage, style.PINK)
        for child in segment.children:
            _draw_branch(axes, (segment.end, segment.y), child, unit, best)
        for leaf in (leaf for leaf in layout.leaves() if leaf.segment is segment):
            if segment.children or len(segment.ended) > 1:
                outline = style.INK if leaf.trial is best else None
                _draw_curve(
                    axes, (segment.end, segment.y), (segment.end + 5 * unit, leaf.y), 5 * unit, 1.1, color, outline
                )
        if segment in layout.roots:
            _draw_branch(axes, (0, segment.y), segment, unit, best)
        _draw_trial_count(axes, segment, unit, color, is_best)


def _draw_branch(
    axes: Axes, parent: tuple[float, float], child: Segment, unit: float, best: TrialRecord | None
) -> None:
    is_best = best is not None and any(trial is best for trial in child.trials)
    bend = min(22 * unit, 0.6 * (child.end - child.start))
    width = 1.1 + 1.5 * math.log2(len(child.trials))
    outline = style.INK if is_best else None
    color = STAGE_COLORS.get(child.stage, style.PINK)
    _draw_curve(axes, parent, (child.end, child.y), bend, width, color, outline)


def _draw_curve(
    axes: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    bend: float,
    width: float,
    color: str,
    outline: str | None,
) -> None:
    """Draw a curve that reaches the row of `end` within `bend`, and then runs horizontally."""
    (x, y), (right, row) = start, end
    points = [(x, y), (x + bend / 2, y), (x + bend / 2, row), (x + bend, row), (right, row)]
    codes = [Path.MOVETO, Path.CURVE4, Path.CURVE4, Path.CURVE4, Path.LINETO]
    options: dict[str, Any] = {"facecolor": "none", "capstyle": "round", "joinstyle": "round", "clip_on": False}
    if outline:
        axes.add_patch(PathPatch(Path(points, codes), edgecolor=outline, linewidth=width + 2.2, zorder=3, **options))
    order = 4 if outline else 2 + width / 20
    axes.add_patch(PathPatch(Path(points, codes), edgecolor=color, linewidth=width, zorder=order, **options))


def _draw_trial_count(axes: Axes, segment: Segment, unit: float, color: str, is_best: bool) -> None:
    """Write how many trials share a segment, if it is long enough."""
    text = f"{len(segment.trials)}{_TIMES}"
    if len(segment.trials) < 2 or (segment.end - segment.start) / unit < 4 * len(text) + 4:
        return
    box = {"boxstyle": "round,pad=0.22", "facecolor": "white", "edgecolor": style.INK if is_best else color}
    options: dict[str, Any] = {"xytext": (-5, 0), "textcoords": "offset points", "ha": "right"}
    options |= {"va": "center_baseline", "bbox": box | {"linewidth": 0.9}, "zorder": 7}
    axes.annotate(text, (segment.end, segment.y), size=_FONT_SIZE, color=style.INK, **options)


def _draw_label(axes: Axes, group: Group, best: TrialRecord | None) -> None:
    """Label each trial with number, MAE and state, or a fan with its number of trials and range of MAEs."""
    has_best = any(leaf.trial is best for leaf in group.leaves)
    if group.is_fan:
        ys = [leaf.y for leaf in group.leaves]
        edge: dict[str, Any] = {"transform": axes.get_yaxis_transform(), "clip_on": False, "linewidth": 0.8}
        axes.plot([1.012, 1.02, 1.02, 1.012], [ys[0], ys[0], ys[-1], ys[-1]], color=style.FAINT, **edge)
        if group.height > _FONT_SIZE or has_best:
            _draw_text(axes, (ys[0] + ys[-1]) / 2, 14, "left", _fan_label(group), has_best)
        return
    pitch = group.height / len(group.leaves)
    for leaf in (leaf for leaf in group.leaves if pitch > _FONT_SIZE or leaf.trial is best):
        faint: dict[str, Any] = {"color": style.PAPER, "linewidth": 0.6, "clip_on": False, "zorder": 1}
        axes.plot([leaf.segment.end, axes.get_xlim()[1] * 1.02], [leaf.y, leaf.y], linestyle=(0, (1, 2)), **faint)
        bold = leaf.trial is best
        _draw_text(axes, leaf.y, 32, "right", f"{leaf.trial.number}", bold)
        if leaf.trial.is_scored:
            _draw_text(axes, leaf.y, 66, "right", f"{leaf.trial.mae:.2f}", bold)
        if leaf.trial.state != "complete":
            _draw_text(axes, leaf.y, 74, "left", leaf.trial.state, bold)


def _fan_label(group: Group) -> str:
    maes = [leaf.trial.mae for leaf in group.leaves if leaf.trial.mae is not None and leaf.trial.is_scored]
    maes_range = f"{min(maes):.2f} to {max(maes):.2f}" if maes else "no MAE"
    return f"{len(group.leaves)} trials: {maes_range}"


def _draw_text(axes: Axes, y: float, right: float, align: str, text: str, bold: bool) -> None:
    """Write a label `right` points to the right of the tree."""
    position: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    options: dict[str, Any] = {"ha": align, "va": "center_baseline", "weight": "bold" if bold else "normal"}
    axes.annotate(text, (1, y), (right, 0), size=_FONT_SIZE + 0.5, color=style.INK, **position, **options)


def _draw_dots(axes: Axes, study: StudyRecord, layout: Layout) -> None:
    leaves = layout.leaves()
    scale = MaeScale(study.trials)
    size = 0.4 if len(leaves) > MAX_LABELLED else 0.8
    scatter(axes, [leaf.trial for leaf in leaves], [leaf.y for leaf in leaves], scale, vertical=False, size=size)
    axes.set(xlim=(scale.bottom, scale.top), ylim=(layout.height, 0))
    axes.axvspan(scale.edge, scale.top, color=style.PAPER, alpha=0.4, linewidth=0, zorder=0)
    axes.set_xlabel(MAE)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    style.style_axes(axes)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color="#eaeef2", linewidth=0.6)


def _draw_header(figure: Figure, study: StudyRecord, layout: Layout, height: float) -> None:
    """Draw title, column names and legend."""
    count = len(study.trials)
    title = f"{study.name}: stage tree of {count} trial{'s' * (count != 1)}, each trained segment drawn once"
    left = _TREE[0] / _WIDTH
    figure.text(left, 1 - 14 / height, title, size=10, va="center", color=style.INK)
    columns = [(32, "right", "trial"), (66, "right", "MAE")]
    if any(group.is_fan for group in layout.groups):
        columns = [(14, "left", "trials and their MAEs")]
    for right, align, head in columns:
        at = ((_TREE[1] + right) / _WIDTH, 1 - (_HEADER - 10) / height)
        figure.text(*at, head, size=_FONT_SIZE + 0.5, ha=align, va="center", color=style.FAINT)
    entries: list[tuple[Any, str]] = [(_line(color, 4), stage) for stage, color in STAGE_COLORS.items()]
    if best := study.best():
        outline = (_line(style.INK, 5.5), _line(STAGE_COLORS["joint"], 3))
        entries.append((outline, f"path to the best trial, {best.number}, MAE {best.mae:.2f}"))
    if (most := max(len(root.trials) for root in layout.roots)) > 1:
        marker: dict[str, Any] = {
            "marker": f"${most}{_TIMES}$",
            "markersize": 7 + 3.5 * len(f"{most}"),
            "markeredgewidth": 0.0,
        }
        entries.append(
            (Line2D([], [], color=style.INK, linestyle="", **marker), f"trained once, used by {most} trials")
        )
    options: dict[str, Any] = {
        "frameon": False,
        "fontsize": 8,
        "borderpad": 0,
        "handlelength": 1.6,
        "labelcolor": style.INK,
    }
    options |= {"loc": "center left", "bbox_to_anchor": (left, 1 - 32 / height), "ncols": len(entries)}
    figure.legend([handle for handle, _ in entries], [label for _, label in entries], **options)


def _line(color: str, width: float) -> Line2D:
    return Line2D([], [], color=color, linewidth=width, solid_capstyle="butt")


def _cost_summary(study: StudyRecord) -> str:
    divisor, unit = time_unit(study.spent)
    text = f"{study.spent / divisor:.1f} worker-{unit} spent, {study.saved / divisor:.1f} saved: "
    text += f"speedup {study.speedup:.2f}.\nMaximum speedup, if nothing were trained twice: {study.max_speedup:.2f}."
    if study.speedup > study.max_speedup * 1.001:
        text += " Some states were stored before the search."
    idle = sum(not any(cost.epochs for cost in trial.stage_costs) for trial in study.trials)
    text += f" Not drawn: {idle} that trained nothing." if idle else ""
    strip = MaeScale(study.trials).strip_label()
    return text + (f" In the gray strip at the right: {strip}." if strip else "")
