"""What a counter was trained on, as its package records it, and which photos are unlike that.

A photo is unlike the training data if its size, its density of heads or its appearance lies far outside theirs. The
appearance is seven statistics of the pixels; its distance from the training images' mean takes their covariance into
account (Mahalanobis).

Shape legend: H W image, S strips of 8 rows, N images, F = 7 features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from crowdray.data.decoding import decode_image
from crowdray.data.shards import Dataset
from crowdray.documents import parse_as

TRAINING_DATA = "training_data"
"""Field of the package's metadata."""

FEATURES = ("brightness", "contrast", "saturation", "colour cast", "sharpness", "texture", "coarse texture")
"""Statistics of the pixels that describe a photo's appearance."""

_FLOORS = np.array([4, 2, 2, 2, 0.05, 0.05, 0.05])
"""Standard deviation that is added to each feature's: images of one camera hardly differ."""
_MIN_LIMIT, _MARGIN = 4.0, 1.1
"""The limit of the distance is the largest one of a training image times this margin, and at least `_MIN_LIMIT`."""
_MAX_IMAGES = 500
"""Training images whose appearance is measured, evenly spaced."""
_STRIP, _MAX_PIXELS = 8, 2**16
"""Rows of a strip, and pixels per image that are measured."""
_SIZE_FACTOR, _DENSITY_FACTOR = 2.25, 2.0
"""Factors by which a photo's pixels and density may lie outside those of the training images."""


@dataclass(frozen=True)
class Range:
    """Smallest, median and largest value."""

    min: float
    median: float
    max: float

    @classmethod
    def of(cls, values: ArrayLike) -> Self:
        """Range of some values, at least one."""
        return cls(*(float(value) for value in np.quantile(np.asarray(values, dtype=np.float64), (0, 0.5, 1))))

    def contains(self, value: float, factor: float) -> bool:
        """Whether a value lies inside, or outside by less than a factor."""
        return self.min / factor <= value <= self.max * factor

    def __str__(self) -> str:
        return f"{self.min:,.4g}" if self.min == self.max else f"{self.min:,.4g} to {self.max:,.4g}"


@dataclass(frozen=True)
class Appearance:
    """Distribution of the features of training images."""

    mean: tuple[float, ...]
    """Mean of each of FEATURES."""
    precision: tuple[tuple[float, ...], ...]
    """Inverse of their covariance."""
    limit: float
    """Largest distance of a photo that looks like the training images."""

    def __post_init__(self) -> None:
        lengths = {len(FEATURES), len(self.mean), len(self.precision), *map(len, self.precision)}
        if lengths != {len(FEATURES)} or not np.isfinite([*self.mean, *np.ravel(self.precision), self.limit]).all():
            raise ValueError(f"the appearance is not {len(FEATURES)} finite means and their precision")

    @classmethod
    def of(cls, features: NDArray[np.float64]) -> Self:
        """Distribution of features (N, F)."""
        mean = features.mean(axis=0)
        centred = features - mean
        precision = np.linalg.inv(centred.T @ centred / len(features) + np.diag(_FLOORS**2))
        largest = float(np.sqrt(np.einsum("ni,ij,nj->n", centred, precision, centred).max()))
        limit = max(_MIN_LIMIT, _MARGIN * largest)
        return cls(tuple(mean.tolist()), tuple(map(tuple, precision.tolist())), limit)

    def distance(self, image: NDArray[np.uint8]) -> tuple[float, str]:
        """Distance of an image (H, W, 3) from the mean, and the feature that contributes most to it."""
        offset = image_features(image) - np.array(self.mean)
        parts = offset * (np.array(self.precision) @ offset)
        return float(np.sqrt(max(0.0, parts.sum()))), FEATURES[int(parts.argmax())]


