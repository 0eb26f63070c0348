"""YOLO's text files of boxes: one file per image, in the folder `labels` for images in `images`, or next to them.

A line is `class x y width height`: the centre and size of a box as fractions of the size of the upright image
(docs.ultralytics.com/datasets/detect). The class is a number, which `label` selects. An empty file is an empty scene.
"""

from crowdray.datasets.sources.annotations.annotation import ImageAnnotation
from crowdray.datasets.sources.annotations.base import AnnotatedFolder
from crowdray.datasets.sources.annotations.shapes import box
from crowdray.datasets.sources.annotations.text import number_lines
from crowdray.errors import DataError

MAX_FRACTION = 2.0
"""Larger values are pixels."""


class Yolo(AnnotatedFolder):
    """Boxes as fractions of the image size; lists of classes or images are ignored."""

    endings = (".txt",)
    per_image = True

    def _read(self, uri: str) -> list[ImageAnnotation]:
        image = self._annotation_named_after(uri)
        image.relative = True
        with image.capture_error():
            for where, numbers in number_lines(uri):
                if len(numbers) != 5 or not numbers[0].is_integer():
                    raise DataError(f"{where} is not a box: class x y width height; export boxes, not outlines")
                label, x, y, width, height = numbers
                if max(map(abs, numbers[1:])) > MAX_FRACTION:
                    raise DataError(
                        f"{where}: {max(numbers[1:]):g} is not a fraction of the image size; export it again"
                    )
                corners = box(x - width / 2, y - height / 2, width, height)
                image.add_shape(self._rules, "box", f"{label:.0f}", corners, where)
        return [image]
