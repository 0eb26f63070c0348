"""Exports and projects of the VGG Image Annotator, VIA 1 and 2: JSON or CSV, shapes with free attributes.

Coordinates are continuous pixels of its canvas (gitlab.com/vgg/via: pack_via_metadata). It lists every file of a
project, so one without regions is an empty scene.
"""

import json
import math
from collections.abc import Iterator
from typing import Annotated, Any

from pydantic import BaseModel

from crowdray.datasets.sources.annotations.annotation import ImageAnnotation
from crowdray.datasets.sources.annotations.base import AnnotatedFolder
from crowdray.datasets.sources.annotations.csv_reader import read_records
from crowdray.datasets.sources.annotations.images import url_path
from crowdray.datasets.sources.annotations.json_reader import Number, Text, location, read_json, validate
from crowdray.datasets.sources.annotations.shapes import Corner, box, ellipse
from crowdray.errors import DataError

KEYS = {
    "point": ("cx", "cy"),
    "rect": ("x", "y", "width", "height"),
    "circle": ("cx", "cy", "r"),
    "ellipse": ("cx", "cy", "rx", "ry"),
}
"""Numbers of each shape, besides an ellipse's rotation `theta`, in radians."""


class Entry(BaseModel):
    """One image; before version 2 its regions were an object with numbers as keys."""

    filename: Text
    regions: list[Any] | dict[str, Any] = []


class Region(BaseModel):
    """One shape with its attributes, such as {"class": "head"}; a checkbox is {"class": {"head": true}}."""

    shape_attributes: dict[str, Any]
    region_attributes: dict[str, Any] = {}


class Via(AnnotatedFolder):
    """Points, and other shapes with --boxes; `attribute` is the name of the attribute that is the label."""

    endings = (".json", ".csv")

    def __init__(
        self,
        source: str,
        *,
        attribute: Annotated[str | None, "region attribute that is the label; required if there are several"] = None,
        **options: Any,
    ) -> None:
        self._attribute = attribute
        super().__init__(source, **options)

    def _read(self, uri: str) -> list[ImageAnnotation]:
        images: dict[str, ImageAnnotation] = {}
        for where, key, name, regions in _csv_images(uri) if uri.lower().endswith(".csv") else _json_images(uri):
            image = images.setdefault(key, ImageAnnotation(uri, where, name))
            with image.capture_error():
                image.alias = url_path(name, where) if "://" in name else ""
                for path, region in regions:
                    self._add(image, validate(Region, region, *path), location(*path))
        return list(images.values())

    def _add(self, image: ImageAnnotation, region: Region, where: str) -> None:
        shape = region.shape_attributes
        name = str(shape.get("name"))
        keys = KEYS.get(name, ())
        numbers = [validate(Number, shape.get(key), where, "shape_attributes", key) for key in keys]
        kind, corners = {"point": "points", "rect": "box"}.get(name, name), list[Corner]()
        if name == "point":
            corners = [(numbers[0], numbers[1])]
        elif name == "rect":
            corners = box(*numbers)
        elif name == "circle":
            x, y, radius = numbers
            corners = ellipse(x, y, radius, radius)
        elif name == "ellipse":
            theta = validate(Number, shape.get("theta", 0), where, "shape_attributes", "theta")
            x, y, radius_x, radius_y = numbers
            corners = ellipse(x, y, radius_x, radius_y, math.degrees(theta))
        elif name == "polygon":
            xs, ys = (validate(list[Number], shape.get(key), where, key) for key in ("all_points_x", "all_points_y"))
            if len(xs) != len(ys):
                raise DataError(f"{where} has {len(xs)} x and {len(ys)} y; export it again")
            corners = list(zip(xs, ys, strict=True))
        image.add_shape(self._rules, kind, self._label(region, where), corners, where)

    def _label(self, region: Region, where: str) -> str:
        """Return the value of the label's attribute; of several checked values, prefer one that marks heads."""
        found = region.region_attributes
        if self._attribute is None and len(found) > 1:
            names = ", ".join(sorted(found))
            raise DataError(f"{where} has the attributes {names}; name the one that is the label with --attribute")
        value = found.get(self._attribute) if self._attribute else next(iter(found.values()), None)
        values = [name for name, checked in value.items() if checked] if isinstance(value, dict) else [value or ""]
        return next((str(v) for v in values if self._rules.accepts(str(v))), str(values[0]) if values else "")


Regions = Iterator[tuple[tuple[Any, ...], Any]]
"""Paths (file, keys ...) of regions, and the regions."""


def _json_images(uri: str) -> Iterator[tuple[str, str, str, Regions]]:
    """Yield location, key, name and regions of each image of a JSON export or project."""
    content = validate(dict[str, Any], read_json(uri), uri)
    if "view" in content and "metadata" in content:
        raise DataError(f"{uri} is a project of VIA 3; use VIA 2, or export it as COCO")
    path = ("_via_img_metadata",) if "_via_img_metadata" in content else ()
    for key, value in validate(dict[str, Any], content[path[0]] if path else content, uri, *path).items():
        entry = validate(Entry, value, uri, *path, key)
        regions = entry.regions.items() if isinstance(entry.regions, dict) else enumerate(entry.regions)
        at = (uri, *path, key, "regions")
        yield location(uri, *path, key), key, entry.filename, (((*at, index), region) for index, region in regions)


def _csv_images(uri: str) -> Iterator[tuple[str, str, str, Regions]]:
    """Yield location, key, name and regions of each image of a CSV export; DataError if rows are missing."""
    found: dict[str, tuple[str, str, str, list[tuple[tuple[Any, ...], Any]]]] = {}
    for where, row in read_records(uri):
        name = row.get("filename") or row.get("#filename")
        if not name:
            raise DataError(f"{where} has no filename; export the annotations as CSV again")
        shape, attributes = (_cell(row, column, where) for column in ("region_shape_attributes", "region_attributes"))
        region = {"shape_attributes": shape, "region_attributes": attributes}
        *_, regions = found.setdefault(name + row.get("file_size", ""), (where, name, row.get("region_count", ""), []))
        regions += [((where,), region)] if shape != {} else []
    for key, (where, name, count, regions) in found.items():
        if count and count != str(len(regions)):
            raise DataError(f"{where}: region_count is {count}, but there are {len(regions)} regions; export it again")
        yield where, key, name, iter(regions)


def _cell(row: dict[str, str], column: str, where: str) -> Any:
    """Parse a cell with JSON; DataError with its location."""
    try:
        return json.loads(row.get(column, ""))
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: {column} is not valid JSON ({error}); export it again") from error
