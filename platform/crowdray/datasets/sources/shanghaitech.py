"""ShanghaiTech parts A and B: photos of crowds with all heads annotated.

Layout: part_{A,B}_final/{train,test}_data/{images/IMG_n.jpg, ground_truth/GT_IMG_n.mat}. Some copies
use part_A and ground-truth instead.
"""

import re
from pathlib import PurePosixPath
from typing import Annotated, Any

from crowdray import storage
from crowdray.datasets.sources import Item
from crowdray.datasets.sources.base import AnnotatedImages, Heads, pair_items
from crowdray.datasets.sources.layout import IMAGES, files_by_name
from crowdray.datasets.sources.matlab import as_points, read_matlab
from crowdray.errors import DataError, UserError

COORDINATE_BASE = 0.5
"""Continuous pixels, with the centre of the first pixel at 0.5: x_continuous = x - base + 0.5.

Over the 49,151 heads of part B's training images (1024x768) x spans [0.157, 1023.95] and y starts at 0.001: 45 heads
lie below 0.5, which is impossible on axes whose first pixel centre is 1, and none below 0.
"""

SPLITS = ("train", "test")
FOLDERS = ("{}", "part{}", "part_{}", "part_{}_final")
"""Folders of a part; the last one that exists is read."""
ANNOTATIONS = ("ground_truth", "ground-truth")


class ShanghaiTech(AnnotatedImages):
    """One part of ShanghaiTech, from the root of the dataset or the folder of the part."""

    official_splits = SPLITS

    def __init__(
        self, source: str, *, part: Annotated[str, "A or B, if --source contains both"] = "", depth: str = "auto"
    ) -> None:
        root, letter = _find_part(storage.resolve(source), part.upper())
        self.name = f"shanghaitech-{letter.lower()}" if letter else "shanghaitech"
        super().__init__(root, [split for split in SPLITS if _has_split(root, split)], depth)

    def split_items(self, split: str) -> list[Item]:
        """Images in the order of their numbers."""
        folder = storage.join(self._root, f"{split}_data")
        images = files_by_name(storage.join(folder, "images"), IMAGES)
        return pair_items(split, images, files_by_name(_annotation_folder(folder), (".mat",), prefix="GT_"))

    def heads(self, item: Item) -> Heads:
        """Heads of one GT_IMG_n.mat."""

        def extract(variables: dict[str, Any]) -> Heads:
            return as_points(variables["image_info"][0, 0]["location"][0, 0], COORDINATE_BASE)

        return read_matlab(item.annotation, extract, "`image_info` with `location`")


def _has_split(root: str, split: str) -> bool:
    return storage.exists(storage.join(root, f"{split}_data", "images"))


def _annotation_folder(folder: str) -> str:
    for name in ANNOTATIONS:
        if storage.exists(storage.join(folder, name)):
            return storage.join(folder, name)
    raise DataError(f"{folder} contains images but neither {' nor '.join(ANNOTATIONS)}; copy the annotations too")


def _find_part(source: str, part: str) -> tuple[str, str]:
    """Folder of the part, and its letter; "" if neither the path nor the user says it."""
    if part not in ("", "A", "B"):
        raise UserError(f"--part {part}: ShanghaiTech has parts A and B; choose one of them")
    if any(_has_split(source, split) for split in SPLITS):
        match = re.fullmatch(r"part[_-]?([AB])(_final)?", PurePosixPath(source).name, re.IGNORECASE)
        letter = match.group(1).upper() if match else part
        if part not in ("", letter):
            raise UserError(f"{source} is part {letter}, but --part is {part}; give the other folder")
        return source, letter
    found = {
        letter: root
        for letter in part or "AB"
        for root in (storage.join(source, pattern.format(letter)) for pattern in FOLDERS)
        if any(_has_split(root, split) for split in SPLITS)
    }
    if not found:
        which, wanted = f" part {part}" if part else "", f"part_{part or 'B'}_final/train_data/images"
        raise UserError(f"{source} is not ShanghaiTech{which}: {wanted} is missing; check --source")
    if len(found) > 1:
        raise UserError(f"{source} contains parts A and B; give the folder of one of them, such as {found['A']}")
    ((letter, root),) = found.items()
    return root, letter
