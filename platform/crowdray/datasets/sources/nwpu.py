"""NWPU-Crowd: photos of crowds of every size, among them some without anybody.

Layout: images/0001.jpg, its heads in jsons/0001.json or mats/0001.mat or both, and the lists train.txt, val.txt
and test.txt, which alone say where an image belongs: `id illumination level` a line. The labels of the test
split are not published.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from crowdray import storage
from crowdray.datasets.sources import Item
from crowdray.datasets.sources.base import AnnotatedImages, Heads, paired
from crowdray.datasets.sources.layout import IMAGES, by_stem, text_lines
from crowdray.datasets.sources.matlab import as_points, read_points
from crowdray.errors import DataError, UserError

COORDINATE_BASE = 0.5
"""Coordinates are continuous pixels, as a web page counts them. An assumption: no copy was at hand."""

SPLITS = ("train", "val")
"""Splits with labels."""


class Nwpu(AnnotatedImages):
    """NWPU-Crowd's labelled splits, from the folder that holds the lists."""

    name = "nwpu"
    published = SPLITS

    def __init__(self, source: str, *, depth: str = "auto") -> None:
        root = storage.resolve(source)
        there = [split for split in SPLITS if storage.exists(storage.join(root, f"{split}.txt"))]
        if not there:
            raise UserError(f"{source} is not NWPU-Crowd: it holds neither train.txt nor val.txt")
        super().__init__(root, there, depth, ("points", "none"))

    def split_items(self, split: str) -> list[Item]:
        """The images of the split's list."""
        listed = self._listed(split)
        images = self._files("images", IMAGES)
        annotations = self._files("mats", (".mat",)) | self._files("jsons", (".json",))
        lost = [name for name in listed if name not in images and name not in annotations]
        if lost:
            raise DataError(
                f"{len(lost)} images of {split}.txt are missing with their annotation, such as {lost[0]}; "
                f"copy them again, or take them out of {storage.join(self._root, f'{split}.txt')}"
            )
        return paired(
            split,
            {name: images[name] for name in listed if name in images},
            {name: annotations[name] for name in listed if name in annotations},
        )

    def heads(self, item: Item) -> Heads:
        """Heads of the JSON or MATLAB file; where both are there they have to agree in number."""
        assert item.annotation is not None
        if not item.annotation.lower().endswith(".json"):
            return read_points(item.annotation, "annPoints", COORDINATE_BASE)
        heads = _read_json(item.annotation)
        other = self._files("mats", (".mat",)).get(item.name)
        if other is not None and len(again := read_points(other, "annPoints", COORDINATE_BASE)) != len(heads):
            raise DataError(f"{item.annotation} holds {len(heads)} heads, but {other} {len(again)}; copy both again")
        return heads

    def notes(self, splits: Sequence[str] = ()) -> list[str]:
        """Missing splits, and the test split without labels."""
        notes = super().notes(splits)
        if storage.exists(storage.join(self._root, "test.txt")):
            notes.append(f"the {len(self._listed('test'))} images of test.txt are left out: they have no labels")
        return notes

    def _listed(self, split: str) -> list[str]:
        lines = text_lines(storage.join(self._root, f"{split}.txt"))
        return list(dict.fromkeys(line.split()[0] for line in lines))

    def _files(self, folder: str, suffixes: tuple[str, ...]) -> dict[str, str]:
        """URIs of a folder's files by name; none when there is no such folder."""

        def listed(place: str) -> dict[str, str]:
            return by_stem(storage.list_files(place, suffixes)) if storage.exists(place) else {}

        return self.remembered(storage.join(self._root, folder), listed)


def _read_json(uri: str) -> Heads:
    try:
        content: Any = json.loads(storage.read_bytes(uri))
        points = content["points"]
        if not isinstance(points, list) or not isinstance(content["human_num"], int):
            raise TypeError("`points` is no list or `human_num` no whole number")
        heads = as_points(np.array(points), COORDINATE_BASE)
        if len(heads) != len(points) or len(heads) != content["human_num"]:
            raise ValueError(f"`human_num` is {content['human_num']}, but {len(points)} points are there")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise DataError(f"{uri} does not hold `human_num` and `points` ({problem}); copy it again") from error
    return heads
