"""Supervisely's JSON: one file per image, ann/NAME.json for img/NAME, where NAME includes the image's suffix.

Coordinates are pixel indices from 0, and the last row and column belong to a rectangle; base 0.5 is for coordinates
with fractions, which Supervisely calls subpixel precision (github.com/supervisely/supervisely: geometry/rectangle.py).
"""

from typing import Annotated, Any

from pydantic import BaseModel, Field

from crowdray.datasets.sources.annotations.annotation import ImageAnnotation, known_size
from crowdray.datasets.sources.annotations.base import AnnotatedFolder
from crowdray.datasets.sources.annotations.json_reader import Number, Point, Text, location, read_json, validate
from crowdray.datasets.sources.annotations.shapes import box
from crowdray.errors import DataError

SHAPES = {"point": "points", "rectangle": "box", "polygon": "polygon"}
"""Our kinds of shapes by Supervisely's; others keep their name."""


class Size(BaseModel):
    """Size of the image."""

    height: Number
    width: Number


class Points(BaseModel):
    """Corners of a shape."""

    exterior: list[Point]


class Figure(BaseModel):
    """One shape; some kinds, such as bitmaps, have no points."""

    geometry: Text = Field(validation_alias="geometryType")
    label: str = Field("", validation_alias="classTitle")
    points: Points | None = None


class File(BaseModel):
    """The parts of a file that are read."""

    size: Size
    objects: list[Figure]


class Supervisely(AnnotatedFolder):
    """Points, rectangles and polygons of a project; the project's own files are ignored."""

    endings = (".json",)
    per_image = True

    def __init__(
        self,
        source: str,
        *,
        base: Annotated[float, "coordinate of the first pixel's centre; 0.5 for subpixel coordinates"] = 0.0,
        **options: Any,
    ) -> None:
        self._shift = 0.5 - base
        super().__init__(source, **options)

    def _read(self, uri: str) -> list[ImageAnnotation]:
        image = self._annotation_named_after(uri)
        with image.capture_error():
            content = validate(File, read_json(uri), uri)
            image.size = known_size(content.size.height, content.size.width)
            for index, figure in enumerate(content.objects):
                where = location(uri, "objects", index)
                kind = SHAPES.get(figure.geometry, figure.geometry)
                corners = figure.points.exterior if figure.points else []
                if kind == "box":
                    if len(corners) != 2:
                        raise DataError(f"{where} has {len(corners)} points, expected 2; export it again")
                    (left, right), (top, bottom) = (sorted(axis) for axis in zip(*corners, strict=True))
                    last = 2 * self._shift
                    corners = box(left, top, right - left + last, bottom - top + last)
                else:
                    corners = [(x + self._shift, y + self._shift) for x, y in corners]
                image.add_shape(self._rules, kind, figure.label, corners, where)
        return [image]
