"""Validation of a source from its statistics: figures per split, duplicate images, problems and unusable items.

Items that cannot be used are left out of a dataset and listed in its quarantine file: one broken photo among thousands
must neither prevent a dataset nor vanish silently. Too many of them are an error.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from crowdray import storage
from crowdray.datasets.statistics import MAX_LISTED, DatasetStats, ImageStats, UnusableItem
from crowdray.documents import parse_json
from crowdray.errors import DataError, JobFailed, escaped

REPORT = "check.json"
"""File of the full report, in the report folder of `--check`."""

QUARANTINE = "quarantine.json"
"""File of unusable items, next to the index of a dataset."""

MAX_UNUSABLE = 0.5
"""Fraction of a split above which the layout is at fault rather than single items: nothing is published."""

_LINE = "\n  "


class InvalidDatasetError(JobFailed):
    """A source has problems although `--strict` was given."""


@dataclass(frozen=True, slots=True)
class Distribution:
    """Minimum, median, mean and maximum of one number over images."""

    min: float
    median: float
    mean: float
    max: float


@dataclass(frozen=True)
class SplitStats:
    """Statistics of one split."""

    images: int
    """Usable images."""
    unusable: int
    heads: int
    counts: Distribution | None
    """Heads per image; None, like all that follow, if the split has no usable image."""
    heights: Distribution | None
    widths: Distribution | None
    colours: dict[str, int]
    """Number of images per colour model of their files."""
    exif_rotated: int
    """Images whose EXIF tag asks viewers to turn them."""
    empty: int
    """Images without heads."""
    outside: int
    """Heads outside their image."""
    overlapping: int
    """Heads on a pixel that already has one."""
    with_roi: int
    """Images with a region of interest."""
    roi: float | None
    """Fraction of these images' pixels inside it."""
    outside_roi: int
    """Heads outside it."""
    with_depth: int
    """Images with depth."""
    depth: tuple[float, float] | None
    """Minimum and maximum depth over all of them."""
    spacing: Distribution | None
    """Median distance in pixels to the nearest other head, over images; None if no image has two heads."""


@dataclass(frozen=True)
class ValidationReport:
    """Statistics of a source, and what is wrong with it."""

    source: str
    depth_teacher: str
    splits: dict[str, SplitStats]
    images: list[ImageStats]
    """Every usable image, in the source's order."""
    unusable: list[UnusableItem]
    duplicates: list[list[ImageStats]]
    """Groups of images with the same bytes."""
    problems: list[str]
    """What must be fixed before results can be trusted."""
    notes: list[str]
    """What is worth knowing."""

    def raise_for_problems(self) -> None:
        """Raise InvalidDatasetError with one line that names each kind of problem, if there is any."""
        if self.problems:
            kinds = [problem.partition(_LINE)[0].rstrip(":") for problem in self.problems]
            raise InvalidDatasetError(f"{self.source} is not valid: {'; '.join(kinds)}")

    def raise_for_unusable(self, *, strict: bool = False) -> None:
        """Raise DataError if most of a split is unusable, or any item if `strict`."""
        worst = [
            f"{stats.unusable} of {stats.unusable + stats.images} in {split}"
            for split, stats in self.splits.items()
            if stats.unusable > MAX_UNUSABLE * (stats.unusable + stats.images)
        ]
        if worst:
            reason = f"{worst[0]}: --source is not {self.source}, or it is damaged"
        elif strict and self.unusable:
            reason = "fix them, or leave --strict out"
        else:
            return
        head = f"{self.source}: {_number(len(self.unusable), 'item')} cannot be used, nothing was published ({reason}):"
        raise DataError(f"{head}{_LINE}{_listed([str(item) for item in self.unusable], _LINE)}")

    def as_dict(self) -> dict[str, Any]:
        """The full report as JSON content."""
        duplicates = [[{"split": i.split, "name": i.name, "heads": i.heads} for i in g] for g in self.duplicates]
        return asdict(self) | {"valid": not self.problems, "duplicates": duplicates}


def write_quarantine(dest: str, items: Sequence[UnusableItem], digest: str) -> None:
    """Write the unusable items of the dataset with this digest."""
    content = {"digest": digest, "items": [asdict(item) for item in items]}
    storage.write_bytes(storage.join(dest, QUARANTINE), (json.dumps(content, indent=1) + "\n").encode())


def read_quarantine(dest: str, digest: str) -> list[UnusableItem]:
    """Items left out of the dataset with this digest; empty if the file is missing or of another dataset."""
    uri = storage.join(dest, QUARANTINE)
    if (text := storage.read_bytes_or_none(uri)) is None:
        return []
    try:
        content = parse_json(text)
        return [UnusableItem(**item) for item in content["items"] if content["digest"] == digest]
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{uri} is damaged ({type(error).__name__}: {error}); convert the dataset again") from error


