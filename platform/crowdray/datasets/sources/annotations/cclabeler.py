"""JSON in the style of cclabeler and NWPU-Crowd: points, boxes and their number, one file per image.

Coordinates are continuous pixels. cclabeler counts points and boxes as different heads, NWPU-Crowd's boxes are the
sizes of the heads at its points; `human_num` says which (github.com/Elin24/cclabeler, its files in data/jsons).
"""

from typing import Any

from pydantic import BaseModel

from crowdray.datasets.sources.annotations.annotation import ImageAnnotation
from crowdray.datasets.sources.annotations.base import AnnotatedFolder
from crowdray.datasets.sources.annotations.json_reader import Number, Text, location, read_json, validate
from crowdray.datasets.sources.annotations.shapes import box
from crowdray.errors import DataError


class Heads(BaseModel):
    """The parts of a file that are read; a point is [x, y] or an object, a box [x0, y0, x1, y1] or an object."""

    img_id: Text | None = None
    human_num: int
    points: list[Any]
    boxes: list[Any] = []


class CcLabeler(AnnotatedFolder):
    """Points, and boxes if they are further heads."""

    endings = (".json",)
    per_image = True

    def _read(self, uri: str) -> list[ImageAnnotation]:
        image = self._annotation_named_after(uri)
        with image.capture_error():
            found = validate(Heads, read_json(uri), uri)
            image.alias = found.img_id or ""
            points, boxes = len(found.points), len(found.boxes)
            if found.human_num not in (points, points + boxes):
                raise DataError(
                    f"{uri}: human_num is {found.human_num}, but there are {points} points and {boxes} boxes; "
                    "save it again, or correct it"
                )
            for index, value in enumerate(found.points):
                corner = _numbers(value, ("x", "y"), uri, "points", index)
                image.add_shape(self._rules, "points", "", [(corner[0], corner[1])], location(uri, "points", index))
            for index, value in enumerate(found.boxes if found.human_num > points else ()):
                left, top, right, bottom = _numbers(value, ("sx", "sy", "ex", "ey"), uri, "boxes", index)
                corners = box(left, top, right - left, bottom - top)
                image.add_shape(self._rules, "box", "", corners, location(uri, "boxes", index))
        return [image]


def _numbers(value: Any, keys: tuple[str, ...], uri: str, *path: str | int) -> list[float]:
    """Return the numbers of a list, or those with the given keys of an object."""
    numbers = validate(list[Number], [value.get(key) for key in keys] if isinstance(value, dict) else value, uri, *path)
    if len(numbers) != len(keys):
        raise DataError(f"{location(uri, *path)} has {len(numbers)} numbers, expected {len(keys)}; correct it")
    return numbers
