"""Mall: 2,000 frames of one surveillance camera at 480x640.

Layout: frames/seq_000001.jpg .. seq_002000.jpg, mall_gt.mat, perspective_roi.mat with a region of interest and a
perspective map. The first 800 frames are for training.
"""

from typing import Any

import numpy as np

from crowdray import storage
from crowdray.datasets.sources import Item
from crowdray.datasets.sources.base import AnnotatedImages, Camera, Heads
from crowdray.datasets.sources.layout import files_by_name
from crowdray.datasets.sources.matlab import as_map, as_points, as_sizes, read_matlab
from crowdray.errors import DataError, UserError

COORDINATE_BASE = 1.0
"""The centre of the first pixel is (1, 1), as on MATLAB's axes: x_continuous = x - base + 0.5.

The file confirms it: in nine of ten frames the heads lie on the grid of the screen pixels where they were clicked, and
that grid starts at 0.5 to three digits, the edge of such axes.
"""

TRAIN_FRAMES = 800
"""Frames 1 to 800 are for training, the rest for testing, as in the dataset's paper and all later ones."""

SPLITS = ("train", "test")


class Mall(AnnotatedImages):
    """The Mall dataset in its official layout, under a folder or a URI."""

    name = "mall"
    official_splits = SPLITS
    fixed_cameras = True

    def __init__(self, source: str, *, depth: str = "auto") -> None:
        super().__init__(_find_root(storage.resolve(source)), SPLITS, depth, perspective=True)
        self._ground_truth = storage.join(self._root, "mall_gt.mat")

    def split_items(self, split: str) -> list[Item]:
        """Frames in the order of their numbers."""
        files = files_by_name(storage.join(self._root, "frames"), (".jpg",), prefix="seq_")
        if unexpected := [uri for digits, uri in files.items() if not digits.isdecimal()]:
            raise DataError(f"{unexpected[0]} is not named like seq_000001.jpg; move it out of frames/")
        frames = {int(digits) - 1: uri for digits, uri in files.items()}
        annotated = len(self.cached(self._ground_truth, _read_heads))
        found = []
        for number in sorted(frames.keys() | set(range(annotated))):
            if split == SPLITS[number >= TRAIN_FRAMES]:
                name, annotation = f"seq_{number + 1:06d}", self._ground_truth if number < annotated else ""
                found.append(Item(split, name, frames.get(number, ""), annotation, number, self.name))
        return found

    def heads(self, item: Item) -> Heads:
        """Heads of one frame of mall_gt.mat."""
        return self.cached(self._ground_truth, _read_heads)[item.number]

    def camera(self, item: Item) -> Camera:
        """Region of interest, and depth from the perspective map."""
        return self.cached(storage.join(self._root, "perspective_roi.mat"), self._read_camera)

    def _read_camera(self, uri: str) -> Camera:
        def extract(variables: dict[str, Any]) -> Camera:
            # pMapN weights a pixel by the inverse of a person's area: it is largest at the top, far away, and
            # 1 / sqrt(pMapN) is linear in the row to 1e-8, like a person's height on a ground plane.
            depth = np.sqrt(as_sizes(variables["pMapN"])) if self.uses_perspective else None
            return Camera(uri, as_map(variables["roi"]["mask"][0, 0]) > 0, depth)

        return read_matlab(uri, extract, "`roi` with `mask`, and `pMapN`")


def _read_heads(uri: str) -> list[Heads]:
    def extract(variables: dict[str, Any]) -> list[Heads]:
        heads = [as_points(frame["loc"][0, 0], COORDINATE_BASE) for frame in variables["frame"][0]]
        counts = variables["count"].ravel()
        wrong = [n + 1 for n, (points, count) in enumerate(zip(heads, counts, strict=False)) if len(points) != count]
        if wrong or len(heads) != len(counts):
            raise DataError(f"{uri}: `count` disagrees with `frame` at frames {wrong[:5]}; copy it again")
        return heads

    return read_matlab(uri, extract, "`frame` with `loc` for each frame, and `count`")


def _find_root(source: str) -> str:
    for root in (source, storage.join(source, "mall_dataset")):
        if storage.exists(storage.join(root, "mall_gt.mat")):
            return root
    raise UserError(f"{source} is not the Mall dataset: mall_gt.mat is missing; give the folder that contains it")
