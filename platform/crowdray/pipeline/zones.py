"""Zones of a photo: polygons in which people are counted, and their area on the ground.

A zones file is a GeoJSON FeatureCollection of polygons in pixels (x to the right, y down, of the upright photo), with
two fields of our own:

    {"type": "FeatureCollection",
     "size": [640, 480],                                  width and height of the photos; optional
     "homography": [[...], [...], [...]],                 3x3, pixels to metres on the ground; optional
     "features": [{"type": "Feature", "properties": {"name": "door"},
                   "geometry": {"type": "Polygon", "coordinates": [[[10, 20], [90, 20], [90, 80], [10, 20]]]}}]}

Shape legend: h w cells of the density, V vertices.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from crowdray import storage
from crowdray.documents import parse_as, parse_json
from crowdray.errors import DataError, UserError

_SAMPLES = 4
"""Points per cell and axis that decide how much of a cell lies in a zone."""

Point = tuple[float, float]
Ring = tuple[Point, ...]


@dataclass(frozen=True)
class _Polygon:
    type: Literal["Polygon"]
    coordinates: Annotated[tuple[Annotated[Ring, Field(min_length=3)], ...], Field(min_length=1)]


@dataclass(frozen=True)
class _Properties:
    name: str


@dataclass(frozen=True)
class _Feature:
    geometry: _Polygon
    properties: _Properties


@dataclass(frozen=True)
class _Collection:
    type: Literal["FeatureCollection"]
    features: Annotated[tuple[_Feature, ...], Field(min_length=1)]
    size: tuple[int, int] | None = None
    homography: tuple[tuple[float, float, float], tuple[float, float, float], tuple[float, float, float]] | None = None


@dataclass(frozen=True)
class Zone:
    """A polygon of a photo."""

    name: str
    rings: tuple[Ring, ...]
    """Its outline, and its holes if it has any, in pixels."""
    area: float | None
    """Square metres of ground; None without a homography."""

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the table: the count, and with a homography people per square metre."""
        count = f"zone {self.name}"
        return (count,) if self.area is None else (count, f"{count} per m2")


@dataclass(frozen=True)
class Zones:
    """The zones of all photos of one camera."""

    zones: tuple[Zone, ...]
    size: tuple[int, int] | None = None
    """Width and height of the photos; None for any."""

    @property
    def columns(self) -> list[str]:
        """Columns of the table."""
        return [column for zone in self.zones for column in zone.columns]

    def count(self, density: NDArray[np.float32], cell: int, size: tuple[int, int]) -> dict[str, float | None]:
        """Value of each column.

        Args:
            density: (h, w) heads per cell.
            cell: Side of a cell in pixels.
            size: Width and height of the photo.

        Raises:
            DataError: The zones are not for photos of this size.
        """
        width, height = size
        if self.size and self.size != size:
            raise DataError(f"the zones are for photos of {self.size[0]}x{self.size[1]} pixels; draw them again")
        values: dict[str, float | None] = {}
        for zone in self.zones:
            if any(not (-1 <= x <= width + 1 and -1 <= y <= height + 1) for ring in zone.rings for x, y in ring):
                raise DataError(f"zone {zone.name} extends beyond the photo of {width}x{height} pixels; draw it again")
            count = float((density * zone_cells(zone.rings, density.shape, cell)).sum(dtype=np.float64))
            values |= zip(zone.columns, (count, zone.area and count / zone.area), strict=False)
        return values


def read_zones(uri: str) -> Zones:
    """Read a zones file.

    Raises:
        UserError: It is damaged, or a zone cannot be used.
    """
    try:
        content = parse_as(_Collection, parse_json(storage.read_bytes(uri)))
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{uri} is not a zones file: {error}; write one as docs/predict.md shows") from error
    matrix = None if content.homography is None else np.array(content.homography)
    zones = []
    for feature in content.features:
        rings = feature.geometry.coordinates
        try:
            area = None if matrix is None else ground_area(rings, matrix)
        except ValueError as error:
            raise UserError(f"{uri}: zone {feature.properties.name!r} {error}") from error
        zones.append(Zone(feature.properties.name, rings, area))
    read = Zones(tuple(zones), content.size)
    if repeated := {name for name in read.columns if read.columns.count(name) > 1}:
        raise UserError(f"{uri} has two columns named {min(repeated)!r}; rename a zone")
    return read


@lru_cache(64)
def zone_cells(rings: tuple[Ring, ...], shape: tuple[int, int], cell: int) -> NDArray[np.float32]:
    """(h, w) fraction of each cell that lies inside an odd number of rings.

    Each cell is sampled at 4x4 points, and a point on an edge belongs to one side of it, so that zones that share edges
    neither overlap nor leave gaps.
    """
    rows, columns = (((np.arange(length * _SAMPLES)) + 0.5) * (cell / _SAMPLES) for length in shape)
    inside = np.zeros((len(rows), len(columns)), dtype=bool)
    for ring in rings:
        for start, end in zip(ring, (*ring[1:], ring[0]), strict=True):
            (x0, y0), (x1, y1) = sorted((start, end), key=lambda point: (point[1], point[0]))
            crossed = (y0 <= rows) & (rows < y1)
            if crossed.any():
                at = x0 + (rows[crossed] - y0) * ((x1 - x0) / (y1 - y0))
                inside[crossed] ^= columns >= at[:, None]
    height, width = shape
    covered: NDArray[np.float32] = inside.reshape(height, _SAMPLES, width, _SAMPLES).mean((1, 3), dtype=np.float32)
    return covered


def ground_area(rings: Sequence[Ring], homography: NDArray[np.float64]) -> float:
    """Area on the ground of an outline without its holes, in the square of the homography's unit.

    A homography maps lines to lines, so the area is that of the polygon of the mapped vertices.

    Raises:
        ValueError: The polygon reaches the horizon, or has no area.
    """
    areas = []
    for ring in rings:
        x, y, w = homography @ np.column_stack([np.array(ring), np.ones(len(ring))]).T  # (V,)
        if not (np.sign(w) == np.sign(w[0])).all() or (w == 0).any():
            raise ValueError("reaches the horizon of the homography; draw it on the ground in front of the camera")
        x, y = x / w, y / w
        areas.append(abs(float(x @ np.roll(y, -1) - y @ np.roll(x, -1))) / 2)
    area = areas[0] - sum(areas[1:])
    if not area > 0:
        raise ValueError("has no area on the ground; correct its corners or the homography")
    return area
