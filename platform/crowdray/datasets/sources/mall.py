"""Mall: 2,000 frames of one surveillance camera at 480x640.

Layout: frames/seq_000001.jpg .. seq_002000.jpg, mall_gt.mat, perspective_roi.mat with a region of interest and a
perspective map. The first 800 frames are for training.
"""

import re
from typing import Any

import numpy as np

from crowdray import storage
from crowdray.datasets.sources import Item
from crowdray.datasets.sources.base import AnnotatedImages, Camera, Heads
from crowdray.datasets.sources.layout import IMAGE, files_by_name, find_root
from crowdray.datasets.sources.matlab import (
    as_frames,
    as_map,
    as_sizes,
    frame_heads,
    read_matlab,
    struct_field,
    unwrapped,
)
from crowdray.errors import DataError

COORDINATE_BASE = 1.0
"""The centre of the first pixel is (1, 1), as on MATLAB's axes: x_continuous = x - base + 0.5.

The file confirms it: in nine of ten frames the heads lie on the grid of the screen pixels where they were clicked, and
that grid starts at 0.5 to three digits, the edge of such axes.
"""

TRAIN_FRAMES = 800
"""Frames 1 to 800 are for training, the rest for testing, as in the dataset's paper and all later ones."""

SPLITS = ("train", "test")
GROUND_TRUTH, MAPS = "mall_gt", "perspective_roi"
MATLAB_FILES = rf"(?P<name>{GROUND_TRUTH}|{MAPS})\.mat"


class Mall(AnnotatedImages):
    """The Mall dataset in its official layout, under a folder or a URI."""

    name = "mall"
    official_splits = SPLITS
    fixed_cameras = True

    def __init__(self, source: str, *, depth: str = "auto") -> None:
        root, files = find_root(source, "the Mall dataset", f"mall_dataset/{GROUND_TRUTH}.mat", rf"{GROUND_TRUTH}\.mat")
        super().__init__(root, SPLITS, depth, files=files, perspective=True)
        found = files_by_name(files, MATLAB_FILES, lower=True)
        self._ground_truth = found[GROUND_TRUTH]
        self._map_file = found.get(MAPS, storage.join(root, f"{MAPS}.mat"))

    def split_items(self, split: str) -> list[Item]:
        """Frames in the order of their numbers."""
        files = files_by_name(self._visible_files, IMAGE, "frames", lower=True)
        if unexpected := [uri for name, uri in files.items() if not re.fullmatch(r"seq_\d+", name)]:
            raise DataError(f"{unexpected[0]} is not named like seq_000001.jpg; move it out of frames/")
        frames = {int(name.removeprefix("seq_")) - 1: uri for name, uri in files.items()}
        annotated = len(self.cached(self._ground_truth, _read_frames))
        found = []
        for number in sorted(frames.keys() | set(range(annotated))):
            if split == SPLITS[number >= TRAIN_FRAMES]:
                name, annotation = f"seq_{number + 1:06d}", self._ground_truth if number < annotated else ""
                found.append(Item(split, name, frames.get(number, ""), annotation, number, self.name))
        return found

    def heads(self, item: Item) -> Heads:
        """Heads of one frame of mall_gt.mat."""
        return frame_heads(item.annotation, self.cached(item.annotation, _read_frames), item.number)

    def camera(self, item: Item) -> Camera:
        """Region of interest, and depth from the perspective map."""
        return self.cached(self._map_file, self._read_camera)

    def _read_camera(self, uri: str) -> Camera:
        def extract(variables: dict[str, Any]) -> Camera:
            # pMapN weights a pixel by the inverse of a person's area: it is largest at the top, far away, and
            # 1 / sqrt(pMapN) is linear in the row to 1e-8, like a person's height on a ground plane.
            depth = np.sqrt(as_sizes(variables["pMapN"])) if self.uses_perspective else None
            return Camera(uri, as_map(struct_field(variables["roi"], "mask")) > 0, depth)

        return read_matlab(uri, extract, "`roi` with `mask`, and `pMapN`")


def _read_frames(uri: str) -> list[Heads | str]:
    def extract(variables: dict[str, Any]) -> list[Heads | str]:
        counts = np.ravel(unwrapped(variables["count"]))
        frames = as_frames(variables["frame"], COORDINATE_BASE, counts=counts)
        if len(frames) != len(counts):
            raise DataError(f"`frame` has {len(frames)} frames, but `count` {len(counts)}; copy it again")
        return frames

    return read_matlab(uri, extract, "`frame` with `loc` for each frame, and `count`")
