"""What the findings in a source amount to: figures of each split, images that are there twice, problems and notes."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crowdray.datasets.statistics import SPACING_EDGES, DatasetStats, ImageFacts, Unusable
from crowdray.errors import JobFailed

MOST_LISTED = 20
"""How many images a message lists before it only counts; Soundness.content lists all."""


_LINE = "\n  "


class InvalidDatasetError(JobFailed):
    """A source has problems, and was to have none."""


@dataclass(frozen=True, slots=True)
class Spread:
    """How a number spreads over images."""

    least: float
    """The smallest."""
    median: float
    """The middle one, or the mean of the middle two."""
    mean: float
    """The mean."""
    most: float
    """The largest."""


@dataclass(frozen=True, eq=False)
class SplitFacts:
    """One split of a source."""

    images: int
    """Images that can be used."""
    unusable: int
    """Images that cannot."""
    heads: int
    """Annotated heads."""
    counts: Spread | None
    """Heads of an image; None, as all that follows, where no image can be used."""
    heights: Spread | None
    """Heights in pixels."""
    widths: Spread | None
    """Widths in pixels."""
    colours: dict[str, int]
    """Images by how their files hold colour."""
    turned: int
    """Images whose EXIF tag asks a viewer to turn them."""
    empty: int
    """Images without a head."""
    outside: int
    """Heads outside their image."""
    crowded: int
    """Heads on a pixel that another head has already."""
    with_roi: int
    """Images with a region of interest."""
    roi: float | None
    """Share of these images' pixels that is in it."""
    outside_roi: int
    """Heads outside it."""
    with_depth: int
    """Images with depth."""
    depth: tuple[float, float] | None
    """Least and greatest depth of them all."""
    spacing: float | None
    """Median of the pixels to the nearest other head, to a tenth of it; None where no image has two heads."""
    spacing_histogram: NDArray[np.int64]
    """(112,) heads by that distance, see SPACING_EDGES."""


@dataclass(frozen=True)
class ValidationReport:
    """What a source is like."""

    source: str
    """Its name."""
    depth_teacher: str
    """Where its depth comes from."""
    splits: dict[str, SplitFacts]
    """Figures of each split, in the source's order."""
    images: list[ImageFacts]
    """Every image that can be used, in the source's order."""
    unusable: list[Unusable]
    """Every image that cannot."""
    repeated: list[list[ImageFacts]]
    """Images of the same bytes, in groups."""
    problems: list[str]
    """What must be mended before a figure can be trusted."""
    notes: list[str]
    """What is worth knowing."""

    def require(self) -> None:
        """Raise UnsoundError, which says in a line what kinds of problems there are."""
        if self.problems:
            kinds = [problem.partition(_LINE)[0].rstrip(":") for problem in self.problems]
            raise InvalidDatasetError(f"{self.source} is not sound: {'; '.join(kinds)}")

    def content(self, **about: Any) -> dict[str, Any]:
        """All of it as JSON content, what is said `about` it first."""
        splits = {
            name: asdict(facts) | {"spacing_histogram": facts.spacing_histogram.tolist()}
            for name, facts in self.splits.items()
        }
        return {
            **about,
            "source": self.source,
            "depth_teacher": self.depth_teacher,
            "sound": not self.problems,
            "problems": self.problems,
            "notes": self.notes,
            "splits": splits,
            "spacing_edges": SPACING_EDGES.tolist(),
            "repeated": [[{"split": i.split, "name": i.name, "heads": i.heads} for i in g] for g in self.repeated],
            "unusable": [asdict(one) for one in self.unusable],
            "images": [asdict(image) for image in self.images],
        }


def validate(source: str, depth_teacher: str, found: DatasetStats, notes: Sequence[str] = ()) -> ValidationReport:
    """What the findings in all items of a source amount to; `notes` are what the source says of itself."""
    repeated = _repeated(found.images)
    return ValidationReport(
        source=source,
        depth_teacher=depth_teacher,
        splits={split: _split_facts(split, found) for split in found.spacing},
        images=found.images,
        unusable=found.unusable,
        repeated=repeated,
        problems=[*_unusable_problem(found.unusable), *_shared_problems(repeated)],
        notes=[*notes, *_notes(found.images, repeated)],
    )


