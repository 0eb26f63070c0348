"""A look at every image of a source: what cannot be used, what is there twice, and how its heads are spread.

Images pass one at a time; what stays of each is a line of numbers, its name and its hash. Findings of slices add up to
those of the whole, whoever made them.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Self

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from scipy.spatial import cKDTree

from crowdray.data.orientation import exif_orientation
from crowdray.data.sample import Encoded, Sample, decode_depth, decode_roi, points_outside
from crowdray.datasets.sources import Item, Source
from crowdray.errors import UserError

SPACING_EDGES: NDArray[np.float64] = 2.0 ** (np.arange(-8, 105) / 8)
"""(113,) edges in pixels of the histogram of spacings: eight bins to the octave, from half a pixel to 8192."""

_GREY_MODES = ("1", "L", "LA", "I", "I;16", "F")


@dataclass(frozen=True, slots=True)
class ImageFacts:
    """What stays of one image that can be used."""

    split: str
    """The part of the dataset it belongs to."""
    name: str
    """Its name there."""
    sha256: str
    """Hash of its bytes."""
    height: int
    """Height in pixels."""
    width: int
    """Width in pixels."""
    colours: str
    """How its file holds colour: colour, grey or CMYK."""
    turned: bool
    """Whether its EXIF tag asks a viewer to turn it, which training does not."""
    heads: int
    """Annotated heads."""
    outside: int
    """Heads outside the image."""
    crowded: int
    """Heads on a pixel that another head has already."""
    roi: float | None
    """Share of its pixels in the region of interest; None without one."""
    outside_roi: int
    """Heads outside the region of interest."""
    depth: tuple[float, float] | None
    """Least and greatest depth, in [0, 1]; None without depth."""


@dataclass(frozen=True, slots=True)
class Unusable:
    """An image that cannot be used."""

    split: str
    """The part of the dataset it belongs to."""
    name: str
    """Its name there."""
    reason: str
    """What is wrong with it, with the mend."""


@dataclass(frozen=True, eq=False)
class DatasetStats:
    """What was found in some items of a source, in their order."""

    images: list[ImageFacts] = field(default_factory=list)
    """Those that can be used."""
    unusable: list[Unusable] = field(default_factory=list)
    """Those that cannot."""
    spacing: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """Per split in order of appearance: (112,) heads by the pixels to their nearest neighbour, see SPACING_EDGES."""

    def __add__(self, following: Self) -> "DatasetStats":
        """Findings in these items and in those that follow them; associative, with Findings() as its zero."""
        spacing = dict(self.spacing)
        for split, histogram in following.spacing.items():
            spacing[split] = spacing.get(split, 0) + histogram
        return DatasetStats(self.images + following.images, self.unusable + following.unusable, spacing)


def inspect_items(source: Source, items: Sequence[Item]) -> DatasetStats:
    """Load each item and look at it; one that cannot be used is noted with its reason, and the rest goes on."""
    found = DatasetStats()
    for item in items:
        histogram = found.spacing.setdefault(item.split, np.zeros(len(SPACING_EDGES) - 1, dtype=np.int64))
        try:
            sample = source.load(item)
        except UserError as error:
            found.unusable.append(Unusable(item.split, item.name, str(error)))
            continue
        found.images.append(image_facts(sample))
        histogram += spacing_histogram(sample.points)
    return found


def image_facts(sample: Sample) -> ImageFacts:
    """What stays of a sample; its image is not decoded again."""
    colours, turned = _said_by_its_head(sample.image)
    pixels = {(x, y) for x, y in np.floor(sample.points).tolist()}
    roi, outside_roi = None, 0
    if sample.roi is not None:
        roi = _roi_share(bytes(sample.roi))
        outside_roi = int((~in_roi(sample.points, decode_roi(sample.roi), sample.height, sample.width)).sum())
    return ImageFacts(
        split=sample.split,
        name=sample.name,
        sha256=sample.sha256,
        height=sample.height,
        width=sample.width,
        colours=colours,
        turned=turned,
        heads=len(sample.points),
        outside=points_outside(sample.points, sample.height, sample.width),
        crowded=len(sample.points) - len(pixels),
        roi=roi,
        outside_roi=outside_roi,
        depth=None if sample.depth is None else _depth_range(bytes(sample.depth)),
    )


def in_roi(points: NDArray[np.float32], mask: NDArray[np.bool_], height: int, width: int) -> NDArray[np.bool_]:
    """(N,) whether the pixel of each of (N, 2) points, the nearest one for those outside the image, is in a mask."""
    rows, columns = mask.shape
    column = np.clip(points[:, 0] * (columns / width), 0, columns - 1).astype(np.int64)
    row = np.clip(points[:, 1] * (rows / height), 0, rows - 1).astype(np.int64)
    inside: NDArray[np.bool_] = mask[row, column]
    return inside


def nearest_neighbours(points: NDArray[Any]) -> NDArray[np.float64]:
    """(N,) pixels from each of (N, 2) points to its nearest other one; (0,) where there is no other."""
    if len(points) < 2:
        return np.zeros(0)
    distances: NDArray[np.float64] = cKDTree(points).query(points, k=2)[0][:, 1]
    return distances


def spacing_histogram(points: NDArray[Any]) -> NDArray[np.int64]:
    """(112,) heads by the distance to their nearest neighbour; what is beyond the edges is in the last bin there."""
    distances = nearest_neighbours(points).clip(SPACING_EDGES[0], SPACING_EDGES[-1])
    return np.histogram(distances, SPACING_EDGES)[0].astype(np.int64)


def evenly_by_count(images: Sequence[ImageFacts], number: int) -> list[ImageFacts]:
    """At most `number` images at evenly spaced quantiles of their counts, from the sparsest to the densest."""
    ranked = sorted(images, key=lambda image: image.heads)
    places = np.linspace(0, len(ranked) - 1, min(number, len(ranked))).round().astype(int)
    return [ranked[place] for place in places]


def _said_by_its_head(image: Encoded) -> tuple[str, bool]:
    """How an image file holds colour, and whether it asks to be turned, without decoding it."""
    try:
        with Image.open(io.BytesIO(image)) as opened:
            mode = opened.mode
            # Of a PNG all pixels would be decoded for it.
            turned = opened.format in ("JPEG", "MPO") and exif_orientation(opened) != 1
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # no head for Pillow, though pixels were
        mode = simplejpeg.decode_jpeg_header(image)[2] if simplejpeg.is_jpeg(image) else ""
        mode, turned = {"Gray": "L", "YCCK": "CMYK"}.get(mode, mode), False
    return "grey" if mode in _GREY_MODES else "CMYK" if mode == "CMYK" else "colour", turned


# Images of one scene often have one mask and one depth.
@lru_cache(maxsize=8)
def _roi_share(content: bytes) -> float:
    return float(decode_roi(content).mean())


@lru_cache(maxsize=8)
def _depth_range(content: bytes) -> tuple[float, float]:
    depth = decode_depth(content)
    return float(depth.min()), float(depth.max())
