"""Mall: 2,000 frames of one surveillance camera at 480x640, with a region of interest and a perspective map.

Layout: frames/seq_000001.jpg .. seq_002000.jpg, mall_gt.mat, perspective_roi.mat. The first 800 frames train.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crowdray import storage
from crowdray.data.depth import Points, View, fit_head_scale, open_teacher
from crowdray.data.sample import Sample, encode_depth, encode_roi, make_sample
from crowdray.data.sources import Item
from crowdray.data.sources.layout import chosen_splits, stem
from crowdray.data.sources.matlab import read_matlab
from crowdray.errors import DataError, UserError

COORDINATE_BASE = 1.0
"""The centre of the first pixel is (1, 1), as on MATLAB's axes: x_continuous = x - base + 0.5.

The file shows it: in nine of ten frames whose heads lie on a grid, that of the screen pixels they were
clicked on, the grid begins at 0.5 to three digits, the edge of such axes.
"""

TRAIN_FRAMES = 800
"""Frames 1..800 train, the rest test, as in the dataset's paper and every one since."""

SPLITS = ("train", "test")


class Mall:
    """The Mall dataset in its official layout, under a folder or a URI."""

    name = "mall"

    def __init__(self, source: str, *, depth: str = "auto") -> None:
        self._teacher = open_teacher(depth, ("perspective", "points", "none"))
        self.depth_teacher, self.gpu = self._teacher.name, self._teacher.gpu
        self._root = _find_root(storage.resolve(source))

    def items(self, splits: Sequence[str] = ()) -> list[Item]:
        """Frames by number; a frame without annotation, or the reverse, is an item that load() refuses."""
        wanted = chosen_splits(self.name, SPLITS, splits)
        frames = {stem(uri): uri for uri in storage.list_files(storage.join(self._root, "frames"), (".jpg",))}
        annotated = {_frame_name(number) for number in range(len(self._heads))}
        scale = 0.0
        if isinstance(self._teacher, Points):
            # Training frames alone: the heads of test frames must not reach training through its depth maps.
            known = [(points, self._size[0]) for points in self._heads[:TRAIN_FRAMES]]
            scale = fit_head_scale(known, one_camera=True)
        found = []
        for name in sorted(frames.keys() | annotated):
            number = _frame_number(name, frames.get(name, name))
            split = SPLITS[number >= TRAIN_FRAMES]
            if split in wanted:
                ground_truth = storage.join(self._root, "mall_gt.mat") if name in annotated else None
                found.append(Item(split, name, frames.get(name), ground_truth, number, scale))
        return found

    def load(self, item: Item) -> Sample:
        """One frame with its heads, the region of interest and the depth of the scene."""
        if item.image is None:
            raise DataError(f"{item.annotation} annotates it, but frames/{item.name}.jpg is missing; copy it again")
        if item.annotation is None:
            raise DataError(f"{item.image} has no annotation in mall_gt.mat; remove the frame or copy that file again")
        points = self._heads[item.number] - COORDINATE_BASE + 0.5
        image = storage.read_bytes(item.image)
        sample = make_sample(
            name=item.name,
            split=item.split,
            scene=self.name,
            image=image,
            points=points,
            roi=self._roi,
            depth=self._depth(item, image),
        )
        if (sample.height, sample.width) != self._size:
            raise DataError(f"{item.image} is {(sample.height, sample.width)}, but perspective_roi.mat is {self._size}")
        return sample

    def notes(self, splits: Sequence[str] = ()) -> list[str]:
        """How many heads lie outside the region of interest: they are kept."""
        wanted = {item.number for item in self.items(splits) if item.image is not None and item.annotation is not None}
        mask = self._mask
        outside = 0
        for number in wanted:
            x, y = np.floor(self._heads[number] - COORDINATE_BASE + 0.5).astype(int).T
            outside += int((~mask[y.clip(0, mask.shape[0] - 1), x.clip(0, mask.shape[1] - 1)]).sum())
        return [f"{outside} heads lie outside the region of interest"] if outside else []

    def __getstate__(self) -> dict[str, Any]:
        # Workers parse the annotations once each; they are not worth sending.
        kept = ("_teacher", "depth_teacher", "gpu", "_root")
        return {name: value for name, value in vars(self).items() if name in kept}

    @cached_property
    def _heads(self) -> list[NDArray[np.float64]]:
        def extract(variables: dict[str, Any]) -> list[NDArray[np.float64]]:
            frames = variables["frame"][0]
            heads = [np.asarray(frame["loc"][0, 0], dtype=np.float64).reshape(-1, 2) for frame in frames]
            counts = variables["count"].ravel()
            wrong = [n + 1 for n, points in enumerate(heads) if len(points) != counts[n]]
            if wrong or len(heads) != len(counts):
                raise DataError(f"mall_gt.mat: `count` disagrees with `frame` at frames {wrong[:5]}; copy it again")
            return heads

        layout = "`frame` with `loc` for each frame, and `count`"
        return read_matlab(storage.join(self._root, "mall_gt.mat"), extract, layout)

    @cached_property
    def _maps(self) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
        def extract(variables: dict[str, Any]) -> tuple[NDArray[np.bool_], NDArray[np.float64]]:
            return variables["roi"]["mask"][0, 0] > 0, np.asarray(variables["pMapN"], dtype=np.float64)

        layout = "`roi` with `mask`, and `pMapN`"
        return read_matlab(storage.join(self._root, "perspective_roi.mat"), extract, layout)

    @property
    def _mask(self) -> NDArray[np.bool_]:
        return self._maps[0]

    @property
    def _size(self) -> tuple[int, int]:
        height, width = self._mask.shape
        return height, width

    @cached_property
    def _roi(self) -> bytes:
        return encode_roi(self._mask)

    @cached_property
    def _depths(self) -> dict[float, bytes | None]:
        return {}

    def _depth(self, item: Item, image: bytes) -> bytes | None:
        """A frame's depth; where it is the scene's it is encoded once: one fixed camera took all frames."""
        if self._teacher.per_image:
            return self._taught(item, image)
        if item.head_scale not in self._depths:
            self._depths[item.head_scale] = self._taught(item, image)
        return self._depths[item.head_scale]

    def _taught(self, item: Item, image: bytes) -> bytes | None:
        # pMapN weighs a pixel by the inverse of a person's area: it is largest far away, at the top, and
        # 1 / sqrt(pMapN) is linear in the row to 1e-8, as a person's height on a ground plane must be.
        view = View(
            image=image,
            height=self._size[0],
            width=self._size[1],
            points=np.zeros((0, 2)),
            split=item.split,
            name=item.name,
            person_size=1.0 / np.sqrt(self._maps[1]),
            head_scale=item.head_scale,
            fixed_camera=True,
        )
        depth = self._teacher.depth(view)
        return None if depth is None else encode_depth(depth)


def _find_root(source: str) -> str:
    for root in (source, storage.join(source, "mall_dataset")):
        if storage.exists(storage.join(root, "mall_gt.mat")):
            return root
    raise UserError(f"{source} is not the Mall dataset: it holds no mall_gt.mat; give the folder that does")


def _frame_name(number: int) -> str:
    return f"seq_{number + 1:06d}"


def _frame_number(name: str, uri: str) -> int:
    digits = name.removeprefix("seq_")
    if not digits.isdecimal():
        raise DataError(f"{uri} is not named like seq_000001.jpg; move it out of frames/")
    return int(digits) - 1
