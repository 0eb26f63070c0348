"""The stage tree of a search: every trained segment once, with all trials that pass through it."""

import math
import os
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from crowdray.plots import style
from crowdray.tune.figures import MAE, legend, mae_limit, scatter, time_unit
from crowdray.tune.record import StudyRecord, TrialRecord

STAGE_COLORS = {"baseline": style.BLUE, "decoders": style.ORANGE, "joint": style.GREEN}
_ROW, _MAX_HEIGHT = 11.0, 800.0
"""Height of a row, and of all rows together, beyond which rows shrink, in points."""
_FONT_SIZE = 6.5
"""Size of the labels; lower rows have none."""


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
    row: float = 0.0
    """Its row, from the top."""

    def walk(self) -> Iterator["Segment"]:
        """Yield itself and all following segments, depth first."""
        yield self
        for child in self.children:
            yield from child.walk()


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
            before = last.end if last else 0
            for cut in (cut for cut in sorted(cuts[cost.key]) if 0 < cut <= cost.epochs):
                if (cost.key, cut) not in known:
                    known[cost.key, cut] = Segment(cost.key, cost.stage, last.end if last else 0, before + cut)
                    (last.children if last else roots).append(known[cost.key, cut])
                last = known[cost.key, cut]
                last.trials.append(trial)
        if last:
            last.ended.append(trial)
    return roots


def lay_out(segments: Sequence[Segment], before: str = "", rows: Sequence[TrialRecord] = ()) -> list[TrialRecord]:
    """Assign rows to all segments; returns the trials in the order of their rows, 0, 1, 2, ...

    Of the branches at one point, that with the lower MAE is higher, and the continuation of the same stage is last. A
    segment is in the center of what follows it.

    Args:
        segments: Segments that branch off at one point.
        before: Stage key of the segment that ends there.
        rows: Trials of the rows above.
    """
    placed = list(rows)
    for segment in sorted(segments, key=lambda s: (s.key == before, min(map(_mae, s.trials)), s.trials[0].number)):
        ended = sorted(segment.ended, key=lambda trial: (_mae(trial), trial.number))
        positions = [float(len(placed) + index) for index in range(len(ended))]
        placed = lay_out(segment.children, segment.key, placed + ended)
        positions += [child.row for child in segment.children]
        segment.row = (min(positions) + max(positions)) / 2
    return placed


def _mae(trial: TrialRecord) -> float:
    return trial.mae if trial.mae is not None and trial.is_scored else math.inf


def draw_stage_tree(study: StudyRecord, path: str | os.PathLike[str]) -> None:
    """Draw each trained segment once, as wide as its use, and the MAE of each trial, as a PNG.

    Epochs run from left to right. The path to the best trial has a dark outline.
    """
    roots = build_tree(study)
    rows = lay_out(roots)
    if not rows:
        return style.text_figure(study.name, "no trial has trained yet", path)
    height = min(_ROW, _MAX_HEIGHT / len(rows))
    size = (10.0, (height * len(rows) + 130) / 72)
    figure = Figure(figsize=size, dpi=style.DPI, layout="constrained", facecolor="white")
    tree, dots = figure.subplots(1, 2, sharey=True, width_ratios=(3, 1))
    limit, best = mae_limit(study.trials), study.best()
    tree.set(xlim=(0, max(segment.end for root in roots for segment in root.walk())), xlabel="epochs")
    tree.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    for root in roots:
        _draw_segment(tree, root, root.row, {trial.number: row for row, trial in enumerate(rows)}, best)
    scatter(dots, rows, range(len(rows)), limit, vertical=False, size=min(0.8, height / 12))
    dots.set(xlabel=MAE, ylim=(len(rows) - 0.5, -0.5))
    dots.xaxis.set_major_locator(MaxNLocator(4))
    for axes in (tree, dots):
        style.style_axes(axes)
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")
        axes.grid(axis="x", color="#eaeef2", linewidth=0.6)
    dots.set_yticks(range(len(rows)), [_label(trial) if height > _FONT_SIZE or trial is best else "" for trial in rows])
    tree.tick_params(axis="y", length=0, labelleft=False)
    dots.tick_params(axis="y", length=0, labelleft=True, labelsize=_FONT_SIZE, labelcolor=style.INK)
    for trial, label in zip(rows, dots.get_yticklabels(), strict=True):
        label.set_weight("bold" if trial is best else "normal")
    lines = [Line2D([], [], color=color, linewidth=4, label=stage) for stage, color in STAGE_COLORS.items()]
    lines += [Line2D([], [], color=style.INK, linewidth=2, label="path to the best")] * (best in rows)
    legend(figure, rows, lines, limit)
    count = f"{len(rows)} trial{'s' * (len(rows) != 1)}"
    title = f"{study.name}: stage tree of {count}, each trained segment drawn once"
    figure.suptitle(f"{title}\n{_cost_summary(study)}", size=10, color=style.INK)
    style.save_figure(figure, path)


def _label(trial: TrialRecord) -> str:
    return f"{trial.number}   {trial.mae:.2f}" if trial.is_scored else f"{trial.number}   {trial.state}"


def _draw_segment(
    axes: Axes, segment: Segment, parent_row: float, rows: Mapping[int, int], best: TrialRecord | None
) -> None:
    """Draw a segment with the branch from its parent, the ends of its trials, and what follows."""
    color, count, right = STAGE_COLORS.get(segment.stage, style.PINK), len(segment.trials), axes.get_xlim()[1]
    x, y = [segment.start, segment.start, segment.end], [parent_row, segment.row, segment.row]
    _draw_line(axes, x, y, color, 1.1 + 1.3 * math.log2(count), best in segment.trials)
    for trial in segment.ended:
        row = rows[trial.number]
        _draw_line(axes, [segment.end, segment.end], [segment.row, row], color, 1.1, trial is best)
        axes.plot([segment.end, right], [row, row], ":", color=style.PAPER, linewidth=0.6, zorder=1)
    if count > 1 and (segment.end - segment.start) / right > 0.012 * len(f"{count}x"):
        box = {"boxstyle": "round,pad=0.2", "facecolor": "white", "edgecolor": color, "linewidth": 0.9}
        at = ((segment.start + segment.end) / 2, segment.row)
        text = f"{count}\N{MULTIPLICATION SIGN}"
        axes.text(*at, text, size=_FONT_SIZE, color=style.INK, ha="center", va="center_baseline", bbox=box, zorder=7)
    for child in segment.children:
        _draw_segment(axes, child, segment.row, rows, best)


def _draw_line(axes: Axes, x: list[int], y: list[float], color: str, width: float, is_best: bool) -> None:
    if is_best:
        axes.plot(x, y, color=style.INK, linewidth=width + 2.2, solid_capstyle="round", zorder=3)
    axes.plot(x, y, color=color, linewidth=width, solid_capstyle="round", zorder=4 if is_best else 2)


def _cost_summary(study: StudyRecord) -> str:
    divisor, unit = time_unit(study.spent)
    times = f"{study.spent / divisor:.1f} worker-{unit} spent, {study.saved / divisor:.1f} saved"
    return f"{times}: speedup {study.speedup:.2f}"
