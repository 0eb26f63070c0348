"""The annotation of one image and the rules, common to all formats, by which shapes are heads.

Coordinates are continuous pixels (x, y); the centre of the first pixel is (0.5, 0.5).
"""

import contextlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from crowdray.data.sample import MAX_DISTANCE
from crowdray.datasets.sources.annotations.shapes import Corner
from crowdray.datasets.sources.region import MAX_VERTICES, polygon_mask
from crowdray.errors import DataError

ROI_LABEL = "roi"
"""Label, in any case, of polygons inside which heads are annotated."""

WITH_EXTENT = ("box", "circle", "ellipse", "polygon")
"""Kinds of shapes around a person, of which `--boxes` counts one point."""


@dataclass(frozen=True, slots=True)
class HeadRules:
    """Which shapes count as heads."""

    labels: tuple[str, ...] = ()
    """Labels that mark heads; other shapes are ignored. Empty: every shape is a head."""
    boxes: str | None = None
    """Point that is the head: `centre` of the upright box around a shape, or middle of its `top`; None rejects them."""

    def accepts(self, label: str) -> bool:
        """Return whether shapes with this label are heads."""
        return not self.labels or label in self.labels


@dataclass(slots=True)
class ImageAnnotation:
    """Everything that one annotation file says about one image."""

    uri: str
    """URI of the annotation file."""
    location: str
    """Position of the image's entry in the file, for messages."""
    image: str
    """Path or name of the image as the file writes it."""
    alias: str = ""
    """Alternative name of the image."""
    path: str = ""
    """Path of the image below the dataset's root; "" if it is missing."""
    embedded: bool = False
    """Whether the file contains the image itself."""
    relative: bool = False
    """Whether coordinates are fractions of the image's width and height."""
    video_frame: bool = False
    """Whether it is a frame of a video, which may have been left out when images were extracted."""
    size: tuple[int, int] | None = None
    """Size (H, W) of the image when it was annotated; None if unknown."""
    split: str = ""
    """train, val or test; "" if the file does not say."""
    scene: str = ""
    """Camera or scene; "" if the file does not say."""
    heads: list[Corner] = field(default_factory=list)
    """Annotated heads."""
    roi_polygons: list[list[Corner]] = field(default_factory=list)
    """Polygons inside which heads are annotated; empty means the whole image."""
    labels: Counter[str] = field(default_factory=Counter)
    """Number of heads per label."""
    ignored: Counter[str] = field(default_factory=Counter)
    """Number of ignored shapes per description."""
    skip_reason: str = ""
    """Description of images that are skipped although nothing is wrong, such as unfinished ones."""
    problem: str = ""
    """What is wrong with the annotation or its image; raised when the image is loaded."""

    def add_shape(self, rules: HeadRules, kind: str, label: str, corners: Sequence[Corner], location: str) -> None:
        """Add a shape to the heads, the regions of interest or the ignored shapes.

        Each of `points` is a head, and with `--boxes` one point of a shape in WITH_EXTENT, whose corners or those of
        the box around it are given; a `polygon` may be a region.

        Raises:
            DataError: for coordinates far outside the image, or a shape that `rules` accept but that is not a point.
        """
        if kind == "points" and not corners:
            raise DataError(f"{location} has no coordinates; correct it")
        for x, y in corners:
            if not (abs(x) <= MAX_DISTANCE and abs(y) <= MAX_DISTANCE):
                raise DataError(f"{location}: ({x:g}, {y:g}) is far outside any image; correct it")
        if kind == "polygon" and label.lower() == ROI_LABEL:
            if not 3 <= len(corners) <= MAX_VERTICES:
                raise DataError(
                    f"{location}: a region of interest has 3 to {MAX_VERTICES} corners, not {len(corners)}; redraw it"
                )
            self.roi_polygons.append(list(corners))
            return
        if not rules.accepts(label):
            self.ignored[f"shapes labelled {label!r}"] += 1
            return
        if kind in WITH_EXTENT and rules.boxes and corners:
            (left, *_, right), (top, *_, bottom) = (sorted(axis) for axis in zip(*corners, corners[0], strict=True))
            corners = [((left + right) / 2, top if rules.boxes == "top" else (top + bottom) / 2)]
        elif kind != "points":
            fix = "use --boxes centre or --boxes top to count it, or select" if kind in WITH_EXTENT else "select"
            raise DataError(
                f"{location}: a {kind} labelled {label!r} is not a point; {fix} the labels of heads with --label"
            )
        self.heads.extend(corners)
        self.labels[label] += len(corners)

    @contextlib.contextmanager
    def capture_error(self) -> Iterator[None]:
        """Store the block's first DataError as the image's problem, so that reading continues with other images."""
        try:
            yield
        except DataError as error:
            self.problem = self.problem or str(error)


def known_size(height: float | None, width: float | None) -> tuple[int, int] | None:
    """Return an image's size (H, W); None if it is missing or, as some tools write it, 0."""
    return (round(height), round(width)) if height and width and min(height, width) >= 1 else None


def parse_number(text: str, location: str) -> float:
    """Parse a finite number; DataError with the text and its location."""
    with contextlib.suppress(ValueError):
        if "_" not in text and math.isfinite(value := float(text)):  # Python would read 1_0 as ten
            return value
    raise DataError(f"{location}: {text[:60]!r} is not a number; correct it")


def roi_mask(polygons: Sequence[Sequence[Corner]], height: int, width: int) -> NDArray[np.bool_]:
    """Return the mask (H, W) of the pixels whose centres lie in any of the polygons."""
    masks = [polygon_mask(x, y, height, width) for x, y in (np.transpose(corners) for corners in polygons)]
    mask: NDArray[np.bool_] = np.logical_or.reduce(masks)
    return mask