@dataclass(frozen=True)
class TrainingData:
    """The images that a counter was trained on."""

    dataset: str
    """Name of the dataset, such as mall."""
    rendered: bool
    """Whether its images are renderings instead of photos."""
    images: int
    """Number of images, those for validation included."""
    total_heads: int
    """Number of heads."""
    heads: Range
    """Heads per image."""
    width: Range
    """Width of an image in pixels."""
    height: Range
    """Height in pixels."""
    pixels: Range
    """Width times height."""
    density: Range
    """Heads per million pixels of an image."""
    appearance: Appearance
    """What the images look like."""

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> Self | None:
        """Return the record in a package's metadata; None for packages of previous versions.

        Raises:
            ValueError: It is damaged.
        """
        content = metadata.get(TRAINING_DATA)
        return None if content is None else parse_as(cls, content)

    def __str__(self) -> str:
        kind = "rendered scenes" if self.rendered else "photos"
        return f"{self.images:,} {kind} of {self.dataset}, {self.sizes} pixels, {self.heads} heads each"

    @property
    def sizes(self) -> str:
        """Sizes of the images: "320x240", or "400x300 to 1024x768"."""
        small, large = ((f"{getattr(self.width, end):.0f}x{getattr(self.height, end):.0f}") for end in ("min", "max"))
        return small if small == large else f"{small} to {large}"

    def differences(self, image: NDArray[np.uint8], count: float) -> list[str]:
        """Describe in what a photo (H, W, 3), upright, lies far outside the training data; empty if in nothing.

        Args:
            image: uint8 RGB.
            count: Its predicted number of heads.
        """
        height, width = image.shape[:2]
        found = []
        if not self.pixels.contains(height * width, _SIZE_FACTOR):
            found.append(f"it has {width}x{height} pixels, training images have {self.sizes}")
        density = count / (height * width / 1e6)
        if not self.density.contains(density, _DENSITY_FACTOR):
            found.append(f"it has {density:,.0f} heads per million pixels, training images have {self.density}")
        distance, feature = self.appearance.distance(image)
        if distance > self.appearance.limit:
            found.append(
                f"it looks different from training images, mainly in {feature} "
                f"(distance {distance:.1f}, limit {self.appearance.limit:.1f})"
            )
        return found


def describe_training_data(dataset: Dataset, rows: NDArray[np.int64]) -> TrainingData:
    """Describe rows of the training split; decodes up to 500 of its images."""
    chosen = np.isin(dataset.rows("train"), rows)
    heads, (height, width) = dataset.counts("train")[chosen], dataset.sizes("train")[chosen].T
    measured = rows[np.linspace(0, len(rows) - 1, min(len(rows), _MAX_IMAGES)).round().astype(int)]
    features = [image_features(decode_image(dataset.sample(int(row)).image)) for row in measured]
    return TrainingData(
        dataset=dataset.index.name,
        rendered=dataset.index.name == "synthetic",
        images=len(rows),
        total_heads=int(heads.sum()),
        heads=Range.of(heads),
        width=Range.of(width),
        height=Range.of(height),
        pixels=Range.of(height * width),
        density=Range.of(heads / (height * width / 1e6)),
        appearance=Appearance.of(np.array(features)),
    )


def image_features(image: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Return the F features of an image (H, W, 3), measured in evenly spaced strips of its rows."""
    height, width = image.shape[:2]
    if height < _STRIP or width < _STRIP:
        image = np.pad(image, ((0, max(0, _STRIP - height)), (0, max(0, _STRIP - width)), (0, 0)), mode="edge")
        height, width = image.shape[:2]
    number = max(1, min(height // _STRIP, _MAX_PIXELS // (_STRIP * width)))
    first = np.linspace(0, height - _STRIP, number).round().astype(int)
    strips = image[first[:, None] + np.arange(_STRIP)]  # (S, 8, W, 3)
    red, green, blue = (strips[..., channel].astype(np.float32) for channel in range(3))  # reducing axis 3 is slow
    grey = (red + green + blue) / 3
    brightest, darkest = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    features = [grey.mean(), grey.std(), (brightest - darkest).mean(), (red - blue).mean()]
    for _ in range(3):  # mean gradients at one, two and four pixels
        gradient = (np.abs(np.diff(grey, axis=1)).mean() + np.abs(np.diff(grey, axis=2)).mean()) / 2
        features.append(np.log(gradient + 0.1))
        grey = grey[:, :, : grey.shape[2] // 2 * 2]
        grey = grey.reshape(len(grey), grey.shape[1] // 2, 2, grey.shape[2] // 2, 2).mean(axis=(2, 4))
    return np.array(features, dtype=np.float64)
