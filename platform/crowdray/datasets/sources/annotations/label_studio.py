"""Label Studio's JSON export: points as percentages of the image size, one task per image.

If a task has several annotations, the ground truth counts, else the latest. A task submitted without a shape is an
empty scene; one that was skipped, or only predicted, is left out.
"""

import math
import re
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from pydantic import AliasChoices, BaseModel, Field

from crowdray.data.decoding import SUFFIXES
from crowdray.datasets.sources.annotations.annotation import Corner, ImageAnnotation, known_size
from crowdray.datasets.sources.annotations.base import AnnotatedFolder
from crowdray.datasets.sources.annotations.json_reader import Id, Number, Point, Text, location, read_json, validate
from crowdray.errors import DataError

SHAPES = {
    "keypointlabels": "points",
    "keypoint": "points",
    "rectanglelabels": "box",
    "rectangle": "box",
    "polygonlabels": "polygon",
}
"""Our kinds of shapes by the type of a result; other types keep their name."""

NOT_SHAPES = ("labels", "choices", "taxonomy", "textarea", "number", "rating", "datetime", "pairwise", "relation")
"""Types of results that describe the image or another result."""


class Task(BaseModel):
    """One image with its annotations; old versions call them completions."""

    data: dict[str, Any]
    annotations: list[Any] | None = Field(None, validation_alias=AliasChoices("annotations", "completions"))


class TaskAnnotation(BaseModel):
    """One annotator's work on a task."""

    result: list[Any]
    was_cancelled: Any = None
    ground_truth: Any = None
    updated_at: Text | None = None
    created_at: Text | None = None

    @property
    def precedence(self) -> tuple[bool, str]:
        """Sort key: ground truth first, then the latest change; times are ISO 8601 in UTC."""
        return bool(self.ground_truth), self.updated_at or self.created_at or ""


class Result(BaseModel):
    """A shape, its label, or a description of the image; a shape and its label may be two results with the same id."""

    type: Text
    id: Id | None = None
    value: dict[str, Any] = {}
    original_height: Number | None = None
    original_width: Number | None = None
    image_rotation: Number | None = None


class PointValue(BaseModel):
    """A keypoint, in percent."""

    x: Number
    y: Number


class BoxValue(PointValue):
    """A box, in percent, rotated clockwise about its first corner by `rotation` degrees."""

    width: Number
    height: Number
    rotation: Number | None = None


class LabelStudio(AnnotatedFolder):
    """An export in the format JSON; JSON-MIN does not say which tasks are done."""

    endings = (".json",)

    def _read(self, uri: str) -> list[ImageAnnotation]:
        tasks = validate(list[Any], read_json(uri), uri)
        return [self._read_task(uri, index, task) for index, task in enumerate(tasks)]

    def _read_task(self, uri: str, index: int, entry: Any) -> ImageAnnotation:
        if isinstance(entry, dict) and entry.get("data") is None:
            raise DataError(f"{location(uri, index)} has no 'data'; export the project as JSON, not as JSON-MIN")
        task = validate(Task, entry, uri, index)
        name = _image_path(task.data, location(uri, index, "data"))
        # Label Studio puts a hash before the name of an uploaded file.
        alias = re.sub(r"(^|/)[0-9a-f]{8}-([^/]+)$", r"\1\2", name)
        image = ImageAnnotation(uri, location(uri, index), name, alias)
        with image.capture_error():
            done = []
            for number, one in enumerate(task.annotations or ()):
                path = (index, "annotations", number)
                annotation = validate(TaskAnnotation, one, uri, *path)
                if not annotation.was_cancelled:
                    done.append((annotation, path))
            if not done:
                image.skip_reason = "tasks that were skipped or not annotated"
                return image
            self._add_shapes(image, *max(done, key=lambda pair: pair[0].precedence))
            if len(done) > 1:
                image.ignored["annotations of tasks with a later one or a ground truth"] = len(done) - 1
        return image

    def _add_shapes(self, image: ImageAnnotation, annotation: TaskAnnotation, path: tuple[str | int, ...]) -> None:
        entries = [(entry, (*path, "result", number)) for number, entry in enumerate(annotation.result)]
        results = [(validate(Result, entry, image.uri, *at), at) for entry, at in entries]
        labels = {result.id: self._label(result, image.uri, *at) for result, at in results if result.type == "labels"}
        for result, at in results:
            if result.type in NOT_SHAPES:
                continue
            where = location(image.uri, *at)
            kind, size = SHAPES.get(result.type, result.type), _image_size(result, where)
            if image.size not in (None, size):
                raise DataError(f"{where}: the image's size differs from that of other shapes; export it again")
            image.size = size
            label = self._label(result, image.uri, *at) or labels.get(result.id, "")
            corners = _corners(result.value, kind, size, image.uri, *at, "value")
            image.add_shape(self._rules, kind, label, corners, where)

    def _label(self, result: Result, uri: str, *path: str | int) -> str:
        """Return the label in a result; of several, prefer one that marks heads."""
        given = result.value.get(result.type)
        labels = validate(list[Text], given, uri, *path, "value", result.type) if given else [""]
        return next((label for label in labels if self._rules.accepts(label)), labels[0])


def _image_path(data: dict[str, Any], where: str) -> str:
    """Return the path of a task's image: `image` in its data, or the only string that ends like an image."""
    texts = {key: value for key, value in data.items() if isinstance(value, str) and value}
    if "image" in texts:
        return _path(texts["image"], where)
    paths = [path for text in texts.values() if (path := _path(text, where)).lower().endswith(SUFFIXES)]
    if len(paths) != 1:
        raise DataError(f"{where} names {len(paths)} images, expected one, preferably called 'image'")
    return paths[0]


def _path(text: str, where: str) -> str:
    """Extract the path of a URL: /data/upload/1/a.jpg, /data/local-files/?d=b/a.jpg, s3://bucket/b/a.jpg?X=1."""
    try:
        address = urlsplit(text)
        return parse_qs(address.query).get("d", [unquote(address.path)])[0]
    except ValueError as error:
        raise DataError(f"{where}: {text!r} is not a valid URL ({error}); correct it") from error


def _image_size(result: Result, where: str) -> tuple[int, int]:
    """Return the image's size (H, W), which percentages need."""
    if (result.image_rotation or 0) % 360:
        raise DataError(
            f"{where}: the image was rotated by {result.image_rotation:g} degrees; undo it and export again"
        )
    size = known_size(result.original_height, result.original_width)
    if size is None:
        raise DataError(f"{where} has no original_height and original_width; export it again")
    return size


def _corners(value: dict[str, Any], kind: str, size: tuple[int, int], uri: str, *path: str | int) -> list[Corner]:
    """Convert a point, two opposite corners of a box, or a polygon to pixels; other shapes to nothing."""
    height, width = size[0] / 100, size[1] / 100
    if kind == "polygon":
        return [(x * width, y * height) for x, y in validate(list[Point], value.get("points"), uri, *path, "points")]
    if kind == "points":
        point = validate(PointValue, value, uri, *path)
        return [(point.x * width, point.y * height)]
    if kind != "box":
        return []
    box = validate(BoxValue, value, uri, *path)
    x, y, right, down = box.x * width, box.y * height, box.width * width, box.height * height
    angle = math.radians(box.rotation or 0.0)
    cos, sin = math.cos(angle), math.sin(angle)
    return [(x, y), (x + right * cos - down * sin, y + right * sin + down * cos)]
