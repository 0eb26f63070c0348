"""Errors of each arm of an ablation, and what it gains over the plain baseline and over the placebo.

Shape legend: S seeds, N images.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

import numpy as np
from numpy.typing import NDArray

from crowdray.ablation.arms import NONE, PLACEBO, Arm
from crowdray.ablation.result import CellResult
from crowdray.evaluation.comparison import Comparison, ErrorSummary, compare_errors, summarise_errors
from crowdray.evaluation.metrics import ImageCount


@dataclass(frozen=True)
class ArmSummary:
    """All seeds of an arm, at a label fraction and with a backbone."""

    arm: str
    """Name of the arm."""
    weights: dict[str, float]
    """Loss weight of each auxiliary task."""
    placebo: bool
    """Whether the tasks learned the targets of other images."""
    fraction: float
    """Fraction of the training images."""
    backbone: str
    """Name of the backbone."""
    seeds: tuple[int, ...]
    """Its seeds."""
    updates: int
    """Number of updates of each run."""
    seconds: float
    """Mean training time of a run in seconds."""
    validation: ErrorSummary
    """Errors on the validation images, which each seed draws for itself."""
    test: ErrorSummary | None
    """Errors on the test split; None for a dataset without one."""
    gain: Comparison | None
    """Gain over the arm `none`, on the test split, or else the validation images; None for that arm, or without it."""
    gain_over_placebo: Comparison | None
    """The same over the placebo."""

    @property
    def errors(self) -> ErrorSummary:
        """Errors on the test split, or else the validation images."""
        return self.test or self.validation


def summarise_arms(cells: Sequence[CellResult], arms: Sequence[Arm], block: int = 1) -> list[ArmSummary]:
    """Summarise cells by arm, fraction and backbone, in the order of their first appearance.

    Arms are compared with `none` and `placebo` of the same fraction and backbone, over the seeds that both have.

    Args:
        cells: Finished cells.
        arms: The arms by which they are named.
        block: Number of consecutive images that a bootstrap resamples together, as `mean_interval` takes it.
    """
    groups: dict[tuple[str, float, str], dict[int, CellResult]] = {}
    for cell in cells:
        groups.setdefault((cell.arm, cell.fraction, cell.backbone), {})[cell.seed] = cell
    by_name = {arm.name: arm for arm in arms}
    summaries = []
    for (name, fraction, backbone), group in groups.items():
        found = list(group.values())
        references = (groups.get((reference, fraction, backbone), {}) for reference in (NONE, PLACEBO))
        gain, over_placebo = (_compare(reference, group, block) for reference in references)
        tested = all(cell.test is not None for cell in found)
        summaries.append(
            ArmSummary(
                arm=name,
                weights=dict(by_name[name].weights),
                placebo=by_name[name].placebo,
                fraction=fraction,
                backbone=backbone,
                seeds=tuple(group),
                updates=found[0].updates,
                seconds=fmean(cell.seconds for cell in found),
                validation=_summarise([cell.validation for cell in found], block),
                test=_summarise([cell.test or [] for cell in found], block) if tested else None,
                gain=None if name == NONE else gain,
                gain_over_placebo=None if name == PLACEBO else over_placebo,
            )
        )
    return summaries


def count_errors(counts: Sequence[ImageCount]) -> NDArray[np.float64]:
    """Signed errors (N,) in the dataset's order."""
    return np.array([count.predicted - count.truth for count in sorted(counts, key=lambda count: count.row)])


def final_counts(cell: CellResult) -> list[ImageCount]:
    """Counts of the test split, or else of the validation images."""
    return cell.validation if cell.test is None else cell.test


def _summarise(counts: Sequence[Sequence[ImageCount]], block: int) -> ErrorSummary:
    return summarise_errors([count_errors(of_seed) for of_seed in counts], block, crossed=_crossed(counts))


def _compare(reference: Mapping[int, CellResult], other: Mapping[int, CellResult], block: int) -> Comparison | None:
    pairs = [(final_counts(reference[seed]), final_counts(cell)) for seed, cell in other.items() if seed in reference]
    if not pairs:
        return None
    first, second = ([pair[side] for pair in pairs] for side in range(2))
    if list(_rows(first)) != list(_rows(second)):
        raise ValueError("the arms of one seed were evaluated on different images")
    errors, others = ([count_errors(counts) for counts in side] for side in (first, second))
    return compare_errors(errors, others, block, crossed=_crossed(first))


def _crossed(counts: Sequence[Sequence[ImageCount]]) -> bool:
    rows = list(_rows(counts))
    return all(found == rows[0] for found in rows)


def _rows(counts: Sequence[Sequence[ImageCount]]) -> Iterator[list[int]]:
    return (sorted(count.row for count in of_seed) for of_seed in counts)
