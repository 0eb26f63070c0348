"""CSV with one head per row: image,x,y and optionally label, split and scene.

A row with an image and neither x nor y marks an empty scene.
"""

import csv
import io
from collections.abc import Iterator
from typing import Annotated, Any

from crowdray import storage
from crowdray.datasets.sources.annotations.annotation import ImageAnnotation, parse_number
from crowdray.datasets.sources.annotations.base import AnnotatedFolder
from crowdray.datasets.sources.annotations.images import parse_split
from crowdray.errors import DataError

IMAGE_COLUMNS = ("image", "file", "filename", "file_name", "image_name", "path")
"""Accepted names of the image column, in any case; the first match is used."""

OTHER_COLUMNS = ("x", "y", "label", "split", "scene")
"""x and y are required; other columns are ignored."""

SEPARATORS = ",;\t"


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
        images: dict[str, ImageAnnotation] = {}
        for where, row in _rows(uri):
            name = row["image"]
            if not name:
                raise DataError(f"{where}: the image is missing; write image,x,y")
            image = images.setdefault(name, ImageAnnotation(uri, where, name))
            with image.capture_error():
                _set_split_and_scene(image, row, where)
                if row["x"] or row["y"]:
                    x, y = (parse_number(row[axis], f"{where}: {axis}") + self._shift for axis in ("x", "y"))
                    image.add_shape(self._rules, "points", row["label"], [(x, y)], where)
        return list(images.values())


def _rows(uri: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield the location and the cells by column name of each row; missing columns are ""."""
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{uri} is not UTF-8 ({error}); save it with that encoding") from error
    lines = text.splitlines()
    separator = max(SEPARATORS, key=lines[0].count) if lines else ","
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    try:
        header = [name.strip().lower() for name in next(reader, [])]
        columns = _columns(header, uri)
        for row in reader:
            cells = [cell.strip() for cell in row]
            if not any(cells):
                continue
            where = f"{uri}, line {reader.line_num}"
            if len(cells) != len(header):
                raise DataError(f"{where} has {len(cells)} cells, the header has {len(header)}; correct it")
            found = {name: cells[column] if column is not None else "" for name, column in columns.items()}
            if separator != ",":  # locales with a decimal comma
                found |= {name: found[name].replace(",", ".") for name in ("x", "y")}
            yield where, found
    except csv.Error as error:
        raise DataError(f"{uri}, line {reader.line_num}: {error}; correct it") from error


def _columns(header: list[str], uri: str) -> dict[str, int | None]:
    image = next((name for name in IMAGE_COLUMNS if name in header), "image")
    for name in (image, *OTHER_COLUMNS):
        if header.count(name) != 1 and (name in (image, "x", "y") or name in header):
            raise DataError(f"{uri}: the header {header} has {header.count(name)} columns {name!r}; write image,x,y")
    return {"image": header.index(image)} | {n: header.index(n) if n in header else None for n in OTHER_COLUMNS}


def _set_split_and_scene(image: ImageAnnotation, row: dict[str, str], where: str) -> None:
    """Set the split and the scene from a row; all rows of an image must agree."""
    split = parse_split(row["split"])
    if row["split"] and not split:
        raise DataError(f"{where}: unknown split {row['split']!r}; write train, val or test")
    for field, value in (("split", split), ("scene", row["scene"])):
        known = getattr(image, field)
        if value and known and value != known:
            raise DataError(f"{where}: {image.image!r} has the {field} {value!r}, but {known!r} in an earlier row")
        setattr(image, field, value or known)
