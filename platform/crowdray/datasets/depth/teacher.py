"""The interface between sources and depth teachers."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from crowdray.data.sample import Sample


@dataclass(frozen=True, slots=True, kw_only=True)
class DepthInput:
    """One image with everything that its source knows about the scene."""

    sample: Sample
    """The image with its heads, without depth. Stored maps are found by split and name."""
    source_depth: NDArray[Any] | None = None
    """(H, W) depth, any unit, if the source knows it: exactly, or from a perspective map."""
    head_scale: float = 0.0
    """Result of fit_head_scale over the whole camera or split; 0 if unknown."""
    fixed_camera: bool = False
    """Whether head_scale is the fit of this camera, so that the image's own heads need no fit."""


class DepthTeacher(Protocol):
    """Computes the depth map of an image; picklable, so that any worker can use it."""

    name: str
    """Name, version, and for files their hash and options. It identifies the dataset, so a changed method needs a new
    version."""
    per_image: ClassVar[bool] = False
    """Whether depth depends on the image or its name, so that frames of one fixed camera differ."""
    gpu: bool = False
    """Whether depth() needs a GPU."""

    def depth(self, inputs: DepthInput) -> NDArray[np.float32] | None:
        """Float32 depth of the whole image, at its size or smaller; None for no map."""
        ...
