"""ShanghaiTech parts A and B: photos of crowds, each with the heads of everybody in it.

Layout: part_{A,B}_final/{train,test}_data/{images/IMG_n.jpg, ground_truth/GT_IMG_n.mat}. Copies in
circulation also say part_A, and ground-truth.
"""

import contextlib
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crowdray import storage
from crowdray.data.depth import Points, View, fit_head_scale, open_teacher
from crowdray.data.sample import Sample, encode_depth, image_size, make_sample
from crowdray.data.sources import Item
from crowdray.data.sources.layout import IMAGES, chosen_splits, natural_key, stem
from crowdray.data.sources.matlab import read_matlab
from crowdray.errors import DataError, UserError

COORDINATE_BASE = 0.5
"""Coordinates are continuous pixels already, the centre of the first pixel is 0.5: x_continuous = x - base +
0.5.

Over the 49,151 heads of part B's training images (1024x768) x spans [0.157, 1023.95] and y begins at 0.001:
45 heads lie below 0.5, where axes that begin with a pixel's centre at 1 have nothing, and none below 0.
"""

SPLITS = ("train", "test")
FOLDERS = ("part_{}_final", "part_{}", "part{}", "{}")
ANNOTATIONS = ("ground_truth", "ground-truth")


class ShanghaiTech:
    """One part of ShanghaiTech, from the root of the dataset or the folder of the part."""

    def __init__(self, source: str, *, part: str = "", depth: str = "auto") -> None:
        self._teacher = open_teacher(depth, ("points", "none"))
        self.depth_teacher, self.gpu = self._teacher.name, self._teacher.gpu
        self._root, letter = _find_part(storage.resolve(source), part.upper())
        self.name = f"shanghaitech-{letter.lower()}" if letter else "shanghaitech"
        self._there = [split for split in SPLITS if _has_split(self._root, split)]

    def items(self, splits: Sequence[str] = ()) -> list[Item]:
        """Images by number; an image without annotation, or the reverse, is an item that load() refuses."""
        return [item for split in chosen_splits(self.name, self._there, splits) for item in self._split_items(split)]

    def load(self, item: Item) -> Sample:
        """One image with its heads; each is a scene of its own, since nothing says which share a camera."""
        if item.image is None:
            raise DataError(f"{item.annotation} has no image {item.name}.jpg; copy it again or remove the annotation")
        if item.annotation is None:
            raise DataError(f"{item.image} has no annotation GT_{item.name}.mat; copy it again or remove the image")
        points = _heads(item.annotation)
        image = storage.read_bytes(item.image)
        try:
            sample = make_sample(
                name=item.name,
                split=item.split,
                scene=f"{item.split}/{item.name}",
                image=image,
                points=points,
            )
        except DataError as error:
            raise DataError(f"{item.image}: {error}") from error
        view = View(
            image=image,
            height=sample.height,
            width=sample.width,
            points=points,
            split=item.split,
            name=item.name,
            head_scale=item.head_scale,
        )
        depth = self._teacher.depth(view)
        return sample if depth is None else replace(sample, depth=encode_depth(depth))

    def notes(self, splits: Sequence[str] = ()) -> list[str]:
        """Which split this copy lacks."""
        missing = [split for split in SPLITS if split not in self._there]
        return [f"this copy has no {split} split ({split}_data is missing)" for split in missing]

    def _split_items(self, split: str) -> list[Item]:
        folder = storage.join(self._root, f"{split}_data")
        images = {stem(uri): uri for uri in storage.list_files(storage.join(folder, "images"), IMAGES)}
        annotations = {
            re.sub("^GT_", "", stem(uri)): uri for uri in storage.list_files(_annotation_folder(folder), (".mat",))
        }
        scale = 0.0
        if isinstance(self._teacher, Points):
            scale = _split_head_scale([(images[n], annotations[n]) for n in sorted(images.keys() & annotations.keys())])
        names = sorted(images.keys() | annotations.keys(), key=natural_key)
        return [Item(split, name, images.get(name), annotations.get(name), head_scale=scale) for name in names]


def _heads(uri: str) -> NDArray[np.float64]:
    def extract(variables: dict[str, Any]) -> NDArray[np.float64]:
        points = np.asarray(variables["image_info"][0, 0][0, 0][0], dtype=np.float64)
        points = points.reshape(0, 2) if points.size == 0 else points
        if points.ndim != 2 or points.shape[1] != 2:
            raise DataError(f"{uri}: `location` has shape {points.shape}, expected (heads, 2); copy it again")
        return points - COORDINATE_BASE + 0.5

    return read_matlab(uri, extract, "`image_info` with `location`")


def _split_head_scale(pairs: Sequence[tuple[str, str]]) -> float:
    """The fit over the images of a split; those that cannot be read are left to load() to report."""
    images = []
    for image, annotation in pairs:
        with contextlib.suppress(UserError):
            images.append((_heads(annotation), image_size(image)[0]))
    return fit_head_scale(images)


def _has_split(root: str, split: str) -> bool:
    return storage.exists(storage.join(root, f"{split}_data", "images"))


def _annotation_folder(folder: str) -> str:
    for name in ANNOTATIONS:
        if storage.exists(storage.join(folder, name)):
            return storage.join(folder, name)
    raise DataError(f"{folder} holds images but neither {' nor '.join(ANNOTATIONS)}; copy the annotations beside them")


def _find_part(source: str, part: str) -> tuple[str, str]:
    """The folder of the part and its letter, "" when neither the path nor the user says it."""
    if part not in ("", "A", "B"):
        raise UserError(f"ShanghaiTech has no part {part!r}; choose A or B")
    if any(_has_split(source, split) for split in SPLITS):
        said = re.fullmatch(r"part[_-]?([AB])(_final)?", PurePosixPath(source).name, re.IGNORECASE)
        letter = said.group(1).upper() if said else ""
        if part and letter and part != letter:
            raise UserError(f"{source} is part {letter}, but part {part} was asked for; give the other folder")
        return source, part or letter
    found = [
        (root, letter)
        for letter in ((part,) if part else ("A", "B"))
        for root in (storage.join(source, pattern.format(letter)) for pattern in FOLDERS)
        if any(_has_split(root, split) for split in SPLITS)
    ]
    if not found:
        wanted = f"part_{part or 'B'}_final/train_data/images"
        raise UserError(f"{source} holds no ShanghaiTech{f' part {part}' if part else ''}: no {wanted} below it")
    if len({letter for _, letter in found}) > 1:
        raise UserError(f"{source} holds parts A and B; give the folder of one of them, such as {found[0][0]}")
    return found[0]
