"""NWPU-Crowd: photos of crowds of every size, some without people.

Layout: images/0001.jpg, or as unpacked images_part1 to images_part5, its heads in jsons/0001.json or mats/0001.mat or
both, and the lists train.txt, val.txt and test.txt, which define the splits, with `id illumination level` per line.
Labels of the test split are not public.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from crowdray import storage
from crowdray.datasets.sources import Item
from crowdray.datasets.sources.base import AnnotatedImages, Heads, pair_items
from crowdray.datasets.sources.layout import IMAGE, files_by_name, find_root, text_lines
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
        root, files = find_root(source, "NWPU-Crowd", "train.txt", r"(?:train|val)\.txt")
        self._lists = files_by_name(files, r"(?P<name>train|val|test)\.txt", lower=True)
        super().__init__(root, [split for split in SPLITS if split in self._lists], depth, files=files)

    def split_items(self, split: str) -> list[Item]:
        """Images in the split's list."""
        listed = self._listed(split)
        images = files_by_name(self._visible_files, IMAGE, r"images(?:_part\d+)?")
        annotations = files_by_name(self._visible_files, r"(?P<name>[^/]+)\.mat", "mats")
        annotations |= files_by_name(self._visible_files, r"(?P<name>[^/]+)\.json", "jsons")
        if missing := [name for name in listed if name not in images and name not in annotations]:
            raise DataError(
                f"{len(missing)} images of {split}.txt and their annotations are missing, such as {missing[0]}; "
                f"copy them again, or remove them from {self._lists[split]}"
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
        if "test" in self._lists:
            notes.append(f"the {len(self._listed('test'))} images of test.txt are left out: they have no labels")
        return notes

    def _listed(self, split: str) -> list[str]:
        return list(dict.fromkeys(line.split()[0] for line in text_lines(self._lists[split])))


def _read_json(uri: str) -> Heads:
    try:
        content: Any = json.loads(storage.read_bytes(uri))
        heads = as_points(np.array(content["points"]), COORDINATE_BASE, count=("human_num", content["human_num"]))
    except DataError as error:
        raise DataError(f"{uri}: {error}") from error
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise DataError(f"{uri} does not contain `human_num` and `points` ({problem}); copy it again") from error
    return heads
