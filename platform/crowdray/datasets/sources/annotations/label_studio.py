"""Label Studio's JSON export: points as percentages of the image, one task for each image.

Of several annotations of a task the one set as ground truth counts, else the latest. A task that was submitted
without a shape is an empty scene; one that was skipped, or only predicted, is left out.
"""

import math
import re
from urllib.parse import parse_qs, unquote, urlsplit

from crowdray.datasets.sources.annotations.annotation import Corner, ImageAnnotation
from crowdray.datasets.sources.annotations.base import AnnotatedFolder
from crowdray.datasets.sources.annotations.images import ENDINGS
from crowdray.datasets.sources.annotations.json_reader import Node, read_json, size_of
from crowdray.errors import DataError

SHAPES = {
    "keypointlabels": "points",
    "keypoint": "points",
    "rectanglelabels": "box",
    "rectangle": "box",
    "polygonlabels": "polygon",
}
"""What types of results are here; other shapes keep their name."""

OF_THE_IMAGE = ("labels", "choices", "taxonomy", "textarea", "number", "rating", "datetime", "pairwise", "relation")
"""Types of results that say something of the image, or of a shape, and are none."""


class LabelStudio(AnnotatedFolder):
    """An export in the format called JSON; JSON-MIN does not say which tasks are done."""

    kind = "label-studio"
    endings = (".json",)

    def _read(self, uri: str) -> list[ImageAnnotation]:
        return [self._task(uri, task) for task in read_json(uri).elements()]

    def _task(self, uri: str, task: Node) -> ImageAnnotation:
        if task.find("data") is None:
            raise DataError(f"{task.place} has no 'data'; export the project as JSON, not as JSON-MIN")
        path = _image_path(task.need("data"))
        # A file that was uploaded got a hash before its name.
        marks = ImageAnnotation(uri, task.place, path, alias=re.sub(r"(^|/)[0-9a-f]{8}-([^/]+)$", r"\1\2", path))
        with marks.checked():
            found = task.find("annotations") or task.find("completions")
            done = [node for node in found.elements() if not _is_set(node, "was_cancelled")] if found else []
            if not done:
                marks.left_out = "tasks that were skipped or not annotated"
                return marks
            self._take(marks, max(done, key=_precedence))
            if len(done) > 1:
                marks.aside["annotations of a task that has a later one, or a ground truth,"] = len(done) - 1
        return marks

    def _take(self, marks: ImageAnnotation, annotation: Node) -> None:
        shapes = [(node, node.need("type").text()) for node in annotation.need("result").elements()]
        # A shape and its label may be two results with one id.
        labels = {_id(node): self._label(node.need("value"), kind) for node, kind in shapes if kind == "labels"}
        for node, kind in shapes:
            if kind in OF_THE_IMAGE:
                continue
            value, size, shape = node.need("value"), _size(node), SHAPES.get(kind, kind)
            if marks.size not in (None, size):
                raise DataError(f"{node.place}: the image's size differs from that of other shapes; export it again")
            marks.size = size
            label = self._label(value, kind) or labels.get(_id(node), "")
            marks.take(self._rules, shape, label, _corners(value, shape, size), node.place)

    def _label(self, value: Node, kind: str) -> str:
        """The label of a shape; of several one that marks heads, if there is one."""
        found = value.find(kind)
        labels = [label.text() for label in found.elements()] if found else []
        return next((label for label in labels if self._rules.want(label)), labels[0] if labels else "")


def _image_path(data: Node) -> str:
    """The path of a task's image: `image` in its data, or the one text that ends as images do."""
    texts = [Node(value, key, data) for key, value in data.object().items() if isinstance(value, str) and value]
    paths = [_path(node) for node in texts if node.key == "image"] or [
        path for path in map(_path, texts) if path.lower().endswith(ENDINGS)
    ]
    if len(paths) != 1:
        raise DataError(f"{data.place} names {len(paths)} images, expected one, best called 'image'")
    return paths[0]


def _path(node: Node) -> str:
    """The path in an address: /data/upload/1/a.jpg, /data/local-files/?d=b/a.jpg, s3://bucket/b/a.jpg?X=1."""
    text = node.text()
    try:
        address = urlsplit(text)
        return parse_qs(address.query).get("d", [unquote(address.path)])[0]
    except ValueError as error:
        raise DataError(f"{node.place} is {text!r}, which is no address ({error}); correct it") from error


def _is_set(node: Node, key: str) -> bool:
    found = node.find(key)
    return found is not None and bool(found.value)


def _precedence(annotation: Node) -> tuple[bool, str]:
    """Ground truth comes before the rest, then what was changed last: times are ISO 8601 in UTC."""
    time = annotation.find("updated_at") or annotation.find("created_at")
    return _is_set(annotation, "ground_truth"), time.text() if time else ""


def _id(node: Node) -> int | str:
    found = node.find("id")
    return found.identity() if found else ""


def _size(node: Node) -> tuple[int, int]:
    """The image's size (H, W), which percentages need."""
    turned = node.find("image_rotation")
    if turned and turned.number() % 360:
        raise DataError(
            f"{turned.place}: the image was turned by {turned.value} degrees; turn it back and export again"
        )
    size = size_of(node, "original_height", "original_width")
    if size is None:
        raise DataError(f"{node.place} has no original_height and original_width; export it again")
    return size


def _corners(value: Node, kind: str, size: tuple[int, int]) -> list[Corner]:
    """The corners of a shape in pixels: one of a point, two opposite ones of a box, none where nobody asks."""
    height, width = size[0] / 100, size[1] / 100
    if kind == "polygon":
        return [(x * width, y * height) for x, y in value.need("points").pairs()]
    if kind not in ("points", "box"):
        return []
    x, y = value.need("x").number() * width, value.need("y").number() * height
    if kind == "points":
        return [(x, y)]
    # A box is turned clockwise about its first corner.
    right, down = value.need("width").number() * width, value.need("height").number() * height
    angle = math.radians(turn.number()) if (turn := value.find("rotation")) else 0.0
    cos, sin = math.cos(angle), math.sin(angle)
    return [(x, y), (x + right * cos - down * sin, y + right * sin + down * cos)]
