"""A folder of images with annotation files: what all formats of users' own data share.

Images lie anywhere below the folder. An image that no annotation names is left out; one that is named without a head
is an empty scene.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import PurePosixPath
from typing import Annotated, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from crowdray import storage
from crowdray.data.decoding import SUFFIXES, upright_size
from crowdray.data.sample import Sample
from crowdray.datasets.sources import SOURCES, Item
from crowdray.datasets.sources.annotations.annotation import HeadRules, ImageAnnotation, roi_mask
from crowdray.datasets.sources.annotations.fingerprints import recognise
from crowdray.datasets.sources.annotations.images import (
    ImageIndex,
    split_and_scene,
    split_in_path,
    upright,
)
from crowdray.datasets.sources.base import AnnotatedImages, Heads
from crowdray.datasets.sources.layout import natural_key
from crowdray.errors import DataError, UserError

SPLITS = ("train", "val", "test")
MAX_LISTED = 3
"""Number of names that a message lists as examples."""
OTHER_FILES = (
    *("classes.txt", "labels.txt", "predefined_classes.txt", "train.txt", "val.txt", "test.txt", "trainval.txt"),
    *("readme.txt", "readme.dataset.txt", "readme.roboflow.txt", "license.txt", "notes.json"),
    *("meta.json", "key_id_map.json", "obj_class_to_machine_color.json"),
)
"""Names, in lower case, of files that tools write next to annotations: names of classes, lists of images, notes."""
_ALL = ""
"""Key of all annotations among the cached files."""


class AnnotatedFolder(AnnotatedImages):
    """Images below a folder or URI and annotation files of one format, which subclasses parse.

    A new format defines `endings` and `_read`, which yields an ImageAnnotation per image, and is listed in SOURCES.
    """

    endings: ClassVar[tuple[str, ...]]
    """Suffixes of its annotation files."""
    per_image: ClassVar[bool] = False
    """Whether each image has an annotation file, named after it."""

    def __init__(
        self,
        source: str,
        *,
        annotations: Annotated[
            tuple[str, ...], "annotation files, relative to --source; default: the only one there"
        ] = (),
        label: Annotated[tuple[str, ...], "labels or categories that mark heads; required if there are several"] = (),
        boxes: Annotated[
            Literal["centre", "top"] | None,
            "count each box as a head at its centre, or at the middle of its top; default: boxes are rejected",
        ] = None,
        test_fraction: Annotated[float, "fraction of the images for the test split, chosen by name"] = 0.0,
        depth: str = "auto",
    ) -> None:
        if not 0 <= test_fraction < 1:
            raise UserError(f"--test-fraction is {test_fraction}; use a fraction in [0, 1), such as 0.2")
        super().__init__(storage.resolve(source), (), depth)
        # The registered model is named after it, so characters that MLflow rejects are replaced.
        self.name = re.sub(r"[^\w.-]+", "-", PurePosixPath(self._root).name).strip("-.") or "images"
        self._rules = HeadRules(tuple(label), boxes)
        self._test_fraction = test_fraction
        if not self._images:
            raise UserError(f"{self._root} contains no image; set --source to a folder above the images")
        self._annotation_files = self._find_annotations(annotations)
        available = {annotation.split for annotation in self._annotations if not annotation.skip_reason}
        self._splits = tuple(split for split in SPLITS if split in available)
        self._check_labels()
        if not self._splits:
            reasons = sorted({annotation.skip_reason for annotation in self._annotations})
            found = f", only {' and '.join(reasons)}" if reasons else ""
            raise DataError(f"{_listed(self._annotation_files)} has no usable annotated image{found}; export it again")

    def split_items(self, split: str) -> list[Item]:
        """Return the annotated images of a split; the column or else the folder names the scene."""
        found = []
        for number, one in enumerate(self._annotations):
            if one.split == split and not one.skip_reason:
                uri = storage.join(self._root, one.path) if one.path else ""
                name = one.path or one.image
                found.append(Item(split, name, uri, one.uri, number, one.scene or split_and_scene(name)[1]))
        return sorted(found, key=lambda item: natural_key(item.name))

    def load(self, item: Item) -> Sample:
        """Load one image with its heads, region of interest and depth."""
        if problem := self._annotation_of(item).problem:
            raise DataError(problem)
        return super().load(item)

    def heads(self, item: Item) -> Heads:
        """Return the annotated heads of an image."""
        annotation = self._annotation_of(item)
        heads = np.array(annotation.heads, dtype=np.float64).reshape(-1, 2)
        return heads * self.size(item)[::-1] if annotation.relative and len(heads) else heads

    def image(self, item: Item, heads: Heads) -> tuple[bytes, Heads]:
        """Return the image to which its annotation refers, which is upright."""
        annotation = self._annotation_of(item)
        return upright(self._content(item), annotation.size, heads, annotation.location), heads

    def region(self, item: Item, size: tuple[int, int]) -> NDArray[np.bool_] | None:
        """Return the region of interest."""
        polygons = self._annotation_of(item).roi_polygons
        return roi_mask(polygons, *size) if polygons else None

    def size(self, item: Item) -> tuple[int, int]:
        """Return the size (H, W) of the upright image, without decoding it."""
        return self._annotation_of(item).size or upright_size(item.image)

    def notes(self, splits: Sequence[str] = ()) -> list[str]:
        """Return notes on images and shapes that are left out, and on a missing test split."""
        ignored: Counter[str] = Counter()
        for annotation in self._annotations:
            ignored.update({annotation.skip_reason: 1} if annotation.skip_reason else annotation.ignored)
        notes = [f"{count} {description} are left out" for description, count in sorted(ignored.items())]
        named = {annotation.path for annotation in self._annotations}
        if unnamed := [path for path in self._images if path not in named]:
            notes.append(f"{len(unnamed)} images without annotation are left out: {_listed(unnamed)}")
        if not splits and "test" not in self._splits:
            fix = "increase --test-fraction" if self._test_fraction else "set --test-fraction, such as 0.2"
            notes.append(f"there is no test split; {fix}")
        return notes

    def _read(self, uri: str) -> Iterable[ImageAnnotation]:
        """Parse one annotation file, image by image; DataError if the whole file is unusable."""
        raise NotImplementedError

    def _annotation_named_after(self, uri: str) -> ImageAnnotation:
        """Return an empty annotation of the image that a file is named after, as 1.txt or 1.jpg.txt."""
        return ImageAnnotation(uri, uri, str(PurePosixPath(self._below(uri)).with_suffix("")))

    def _read_file(self, uri: str) -> list[ImageAnnotation]:
        """Parse one annotation file; errors in a file of another tool say which source to use."""
        try:
            annotations = list(self._read(uri))
        except DataError as error:
            raise DataError(self._other_tool(uri) or str(error)) from error
        broken = [annotation for annotation in annotations if annotation.problem]
        message = self._other_tool(uri) if broken else ""
        for annotation in broken:
            annotation.problem = message or annotation.problem
        return annotations

    def _other_tool(self, uri: str) -> str:
        """Return a message that names the source for a file of another tool; "" for a file of this one."""
        source, kind = recognise(uri)
        if not source or SOURCES[source].path.endswith(f":{type(self).__name__}"):
            return ""
        return f"{uri} looks like {kind}; convert it with the source {source!r}"

    def _any_other_tool(self, paths: Sequence[str]) -> str:
        """Return the message of the first of some files that another tool wrote; "" if there is none."""
        return next(filter(None, (self._other_tool(storage.join(self._root, path)) for path in paths[:MAX_LISTED])), "")

    def _split_of(self, file: str) -> str:
        """Return the split in the name of an annotation file, if there are several files."""
        several = len(self._annotation_files) > 1 and not self.per_image
        return split_in_path(self._below(file)) if several else ""

    def _below(self, uri: str) -> str:
        """Return a URI as a path relative to the root."""
        return uri.removeprefix(self._root).lstrip("/")

    def _annotation_of(self, item: Item) -> ImageAnnotation:
        if self.per_image and item.image and _ALL not in self._cache:  # a worker reads only its own images' files
            return self.cached(item.annotation, self._read_file)[0]
        return self._annotations[item.number]

    def _content(self, item: Item) -> bytes:
        return storage.read_bytes(item.image)

    def _find_annotations(self, given: Sequence[str]) -> list[str]:
        """Return URIs of the given annotation files, else of the only one below the root, or of all if per image."""
        if given:
            return [self._resolve_annotation(path) for path in given]
        found = self._annotation_like(self.endings)
        nearest = [path for path in found if PurePosixPath(path).parent.as_posix() in (".", "annotations")] or found
        if not nearest:
            others = self._annotation_like((".json", ".csv", ".xml", ".txt"))
            fix = self._any_other_tool(others) or "set its path with --annotations"
            raise UserError(f"{self._root} contains no {' or '.join(self.endings)} file; {fix}")
        if self.per_image:
            return [storage.join(self._root, path) for path in found]
        if len(nearest) > 1:
            fix = self._any_other_tool(nearest) or "select one or more with --annotations"
            raise UserError(
                f"{self._root} contains several {' or '.join(self.endings)} files: {_listed(nearest)}; {fix}"
            )
        return [storage.join(self._root, nearest[0])]

    def _annotation_like(self, endings: tuple[str, ...]) -> list[str]:
        """Return the files below the root with one of the suffixes, without those that are known to be others."""
        found = [path for path in self._files if path.lower().endswith(endings)]
        return [path for path in found if PurePosixPath(path).name.lower() not in OTHER_FILES]

    def _resolve_annotation(self, path: str) -> str:
        """Resolve a file from the command line: relative to the source, else a path or URI."""
        for uri in (path if "://" in path or path.startswith("/") else storage.join(self._root, path), path):
            if storage.exists(uri):
                return storage.resolve(uri)
        raise UserError(f"--annotations {path}: file not found, neither at this path nor below {self._root}")

    def _check_labels(self) -> None:
        """Raise UserError if several labels exist and none is selected, or if a selected one is missing."""
        labels = sum((annotation.labels for annotation in self._annotations), Counter[str]())
        present = [f"{label!r} ({count})" for label, count in sorted(labels.items())]
        if not self._rules.labels and len(labels) > 1:
            raise UserError(
                f"{_listed(self._annotation_files)} has heads with several labels: {', '.join(present)}; "
                "select those to count with --label"
            )
        missing = [label for label in self._rules.labels if label not in labels]
        others = sorted({description for annotation in self._annotations for description in annotation.ignored})
        if missing and others:
            raise UserError(
                f"--label {missing[0]}: no head has this label; found {', '.join([*present, *others])}; correct it"
            )

    @property
    def _files(self) -> list[str]:
        return self.cached(
            self._root,
            lambda root: [file.name for file in storage.find_files(root) if not storage.is_hidden(file.name)],
        )

    @property
    def _images(self) -> list[str]:
        return [path for path in self._files if path.lower().endswith(SUFFIXES)]

    @property
    def _annotations(self) -> list[ImageAnnotation]:
        return self.cached(_ALL, lambda _: self._read_all())

    def _read_all(self) -> list[ImageAnnotation]:
        """All annotations with their images and splits; problems of one are raised when it is loaded."""
        annotations = [annotation for uri in self._annotation_files for annotation in self._read_file(uri)]
        index, first = ImageIndex(self._images), dict[str, ImageAnnotation]()
        for annotation in annotations:
            with annotation.capture_error():
                path = self._find_image(annotation, index)
                if not path:
                    annotation.skip_reason = "frames of the video without an image"
                if not annotation.skip_reason and (other := first.setdefault(path, annotation)) is not annotation:
                    twice = f"{path} is annotated twice: {other.location} and {annotation.location}; keep one of them"
                    other.path, other.problem = "", other.problem or twice
                    raise DataError(twice)
                annotation.path = path
            folders, _ = split_and_scene(annotation.path)
            annotation.split = annotation.split or folders or self._split_of(annotation.uri) or "train"
        if self._test_fraction and any(annotation.split == "test" for annotation in annotations):
            raise UserError(
                f"--test-fraction {self._test_fraction}: {self.name} already has a test split; omit the option"
            )
        for annotation in annotations:
            name = annotation.path or annotation.image
            if annotation.split == "train" and _hash_fraction(name) < self._test_fraction:
                annotation.split = "test"
        return annotations

    def _find_image(self, annotation: ImageAnnotation, index: ImageIndex) -> str:
        where = annotation.location
        if path := index.find(annotation.image, where) or index.find(annotation.alias, where):
            return path
        if annotation.embedded:
            return self._below(annotation.uri)
        if annotation.video_frame:
            return ""
        raise DataError(
            f"{where}: there is no image {annotation.image!r} below {self._root}{index.similar(annotation.image)}; "
            "add it, or remove its annotation"
        )


def _hash_fraction(name: str) -> float:
    """Map a name to [0, 1), so that adding images moves none of the others to another split."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="replace")).digest()[:8]) / 2**64


def _listed(names: Sequence[str]) -> str:
    more = [f"and {len(names) - MAX_LISTED} more"] if len(names) > MAX_LISTED else []
    return ", ".join([*names[:MAX_LISTED], *more])
