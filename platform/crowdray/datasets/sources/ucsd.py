"""UCSD pedestrians: ten clips of 200 grey frames of one surveillance camera at 158x238.

Layout: ucsdpeds/vidf/vidf1_33_00X.y/vidf1_33_00X_fNNN.png, and in vidf-cvpr/ vidf1_33_00X_frame_full.mat,
vidf1_33_roi_mainwalkway.mat, vidf1_33_dmap3.mat. Clips count from 0, frames from 1; some clips are
not annotated.
"""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crowdray import storage
from crowdray.datasets.sources import Item
from crowdray.datasets.sources.base import AnnotatedImages, Camera, Heads
from crowdray.datasets.sources.layout import IMAGE, files_by_name, not_found, visible_files
from crowdray.datasets.sources.matlab import (
    as_frames,
    as_map,
    as_sizes,
    frame_heads,
    read_matlab,
    struct_field,
    unwrapped,
)

COORDINATE_BASE = 1.0
"""The centre of the first pixel is (1, 1), as on MATLAB's axes.

Not verified on a copy. A public converter reports that x - 0.5, as here, reproduces the dataset's own count inside the
region in 1,649 of its 2,000 frames, and plain x only in 1,494.
"""

CLIPS, CLIP_FRAMES = 10, 200
"""Number of annotated clips, and of frames in each."""

TRAIN_FRAMES = range(601, 1401)
"""Training frames, counted from 1 through all clips; the rest are for testing."""

SPLITS = ("train", "test")
REGION, PERSPECTIVE = "vidf1_33_roi_mainwalkway", "vidf1_33_dmap3"
MATLAB_FILES = rf"(?P<name>vidf1_33_\d+_frame_full|{REGION}|{PERSPECTIVE})\.mat"
MAX_COLUMNS = 3
"""Columns of the published lists of heads, of which the third is unused."""


class Ucsd(AnnotatedImages):
    """The available ones of UCSD's ten annotated clips."""

    name = "ucsd"
    official_splits = SPLITS
    fixed_cameras = True

    def __init__(self, source: str, *, depth: str = "auto") -> None:
        files = visible_files(source)
        self._annotations = files_by_name(files, MATLAB_FILES, lower=True)
        frames = {clip: files_by_name(files, IMAGE, rf"{_clip(clip)}\.y") for clip in range(CLIPS)}
        self._clips = [clip for clip in range(CLIPS) if frames[clip] and _frame_file(clip) in self._annotations]
        splits = {frame_split(clip * CLIP_FRAMES + frame) for clip in self._clips for frame in (1, CLIP_FRAMES)}
        if not splits:
            example = f"{_frame_file(0)}.mat, or no {_clip(0)}.y/{_clip(0)}_f001.png"
            raise not_found(source, "UCSD", example, files)
        available = [split for split in SPLITS if split in splits]
        root, mapped = storage.resolve(source), PERSPECTIVE in self._annotations
        super().__init__(root, available, depth, files=files, perspective=mapped)

    def split_items(self, split: str) -> list[Item]:
        """Frames in the order of the video."""
        found = []
        for clip in self._clips:
            files = files_by_name(self._visible_files, IMAGE, rf"{_clip(clip)}\.y", lower=True)
            names = {name: re.fullmatch(rf"{_clip(clip)}_f(\d+)", name) for name in files}
            images = {int(match[1]): files[name] for name, match in names.items() if match}
            uri = self._annotations[_frame_file(clip)]
            annotated = len(self.cached(uri, _read_frames))
            for frame in sorted(images.keys() | set(range(1, annotated + 1))):
                number = clip * CLIP_FRAMES + frame
                if split == frame_split(number):
                    name, annotation = f"{_clip(clip)}_f{frame:03d}", uri if frame <= annotated else ""
                    found.append(Item(split, name, images.get(frame, ""), annotation, number, self.name))
        return found

    def heads(self, item: Item) -> Heads:
        """Heads of one frame, including those outside the region of interest."""
        frames = self.cached(item.annotation, _read_frames)
        return frame_heads(item.annotation, frames, (item.number - 1) % CLIP_FRAMES)

    def camera(self, item: Item) -> Camera:
        """Region of interest, which is the walkway, and size of a person from the perspective map."""
        return self.cached("camera", lambda _: self._read_camera())

    def notes(self, splits: Sequence[str] = ()) -> list[str]:
        """Missing splits, clips and maps."""
        notes = super().notes(splits)
        if missing := [str(clip) for clip in range(CLIPS) if clip not in self._clips]:
            notes.append(f"clips {', '.join(missing)} are left out: their frames or their annotation are missing")
        if REGION not in self._annotations:
            notes.append(
                f"{REGION}.mat is missing: all heads count, while published results count those on the walkway"
            )
        if PERSPECTIVE not in self._annotations:
            notes.append(f"{PERSPECTIVE}.mat is missing: depth comes from the annotated heads")
        return notes

    def _read_camera(self) -> Camera:
        roi = depth = None
        uris = [self._annotations[name] for name in (REGION, PERSPECTIVE) if name in self._annotations]
        if REGION in self._annotations:
            uri = self._annotations[REGION]
            roi = read_matlab(uri, lambda found: as_map(struct_field(found["roi"], "mask")) > 0, "`roi` with `mask`")
        if self.uses_perspective:
            uri = self._annotations[PERSPECTIVE]
            depth = read_matlab(uri, lambda variables: 1.0 / _person_size(variables["dmap"]), "`dmap` with `pmapxy`")
        return Camera(" or ".join(uris), roi, depth)


def _read_frames(uri: str) -> list[Heads | str]:
    def extract(variables: dict[str, Any]) -> list[Heads | str]:
        frames = variables["frame"] if "frame" in variables else unwrapped(variables["fgt"])["frame"]
        return as_frames(frames, COORDINATE_BASE, columns=MAX_COLUMNS)

    return read_matlab(uri, extract, "`frame` or `fgt.frame` with `loc` for each frame")


def _person_size(dmap: Any) -> NDArray[np.float64]:
    """Size of a person from `pmapxy`, which is proportional to a person's area or to its inverse.

    Some descriptions call it the scale of a person, larger = nearer, others the weight of a pixel, larger = farther.
    The camera looks down on the walkway, so the lower end must be the nearer one.
    """
    area = as_sizes(struct_field(dmap, "pmapxy"))
    half = len(area) // 2
    return np.asarray(area ** (0.5 if area[half:].mean() >= area[:half].mean() else -0.5))


def frame_split(number: int) -> str:
    """Split of a frame by its number, counted from 1 through all clips."""
    return SPLITS[number not in TRAIN_FRAMES]


def _clip(clip: int) -> str:
    return f"vidf1_33_{clip:03d}"


def _frame_file(clip: int) -> str:
    return f"{_clip(clip)}_frame_full"
