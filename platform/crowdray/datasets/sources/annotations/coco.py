"""COCO JSON with keypoints: one of each person, or of each point, is its head.

COCO's keypoints are indices of pixels, counted from 0, so that 0.5 is added; its boxes are continuous. An image
without annotation is an empty scene.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

from crowdray.datasets.sources.annotations.annotation import REGION, ImageAnnotation
from crowdray.datasets.sources.annotations.base import AnnotatedFolder
from crowdray.datasets.sources.annotations.json_reader import Node, read_json, size_of
from crowdray.errors import DataError

HEADS = ("head", "nose")
"""Keypoints that are taken for the head if none is named: the first of them that a category has."""


@dataclass(frozen=True, slots=True)
class Category:
    """One kind of thing that is annotated."""

    name: str
    """Its label."""
    keypoints: tuple[str, ...]
    """Names of its keypoints; one, without a name, where the file says none."""
    head: int
    """Which of them is the head."""


class Coco(AnnotatedFolder):
    """Keypoints in COCO's format; `base` is the coordinate of the first pixel's centre, 0 in COCO itself.

    Tools that write fractions usually mean continuous pixels: base 0.5. `keypoint` names the one that is the head.
    """

    kind = "coco"
    endings = (".json",)

    def __init__(
        self,
        source: str,
        *,
        base: Annotated[float, "coordinate of the first pixel's centre; 0.5 where keypoints are continuous"] = 0.0,
        keypoint: Annotated[str | None, "the keypoint that is the head; by default head, else nose"] = None,
        **options: Any,
    ) -> None:
        self._shift = 0.5 - base
        self._keypoint = keypoint
        super().__init__(source, **options)

    def _read(self, uri: str) -> list[ImageAnnotation]:
        root = read_json(uri)
        categories = {key: self._category(node) for key, node in _by_id(root.need("categories")).items()}
        images = {
            key: ImageAnnotation(uri, node.place, node.need("file_name").text(), size=size_of(node))
            for key, node in _by_id(root.need("images")).items()
        }
        for node in root.need("annotations").elements():
            marks = _referred(images, node.need("image_id"), "images")
            with marks.checked():
                self._take(marks, node, _referred(categories, node.need("category_id"), "categories"))
        return list(images.values())

    def _take(self, marks: ImageAnnotation, node: Node, category: Category) -> None:
        keypoints = node.find("keypoints")
        if category.name.lower() == REGION:
            for polygon in node.need("segmentation").elements():
                numbers = _numbers(polygon)
                corners = list(zip(numbers[::2], numbers[1::2], strict=False))
                marks.take(self._rules, "polygon", category.name, corners, polygon.place)
        elif self._rules.want(category.name) and (crowd := node.find("iscrowd")) and crowd.value:
            marks.left_out = "images with a region of people who were not marked one by one"
        elif keypoints is None or self._rules.boxes:
            x, y, width, height = _numbers(node.need("bbox"), 4)
            marks.take(self._rules, "box", category.name, [(x, y), (x + width, y + height)], node.place)
        else:
            triples = _numbers(keypoints, 3 * len(category.keypoints))
            x, y, visible = triples[3 * category.head : 3 * category.head + 3]
            if visible > 0 or not self._rules.want(category.name):
                head = [(x + self._shift, y + self._shift)]
                marks.take(self._rules, "points", category.name, head, keypoints.place)
            else:
                marks.aside[f"{category.name!r} whose {category.keypoints[category.head]!r} is not marked"] += 1

    def _category(self, node: Node) -> Category:
        """A category with its head, which is found by name where it has several keypoints."""
        name, listed = node.need("name").text(), node.find("keypoints")
        keypoints = tuple(keypoint.text() for keypoint in listed.elements()) if listed else ()
        lower = [keypoint.lower() for keypoint in keypoints]
        wanted = HEADS if self._keypoint is None else (self._keypoint.lower(),)
        known = [lower.index(head) for head in wanted if head in lower]
        sure = known or (len(keypoints) < 2 and self._keypoint is None)
        if not sure and self._rules.want(name) and not self._rules.boxes and name.lower() != REGION:
            raise DataError(
                f"{node.place}: {name!r} has the keypoints {', '.join(keypoints) or '(none)'}; "
                "say which is the head with --keypoint, or name the categories of heads with --label"
            )
        return Category(name, keypoints or ("point",), known[0] if known else 0)


def _by_id(nodes: Node) -> dict[int | str, Node]:
    found: dict[int | str, Node] = {}
    for node in nodes.elements():
        key = node.need("id").identity()
        if (before := found.setdefault(key, node)) is not node:
            raise DataError(f"{node.place} has the id {key!r} of {before.place}; export it again")
    return found


T = TypeVar("T")


def _referred(there: Mapping[int | str, T], node: Node, what: str) -> T:
    key = node.identity()
    if key not in there:
        raise DataError(f"{node.place} is {key!r}, but no such id is among the {what}; export it again")
    return there[key]


def _numbers(node: Node, count: int = 0) -> list[float]:
    """A list of so many numbers, or of x and y of one corner after the other."""
    numbers = [number.number() for number in node.elements()]
    if len(numbers) != count if count else len(numbers) % 2:
        raise node.wrong(f"{count} numbers" if count else "pairs of numbers")
    return numbers
