"""Corners of the shapes that annotation tools draw, in continuous pixels."""

import math
from collections.abc import Iterable

Corner = tuple[float, float]


def box(x: float, y: float, width: float, height: float) -> list[Corner]:
    """Return the four corners of an upright box with a corner at (x, y)."""
    return [(x, y), (x + width, y), (x + width, y + height), (x, y + height)]


def rotate(corners: Iterable[Corner], degrees: float, pivot: Corner) -> list[Corner]:
    """Return corners rotated clockwise, as seen on the image, about a pivot."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    left, top = pivot
    return [(left + (x - left) * cos - (y - top) * sin, top + (x - left) * sin + (y - top) * cos) for x, y in corners]


def ellipse(x: float, y: float, radius_x: float, radius_y: float, degrees: float = 0.0) -> list[Corner]:
    """Return the corners of the upright box around an ellipse with its centre at (x, y), rotated clockwise."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    across, down = math.hypot(radius_x * cos, radius_y * sin), math.hypot(radius_x * sin, radius_y * cos)
    return box(x - across, y - down, 2 * across, 2 * down)
