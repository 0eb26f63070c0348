"""CVAT's XML, "CVAT for images 1.1": points, and the point of each skeleton that `keypoint` names.

Coordinates are continuous pixels. The export lists every frame, so one without shapes is an empty scene.
"""

import io
from collections.abc import Iterator
from typing import Annotated, Any
from xml.etree.ElementTree import Element, ParseError

from crowdray import storage
from crowdray.datasets.extras import import_extra
from crowdray.datasets.sources.annotations.annotation import Corner, ImageAnnotation, known_size, parse_number
from crowdray.datasets.sources.annotations.base import AnnotatedFolder
from crowdray.datasets.sources.annotations.images import parse_split
from crowdray.errors import DataError

EXPORT = "export the task as 'CVAT for images 1.1'"


class Cvat(AnnotatedFolder):
    """Images with points; `keypoint` names the point of a skeleton that is the head."""

    endings = (".xml",)

    def __init__(
        self,
        source: str,
        *,
        keypoint: Annotated[str | None, "point of a skeleton that is the head"] = None,
        **options: Any,
    ) -> None:
        self._keypoint = keypoint
        super().__init__(source, **options)

    def _read(self, uri: str) -> list[ImageAnnotation]:
        return [self._read_image(uri, element, number) for number, element in enumerate(_image_elements(uri), 1)]

    def _read_image(self, uri: str, element: Element, number: int) -> ImageAnnotation:
        name = element.get("name")
        if not name:
            raise DataError(f"{uri}: image {number} has no name; {EXPORT}")
        where, subset = f"{uri}: image {name!r}", element.get("subset", "")
        # A project's export has a folder for each subset, in which names may recur.
        image = ImageAnnotation(uri, where, f"{subset}/{name}" if subset else name, split=parse_split(subset))
        with image.capture_error():
            height, width = (parse_number(element.get(side, "0"), f"{where}: {side}") for side in ("height", "width"))
            image.size = known_size(height, width)
            for shape in element:
                if shape.tag != "tag":  # a tag describes the whole image
                    self._add(image, shape, f"{where}: {shape.tag}")
        return image

    def _add(self, image: ImageAnnotation, shape: Element, where: str) -> None:
        label = shape.get("label", "")
        if shape.tag == "skeleton" and self._rules.accepts(label):
            corners = self._head_of(shape, f"{where} labelled {label!r}")
            if corners:
                image.add_shape(self._rules, "points", label, corners, where)
            else:
                image.ignored[f"skeletons {label!r} whose {self._keypoint!r} is not marked"] += 1
        elif shape.tag == "box":
            sides = [parse_number(shape.get(side, ""), f"{where}: {side}") for side in ("xtl", "ytl", "xbr", "ybr")]
            image.add_shape(self._rules, "box", label, [(sides[0], sides[1]), (sides[2], sides[3])], where)
        elif shape.tag in ("points", "polygon"):
            image.add_shape(self._rules, shape.tag, label, _corners(shape.get("points", ""), where), where)
        else:
            image.add_shape(self._rules, shape.tag, label, [], where)

    def _head_of(self, skeleton: Element, where: str) -> list[Corner]:
        """Return the point of a skeleton that is the head; empty if it is marked as outside the image."""
        if self._keypoint is None:
            raise DataError(f"{where}: name the point that is the head with --keypoint")
        named = [point for point in skeleton if point.get("label", "").lower() == self._keypoint.lower()]
        if not named:
            labels = ", ".join(sorted(point.get("label", "") for point in skeleton))
            raise DataError(f"{where} has no point {self._keypoint!r}; it has {labels}; correct --keypoint")
        marked = [point for point in named if point.get("outside", "0") == "0"]
        return [corner for point in marked for corner in _corners(point.get("points", ""), where)]


def _image_elements(uri: str) -> Iterator[Element]:
    """Yield the <image> elements of a file and free each one after use: exports can be large."""
    content = io.BytesIO(storage.read_bytes(uri))
    parser = import_extra("defusedxml.ElementTree", "cvat")
    depth = 0
    try:
        for event, element in parser.iterparse(content, events=("start", "end")):
            depth += 1 if event == "start" else -1
            if event == "start" and depth == 1 and element.tag != "annotations":
                raise DataError(f"{uri} starts with <{element.tag}>, not with <annotations>; {EXPORT}")
            if event == "start" and depth == 2 and element.tag == "track":
                raise DataError(f"{uri} contains video tracks; {EXPORT}")
            if event == "end" and depth == 1:
                if element.tag == "image":
                    yield element
                element.clear()
    except DataError:
        raise
    except (ParseError, ValueError, LookupError) as error:  # forbidden entities and unknown encodings
        raise DataError(f"{uri} is not readable XML ({error}); {EXPORT}") from error


def _corners(text: str, where: str) -> list[Corner]:
    """Parse CVAT's format of points: x,y;x,y."""
    pairs = [pair.split(",") for pair in text.split(";")]
    if any(len(pair) != 2 for pair in pairs):
        raise DataError(f"{where}: points are {text[:60]!r}, expected x,y;x,y; {EXPORT}")
    return [(parse_number(x, where), parse_number(y, where)) for x, y in pairs]
