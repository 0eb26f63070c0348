"""LabelMe's JSON: a file for each image, anywhere below the folder, sometimes with the image inside.

Coordinates are continuous pixels. A file without a shape says that its image holds no head.
"""

import base64
import posixpath
from collections.abc import Sequence
from pathlib import PurePosixPath

from crowdray import storage
from crowdray.datasets.sources import Item
from crowdray.datasets.sources.annotations.annotation import ImageAnnotation
from crowdray.datasets.sources.annotations.base import AnnotatedFolder
from crowdray.datasets.sources.annotations.json_reader import read_json, size_of
from crowdray.errors import DataError, UserError

SHAPES = {"point": "points", "points": "points", "rectangle": "box"}
"""What LabelMe's types of shapes are here; others keep their name."""


class LabelMe(AnnotatedFolder):
    """A JSON file for each image; an image that lies nowhere is taken from inside its file."""

    kind = "labelme"
    endings = (".json",)

    def _find_annotations(self, given: Sequence[str]) -> list[str]:
        if given:
            return super()._find_annotations(given)
        there = [path for path in self._files if path.lower().endswith(self.endings)]
        if not there:
            raise UserError(f"{self._root} holds no .json file; put those that LabelMe wrote beside their images")
        return [storage.join(self._root, path) for path in there]

    def _read(self, uri: str) -> list[ImageAnnotation]:
        own = self._below(uri)
        marks = ImageAnnotation(uri, uri, own, alias=str(PurePosixPath(own).with_suffix("")))
        with marks.checked():
            root = read_json(uri)
            if root.find("shapes") is None:
                raise DataError(f"{uri} has no 'shapes', so LabelMe did not write it; move it out of the folder")
            marks.embedded = root.find("imageData") is not None
            marks.size = size_of(root, "imageHeight", "imageWidth")
            path = root.need("imagePath").text().replace("\\", "/")
            marks.image = posixpath.normpath(posixpath.join(posixpath.dirname(own), path))
            for shape in root.need("shapes").elements():
                kind, label = shape.find("shape_type"), shape.find("label")
                name = kind.text() if kind else "polygon"  # before version 3.6 there was nothing else
                corners = shape.need("points").pairs()
                marks.take(self._rules, SHAPES.get(name, name), label.text() if label else "", corners, shape.place)
        return [marks]

    def _split_of(self, file: str) -> str:
        return ""  # it is called after its image

    def _marks_of(self, item: Item) -> ImageAnnotation:
        if item.annotation is None or item.image is None:
            return super()._marks_of(item)
        return self._read(item.annotation)[0]  # a worker reads the files of its own images only

    def _image(self, item: Item) -> bytes:
        if item.image is None or item.image != item.annotation:
            return super()._image(item)
        data = read_json(item.image).need("imageData")
        text = data.text()
        try:
            return base64.b64decode(text, validate=True)
        except ValueError as error:
            raise DataError(f"{data.place} is no base64 ({error}); put the image beside the file") from error
