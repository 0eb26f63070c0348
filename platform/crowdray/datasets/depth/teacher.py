"""What a depth teacher is shown, and what it gives: the one seam between sources and teachers."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """What a teacher may look at: one image with all that its source knows of the scene."""

    image: bytes
    """The encoded image."""
    height: int
    """Image height H in pixels."""
    width: int
    """Image width W in pixels."""
    points: NDArray[Any]
    """(N, 2) heads as (x, y) in continuous pixels."""
    split: str = ""
    """The part of the dataset that the image belongs to."""
    name: str = ""
    """The image's name, unique in its split; stored maps are found by the two."""
    person_size: NDArray[Any] | None = None
    """(H, W) size of a person in pixels, any unit, from the dataset's perspective map."""
    own_depth: NDArray[Any] | None = None
    """(H, W) true depth, where the source knows it."""
    head_scale: float = 0.0
    """Fit of fit_head_scale over the whole camera or split; 0 when there is none."""
    fixed_camera: bool = False
    """Whether head_scale holds for this very view, so that the image's own heads need not be asked."""


class DepthTeacher(Protocol):
    """Gives the depth of a view, or None when it has none to give; picklable, so that any worker can ask it."""

    name: str
    """Name, version and, where a file or a folder teaches, hash and options: part of a dataset's identity, so a new
    method needs a new version."""
    per_image: ClassVar[bool] = False
    """Whether it looks at the image or its name, so that frames of one fixed camera differ in depth."""
    gpu: bool = False
    """Whether depth() needs a GPU."""

    def depth(self, view: View) -> NDArray[np.float32] | None:
        """Depth as a float32 map of the whole image, at its size or smaller, larger = farther, any scale."""
        ...
