"""A folder of images with annotation files: what all formats of users' own data share.

Images lie anywhere below the folder. An image that no annotation names is left out; one that is named without a head
is an empty scene.
"""

import contextlib
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import PurePosixPath
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from crowdray import storage
from crowdray.data.sample import Sample, encode_depth, encode_roi, make_sample
from crowdray.datasets.depth import open_teacher
from crowdray.datasets.depth.analytic import PointSpacingDepth, fit_head_scale
from crowdray.datasets.depth.teacher import DepthInput
from crowdray.datasets.sources import Item
from crowdray.datasets.sources.annotations.annotation import HeadRules, ImageAnnotation, roi_mask
from crowdray.datasets.sources.annotations.images import (
    ENDINGS,
    ImageIndex,
    is_hidden,
    split_and_scene,
    split_in_path,
    upright,
    upright_size,
)
from crowdray.datasets.sources.layout import chosen_splits, natural_key
from crowdray.errors import DataError, UserError

SPLITS = ("train", "val", "test")
MAX_LISTED = 3
"""Number of names that a message lists as examples."""


class AnnotatedFolder:
    """Images below a folder or URI and annotation files of one format, which subclasses parse."""

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
            Literal["centre"] | None, "count the centre of each box as a head; default: boxes are rejected"
        ] = None,
        test_fraction: Annotated[float, "fraction of the images for the test split, chosen by name"] = 0.0,
        depth: str = "auto",
    ) -> None:
        if not 0 <= test_fraction < 1:
            raise UserError(f"--test-fraction is {test_fraction}; use a fraction in [0, 1), such as 0.2")
        self.teacher = open_teacher(depth, ("points", "none"))
        self.depth_teacher, self.gpu = self.teacher.name, self.teacher.gpu
        self._root = storage.resolve(source)
        # The registered model is named after it, so characters that MLflow rejects are replaced.
        self.name = re.sub(r"[^\w.-]+", "-", PurePosixPath(self._root).name).strip("-.") or "images"
        self._rules = HeadRules(tuple(label), boxes)
        self._test_fraction = test_fraction
        if not self._images:
            raise UserError(f"{self._root} contains no image; set --source to a folder above the images")
        self._annotation_files = self._find_annotations(annotations)

    def items(self, splits: Sequence[str] = ()) -> list[Item]:
        """Return the annotated images in natural order; load() raises for those that are missing."""
        self._check_labels()
        found = []
        for number, one in enumerate(self._annotations):
            if not one.skip_reason:
                uri = storage.join(self._root, one.path) if one.path else ""
                found.append(Item(one.split, one.path or one.image, uri, one.uri, number))
        if not found:
            raise DataError(f"{_listed(self._annotation_files)} has no usable annotated image; export it again")
        wanted = chosen_splits(self.name, self._available, splits)
        found.sort(key=lambda item: (SPLITS.index(item.split), natural_key(item.name)))
        scales = {split: self._head_scale([item for item in found if item.split == split]) for split in wanted}
        return [replace(item, head_scale=scales[item.split]) for item in found if item.split in wanted]

    def load(self, item: Item) -> Sample:
        """Load one image with its heads, region of interest and depth."""
        annotation = self._annotation_of(item)
        if annotation.problem:
            raise DataError(annotation.problem)
        image = upright(self._image(item), annotation.size)
        _, scene = split_and_scene(item.name)
        try:
            sample = make_sample(
                name=item.name,
                split=item.split,
                scene=annotation.scene or scene or f"{item.split}/{item.name}",
                image=image,
                points=np.array(annotation.heads).reshape(-1, 2),
            )
        except DataError as error:
            raise DataError(f"{item.image}: {error}") from error
        height, width = sample.height, sample.width
        if annotation.size and annotation.size != (height, width):
            annotated = f"{annotation.size[1]}x{annotation.size[0]} ({annotation.location})"
            raise DataError(
                f"{item.image} is {width}x{height}, but was annotated at {annotated}; replace it by the annotated image"
            )
        roi = encode_roi(roi_mask(annotation.roi_polygons, height, width)) if annotation.roi_polygons else None
        depth = self.teacher.depth(DepthInput(sample=sample, head_scale=item.head_scale))
        return replace(sample, roi=roi, depth=None if depth is None else encode_depth(depth))

    def notes(self, splits: Sequence[str] = ()) -> list[str]:
        """Return notes on images and shapes that are left out, and on a missing test split."""
        ignored: Counter[str] = Counter()
        for annotation in self._annotations:
            ignored.update({annotation.skip_reason: 1} if annotation.skip_reason else annotation.ignored)
        notes = [f"{count} {description} are left out" for description, count in sorted(ignored.items())]
        named = {annotation.path for annotation in self._annotations}
        if unnamed := [path for path in self._images if path not in named]:
            notes.append(f"{len(unnamed)} images without annotation are left out: {_listed(unnamed)}")
        if not splits and "test" not in self._available:
            fix = "increase --test-fraction" if self._test_fraction else "set --test-fraction, such as 0.2"
            notes.append(f"there is no test split; {fix}")
        return notes

    def _read(self, uri: str) -> Iterable[ImageAnnotation]:
        """Parse one annotation file, image by image; DataError if the whole file is unusable."""
        raise NotImplementedError

    def _split_of(self, file: str) -> str:
        """Return the split in the name of an annotation file, if there are several files."""
        several = len(self._annotation_files) > 1 and not self.per_image
        return split_in_path(self._below(file)) if several else ""

    def _below(self, uri: str) -> str:
        """Return a URI as a path relative to the root."""
        return uri.removeprefix(self._root).lstrip("/")

    def _annotation_of(self, item: Item) -> ImageAnnotation:
        return self._annotations[item.number]

    def _image(self, item: Item) -> bytes:
        return storage.read_bytes(item.image)

    def _find_annotations(self, given: Sequence[str]) -> list[str]:
        """Return URIs of the given annotation files, else of the only one below the root, or of all if per image."""
        if given:
            return [self._resolve_annotation(path) for path in given]
        found = [path for path in self._files if path.lower().endswith(self.endings)]
        nearest = [path for path in found if PurePosixPath(path).parent.as_posix() in (".", "annotations")] or found
        if not nearest:
            raise UserError(f"{self._root} contains no {self.endings[0]} file; set its path with --annotations")
        if self.per_image:
            return [storage.join(self._root, path) for path in found]
        if len(nearest) > 1:
            raise UserError(
                f"{self._root} contains several {self.endings[0]} files: {_listed(nearest)}; "
                "select one or more with --annotations"
            )
        return [storage.join(self._root, nearest[0])]

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

    def _head_scale(self, items: Sequence[Item]) -> float:
        """Fit the head scale of one split for the depth teacher `points`; load() reports unreadable images."""
        if not isinstance(self.teacher, PointSpacingDepth):
            return 0.0
        images = []
        for item in items:
            annotation = self._annotations[item.number]
            with contextlib.suppress(UserError):
                if item.image and len(annotation.heads) > 1:
                    images.append((np.array(annotation.heads), (annotation.size or upright_size(item.image))[0]))
        return fit_head_scale(images)

    def __getstate__(self) -> dict[str, Any]:
        # Each worker parses the annotations itself: cheaper than sending them.
        return {key: value for key, value in vars(self).items() if key not in _CACHED}

    @cached_property
    def _files(self) -> list[str]:
        return [file.name for file in storage.find_files(self._root) if not is_hidden(file.name)]

    @cached_property
    def _images(self) -> list[str]:
        return [path for path in self._files if path.lower().endswith(ENDINGS)]

    @cached_property
    def _annotations(self) -> list[ImageAnnotation]:
        """All annotations with their images and splits; problems of one are raised when it is loaded."""
        annotations = [annotation for uri in self._annotation_files for annotation in self._read(uri)]
        index, first = ImageIndex(self._images), dict[str, ImageAnnotation]()
        for annotation in annotations:
            with annotation.capture_error():
                path = self._find_image(annotation, index)
                if not annotation.skip_reason and (other := first.setdefault(path, annotation)) is not annotation:
                    raise DataError(
                        f"{path} is annotated twice: {other.location} and {annotation.location}; keep one of them"
                    )
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
        raise DataError(
            f"{where}: there is no image {annotation.image!r} below {self._root}; add it, or remove its annotation"
        )

    @property
    def _available(self) -> list[str]:
        available = {annotation.split for annotation in self._annotations if not annotation.skip_reason}
        return [split for split in SPLITS if split in available]


_CACHED = {name for name, value in vars(AnnotatedFolder).items() if isinstance(value, cached_property)}


def _hash_fraction(name: str) -> float:
    """Map a name to [0, 1), so that adding images moves none of the others to another split."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="replace")).digest()[:8]) / 2**64


def _listed(names: Sequence[str]) -> str:
    more = [f"and {len(names) - MAX_LISTED} more"] if len(names) > MAX_LISTED else []
    return ", ".join([*names[:MAX_LISTED], *more])
