"""Interval around a predicted count that contains the true one with a known frequency (split conformal prediction)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import ArrayLike

from crowdray.documents import parse_as

INTERVAL = "interval"
"""Field of the package's metadata."""
LEVEL = 0.95
"""Fraction of photos whose true count lies inside their interval."""


@dataclass(frozen=True)
class CountInterval:
    """Half width of the interval as a multiple of the root of the count.

    Of photos like those it was measured on, LEVEL have their true count inside, whatever the distribution of errors.
    """

    scale: float
    """Half width of the interval around a count of 1; proportional to the root of larger counts."""
    images: int
    """Number of images that it was measured on, which were not used in training."""

    def __post_init__(self) -> None:
        if not 0 <= self.scale < math.inf:
            raise ValueError(f"the scale of the interval is {self.scale}")

    @classmethod
    def of(cls, truth: ArrayLike, predicted: ArrayLike) -> Self | None:
        """Interval from true and predicted counts; None if they are too few for LEVEL."""
        predicted = np.asarray(predicted, dtype=np.float64)
        errors = np.sort(np.abs(predicted - np.asarray(truth)) / np.sqrt(np.maximum(predicted, 1)))
        rank = math.ceil((len(errors) + 1) * LEVEL)
        return cls(float(errors[rank - 1]), len(errors)) if rank <= len(errors) else None

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, object]) -> Self | None:
        """Return the record in a package's metadata; None if it has none. Raises ValueError if it is damaged."""
        content = metadata.get(INTERVAL)
        return None if content is None else parse_as(cls, content)

    def around(self, count: float) -> tuple[float, float]:
        """Lower and upper end of the interval of a count."""
        half = self.scale * math.sqrt(max(count, 1))
        return max(0.0, count - half), count + half
