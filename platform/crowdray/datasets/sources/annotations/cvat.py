"""CVAT's XML for images and for video, 1.1: points, and the point of each skeleton that `keypoint` names.

Coordinates are continuous pixels. The export covers every frame, so one without shapes is an empty scene. A video's
frames are the images frame_000000.jpg and so on; its tracks list a shape for each frame, interpolated ones too, and
where one ends a shape that is `outside` (github.com/cvat-ai/cvat: dataset_manager/formats/cvat.py, dump_track).
"""

import re
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import PurePosixPath
from typing import Annotated, Any
from xml.etree.ElementTree import Element

from crowdray.datasets.sources.annotations.annotation import ImageAnnotation, known_size, parse_number
from crowdray.datasets.sources.annotations.base import AnnotatedFolder
from crowdray.datasets.sources.annotations.images import parse_split
from crowdray.datasets.sources.annotations.shapes import Corner, box, ellipse, rotate
from crowdray.datasets.sources.annotations.xml_reader import read_elements
from crowdray.errors import DataError

EXPORT = "export the task as 'CVAT for images 1.1' or 'CVAT for video 1.1'"


@dataclass
class Video:
    """What an export says about a video, and its frames found so far."""

    size: tuple[int, int] | None = None
    frames: range = range(0)
    """Frames of the task; empty if unknown."""
    tasks: set[str | None] = field(default_factory=set)
    images: dict[int, ImageAnnotation] = field(default_factory=dict)
    """Annotations by frame."""
    gaps: set[range] = field(default_factory=set)
    """Frames for which a track has no shape although it continues later."""


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
        images, video = list[ImageAnnotation](), Video()
        for element in read_elements(uri, "annotations", EXPORT):
            if element.tag == "meta":
                _read_meta(video, element, f"{uri}: meta")
            elif element.tag == "image":
                images.append(self._read_image(uri, element, len(images) + 1))
            elif element.tag == "track":
                self._read_track(uri, element, video)
        return images or self._video_frames(uri, video)

    def _read_track(self, uri: str, track: Element, video: Video) -> None:
        """Add the shapes of one track to the frames of a video."""
        video.tasks.add(track.get("task_id"))
        if len(video.tasks) > 1:
            raise DataError(f"{uri} contains the videos of several tasks; export each task, not the project")
        listed = []
        for shape in track:
            if shape.tag == "attribute":
                continue
            text = shape.get("frame", "")
            where = f"{uri}: track {track.get('id')}, frame {text or '(none)'}"
            if not re.fullmatch(r"\d{1,9}", text):
                raise DataError(f"{where} is not a number; {EXPORT}")
            image, outside = self._frame(uri, video, int(text)), shape.get("outside", "0") != "0"
            listed.append((int(text), outside))
            with image.capture_error():
                if not outside:
                    self._add(image, shape, where, track.get("label", ""))
        video.gaps |= {
            range(frame + video.frames.step, following)
            for (frame, outside), (following, _) in pairwise(sorted(listed))
            if not outside and following > frame + video.frames.step
        }

    def _frame(self, uri: str, video: Video, frame: int) -> ImageAnnotation:
        image = ImageAnnotation(uri, f"{uri}: frame {frame}", f"frame_{frame:06d}", size=video.size, video_frame=True)
        return video.images.setdefault(frame, image)

    def _video_frames(self, uri: str, video: Video) -> list[ImageAnnotation]:
        """Return the frames of a video, also those that have an image but no shape."""
        for path in self._images if video.frames else ():
            name = re.fullmatch(r"frame_(\d{6,9})", PurePosixPath(path).stem)
            if name and int(name[1]) in video.frames:
                self._frame(uri, video, int(name[1]))
        for frame, image in video.images.items():
            if any(frame in gap for gap in video.gaps):
                image.skip_reason = "frames between those that a track lists"
        return [image for _, image in sorted(video.images.items())]

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
                    self._add(image, shape, f"{where}: {shape.tag}", shape.get("label", ""))
        return image

    def _add(self, image: ImageAnnotation, shape: Element, where: str, label: str) -> None:
        def number(name: str, default: str = "") -> float:
            return parse_number(shape.get(name, default), f"{where}: {name}")

        if shape.tag == "skeleton" and self._rules.accepts(label):
            corners = self._head_of(shape, f"{where} labelled {label!r}")
            if corners:
                image.add_shape(self._rules, "points", label, corners, where)
            else:
                image.ignored[f"skeletons {label!r} whose {self._keypoint!r} is not marked"] += 1
        elif shape.tag == "box":
            left, top, right, bottom = map(number, ("xtl", "ytl", "xbr", "ybr"))
            corners = box(left, top, right - left, bottom - top)
            centre = (left + right) / 2, (top + bottom) / 2
            image.add_shape(self._rules, "box", label, rotate(corners, number("rotation", "0"), centre), where)
        elif shape.tag == "ellipse":
            x, y, radius_x, radius_y = map(number, ("cx", "cy", "rx", "ry"))
            corners = ellipse(x, y, radius_x, radius_y, number("rotation", "0"))
            image.add_shape(self._rules, "ellipse", label, corners, where)
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


def _read_meta(video: Video, meta: Element, where: str) -> None:
    """Read the frames and the size of a video's task or job."""

    def find(name: str) -> Element | None:
        return next(meta.iter(name), None)

    def number(name: str) -> int:
        text = (meta.findtext(f".//{name}") or "0").strip()
        if not re.fullmatch(r"\d{1,9}", text):
            raise DataError(f"{where}: {name} is {text[:60]!r}; {EXPORT}")
        return int(text)

    if find("original_size") is not None:
        video.size = known_size(number("original_size/height"), number("original_size/width"))
    if find("stop_frame") is not None:
        step = re.search(r"step=(\d{1,9})", meta.findtext(".//frame_filter") or "")
        video.frames = range(number("start_frame"), number("stop_frame") + 1, max(1, int(step[1])) if step else 1)


def _corners(text: str, where: str) -> list[Corner]:
    """Parse CVAT's format of points: x,y;x,y."""
    pairs = [pair.split(",") for pair in text.split(";")]
    if any(len(pair) != 2 for pair in pairs):
        raise DataError(f"{where}: points are {text[:60]!r}, expected x,y;x,y; {EXPORT}")
    return [(parse_number(x, where), parse_number(y, where)) for x, y in pairs]
