"""CSV with a head on each line: image,x,y, and where they are known label, split and scene.

A line with an image and neither x nor y says that the image holds no head.
"""

import csv
import io
from collections.abc import Iterator
from typing import Annotated, Any

from crowdray import storage
from crowdray.datasets.sources.annotations.annotation import ImageAnnotation, parse_number
from crowdray.datasets.sources.annotations.base import AnnotatedFolder
from crowdray.datasets.sources.annotations.images import split_called
from crowdray.errors import DataError

IMAGE_COLUMNS = ("image", "file", "filename", "file_name", "image_name", "path")
"""Names of the column that names the image, in any case; the first of them that is there counts."""

OTHER_COLUMNS = ("x", "y", "label", "split", "scene")
"""x and y must be there; columns with any other name are not looked at."""

SEPARATORS = ",;\t"


class CsvTable(AnnotatedFolder):
    """Heads in a table; `base` is the coordinate of the first pixel's centre, 0.5 for continuous pixels."""

    kind = "csv"
    endings = (".csv", ".tsv")

    def __init__(
        self,
        source: str,
        *,
        base: Annotated[float, "coordinate of the first pixel's centre: 0 for indices, 1 for MATLAB's"] = 0.5,
        **options: Any,
    ) -> None:
        self._shift = 0.5 - base
        super().__init__(source, **options)

    def _read(self, uri: str) -> list[ImageAnnotation]:
        images: dict[str, ImageAnnotation] = {}
        empty: dict[str, str] = {}
        for place, row in _rows(uri):
            image = row["image"]
            if not image:
                raise DataError(f"{place}: the line names no image; write image,x,y")
            marks = images.setdefault(image, ImageAnnotation(uri, place, image))
            with marks.checked():
                _describe(marks, row, place)
                if row["x"] or row["y"]:
                    x, y = (parse_number(row[name], f"{place}: {name}") + self._shift for name in ("x", "y"))
                    marks.take(self._rules, "points", row["label"], [(x, y)], place)
                else:
                    empty[image] = place
                if image in empty and (marks.heads or marks.aside):
                    raise DataError(f"{empty[image]} says that {image!r} holds no head, but other lines give some")
        return list(images.values())


def _rows(uri: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The lines of a table with their place, the columns that count by name; "" for those that are not there."""
    try:
        text = storage.read_bytes(uri).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{uri} is not UTF-8 ({error}); save it again with that encoding") from error
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
            place = f"{uri}, line {reader.line_num}"
            if len(cells) != len(header):
                raise DataError(f"{place} has {len(cells)} cells, the first line has {len(header)}; correct it")
            found = {name: cells[column] if column is not None else "" for name, column in columns.items()}
            if separator != ",":  # tables of countries with a decimal comma
                found |= {name: found[name].replace(",", ".") for name in ("x", "y")}
            yield place, found
    except csv.Error as error:
        raise DataError(f"{uri}, line {reader.line_num}: {error}; correct it") from error


def _columns(header: list[str], uri: str) -> dict[str, int | None]:
    image = next((name for name in IMAGE_COLUMNS if name in header), "image")
    for name in (image, *OTHER_COLUMNS):
        if header.count(name) != 1 and (name in (image, "x", "y") or name in header):
            raise DataError(
                f"{uri}: its first line {header} has {header.count(name)} columns {name!r}; write image,x,y"
            )
    return {"image": header.index(image)} | {n: header.index(n) if n in header else None for n in OTHER_COLUMNS}


def _describe(marks: ImageAnnotation, row: dict[str, str], place: str) -> None:
    """Take the split and the scene of a line, which all lines of an image share."""
    split = split_called(row["split"])
    if row["split"] and not split:
        raise DataError(f"{place}: there is no split {row['split']!r}; write train, val or test")
    for name, said in (("split", split), ("scene", row["scene"])):
        known = getattr(marks, name)
        if said and known and said != known:
            raise DataError(f"{place}: {marks.image!r} has the {name} {said!r}, but an earlier line says {known!r}")
        setattr(marks, name, said or known)
