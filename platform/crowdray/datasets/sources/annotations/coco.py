"""COCO JSON with keypoints: one keypoint of each person, or each single point, is a head.

COCO's keypoints are pixel indices from 0, so 0.5 is added; its boxes are continuous. An image without annotations is
an empty scene.
"""

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, Field

from crowdray.datasets.sources.annotations.annotation import ROI_LABEL, ImageAnnotation, known_size
from crowdray.datasets.sources.annotations.base import AnnotatedFolder
from crowdray.datasets.sources.annotations.json_reader import Id, Number, Text, location, read_json, validate
from crowdray.errors import DataError

DEFAULT_KEYPOINTS = ("head", "nose")
"""Keypoints used as the head when none is named: the first one that a category has."""


class CategoryEntry(BaseModel):
    """An element of `categories`."""

    id: Id
    name: Text
    keypoints: list[Text] | None = None


class ImageEntry(BaseModel):
    """An element of `images`."""

    id: Id
    file_name: Text
    height: Number | None = None
    width: Number | None = None


class CocoFile(BaseModel):
    """The parts of a file that are read; annotations are validated one by one, so a broken one costs one image."""

    categories: list[CategoryEntry]
    images: list[ImageEntry]
    annotations: list[Any]


class References(BaseModel):
    """What every annotation has."""

    image_id: Id
    category_id: Id


class Keypoints(BaseModel):
    """An annotation that may have keypoints: x, y and visibility of each."""

    keypoints: list[Number] | None = None
    iscrowd: Any = None


class Box(BaseModel):
    """An annotation that is used for its box: x, y, width and height."""

    bbox: Annotated[list[Number], Field(min_length=4, max_length=4)]


class Category(NamedTuple):
    """A category whose head is known."""

    name: str
    keypoints: tuple[str, ...]
    """Names of its keypoints; a single placeholder if the file names none."""
    head: int
    """Index of the head among them."""


class Coco(AnnotatedFolder):
    """Keypoints in COCO's format; `base` is the coordinate of the first pixel's centre, 0 in COCO itself.

    Tools that write fractions usually mean continuous pixels: base 0.5. `keypoint` names the head.
    """

    endings = (".json",)

    def __init__(
        self,
        source: str,
        *,
        base: Annotated[float, "coordinate of the first pixel's centre; 0.5 for continuous keypoints"] = 0.0,
        keypoint: Annotated[str | None, "keypoint that is the head; default: head, else nose"] = None,
        **options: Any,
    ) -> None:
        self._shift = 0.5 - base
        self._keypoint = keypoint
        super().__init__(source, **options)

    def _read(self, uri: str) -> list[ImageAnnotation]:
        content = validate(CocoFile, read_json(uri), uri)
        categories = {
            entry.id: self._category(entry, where) for entry, where in _unique(content.categories, uri, "categories")
        }
        images = {
            entry.id: ImageAnnotation(uri, where, entry.file_name, size=known_size(entry.height, entry.width))
            for entry, where in _unique(content.images, uri, "images")
        }
        for index, entry in enumerate(content.annotations):
            path = ("annotations", index)
            ids = validate(References, entry, uri, *path)
            image = _lookup(images, ids.image_id, location(uri, *path, "image_id"), "images")
            with image.capture_error():
                category = _lookup(categories, ids.category_id, location(uri, *path, "category_id"), "categories")
                self._add(image, entry, category, path)
        return list(images.values())

    def _add(self, image: ImageAnnotation, entry: Any, category: Category, path: tuple[str | int, ...]) -> None:
        """Add one annotation of the category to its image."""
        where, accepted = location(image.uri, *path), self._rules.accepts(category.name)
        if category.name.lower() == ROI_LABEL:
            polygons = validate(list[list[Number]], entry.get("segmentation"), image.uri, *path, "segmentation")
            for index, numbers in enumerate(polygons):
                where = location(image.uri, *path, "segmentation", index)
                if len(numbers) % 2:
                    raise DataError(f"{where} has {len(numbers)} numbers, expected pairs of x and y; export it again")
                corners = list(zip(numbers[::2], numbers[1::2], strict=True))
                image.add_shape(self._rules, "polygon", category.name, corners, where)
            return
        found = validate(Keypoints, entry, image.uri, *path)
        if accepted and found.iscrowd:
            image.skip_reason = "images with a crowd region (iscrowd), whose people are not annotated one by one,"
        elif found.keypoints is None or self._rules.boxes:
            x, y, width, height = validate(Box, entry, image.uri, *path).bbox
            image.add_shape(self._rules, "box", category.name, [(x, y), (x + width, y + height)], where)
        else:
            expected = 3 * len(category.keypoints)
            if len(found.keypoints) != expected:
                raise DataError(
                    f"{where}.keypoints has {len(found.keypoints)} numbers, expected {expected}; export it again"
                )
            x, y, visibility = found.keypoints[3 * category.head : 3 * category.head + 3]
            if visibility > 0 or not accepted:
                head = [(x + self._shift, y + self._shift)]
                image.add_shape(self._rules, "points", category.name, head, f"{where}.keypoints")
            else:
                image.ignored[f"{category.name!r} whose {category.keypoints[category.head]!r} is not marked"] += 1

    def _category(self, entry: CategoryEntry, where: str) -> Category:
        """Find the head of a category, by name if it has several keypoints."""
        keypoints = tuple(entry.keypoints or ())
        lower = [keypoint.lower() for keypoint in keypoints]
        wanted = DEFAULT_KEYPOINTS if self._keypoint is None else (self._keypoint.lower(),)
        known = [lower.index(head) for head in wanted if head in lower]
        clear = known or (len(keypoints) < 2 and self._keypoint is None)
        if not clear and self._rules.accepts(entry.name) and not self._rules.boxes and entry.name.lower() != ROI_LABEL:
            raise DataError(
                f"{where}: {entry.name!r} has the keypoints {', '.join(keypoints) or '(none)'}; "
                "name the one that is the head with --keypoint, or the categories of heads with --label"
            )
        return Category(entry.name, keypoints or ("point",), known[0] if known else 0)


Entry = TypeVar("Entry", CategoryEntry, ImageEntry)
T = TypeVar("T")


def _unique(entries: Iterable[Entry], uri: str, key: str) -> Iterable[tuple[Entry, str]]:
    """Yield the entries with their locations; DataError if two have the same id."""
    seen: dict[int | str, str] = {}
    for index, entry in enumerate(entries):
        where = location(uri, key, index)
        if (first := seen.setdefault(entry.id, where)) is not where:
            raise DataError(f"{where} has the same id {entry.id!r} as {first}; export it again")
        yield entry, where


def _lookup(known: Mapping[int | str, T], key: int | str, where: str, name: str) -> T:
    if key not in known:
        raise DataError(f"{where} is {key!r}, an id that is missing from {name}; export it again")
    return known[key]
