"""Text files with one head per line, x and y: one file per image, named after it.

An empty file is an empty scene.
"""

import re
from collections.abc import Iterator
from typing import Annotated, Any

from crowdray.datasets.sources.annotations.annotation import ImageAnnotation
from crowdray.datasets.sources.annotations.base import AnnotatedFolder
from crowdray.datasets.sources.annotations.csv_reader import parse_decimals, read_text
from crowdray.errors import DataError


class TextPoints(AnnotatedFolder):
    """Heads as x and y per line; `base` is the coordinate of the first pixel's centre, 0.5 for continuous pixels."""

    endings = (".txt",)
    per_image = True

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
        image = self._annotation_named_after(uri)
        with image.capture_error():
            for where, numbers in number_lines(uri):
                if len(numbers) != 2:
                    raise DataError(f"{where} has {len(numbers)} numbers, expected 2: x and y; correct it")
                x, y = numbers
                image.add_shape(self._rules, "points", "", [(x + self._shift, y + self._shift)], where)
        return [image]


def number_lines(uri: str) -> Iterator[tuple[str, list[float]]]:
    """Yield the location and the numbers of each line that is not blank.

    Numbers are separated by spaces, tabs or semicolons, in which case decimal commas are allowed, or by commas.
    """
    for number, line in enumerate(read_text(uri).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{uri}, line {number}"
        fields = [field.removesuffix(",") for field in re.split(r"\s*;\s*|\s+", line.strip().rstrip(";"))]
        fields = fields[0].split(",") if len(fields) == 1 else fields
        yield where, parse_decimals(fields, [where] * len(fields))
