"""Statistics of a source's images: sizes, head counts, spacing, hashes and unusable items.

Conversion and `--check` load items through the same function here. One image is in memory at a time; what stays of each
is a row of numbers, its name and its hash. Statistics of slices add up to those of the whole.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from crowdray import storage
from crowdray.data.decoding import orientation, read_header
from crowdray.data.sample import Sample, decode_depth, decode_roi, points_outside
from crowdray.datasets.sources import Item, Source
from crowdray.errors import DataError, UserError

MAX_LISTED = 20
"""Number of problems or names that a message lists before it only counts the rest."""


@dataclass(frozen=True, slots=True)
class ImageStats:
    """Statistics of one usable image."""

    split: str
    name: str
    sha256: str
    """Hash of the encoded image in the source."""
    height: int
    width: int
    colours: str
    """Colour model of the file: colour, grey or CMYK."""
    exif_rotated: bool
    """Whether its EXIF tag asks viewers to turn it, which training ignores."""
    heads: int
    outside: int
    """Number of heads outside the image."""
    overlapping: int
    """Number of heads on a pixel that already has one."""
    roi: float | None
    """Fraction of pixels inside the region of interest; None without one."""
    outside_roi: int
    """Number of heads outside the region of interest."""
    depth: tuple[float, float] | None
    """Minimum and maximum depth, in [0, 1]; None without depth."""
    spacing: float | None
    """Median distance in pixels from a head to its nearest neighbour; None for fewer than two heads."""


@dataclass(frozen=True, slots=True)
class UnusableItem:
    """An item that cannot be used, and the reason."""

    split: str
    name: str
    file: str
    """URI of its image, or of its annotation if the image is missing."""
    reason: str
    """What is wrong with it, and how to fix it."""

    def __str__(self) -> str:
        return f"{self.split}/{self.name}: {self.reason}"


@dataclass(frozen=True, eq=False)
class DatasetStats:
    """Statistics of some items of a source, in their order."""

    images: list[ImageStats] = field(default_factory=list)
    unusable: list[UnusableItem] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    """Files that do not exist for the process that loaded the items."""

    def __add__(self, other: Self) -> "DatasetStats":
        """Concatenate the statistics of successive items; associative, with DatasetStats() as zero."""
        images, unusable = self.images + other.images, self.unusable + other.unusable
        return DatasetStats(images, unusable, self.missing + other.missing)


def load_usable(source: Source, items: Sequence[Item], stats: DatasetStats) -> Iterator[Sample]:
    """Load items and yield the samples that can be used; `stats` collects the statistics of all items.

    A failure of storage is not a fault of the item: its UserError is raised.
    """
    for item in items:
        try:
            sample = source.load(item)
        except UserError as error:
            missing = [uri for uri in (item.image, item.annotation) if uri and not storage.exists(uri)]
            if not missing and not isinstance(error, DataError):
                raise
            stats.missing.extend(missing)
            stats.unusable.append(UnusableItem(item.split, item.name, item.image or item.annotation, str(error)))
            continue
        stats.images.append(image_stats(sample))
        yield sample


def compute_stats(source: Source, items: Sequence[Item]) -> DatasetStats:
    """Load each item and return the statistics of all."""
    stats = DatasetStats()
    for _ in load_usable(source, items, stats):
        pass
    return stats


def image_stats(sample: Sample) -> ImageStats:
    """Statistics of one sample, without decoding its image again."""
    header = read_header(sample.image)
    # Reading the tag of a PNG would decode all its pixels.
    exif_rotated = header.format in ("JPEG", "MPO") and orientation(sample.image) != 1
    pixels = {(x, y) for x, y in np.floor(sample.points).tolist()}
    nearest = nearest_neighbours(sample.points)
    roi, depth, outside_roi = None, None, 0
    if sample.roi is not None:
        mask = decode_roi(bytes(sample.roi))
        roi, outside_roi = float(mask.mean()), int((~in_roi(sample.points, mask, sample.height, sample.width)).sum())
    if sample.depth is not None:
        values = decode_depth(bytes(sample.depth))
        depth = float(values.min()), float(values.max())
    return ImageStats(
        split=sample.split,
        name=sample.name,
        sha256=sample.source_sha256 or sample.sha256,
        height=sample.height,
        width=sample.width,
        colours=header.colours,
        exif_rotated=exif_rotated,
        heads=len(sample.points),
        outside=points_outside(sample.points, sample.height, sample.width),
        overlapping=len(sample.points) - len(pixels),
        roi=roi,
        outside_roi=outside_roi,
        depth=depth,
        spacing=float(np.median(nearest)) if len(nearest) else None,
    )


def in_roi(points: NDArray[np.float32], mask: NDArray[np.bool_], height: int, width: int) -> NDArray[np.bool_]:
    """(N,) whether each of (N, 2) points is inside a mask; clipped to the image first."""
    rows, columns = mask.shape
    column = np.clip(points[:, 0] * (columns / width), 0, columns - 1).astype(np.int64)
    row = np.clip(points[:, 1] * (rows / height), 0, rows - 1).astype(np.int64)
    inside: NDArray[np.bool_] = mask[row, column]
    return inside


def nearest_neighbours(points: NDArray[Any]) -> NDArray[np.float64]:
    """(N,) distance of each of (N, 2) points to its nearest neighbour; (0,) for fewer than two points."""
    if len(points) < 2:
        return np.zeros(0)
    distances: NDArray[np.float64] = cKDTree(points).query(points, k=2)[0][:, 1]
    return distances


def count_quantiles(images: Sequence[ImageStats], number: int) -> list[ImageStats]:
    """At most `number` images at evenly spaced quantiles of their head counts, sparsest first."""
    ranked = sorted(images, key=lambda image: image.heads)
    ranks = np.linspace(0, len(ranked) - 1, min(number, len(ranked))).round().astype(int)
    return [ranked[rank] for rank in ranks]
