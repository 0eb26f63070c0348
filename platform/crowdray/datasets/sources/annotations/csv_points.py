"""CSV with one head or box per row: image,x,y or image,x1,y1,x2,y2, and optionally label, split and scene.

A row with an image and no coordinate marks an empty scene.
"""

import re
from typing import Annotated, Any

from crowdray.datasets.sources.annotations.annotation import ImageAnnotation
from crowdray.datasets.sources.annotations.base import AnnotatedFolder
from crowdray.datasets.sources.annotations.csv_reader import parse_decimals, read_table
from crowdray.datasets.sources.annotations.images import parse_split
from crowdray.datasets.sources.annotations.shapes import box
from crowdray.errors import DataError

COLUMNS = {
    "image": ("image", "file", "filename", "file_name", "image_name", "path"),
    "label": ("label", "label_name", "class"),
    "split": ("split",),
    "scene": ("scene",),
}
"""Accepted names of columns, in any case; the first match is used. Only the image is required."""

COORDINATES = (
    ("x", "y"),
    ("x1", "y1", "x2", "y2"),
    ("xmin", "ymin", "xmax", "ymax"),
    ("bbox_x", "bbox_y", "bbox_width", "bbox_height"),
)
"""Columns of coordinates; the first group of which all are present is read."""
THOUSAND = re.compile(r"[+-]?\d{1,3}(,\d{3})+")
"""Numbers that, in a table separated by commas, may have a decimal comma or a thousands separator."""

AMBIGUOUS = ({"x", "y", "w", "h"}, {"x", "y", "width", "height"})
"""Columns of boxes, or of points and the size of something."""


class CsvTable(AnnotatedFolder):
    """Heads in a CSV table; `base` is the coordinate of the first pixel's centre, 0.5 for continuous pixels."""

    endings = (".csv", ".tsv")

    def __init__(
        self,
        source: str,
        *,
        base: Annotated[float, "coordinate of the first pixel's centre: 0 for indices, 1 for MATLAB"] = 0.5,
        **options: Any,
    ) -> None:
        self._shift = 0.5 - base
        super().__init__(source, **options)

    def _read(self, uri: str) -> list[ImageAnnotation]:
        separator, rows = read_table(uri)
        _, header = next(rows, (uri, []))
        columns, axes = _columns([name.lower() for name in header], uri)
        images: dict[str, ImageAnnotation] = {}
        for where, cells in rows:
            if len(cells) <= max(columns[name] for name in ("image", *axes)):
                raise DataError(f"{where} has {len(cells)} cells, the header has {len(header)}; correct it")
            row = {name: cells[column] for name, column in columns.items() if column < len(cells)}
            name = row["image"]
            if not name:
                raise DataError(f"{where}: the image is missing; write image,x,y")
            image = images.setdefault(name, ImageAnnotation(uri, where, name))
            with image.capture_error():
                _set_split_and_scene(image, row, where)
                if any(row[axis] for axis in axes):
                    if separator == "," and (unclear := [row[axis] for axis in axes if THOUSAND.fullmatch(row[axis])]):
                        raise DataError(
                            f"{where}: {unclear[0]!r} may be a thousand or a decimal comma; write a decimal point"
                        )
                    numbers = parse_decimals([row[axis] for axis in axes], [f"{where}: {axis}" for axis in axes])
                    self._add(image, axes, numbers, row.get("label", ""), where)
        return list(images.values())

    def _add(self, image: ImageAnnotation, axes: tuple[str, ...], numbers: list[float], label: str, where: str) -> None:
        x, y = numbers[0] + self._shift, numbers[1] + self._shift
        if len(axes) == 2:
            image.add_shape(self._rules, "points", label, [(x, y)], where)
            return
        width, height = numbers[2:] if "bbox_width" in axes else (numbers[2] - numbers[0], numbers[3] - numbers[1])
        image.add_shape(self._rules, "box", label, box(x, y, width, height), where)


def _columns(header: list[str], uri: str) -> tuple[dict[str, int], tuple[str, ...]]:
    """Return the position of each column that is read, and the names of those with coordinates."""
    if unclear := next((group for group in AMBIGUOUS if group <= set(header)), None):
        names = ", ".join(sorted(unclear))
        raise DataError(f"{uri}: {names} may be points or boxes; rename them bbox_x ... bbox_height, or omit the sizes")
    axes = next((group for group in COORDINATES if set(group) <= set(header)), COORDINATES[0])
    accepted = COLUMNS | {axis: (axis,) for axis in axes}
    found = {name: next((one for one in names if one in header), names[0]) for name, names in accepted.items()}
    for name, column in found.items():
        if header.count(column) > 1 or (column not in header and name in ("image", *axes)):
            raise DataError(
                f"{uri}: the header {header} has {header.count(column)} columns {column!r}; write image,x,y"
            )
    return {name: header.index(column) for name, column in found.items() if column in header}, axes


def _set_split_and_scene(image: ImageAnnotation, row: dict[str, str], where: str) -> None:
    """Set the split and the scene from a row; all rows of an image must agree."""
    split = parse_split(row.get("split", ""))
    if row.get("split") and not split:
        raise DataError(f"{where}: unknown split {row['split']!r}; write train, val or test")
    for field, value in (("split", split), ("scene", row.get("scene", ""))):
        known = getattr(image, field)
        if value and known and value != known:
            raise DataError(f"{where}: {image.image!r} has the {field} {value!r}, but {known!r} in an earlier row")
        setattr(image, field, value or known)
