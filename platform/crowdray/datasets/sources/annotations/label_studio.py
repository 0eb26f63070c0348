"""Label Studio's exports JSON, JSON-MIN and CSV: points as percentages of the image size, one task per image.

If a task has several annotations, the ground truth counts, else the latest. A task submitted without a shape is an
empty scene; one that was skipped, or only predicted, is left out. JSON-MIN and CSV have a record per annotation, with
the shapes of each control under its name (github.com/HumanSignal/label-studio-converter: converter.py, csv2.py).
"""

import json
import re
from typing import Any

from pydantic import AliasChoices, BaseModel, Field

from crowdray.data.decoding import SUFFIXES
from crowdray.datasets.sources.annotations.annotation import ImageAnnotation, known_size
from crowdray.datasets.sources.annotations.base import AnnotatedFolder
from crowdray.datasets.sources.annotations.csv_reader import read_records
from crowdray.datasets.sources.annotations.images import url_path
from crowdray.datasets.sources.annotations.json_reader import Id, Number, Point, Text, location, read_json, validate
from crowdray.datasets.sources.annotations.shapes import Corner, box, ellipse, rotate
from crowdray.errors import DataError

SHAPES = {
    "keypointlabels": "points",
    "keypoint": "points",
    "rectanglelabels": "box",
    "rectangle": "box",
    "polygonlabels": "polygon",
    "polygon": "polygon",
    "ellipselabels": "ellipse",
    "ellipse": "ellipse",
}
"""Our kinds of shapes by the type of a result; other types keep their name."""

NOT_SHAPES = ("labels", "choices", "taxonomy", "textarea", "number", "rating", "datetime", "pairwise", "relation")
"""Types of results that describe the image or another result."""

NOT_DONE = "tasks that were skipped or not annotated"
SUPERSEDED = "annotations of tasks with a later one or a ground truth"


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


class EllipseValue(PointValue):
    """An ellipse, in percent."""

    radiusX: Number
    radiusY: Number
    rotation: Number | None = None


class LabelStudio(AnnotatedFolder):
    """An export in the format JSON, JSON-MIN or CSV."""

    endings = (".json", ".csv", ".tsv")

    def _read(self, uri: str) -> list[ImageAnnotation]:
        if not uri.lower().endswith(".json"):
            rows = [(where, _parse_cells(row, where)) for where, row in read_records(uri)]
            return self._read_records(uri, rows)
        tasks = validate(list[Any], read_json(uri), uri)
        if tasks and all(isinstance(task, dict) and "data" not in task for task in tasks):
            return self._read_records(uri, [(location(uri, index), task) for index, task in enumerate(tasks)])
        return [self._read_task(uri, index, task) for index, task in enumerate(tasks)]

    def _read_records(self, uri: str, records: list[tuple[str, dict[str, Any]]]) -> list[ImageAnnotation]:
        """Return the images of JSON-MIN or CSV, whose records of one task follow in any order."""
        tasks: dict[Any, list[tuple[str, dict[str, Any]]]] = {}
        for where, record in records:
            tasks.setdefault(repr(record.get("id", where)), []).append((where, record))
        images = []
        for of_task in tasks.values():
            images.append(image := _new_image(uri, of_task[0][1], *(of_task[0][0],) * 2))
            with image.capture_error():
                done = [(where, record) for where, record in of_task if _is_done(record, where)]
                if not done:
                    image.skip_reason = NOT_DONE
                    continue
                where, record = max(done, key=lambda pair: str(pair[1].get("updated_at") or ""))
                for key, shapes in record.items():
                    for number, value in enumerate(shapes if _are_shapes(shapes) else ()):
                        result = _as_result(value, location(where, key, number))
                        self._add_shape(image, result, {}, (where, key, number))
                if len(done) > 1:
                    image.ignored[SUPERSEDED] = len(done) - 1
        return images

    def _read_task(self, uri: str, index: int, entry: Any) -> ImageAnnotation:
        task = validate(Task, entry, uri, index)
        image = _new_image(uri, task.data, location(uri, index), location(uri, index, "data"))
        with image.capture_error():
            done = []
            for number, one in enumerate(task.annotations or ()):
                path = (index, "annotations", number)
                annotation = validate(TaskAnnotation, one, uri, *path)
                if not annotation.was_cancelled:
                    done.append((annotation, path))
            if not done:
                image.skip_reason = NOT_DONE
                return image
            self._add_shapes(image, *max(done, key=lambda pair: pair[0].precedence))
            if len(done) > 1:
                image.ignored[SUPERSEDED] = len(done) - 1
        return image

    def _add_shapes(self, image: ImageAnnotation, annotation: TaskAnnotation, path: tuple[str | int, ...]) -> None:
        entries = [(entry, (*path, "result", number)) for number, entry in enumerate(annotation.result)]
        results = [(validate(Result, entry, image.uri, *at), at) for entry, at in entries]
        labels = {result.id: self._label(result, image.uri, *at) for result, at in results if result.type == "labels"}
        for result, at in results:
            if result.type not in NOT_SHAPES:
                self._add_shape(image, result, labels, (image.uri, *at))

    def _add_shape(
        self, image: ImageAnnotation, result: Result, labels: dict[int | str | None, str], path: tuple[Any, ...]
    ) -> None:
        where = location(*path)
        kind, size = SHAPES.get(result.type, result.type), _image_size(result, where)
        if image.size not in (None, size):
            raise DataError(f"{where}: the image's size differs from that of other shapes; export it again")
        image.size = size
        label = self._label(result, *path) or labels.get(result.id, "")
        image.add_shape(self._rules, kind, label, _corners(result.value, kind, size, *path, "value"), where)

    def _label(self, result: Result, uri: str, *path: str | int) -> str:
        """Return the label in a result; of several, prefer one that marks heads."""
        given = result.value.get(result.type)
        labels = validate(list[Text], given, uri, *path, "value", result.type) if given else [""]
        return next((label for label in labels if self._rules.accepts(label)), labels[0])


