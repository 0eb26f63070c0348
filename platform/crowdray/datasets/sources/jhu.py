"""JHU-CROWD++: photos of crowds in all weather conditions, with the size of each head.

Layout: {train,val,test}/{images/0000.jpg, gt/0000.txt, image_labels.txt}. Each line of gt is one head,
`cx cy w h occlusion blur`; each line of image_labels.txt is one image, `id,count,scene,weather,distractor`.
"""

import re
from collections.abc import Sequence

import numpy as np

from crowdray.datasets.sources import Item
from crowdray.datasets.sources.base import AnnotatedImages, Heads, pair_items
from crowdray.datasets.sources.layout import IMAGE, files_by_name, find_root, text_lines
from crowdray.datasets.sources.matlab import as_points
from crowdray.errors import DataError

COORDINATE_BASE = 0.0
"""Integers that index pixels from 0: x_continuous = x + 0.5. Assumed; not verified on a copy."""

SPLITS = ("train", "val", "test")
HEAD_FIELDS = 6
LABELS = "image_labels.txt"


class Jhu(AnnotatedImages):
    """JHU-CROWD++ from the folder that contains its splits.

    An image's scene is its label, such as stadium, so that reports show the error of each kind of scene; images of one
    scene do not share a camera. Without labels each image is a scene of its own.
    """

    name = "jhu"
    official_splits = SPLITS

    def __init__(self, source: str, *, depth: str = "auto") -> None:
        root, files = find_root(source, "JHU-CROWD++", "train/images/0001.jpg", IMAGE, "(?:train|val|test)", "images")
        available = [split for split in SPLITS if files_by_name(files, IMAGE, split, "images")]
        super().__init__(root, available, depth, files=files)
        labels = {split: files_by_name(files, r"(?P<name>image_labels)\.txt", split) for split in available}
        self._labels = {split: uri for split, found in labels.items() for uri in found.values()}

    def split_items(self, split: str) -> list[Item]:
        """Images in the order of their numbers."""
        images = files_by_name(self._visible_files, IMAGE, split, "images")
        annotations = files_by_name(self._visible_files, r"(?P<name>[^/]+)\.txt", split, "gt")
        labels = self.cached(self._labels.get(split, ""), _read_labels)
        return pair_items(split, images, annotations, scene=lambda name: labels[name][1] if name in labels else "")

    def heads(self, item: Item) -> Heads:
        """Heads of one gt file, checked against the image's label; an empty file is an image without heads."""
        rows = [line.split() for line in text_lines(item.annotation)]
        try:
            if wrong := [row for row in rows if len(row) != HEAD_FIELDS]:
                raise ValueError(f"a line has {len(wrong[0])} fields")
            heads = as_points(np.array(rows, dtype=np.float64), COORDINATE_BASE, columns=HEAD_FIELDS)
        except ValueError as error:
            expected = "`cx cy w h occlusion blur` in each line"
            raise DataError(f"{item.annotation} does not contain {expected} ({error}); copy it again") from error
        labels = self.cached(self._labels.get(item.split, ""), _read_labels)
        if item.name in labels and labels[item.name][0] != len(heads):
            raise DataError(
                f"{item.annotation} contains {len(heads)} heads, {LABELS} says {labels[item.name][0]}; copy both again"
            )
        return heads

    def notes(self, splits: Sequence[str] = ()) -> list[str]:
        """Missing splits, and missing labels."""
        missing = [split for split in self._splits if split not in self._labels]
        notes = [f"{split}/{LABELS} is missing: each image is a scene of its own" for split in missing]
        return [*super().notes(splits), *notes]


def _read_labels(uri: str) -> dict[str, tuple[int, str]]:
    """Count and scene of each image by its id; empty without file. Only scenes may contain commas."""
    if not uri:
        return {}
    labels = {}
    for number, line in enumerate(text_lines(uri), 1):
        name, _, rest = line.partition(",")
        count, _, rest = rest.partition(",")
        scene, *others = rest.rsplit(",", 2)
        if len(others) != 2 or not re.fullmatch(r"\s*[0-9]{1,9}\s*", count):
            raise DataError(f"{uri}: line {number} is {line!r}, not `id,count,scene,weather,distractor`; copy it again")
        labels[name.strip()] = int(count), scene.strip()
    return labels
