"""What annotations say of one image: heads, regions of interest, and what was left aside, by the same rules for
every format.

Coordinates are continuous pixels (x, y); the centre of the first pixel is (0.5, 0.5).
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from crowdray.data.sample import FARTHEST
from crowdray.datasets.sources.region import MOST_VERTICES, polygon_mask
from crowdray.errors import DataError

Corner = tuple[float, float]

REGION = "roi"
"""A polygon with this label, in any case, encloses where heads are annotated."""


@dataclass(frozen=True, slots=True)
class Rules:
    """Which shapes are heads."""

    labels: tuple[str, ...] = ()
    """Labels that mark heads; shapes with another one are left aside. None given: every shape is a head."""
    boxes: str | None = None
    """`centre` takes the centre of each box for a head; None refuses boxes."""

    def want(self, label: str) -> bool:
        """Whether shapes of this label are heads."""
        return not self.labels or label in self.labels


@dataclass(slots=True)
class ImageAnnotation:
    """All that one annotation file says of one image."""

    file: str
    """URI of the file."""
    place: str
    """Where in it the image is named, for messages."""
    image: str
    """What the file calls the image."""
    alias: str = ""
    """What else the image may be called."""
    embedded: bool = False
    """Whether the file holds the image itself."""
    size: tuple[int, int] | None = None
    """Height and width in pixels when it was annotated; None is unknown."""
    split: str = ""
    """train, val, test, or "" when the file does not say."""
    scene: str = ""
    """The camera or place, "" when the file does not say."""
    heads: list[Corner] = field(default_factory=list)
    """Annotated heads."""
    regions: list[list[Corner]] = field(default_factory=list)
    """Polygons inside which heads are annotated; none means everywhere."""
    labels: Counter[str] = field(default_factory=Counter)
    """How many heads have each label."""
    aside: Counter[str] = field(default_factory=Counter)
    """What was left aside, in words for a note, and how many of it."""
    left_out: str = ""
    """Why the image cannot be used though nothing is wrong, in words for a note."""
    problem: str = ""
    """What is wrong with its annotation, told when it is loaded."""

    def take(self, rules: Rules, kind: str, label: str, corners: Sequence[Corner], place: str) -> None:
        """Take a shape: each of `points`, or the centre of a `box`, is a head, a `polygon` may be a region.

        Raises DataError for a shape that should be a head by its label, but is none.
        """
        for x, y in corners:
            if not (abs(x) <= FARTHEST and abs(y) <= FARTHEST):
                raise DataError(f"{place}: ({x:g}, {y:g}) is no place in an image; correct it")
        if kind == "polygon" and label.lower() == REGION:
            if not 3 <= len(corners) <= MOST_VERTICES:
                raise DataError(
                    f"{place}: a region of interest has 3 to {MOST_VERTICES} corners, not {len(corners)}; draw it again"
                )
            self.regions.append(list(corners))
            return
        if not rules.want(label):
            self.aside[f"shapes labelled {label!r}"] += 1
            return
        if kind == "box" and rules.boxes == "centre":
            corners = [(sum(x for x, _ in corners) / len(corners), sum(y for _, y in corners) / len(corners))]
        elif kind != "points":
            mend = "take the centres of boxes with --boxes centre, or name" if kind == "box" else "name"
            raise DataError(
                f"{place}: a {kind} labelled {label!r} is no point; {mend} the labels of heads with --label"
            )
        self.heads.extend(corners)
        self.labels[label] += len(corners)

    @contextlib.contextmanager
    def checked(self) -> Iterator[None]:
        """Keep the first DataError of the block as the image's problem, so that the other images are read too."""
        try:
            yield
        except DataError as error:
            self.problem = self.problem or str(error)


def parse_number(text: str, place: str) -> float:
    """A finite number from text; a DataError that shows the text and its place."""
    with contextlib.suppress(ValueError):
        if "_" not in text and math.isfinite(value := float(text)):  # Python would read 1_0 as ten
            return value
    raise DataError(f"{place}: {text[:60]!r} is no number; correct it")


def any_region(regions: Sequence[Sequence[Corner]], height: int, width: int) -> NDArray[np.bool_]:
    """(H, W) mask of the pixels whose centres lie in any of the polygons."""
    masks = [polygon_mask(x, y, height, width) for x, y in (np.transpose(corners) for corners in regions)]
    mask: NDArray[np.bool_] = np.logical_or.reduce(masks)
    return mask
