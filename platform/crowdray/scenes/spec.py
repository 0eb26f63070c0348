"""Input and output of the renderer, and its random number generators."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from crowdray.errors import UserError

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

MAX_DEPTH = 120.0
"""Maximum depth in metres, also that of the sky."""


@dataclass(frozen=True)
class SceneSpec:
    """Parameters of a family of synthetic images; spec and index determine an image bit for bit.

    Raises UserError with every invalid field.
    """

    seed: int = 0
    """Random seed of scenes, cameras, people and noise."""
    width: int = 320
    """Width of an image in pixels."""
    height: int = 240
    """Height of an image in pixels."""
    cameras: int = 8
    """Number of scenes, each with a fixed camera; image i is taken by camera i modulo this number."""
    min_people: int = 2
    """Minimum number of people if space permits; fewer are annotated, as some are hidden or out of frame."""
    max_people: int = 600
    """Maximum number of people in the images of the busiest camera."""
    masked_fraction: float = 0.25
    """Fraction of the cameras whose ROI is a polygon, outside which people are visible but not annotated, as in Mall.
    With 0, no one is ever visible outside the ROI."""
    sensor_noise: float = 1.0
    """Strength of the sensor noise; 1 is a phone camera by day, 0 is none."""

    def __post_init__(self) -> None:
        limits: dict[str, tuple[float, float]] = {
            "seed": (0, 2**63 - 1),
            "width": (64, 4096),
            "height": (64, 4096),
            "cameras": (1, 1000),
            "min_people": (0, self.max_people),
            "max_people": (1, 2000),
            "masked_fraction": (0, 1),
            "sensor_noise": (0, 10),
        }
        problems = [
            f"{name} = {value}: use a value from {low} to {high}"
            for name, (low, high) in limits.items()
            if not low <= (value := getattr(self, name)) <= high
        ]
        if problems:
            raise UserError("synthetic scene: " + "; ".join(problems))


@dataclass(frozen=True, eq=False, slots=True)
class RenderedScene:
    """A rendered image with its ground truth."""

    image: npt.NDArray[np.uint8]
    """(H, W, 3) RGB."""
    points: Floats
    """(N, 2) centres of the annotated heads in continuous pixels (x, y), the first pixel's centre at 0.5."""
    depth: Floats
    """(H, W) depth in metres along the optical axis (not the ray), at most MAX_DEPTH."""
    roi: Bools
    """(H, W) region in which people are annotated."""
    scene: str
    """Identity of the camera, e.g. `camera-03`."""


def generator(*keys: int) -> np.random.Generator:
    """Return a random generator that depends on the keys alone."""
    return np.random.default_rng(keys)


def linear(*srgb: int) -> Floats:
    """Convert an sRGB colour in 0..255 to linear light, float32 (3,)."""
    return ((np.array(srgb, np.float64) / 255) ** 2.2).astype(np.float32)


def hex_colours(table: str) -> Floats:
    """Convert hexadecimal sRGB colours to linear light, float32 (N, 3)."""
    return np.stack([linear(*bytes.fromhex(colour)) for colour in table.split()])
