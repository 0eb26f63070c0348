"""CVAT's XML, "CVAT for images 1.1": points of images, and of skeletons when one of theirs is named the head.

Coordinates are continuous pixels. The export lists every frame, so one without a shape is an empty scene.
"""

import io
from collections.abc import Iterator
from typing import Annotated, Any
from xml.etree.ElementTree import Element, ParseError

from crowdray import storage
from crowdray.datasets.sources.annotations.annotation import Corner, ImageAnnotation, parse_number
from crowdray.datasets.sources.annotations.base import AnnotatedFolder
from crowdray.datasets.sources.annotations.images import split_called
from crowdray.errors import DataError, UserError

EXPORT = "export the task as 'CVAT for images 1.1'"


class Cvat(AnnotatedFolder):
    """Images with points; `keypoint` names the one of a skeleton that is the head."""

    kind = "cvat"
    endings = (".xml",)

    def __init__(
        self,
        source: str,
        *,
        keypoint: Annotated[str | None, "the point of a skeleton that is the head"] = None,
        **options: Any,
    ) -> None:
        self._keypoint = keypoint
        super().__init__(source, **options)

    def _read(self, uri: str) -> list[ImageAnnotation]:
        return [self._marks_in(uri, image, number) for number, image in enumerate(_images(uri), 1)]

    def _marks_in(self, uri: str, image: Element, number: int) -> ImageAnnotation:
        name = image.get("name")
        if not name:
            raise DataError(f"{uri}: image {number} has no name; {EXPORT}")
        place = f"{uri}: image {name!r}"
        marks = ImageAnnotation(uri, place, name, split=split_called(image.get("subset", "")))
        with marks.checked():
            height, width = (parse_number(image.get(side, "0"), f"{place}: {side}") for side in ("height", "width"))
            marks.size = (round(height), round(width)) if height >= 1 and width >= 1 else None
            for shape in image:
                if shape.tag != "tag":  # it says something of the whole image
                    self._take(marks, shape, f"{place}: {shape.tag}")
        return marks

    def _take(self, marks: ImageAnnotation, shape: Element, place: str) -> None:
        label = shape.get("label", "")
        if shape.tag == "skeleton" and self._keypoint is not None and self._rules.want(label):
            corners = self._heads_of(shape, place)
            if corners:
                marks.take(self._rules, "points", label, corners, place)
            else:
                marks.aside[f"skeletons {label!r} whose {self._keypoint!r} is not marked"] += 1
        elif shape.tag == "skeleton" and self._rules.want(label):
            raise DataError(f"{place} labelled {label!r}: say which of its points is the head with --keypoint")
        elif shape.tag == "box":
            sides = [parse_number(shape.get(side, ""), f"{place}: {side}") for side in ("xtl", "ytl", "xbr", "ybr")]
            marks.take(self._rules, "box", label, [(sides[0], sides[1]), (sides[2], sides[3])], place)
        elif shape.tag in ("points", "polygon"):
            marks.take(self._rules, shape.tag, label, _corners(shape.get("points", ""), place), place)
        else:
            marks.take(self._rules, shape.tag, label, [], place)

    def _heads_of(self, skeleton: Element, place: str) -> list[Corner]:
        """The point of a skeleton that is the head; none when it lies outside of the image."""
        named = [point for point in skeleton if point.get("label", "").lower() == str(self._keypoint).lower()]
        if not named:
            labels = ", ".join(sorted(point.get("label", "") for point in skeleton))
            raise DataError(f"{place} has no point {self._keypoint!r}; it has {labels}; correct --keypoint")
        marked = [point for point in named if point.get("outside", "0") == "0"]
        return [corner for point in marked for corner in _corners(point.get("points", ""), place)]


def _images(uri: str) -> Iterator[Element]:
    """The <image> elements of a file, each dropped once it was used: exports can be large."""
    content = io.BytesIO(storage.read_bytes(uri))
    depth = 0
    try:
        for event, element in _iterparse()(content, events=("start", "end")):
            depth += 1 if event == "start" else -1
            if event == "start" and depth == 1 and element.tag != "annotations":
                raise DataError(f"{uri} begins with <{element.tag}>, not with <annotations>; {EXPORT}")
            if event == "start" and depth == 2 and element.tag == "track":
                raise DataError(f"{uri} holds tracks of a video; {EXPORT}")
            if event == "end" and depth == 1:
                if element.tag == "image":
                    yield element
                element.clear()
    except DataError:
        raise
    except (ParseError, ValueError, LookupError) as error:  # entities, which can harm, and unknown encodings
        raise DataError(f"{uri} is no XML that can be read ({error}); {EXPORT}") from error


def _iterparse() -> Any:
    try:
        from defusedxml.ElementTree import iterparse
    except ImportError as error:
        raise UserError("cvat needs defusedxml: pip install 'crowdray[cvat]'") from error
    return iterparse


def _corners(text: str, place: str) -> list[Corner]:
    """Corners from CVAT's own way to write them: x,y;x,y."""
    pairs = [pair.split(",") for pair in text.split(";")]
    if any(len(pair) != 2 for pair in pairs):
        raise DataError(f"{place}: points are {text[:60]!r}, expected x,y;x,y; {EXPORT}")
    return [(parse_number(x, place), parse_number(y, place)) for x, y in pairs]