def _new_image(uri: str, data: dict[str, Any], where: str, data_at: str) -> ImageAnnotation:
    """Return the empty annotation of a task's image; Label Studio puts a hash before the name of an uploaded file."""
    name = _image_path(data, data_at)
    return ImageAnnotation(uri, where, name, alias=re.sub(r"(^|/)[0-9a-f]{8}-([^/]+)$", r"\1\2", name))


def _parse_cells(row: dict[str, str], where: str) -> dict[str, Any]:
    """Return a row of a CSV export as a record of JSON-MIN: cells of shapes are JSON."""
    record: dict[str, Any] = {**row}
    for key, cell in row.items():
        if cell.startswith("[{") or '"original_' in cell:
            try:
                record[key] = validate(list[Any], json.loads(cell), where, key)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{where}: {key} is not valid JSON ({error}); export it again") from error
    return record


def _are_shapes(value: Any) -> bool:
    """Return whether a field of a record lists shapes, not choices or text."""
    descriptions = {*NOT_SHAPES}
    return isinstance(value, list) and any(
        isinstance(one, dict) and (one.keys() & {"x", "points"} or not one.keys() & descriptions) for one in value
    )


def _is_done(record: dict[str, Any], where: str) -> bool:
    """Return whether a record is an annotation: one without shapes has an id if it was submitted."""
    if any(map(_are_shapes, record.values())):
        return True
    if "annotation_id" not in record:
        raise DataError(f"{where} has neither shapes nor an annotation_id; export the project as JSON")
    return bool(record["annotation_id"])


def _as_result(value: Any, where: str) -> Result:
    """Return a shape of a record, which has no type, as a result of an annotation."""
    if not isinstance(value, dict):
        raise DataError(f"{where}: {value!r} is not a shape; export it again")
    if any(key in value for key in NOT_SHAPES):
        raise DataError(f"{where}: shapes and their labels are apart; export the project as JSON, which links them")
    types = [key for key in SHAPES if key in value]
    plain = {"points": "polygon", "radiusX": "ellipse", "height": "rectangle", "rle": "brush"}
    types += [kind for key, kind in plain.items() if key in value]
    kind = types[0] if types else "keypoint"
    return validate(Result, {"type": kind, "value": value, **value}, where)


def _image_path(data: dict[str, Any], where: str) -> str:
    """Return the path of a task's image: `image` in its data, or the only string that ends like an image."""
    texts = {key: value for key, value in data.items() if isinstance(value, str) and value}
    if "image" in texts:
        return url_path(texts["image"], where)
    paths = [path for text in texts.values() if (path := url_path(text, where)).lower().endswith(SUFFIXES)]
    if len(paths) != 1:
        raise DataError(f"{where} names {len(paths)} images, expected one, preferably called 'image'")
    return paths[0]


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
    """Convert a point, or the corners of a box, an ellipse's box or a polygon, to pixels; other shapes to nothing."""
    height, width = size[0] / 100, size[1] / 100
    if kind == "polygon":
        return [(x * width, y * height) for x, y in validate(list[Point], value.get("points"), uri, *path, "points")]
    if kind == "points":
        point = validate(PointValue, value, uri, *path)
        return [(point.x * width, point.y * height)]
    if kind == "ellipse":
        found = validate(EllipseValue, value, uri, *path)
        radii = found.radiusX * width, found.radiusY * height
        return ellipse(found.x * width, found.y * height, *radii, found.rotation or 0.0)
    if kind != "box":
        return []
    given = validate(BoxValue, value, uri, *path)
    corners = box(given.x * width, given.y * height, given.width * width, given.height * height)
    return rotate(corners, given.rotation or 0.0, corners[0])
