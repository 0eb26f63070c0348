"""NWPU-Crowd: photos of crowds of every size, some without people.

Layout: images/0001.jpg, its heads in jsons/0001.json or mats/0001.mat or both, and the lists train.txt, val.txt
and test.txt, which define the splits, with `id illumination level` per line. Labels of the test split are not public.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from crowdray import storage
from crowdray.datasets.sources import Item
from crowdray.datasets.sources.base import AnnotatedImages, Heads, pair_items
from crowdray.datasets.sources.layout import IMAGES, files_by_name, find_splits, text_lines
from crowdray.datasets.sources.matlab import as_points, read_points
from crowdray.errors import DataError

COORDINATE_BASE = 0.5
"""Continuous pixels, as in a browser. Assumed; not verified on a copy."""

SPLITS = ("train", "val")
"""Splits with labels."""


class Nwpu(AnnotatedImages):
    """NWPU-Crowd's labelled splits, from the folder that contains the lists."""

    name = "nwpu"
    official_splits = SPLITS

    def __init__(self, source: str, *, depth: str = "auto") -> None:
        super().__init__(*find_splits(source, {split: f"{split}.txt" for split in SPLITS}, "NWPU-Crowd"), depth)

    def split_items(self, split: str) -> list[Item]:
        """Images in the split's list."""
        listed = self._listed(split)
        images = self._files("images", IMAGES)
        annotations = self._files("mats", (".mat",)) | self._files("jsons", (".json",))
        if missing := [name for name in listed if name not in images and name not in annotations]:
            raise DataError(
                f"{len(missing)} images of {split}.txt and their annotations are missing, such as {missing[0]}; "
                f"copy them again, or remove them from {storage.join(self._root, f'{split}.txt')}"
            )
        items, wanted = pair_items(split, images, annotations), set(listed)
        return [item for item in items if item.name in wanted]

    def heads(self, item: Item) -> Heads:
        """Heads of the JSON file, or without one of the MATLAB file."""
        if item.annotation.lower().endswith(".json"):
            return _read_json(item.annotation)
        return read_points(item.annotation, "annPoints", COORDINATE_BASE)

    def notes(self, splits: Sequence[str] = ()) -> list[str]:
        """Missing splits, and the unlabelled test split."""
        notes = super().notes(splits)
        if storage.exists(storage.join(self._root, "test.txt")):
            notes.append(f"the {len(self._listed('test'))} images of test.txt are left out: they have no labels")
        return notes

    def _listed(self, split: str) -> list[str]:
        lines = text_lines(storage.join(self._root, f"{split}.txt"))
        return list(dict.fromkeys(line.split()[0] for line in lines))

    def _files(self, folder: str, suffixes: tuple[str, ...]) -> dict[str, str]:
        """URIs of a folder's files by name; empty if the folder does not exist."""

        uri = storage.join(self._root, folder)
        return self.cached(uri, lambda uri: files_by_name(uri, suffixes) if storage.exists(uri) else {})


def _read_json(uri: str) -> Heads:
    try:
        content: Any = json.loads(storage.read_bytes(uri))
        heads = as_points(np.array(content["points"]), COORDINATE_BASE)
        if not len(heads) == len(content["points"]) == content["human_num"]:
            raise ValueError(f"`human_num` is {content['human_num']}, but there are {len(heads)} points")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise DataError(f"{uri} does not contain `human_num` and `points` ({problem}); copy it again") from error
    return heads
