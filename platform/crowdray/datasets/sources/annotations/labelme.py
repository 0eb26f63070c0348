"""LabelMe's JSON: one file per image, anywhere below the folder, optionally with the image embedded.

Coordinates are continuous pixels. A file without shapes is an empty scene.
"""

import base64
import math
import posixpath
from pathlib import PurePosixPath

from pydantic import BaseModel

from crowdray.datasets.sources import Item
from crowdray.datasets.sources.annotations.annotation import ImageAnnotation, known_size
from crowdray.datasets.sources.annotations.base import AnnotatedFolder
from crowdray.datasets.sources.annotations.json_reader import Number, Point, Text, location, read_json, validate
from crowdray.datasets.sources.annotations.shapes import ellipse
from crowdray.errors import DataError

SHAPES = {"point": "points", "points": "points", "rectangle": "box"}
"""Our kinds of shapes by LabelMe's; others keep their name."""


class Shape(BaseModel):
    """One shape; before version 3.6 every shape was a polygon."""

    shape_type: Text | None = None
    label: Text | None = None
    points: list[Point]


class LabelMeFile(BaseModel):
    """The parts of a file that are read."""

    shapes: list[Shape]
    imagePath: Text
    imageData: str | None = None
    imageHeight: Number | None = None
    imageWidth: Number | None = None


class LabelMe(AnnotatedFolder):
    """A JSON file per image; an image missing from the folder is taken from inside its file."""

    endings = (".json",)
    per_image = True

    def _read(self, uri: str) -> list[ImageAnnotation]:
        path = self._below(uri)
        image = ImageAnnotation(uri, uri, path, alias=str(PurePosixPath(path).with_suffix("")))
        with image.capture_error():
            content = _parse(uri)
            image.embedded = content.imageData is not None
            image.size = known_size(content.imageHeight, content.imageWidth)
            named = content.imagePath.replace("\\", "/")
            image.image = posixpath.normpath(posixpath.join(posixpath.dirname(path), named))
            for index, shape in enumerate(content.shapes):
                kind = shape.shape_type or "polygon"
                where = location(uri, "shapes", index)
                corners = shape.points
                if kind == "circle" and len(corners) == 2:  # its centre and a point on it
                    radius = math.dist(*corners)
                    corners = ellipse(*corners[0], radius, radius)
                image.add_shape(self._rules, SHAPES.get(kind, kind), shape.label or "", corners, where)
        return [image]

    def _content(self, item: Item) -> bytes:
        if item.image != item.annotation:
            return super()._content(item)
        data = _parse(item.image).imageData or ""
        try:
            return base64.b64decode(data, validate=True)
        except ValueError as error:
            raise DataError(
                f"{item.image}: imageData is not valid base64 ({error}); put the image next to the file"
            ) from error


def _parse(uri: str) -> LabelMeFile:
    content = read_json(uri)
    if isinstance(content, dict) and content.get("shapes") is None:
        raise DataError(f"{uri} has no 'shapes', so LabelMe did not write it; move it out of the folder")
    return validate(LabelMeFile, content, uri)
