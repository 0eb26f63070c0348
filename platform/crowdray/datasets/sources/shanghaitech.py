"""ShanghaiTech parts A and B: photos of crowds with all heads annotated.

Layout: part_{A,B}_final/{train,test}_data/{images/IMG_n.jpg, ground_truth/GT_IMG_n.mat}. Some copies
use part_A and ground-truth instead, and a struct where the published files have a cell with a struct.
"""

import re
from pathlib import PurePosixPath
from typing import Annotated, Any

from crowdray import storage
from crowdray.datasets.sources import Item
from crowdray.datasets.sources.base import AnnotatedImages, Heads, pair_items
from crowdray.datasets.sources.layout import IMAGE, files_by_name, find_roots
from crowdray.datasets.sources.matlab import as_points, read_matlab, struct_field, unwrapped
from crowdray.errors import UserError

COORDINATE_BASE = 0.5
"""Continuous pixels, with the centre of the first pixel at 0.5: x_continuous = x - base + 0.5.

Over the 49,151 heads of part B's training images (1024x768) x spans [0.157, 1023.95] and y starts at 0.001: 45 heads
lie below 0.5, which is impossible on axes whose first pixel centre is 1, and none below 0.
"""

SPLITS = ("train", "test")
EXAMPLE = "part_B_final/train_data/images/IMG_1.jpg"


class ShanghaiTech(AnnotatedImages):
    """One part of ShanghaiTech, from the root of the dataset or the folder of the part."""

    official_splits = SPLITS

    def __init__(
        self, source: str, *, part: Annotated[str, "A or B, if --source contains both"] = "", depth: str = "auto"
    ) -> None:
        root, files, letter = _find_part(storage.resolve(source), part.upper())
        self.name = f"shanghaitech-{letter.lower()}" if letter else "shanghaitech"
        available = [split for split in SPLITS if files_by_name(files, IMAGE, f"{split}_data", "images")]
        super().__init__(root, available, depth, files=files)

    def split_items(self, split: str) -> list[Item]:
        """Images in the order of their numbers."""
        images = files_by_name(self._visible_files, IMAGE, f"{split}_data", "images")
        annotations = r"GT_(?P<name>[^/]+)\.mat"
        return pair_items(
            split, images, files_by_name(self._visible_files, annotations, f"{split}_data", "ground[-_]truth")
        )

    def heads(self, item: Item) -> Heads:
        """Heads of one GT_IMG_n.mat."""

        def extract(variables: dict[str, Any]) -> Heads:
            info = unwrapped(variables["image_info"])
            count = ("number", struct_field(info, "number")) if "number" in info.dtype.names else None
            return as_points(struct_field(info, "location"), COORDINATE_BASE, count=count)

        return read_matlab(item.annotation, extract, "`image_info` with `location`")


def _find_part(source: str, part: str) -> tuple[str, list[str], str]:
    """Folder of the part, its files, and its letter; "" if neither the path nor the user says it."""
    if part not in ("", "A", "B"):
        raise UserError(f"--part {part}: ShanghaiTech has parts A and B; choose one of them")
    roots = find_roots(source, "ShanghaiTech", EXAMPLE, IMAGE, "(?:train|test)_data", "images")
    letters = {root: _letter(root) for root in roots}
    chosen = [root for root, letter in letters.items() if not part or letter in ("", part)]
    if not chosen:
        root, letter = next(iter(letters.items()))
        raise UserError(f"{root} is part {letter}, but --part is {part}; give the other folder")
    if len(chosen) > 1:
        what = "parts A and B" if {letters[root] for root in chosen} == {"A", "B"} else "a part more than once"
        raise UserError(f"{source} contains {what}, see {', '.join(chosen)}; set --source to one")
    return chosen[0], roots[chosen[0]], letters[chosen[0]] or part


def _letter(root: str) -> str:
    match = re.fullmatch(r"(?:part[_-]?|SHH?)?([AB])(?:_final)?", PurePosixPath(root).name, re.IGNORECASE)
    return match.group(1).upper() if match else ""