def _split_facts(split: str, found: DatasetStats) -> SplitFacts:
    images = [image for image in found.images if image.split == split]
    areas = [(image.roi, image.height * image.width) for image in images if image.roi is not None]
    depths = [image.depth for image in images if image.depth is not None]
    return SplitFacts(
        images=len(images),
        unusable=sum(one.split == split for one in found.unusable),
        heads=sum(image.heads for image in images),
        counts=_spread([image.heads for image in images]),
        heights=_spread([image.height for image in images]),
        widths=_spread([image.width for image in images]),
        colours=dict(Counter(image.colours for image in images)),
        turned=sum(image.turned for image in images),
        empty=sum(image.heads == 0 for image in images),
        outside=sum(image.outside for image in images),
        crowded=sum(image.crowded for image in images),
        with_roi=len(areas),
        roi=sum(share * area for share, area in areas) / sum(area for _, area in areas) if areas else None,
        outside_roi=sum(image.outside_roi for image in images),
        with_depth=len(depths),
        depth=(min(near for near, _ in depths), max(far for _, far in depths)) if depths else None,
        spacing=_median(found.spacing[split]),
        spacing_histogram=found.spacing[split],
    )


def _spread(values: Sequence[int]) -> Spread | None:
    if not values:
        return None
    return Spread(min(values), float(np.median(values)), sum(values) / len(values), max(values))


def _median(histogram: NDArray[np.int64]) -> float | None:
    """The distance in the middle of a histogram of spacings, its bins taken to be filled evenly in their logarithm."""
    total = int(histogram.sum())
    if total == 0:
        return None
    reached = np.concatenate([[0], histogram.cumsum()]) / total
    place = int(np.searchsorted(reached, 0.5)) - 1
    share = (0.5 - reached[place]) / (reached[place + 1] - reached[place])
    return float(SPACING_EDGES[place] * (SPACING_EDGES[place + 1] / SPACING_EDGES[place]) ** share)


def _repeated(images: Sequence[ImageFacts]) -> list[list[ImageFacts]]:
    groups: dict[str, list[ImageFacts]] = {}
    for image in images:
        groups.setdefault(image.sha256, []).append(image)
    return [group for group in groups.values() if len(group) > 1]


def _unusable_problem(unusable: Sequence[Unusable]) -> Iterator[str]:
    if unusable:
        reasons = [f"{one.split}/{one.name}: {one.reason}" for one in unusable]
        yield f"{_number(len(unusable), 'image')} cannot be used:\n  {_listed(reasons, _LINE)}"


def _shared_problems(repeated: Sequence[Sequence[ImageFacts]]) -> Iterator[str]:
    """One message for each set of splits that have images in common."""
    shared: dict[tuple[str, ...], list[str]] = {}
    for group in repeated:
        if len(splits := tuple(dict.fromkeys(image.split for image in group))) > 1:
            shared.setdefault(splits, []).append(_equation(group))
    for splits, equations in shared.items():
        what = f"{' and '.join(splits)} share {_number(len(equations), 'image')}"
        mend = "keep each in one of them, or a score tells what training remembers"
        yield f"{what}, {mend}:\n  {_listed(equations, _LINE)}"


def _notes(images: Sequence[ImageFacts], repeated: Sequence[Sequence[ImageFacts]]) -> Iterator[str]:
    within = [_equation(group) for group in repeated if len({image.split for image in group}) == 1]
    if within:
        yield f"{_number(len(within), 'image')} repeated within a split: {_listed(within, '; ')}"
    heads: dict[str, Callable[[ImageFacts], int]] = {
        "outside the image": lambda image: image.outside,
        "on a pixel that another head has already": lambda image: image.crowded,
        "outside the region of interest": lambda image: image.outside_roi,
    }
    for where, number in heads.items():
        if some := [(f"{image.split}/{image.name}", number(image)) for image in images if number(image)]:
            total, listed = sum(count for _, count in some), _listed([f"{name} ({count})" for name, count in some])
            yield f"{_number(total, 'head')} {where}, in {_number(len(some), 'image')}: {listed}"
    kinds: dict[str, Callable[[ImageFacts], bool]] = {
        "without a head": lambda image: image.heads == 0,
        "stored in grey, read as RGB": lambda image: image.colours == "grey",
        "stored in CMYK, read as RGB": lambda image: image.colours == "CMYK",
        "with an EXIF turn, which training does not follow": lambda image: image.turned,
    }
    for what, holds in kinds.items():
        if names := [f"{image.split}/{image.name}" for image in images if holds(image)]:
            yield f"{_number(len(names), 'image')} {what}: {_listed(names)}"


def _equation(group: Sequence[ImageFacts]) -> str:
    """train/a = test/b, with the counts where the annotations differ in them."""
    differ = len({image.heads for image in group}) > 1
    return " = ".join(f"{i.split}/{i.name}" + (f" ({_number(i.heads, 'head')})" if differ else "") for i in group)


def _listed(names: Sequence[str], between: str = ", ") -> str:
    more = [f"and {len(names) - MOST_LISTED:,} more"] if len(names) > MOST_LISTED else []
    return between.join([*names[:MOST_LISTED], *more])


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
