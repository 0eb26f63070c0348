"""The stage tree of a search: every stretch of training once, with all the trials that pass through it.

Rows and heights are in points of 1/72 inch, downwards from the top of the tree.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field

from crowdray.tune.record import StudyRecord, TrialRecord

ROW, DENSE = 11.0, 3.4
"""Heights of a trial with a label, and of one in a fan."""
GAP = 5.0
"""Between families: trials that part ways at the same place."""
MANY, TALLEST = 45, 1000.0
"""Trials above which families become fans; height of a tree above which rows shrink."""


@dataclass(eq=False)
class Segment:
    """Epochs of one chain between two places where trials part ways."""

    chain: str
    """Key of the chain."""
    stage: str
    """Its stage."""
    start: int
    """Epochs of the whole training before the segment."""
    end: int
    """Epochs of the whole training at its end."""
    trials: list[TrialRecord] = field(default_factory=list)
    """Those that pass through it."""
    ended: list[TrialRecord] = field(default_factory=list)
    """Those whose training ends where it does."""
    children: list["Segment"] = field(default_factory=list)
    """What follows."""
    y: float = 0.0
    """Its row."""

    @property
    def mae(self) -> float:
        """Lowest MAE of its trials, infinite without any."""
        return min(map(rank, self.trials))

    def walk(self) -> Iterator["Segment"]:
        """Itself and all that follow, depth first."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclass(frozen=True)
class Tip:
    """The end of one trial."""

    trial: TrialRecord
    segment: Segment
    """The last it passed through."""
    y: float
    """Its row."""


@dataclass(frozen=True)
class Family:
    """Trials that part ways at one place, by rising MAE."""

    tips: list[Tip]
    fan: bool
    """Whether they have one label together."""
    height: float
    """Room for labels."""


@dataclass(frozen=True)
class Layout:
    """A tree with its rows."""

    roots: list[Segment]
    families: list[Family]
    """From top to bottom."""
    height: float

    def segments(self) -> list[Segment]:
        """All segments, the least used first, so that the well-used lie on top."""
        found = [segment for root in self.roots for segment in root.walk()]
        return sorted(found, key=lambda segment: len(segment.trials))


def rank(trial: TrialRecord) -> float:
    """A trial's MAE, infinite where it has none."""
    return trial.mae if trial.mae is not None and trial.is_scored else math.inf


def grow(study: StudyRecord) -> list[Segment]:
    """The trees of a search, one for each first chain; trials that trained nothing stand in none."""
    cuts: dict[str, set[int]] = defaultdict(set)
    for leg in (leg for trial in study.trials for leg in trial.stage_costs):
        cuts[leg.key].add(leg.epochs)
    roots: list[Segment] = []
    known: dict[tuple[str, int], Segment] = {}
    for trial in study.trials:
        last: Segment | None = None
        for leg in trial.stage_costs:
            for cut in (cut for cut in sorted(cuts[leg.key]) if 0 < cut <= leg.epochs):
                if (leg.key, cut) not in known:
                    start = last.end if last else 0
                    done = start - max((c for c in cuts[leg.key] if c < cut), default=0)
                    known[leg.key, cut] = Segment(leg.key, leg.stage, start, done + cut)
                    (last.children if last else roots).append(known[leg.key, cut])
                last = known[leg.key, cut]
                last.trials.append(trial)
        if last:
            last.ended.append(trial)
    return roots


def arrange(roots: list[Segment]) -> Layout:
    """Give every segment and every trial its row: siblings by MAE, a chain's own continuation last."""
    families = [family for root in _ordered(roots, "") for family in _families(root)]
    count = sum(len(tips) for tips in families)
    fans = [count > MANY and len(tips) > 2 for tips in families]
    heights = [
        max(ROW, DENSE * len(tips)) if fan else ROW * len(tips) for tips, fan in zip(families, fans, strict=True)
    ]
    scale = min(1.0, TALLEST / (math.fsum(heights) + GAP * len(heights) or 1.0))
    rows: dict[int, float] = {}
    placed, top = [], 0.0
    for tips, fan, height in zip(families, fans, heights, strict=True):
        pitch = DENSE if fan else ROW
        first = (height - pitch * len(tips)) / 2
        ys = [top + scale * (first + pitch * (place + 0.5)) for place in range(len(tips))]
        placed.append(
            Family([Tip(trial, of, y) for (trial, of), y in zip(tips, ys, strict=True)], fan, scale * (height + GAP))
        )
        rows |= {trial.number: y for (trial, _), y in zip(tips, ys, strict=True)}
        top += scale * (height + GAP)
    for root in roots:
        _settle(root, rows)
    return Layout(roots, placed, max(0.0, top - scale * GAP))


def _families(segment: Segment) -> Iterator[list[tuple[TrialRecord, Segment]]]:
    """The families of a subtree, from top to bottom."""
    lone = [child for child in segment.children if _is_tip(child)]
    tips = [(trial, segment) for trial in segment.ended]
    tips += [(child.ended[0], child) for child in lone]
    if tips:
        yield sorted(tips, key=lambda tip: (rank(tip[0]), tip[0].number))
    for child in _ordered([child for child in segment.children if not _is_tip(child)], segment.chain):
        yield from _families(child)


def _is_tip(segment: Segment) -> bool:
    return not segment.children and len(segment.ended) == 1


def _ordered(segments: list[Segment], chain: str) -> list[Segment]:
    return sorted(segments, key=lambda segment: (segment.chain == chain, segment.mae, segment.trials[0].number))


def _settle(segment: Segment, rows: dict[int, float]) -> list[float]:
    """A segment's row is the middle of what follows; returns it in a list."""
    below = [y for child in segment.children for y in _settle(child, rows)]
    below += [rows[trial.number] for trial in segment.ended]
    segment.y = (min(below) + max(below)) / 2
    return [segment.y]
