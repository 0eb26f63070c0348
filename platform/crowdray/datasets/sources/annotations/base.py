"""A folder of images with annotations that name them: what the formats of people's own data have in common.

Images lie anywhere below the folder. An image that no annotation names is left out; one that is named without a
head is an empty scene.
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
from crowdray.datasets.depth import Points, View, fit_head_scale, open_teacher
from crowdray.datasets.sources import Item
from crowdray.datasets.sources.annotations.annotation import ImageAnnotation, Rules, any_region
from crowdray.datasets.sources.annotations.images import (
    ENDINGS,
    Names,
    is_hidden,
    split_among,
    split_and_scene,
    upright,
    upright_size,
)
from crowdray.datasets.sources.layout import chosen_splits, natural_key
from crowdray.errors import DataError, UserError

SPLITS = ("train", "val", "test")
MOST_LISTED = 3
"""Names that a message gives as examples."""


class AnnotatedFolder:
    """Images under a folder or a URI, and annotation files of one format; subclasses read those."""

    kind: ClassVar[str]
    """What the format is called on the command line."""
    endings: ClassVar[tuple[str, ...]]
    """Endings of its files."""

    def __init__(
        self,
        source: str,
        *,
        annotations: Annotated[
            tuple[str, ...], "annotation files, from --source on; by default the only one there"
        ] = (),
        label: Annotated[
            tuple[str, ...], "labels or categories that mark heads; all by default, if there is only one"
        ] = (),
        boxes: Annotated[
            Literal["centre"] | None, "take the centre of each box for a head; by default boxes are refused"
        ] = None,
        test_fraction: Annotated[float, "share of the images that are kept for testing, drawn by name"] = 0.0,
        depth: str = "auto",
    ) -> None:
        if not 0 <= test_fraction < 1:
            raise UserError(
                f"--test-fraction is {test_fraction}; give a share of the images from 0 to below 1, such as 0.2"
            )
        if boxes not in (None, "centre"):
            raise UserError(f"--boxes {boxes}: boxes can give their centre only; give --boxes centre, or leave it out")
        self._teacher = open_teacher(depth, ("points", "none"))
        self.depth_teacher, self.gpu = self._teacher.name, self._teacher.gpu
        self._root = storage.resolve(source)
        # Its counter will be called after it, which not every name of a folder is fit for.
        self.name = re.sub(r"[^\w.-]+", "-", PurePosixPath(self._root).name).strip("-.") or self.kind
        self._rules = Rules(tuple(label), boxes)
        self._test_fraction = test_fraction
        if not self._images:
            raise UserError(f"{self._root} holds no image; give the folder below which the images lie as --source")
        self._annotations = self._find_annotations(annotations)

    def items(self, splits: Sequence[str] = ()) -> list[Item]:
        """The images that an annotation names, in natural order; one that is missing is an item that load() refuses."""
        self._check_labels()
        found = []
        for number, marks in enumerate(self._marks):
            if not marks.left_out:
                image, _ = self._found[number]
                uri = storage.join(self._root, image) if image else None
                found.append(Item(self._splits[number], image or marks.image, uri, marks.file, number))
        if not found:
            raise DataError(f"{_listed(self._annotations)} annotates no image that can be used; export it again")
        wanted = chosen_splits(self.name, self._there, splits)
        found.sort(key=lambda item: (SPLITS.index(item.split), natural_key(item.name)))
        scales = {split: self._head_scale([item for item in found if item.split == split]) for split in wanted}
        return [replace(item, head_scale=scales[item.split]) for item in found if item.split in wanted]

    def load(self, item: Item) -> Sample:
        """One image with its heads, its region of interest where one was drawn, and the depth of the scene."""
        marks = self._marks_of(item)
        if item.image is None or marks.problem:
            raise DataError(marks.problem or self._found[item.number][1])
        image = upright(self._image(item), marks.size)
        _, place = split_and_scene(item.name)
        try:
            sample = make_sample(
                name=item.name,
                split=item.split,
                scene=marks.scene or place or f"{item.split}/{item.name}",
                image=image,
                points=np.array(marks.heads).reshape(-1, 2),
            )
        except DataError as error:
            raise DataError(f"{item.image}: {error}") from error
        height, width = sample.height, sample.width
        if marks.size and marks.size != (height, width):
            annotated = f"{marks.size[1]}x{marks.size[0]} ({marks.place})"
            raise DataError(
                f"{item.image} is {width}x{height}, but it was annotated at {annotated}; put the annotated image there"
            )
        roi = encode_roi(any_region(marks.regions, height, width)) if marks.regions else None
        view = View(
            image=image,
            height=height,
            width=width,
            points=sample.points,
            split=item.split,
            name=item.name,
            head_scale=item.head_scale,
        )
        depth = self._teacher.depth(view)
        return replace(sample, roi=roi, depth=None if depth is None else encode_depth(depth))

    def notes(self, splits: Sequence[str] = ()) -> list[str]:
        """Images that no annotation names, what else was left out, and that there is no test split."""
        aside: Counter[str] = Counter()
        for marks in self._marks:
            aside.update({marks.left_out: 1} if marks.left_out else marks.aside)
        notes = [f"{count} {what} are left out" for what, count in sorted(aside.items())]
        named = {image for image, _ in self._found if image}
        if unnamed := [path for path in self._images if path not in named]:
            notes.append(f"{len(unnamed)} images that no annotation names are left out: {_listed(unnamed)}")
        if not splits and "test" not in self._there:
            larger = "give a larger" if self._test_fraction else "give a share, such as 0.2, as"
            notes.append(f"no image is kept for testing; {larger} --test-fraction")
        return notes

    def _read(self, uri: str) -> Iterable[ImageAnnotation]:
        """What one annotation file says, image by image; a DataError when the file as a whole cannot be used."""
        raise NotImplementedError

    def _split_of(self, file: str) -> str:
        """The split that an annotation file is called after: one alone may be called anything."""
        return split_among(self._below(file)) if len(self._annotations) > 1 else ""

    def _below(self, uri: str) -> str:
        """A URI as a path below the root."""
        return uri.removeprefix(self._root).lstrip("/")

    def _marks_of(self, item: Item) -> ImageAnnotation:
        return self._marks[item.number]

    def _image(self, item: Item) -> bytes:
        assert item.image is not None
        return storage.read_bytes(item.image)

    def _find_annotations(self, given: Sequence[str]) -> list[str]:
        """URIs of the annotation files: those given, or the one file of the format at the root, else below it."""
        if given:
            return [self._given(path) for path in given]
        there = [path for path in self._files if path.lower().endswith(self.endings)]
        nearest = [path for path in there if PurePosixPath(path).parent.as_posix() in (".", "annotations")] or there
        if not nearest:
            raise UserError(f"{self._root} holds no {self.endings[0]} file; say where it lies with --annotations")
        if len(nearest) > 1:
            raise UserError(
                f"{self._root} holds several {self.endings[0]} files: {_listed(nearest)}; "
                "name one or more with --annotations"
            )
        return [storage.join(self._root, nearest[0])]

    def _given(self, path: str) -> str:
        """An annotation file from the command line: below the source, or else a path or URI of its own."""
        for uri in (path if "://" in path or path.startswith("/") else storage.join(self._root, path), path):
            if storage.exists(uri):
                return storage.resolve(uri)
        raise UserError(f"--annotations {path}: there is no such file, neither as it stands nor below {self._root}")

    def _check_labels(self) -> None:
        """Refuse to count what may be no heads: several labels when none was chosen, or one that is not there."""
        labels: Counter[str] = Counter()
        for marks in self._marks:
            labels.update(marks.labels)
        there = [f"{label!r} ({count})" for label, count in sorted(labels.items())]
        if not self._rules.labels and len(labels) > 1:
            raise UserError(
                f"{_listed(self._annotations)} marks heads by several labels: {', '.join(there)}; "
                "name those to count with --label"
            )
        missing = [label for label in self._rules.labels if label not in labels]
        others = sorted({what for marks in self._marks for what in marks.aside})
        if missing and others:
            raise UserError(
                f"--label {missing[0]}: no head is labelled so; there are {', '.join([*there, *others])}; correct it"
            )

    def _head_scale(self, items: Sequence[Item]) -> float:
        """For the depth teacher `points`: the fit over one split; what cannot be read is left to load() to report."""
        if not isinstance(self._teacher, Points):
            return 0.0
        images = []
        for item in items:
            with contextlib.suppress(UserError):
                marks = self._marks[item.number]
                if item.image and len(marks.heads) > 1:
                    images.append((np.array(marks.heads), (marks.size or upright_size(item.image))[0]))
        return fit_head_scale(images)

    def __getstate__(self) -> dict[str, Any]:
        # Workers parse the annotations once each; what was parsed and listed here is not worth sending.
        return {key: value for key, value in vars(self).items() if key not in _CACHED}

    @cached_property
    def _files(self) -> list[str]:
        return [file.name for file in storage.find_files(self._root) if not is_hidden(file.name)]

    @cached_property
    def _images(self) -> list[str]:
        return [path for path in self._files if path.lower().endswith(ENDINGS)]

    @cached_property
    def _marks(self) -> list[ImageAnnotation]:
        return [marks for uri in self._annotations for marks in self._read(uri)]

    @cached_property
    def _found(self) -> list[tuple[str, str]]:
        """For each of the marks the path of its image, or "" and what is wrong."""
        names = Names(self._images)
        found: list[tuple[str, str]] = []
        first: dict[str, ImageAnnotation] = {}
        for marks in self._marks:
            try:
                image = names.find(marks.image, marks.place) or names.find(marks.alias, marks.place)
                if image is None and marks.embedded:
                    image = self._below(marks.file)
                if image is None:
                    raise DataError(
                        f"{marks.place}: there is no image {marks.image!r} below {self._root}; "
                        "put it there, or remove its annotation"
                    )
                if not marks.left_out and (before := first.setdefault(image, marks)) is not marks:
                    raise DataError(f"{image} is annotated twice: {before.place}, and {marks.place}; keep one of them")
                found.append((image, ""))
            except DataError as error:
                found.append(("", str(error)))
        return found

    @cached_property
    def _splits(self) -> list[str]:
        """The split of each of the marks: as the file says, else as the folders of the image or the file are called."""
        splits: list[str] = []
        for marks, (image, _) in zip(self._marks, self._found, strict=True):
            splits.append(marks.split or split_and_scene(image)[0] or self._split_of(marks.file))
        if self._test_fraction and "test" in splits:
            raise UserError(
                f"--test-fraction {self._test_fraction}: {self.name} has a test split already; leave it out"
            )
        names = [image or marks.image for marks, (image, _) in zip(self._marks, self._found, strict=True)]
        return [
            "test" if split in ("", "train") and _draw(name) < self._test_fraction else split or "train"
            for name, split in zip(names, splits, strict=True)
        ]

    @property
    def _there(self) -> list[str]:
        there = {split for split, marks in zip(self._splits, self._marks, strict=True) if not marks.left_out}
        return [split for split in SPLITS if split in there]


_CACHED = {name for name, value in vars(AnnotatedFolder).items() if isinstance(value, cached_property)}


def _draw(name: str) -> float:
    """A number in [0, 1) that depends on nothing but the name: new images leave the old ones where they are."""
    return int.from_bytes(hashlib.sha256(name.encode(errors="replace")).digest()[:8]) / 2**64


def _listed(names: Sequence[str]) -> str:
    more = [f"and {len(names) - MOST_LISTED} more"] if len(names) > MOST_LISTED else []
    return ", ".join([*names[:MOST_LISTED], *more])
