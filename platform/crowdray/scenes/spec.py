"""What is asked of the renderer, what it gives back, and where its randomness comes from."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from crowdray.errors import UserError

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

MAX_DEPTH = 120.0
"""Depth in metres at which the world ends: sky and everything beyond it."""


@dataclass(frozen=True)
class SceneSpec:
    """A family of synthetic pictures: the same spec and index give the same picture, bit for bit.

    Raises UserError naming every field that makes no sense.
    """

    seed: int = 0
    """Seed of everything: the places, the cameras, the people, the noise."""
    width: int = 320
    """Width of an image in pixels."""
    height: int = 240
    """Height of an image in pixels."""
    cameras: int = 8
    """Number of places, each with one fixed camera; image i is taken by camera i modulo this number."""
    min_people: int = 2
    """Fewest people placed, given room for them; fewer are annotated, as some are hidden or out of frame."""
    max_people: int = 600
    """Most people placed in the images of the busiest camera."""
    masked_share: float = 0.25
    """Share of the cameras whose ROI is a polygon smaller than the place: beyond it people are visible and
    not annotated, as in Mall. 0 means that nobody is ever visible outside the ROI."""
    sensor_noise: float = 1.0
    """Strength of the sensor's noise; 1 is a phone camera by day, 0 is none."""

    def __post_init__(self) -> None:
        problems = [
            f"{name} = {getattr(self, name)!r}: give a whole number from {low} to {high}"
            for name, low, high in (
                ("seed", 0, 2**63 - 1),
                ("width", 64, 4096),
                ("height", 64, 4096),
                ("cameras", 1, 1000),
                ("min_people", 0, 2000),
                ("max_people", 1, 2000),
            )
            if not _is_whole(getattr(self, name)) or not low <= getattr(self, name) <= high
        ]
        problems += [
            f"{name} = {getattr(self, name)!r}: give a number from 0 to {high}"
            for name, high in (("masked_share", 1.0), ("sensor_noise", 10.0))
            if not _is_number(getattr(self, name)) or not 0 <= getattr(self, name) <= high
        ]
        if not problems and self.min_people > self.max_people:
            problems.append(
                f"min_people = {self.min_people} is more than max_people = {self.max_people}: "
                f"lower min_people or raise max_people"
            )
        if problems:
            raise UserError("synthetic scene: " + "; ".join(problems))

    def camera_of(self, index: int) -> int:
        """The number of the camera that takes image `index`."""
        return index % self.cameras


@dataclass(frozen=True, eq=False, slots=True)
class RenderedScene:
    """One picture with everything that is known about it."""

    image: npt.NDArray[np.uint8]
    """(H, W, 3) RGB."""
    points: Floats
    """(N, 2) centres of the annotated heads in continuous pixels (x, y), the first pixel's centre at 0.5."""
    depth: Floats
    """(H, W) metres to what the pixel shows, along the optical axis (not the ray), at most MAX_DEPTH."""
    roi: Bools
    """(H, W) where people are annotated."""
    scene: str
    """Identity of the camera, e.g. `camera-03`."""


def _is_whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def generator(*keys: int) -> np.random.Generator:
    """The random numbers that belong to these keys alone, whatever was drawn before."""
    return np.random.default_rng(keys)


def linear(*srgb: int) -> Floats:
    """An sRGB colour of 0..255 as linear light, float32 (3,)."""
    return ((np.array(srgb, np.float64) / 255) ** 2.2).astype(np.float32)