def validate(source: str, depth_teacher: str, stats: DatasetStats, notes: Sequence[str] = ()) -> ValidationReport:
    """Validate a source by the statistics of all its items; `notes` are the source's own."""
    duplicates, unusable = _duplicates(stats.images), []
    every: list[ImageStats | UnusableItem] = [*stats.images, *stats.unusable]
    if reasons := [str(item) for item in stats.unusable]:
        unusable = [f"{_number(len(reasons), 'image')} cannot be used:\n  {_listed(reasons, _LINE)}"]
    return ValidationReport(
        source=source,
        depth_teacher=depth_teacher,
        splits={split: _split_stats(split, stats) for split in dict.fromkeys(one.split for one in every)},
        images=stats.images,
        unusable=stats.unusable,
        duplicates=duplicates,
        problems=[*unusable, *shared_problems(duplicates)],
        notes=list(dict.fromkeys([*notes, *_notes(stats.images, duplicates)])),
    )


def shared_problems(duplicates: Sequence[Sequence[ImageStats]]) -> Iterator[str]:
    """One message for each set of splits that share images."""
    shared: dict[tuple[str, ...], list[str]] = {}
    for group in duplicates:
        if len(splits := tuple(dict.fromkeys(image.split for image in group))) > 1:
            shared.setdefault(splits, []).append(_equation(group))
    for splits, equations in shared.items():
        what = f"{' and '.join(splits)} share {_number(len(equations), 'image')}"
        fix = "keep each image in one split, since a model is scored on images that it was trained on"
        yield f"{what}, {fix}:\n  {_listed(equations, _LINE)}"


def _split_stats(split: str, stats: DatasetStats) -> SplitStats:
    images = [image for image in stats.images if image.split == split]
    rois = [(image.roi, image.height * image.width) for image in images if image.roi is not None]
    depths = [image.depth for image in images if image.depth is not None]
    return SplitStats(
        images=len(images),
        unusable=sum(item.split == split for item in stats.unusable),
        heads=sum(image.heads for image in images),
        counts=_distribution([image.heads for image in images]),
        heights=_distribution([image.height for image in images]),
        widths=_distribution([image.width for image in images]),
        colours=dict(Counter(image.colours for image in images)),
        exif_rotated=sum(image.exif_rotated for image in images),
        empty=sum(image.heads == 0 for image in images),
        outside=sum(image.outside for image in images),
        overlapping=sum(image.overlapping for image in images),
        with_roi=len(rois),
        roi=sum(fraction * area for fraction, area in rois) / sum(area for _, area in rois) if rois else None,
        outside_roi=sum(image.outside_roi for image in images),
        with_depth=len(depths),
        depth=(min(nearest for nearest, _ in depths), max(farthest for _, farthest in depths)) if depths else None,
        spacing=_distribution([image.spacing for image in images if image.spacing is not None]),
    )


def _distribution(values: Sequence[float]) -> Distribution | None:
    mean = sum(values) / max(1, len(values))
    return Distribution(min(values), float(np.median(values)), mean, max(values)) if values else None


def _duplicates(images: Sequence[ImageStats]) -> list[list[ImageStats]]:
    groups: dict[str, list[ImageStats]] = {}
    for image in images:
        groups.setdefault(image.sha256, []).append(image)
    return [group for group in groups.values() if len(group) > 1]


def _notes(images: Sequence[ImageStats], duplicates: Sequence[Sequence[ImageStats]]) -> Iterator[str]:
    within = [_equation(group) for group in duplicates if len({image.split for image in group}) == 1]
    if within:
        yield f"{_number(len(within), 'image')} repeated within a split: {_listed(within, '; ')}"
    heads: dict[str, Callable[[ImageStats], int]] = {
        "outside the image": lambda image: image.outside,
        "on a pixel that already has one": lambda image: image.overlapping,
        "outside the region of interest": lambda image: image.outside_roi,
    }
    for where, number in heads.items():
        if counts := [(f"{image.split}/{image.name}", number(image)) for image in images if number(image)]:
            total, listed = sum(count for _, count in counts), _listed([f"{name} ({count})" for name, count in counts])
            yield f"{_number(total, 'head')} {where}, in {_number(len(counts), 'image')}: {listed}"
    kinds: dict[str, Callable[[ImageStats], bool]] = {
        "without heads": lambda image: image.heads == 0,
        "stored in grey, read as RGB": lambda image: image.colours == "grey",
        "stored in CMYK, read as RGB": lambda image: image.colours == "CMYK",
        "with an EXIF rotation, which training ignores": lambda image: image.exif_rotated,
    }
    for what, holds in kinds.items():
        if names := [f"{image.split}/{image.name}" for image in images if holds(image)]:
            yield f"{_number(len(names), 'image')} {what}: {_listed(names)}"


def _equation(group: Sequence[ImageStats]) -> str:
    """`train/a = test/b`, with head counts where they differ."""
    differ = len({image.heads for image in group}) > 1
    return " = ".join(f"{i.split}/{i.name}" + (f" ({_number(i.heads, 'head')})" if differ else "") for i in group)


def _listed(names: Sequence[str], separator: str = ", ") -> str:
    more = [f"and {len(names) - MAX_LISTED:,} more"] if len(names) > MAX_LISTED else []
    return separator.join([*map(escaped, names[:MAX_LISTED]), *more])


def _number(count: int, noun: str) -> str:
    return f"{count:,} {noun}{'s' * (count != 1)}"
