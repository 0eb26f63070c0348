"""UCSD pedestrians: ten clips of 200 grey frames of one surveillance camera at 158x238.

Layout: ucsdpeds/vidf/vidf1_33_00X.y/vidf1_33_00X_fNNN.png, and in vidf-cvpr/ vidf1_33_00X_frame_full.mat,
vidf1_33_roi_mainwalkway.mat, vidf1_33_dmap3.mat. Clips count from 0, frames from 1; some clips are
not annotated.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from crowdray import storage
from crowdray.datasets.sources import Item
from crowdray.datasets.sources.base import AnnotatedImages, Camera, Heads
from crowdray.datasets.sources.layout import files_by_name
from crowdray.datasets.sources.matlab import as_map, as_points, as_sizes, read_matlab
from crowdray.errors import UserError

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
FRAME_FOLDERS = ("ucsdpeds/vidf", "vidf", "ucsdpeds_vidf/video/vidf")
REGION, PERSPECTIVE = "vidf1_33_roi_mainwalkway.mat", "vidf1_33_dmap3.mat"


class Ucsd(AnnotatedImages):
    """The available ones of UCSD's ten annotated clips."""

    name = "ucsd"
    official_splits = SPLITS
    fixed_cameras = True

    def __init__(self, source: str, *, depth: str = "auto") -> None:
        root = storage.resolve(source)
        self._frames = _first_existing(root, FRAME_FOLDERS, source)
        self._annotations = _first_existing(root, ("vidf-cvpr", "ucsdpeds/vidf-cvpr"), source)
        self._names = {uri.rsplit("/", 1)[-1] for uri in storage.list_files(self._annotations, (".mat",))}
        annotated = [clip for clip in range(CLIPS) if _frame_file(clip) in self._names]
        self._clips = [clip for clip in annotated if storage.exists(self._clip_folder(clip))]
        splits = {frame_split(clip * CLIP_FRAMES + frame) for clip in self._clips for frame in (1, CLIP_FRAMES)}
        if not splits:
            raise UserError(f"{source} contains no annotated clip of UCSD, such as {_frame_file(0)}; check --source")
        available = [split for split in SPLITS if split in splits]
        super().__init__(root, available, depth, perspective=PERSPECTIVE in self._names)

    def split_items(self, split: str) -> list[Item]:
        """Frames in the order of the video."""
        found = []
        for clip in self._clips:
            images = files_by_name(self._clip_folder(clip), (".png",), prefix=f"{_clip(clip)}_f")
            uri = storage.join(self._annotations, _frame_file(clip))
            annotated = len(self.cached(uri, _read_frames))
            frames = {int(frame) for frame in images if frame.isdecimal()}
            for frame in sorted(frames | set(range(1, annotated + 1))):
                number = clip * CLIP_FRAMES + frame
                if split == frame_split(number):
                    name, image = f"{_clip(clip)}_f{frame:03d}", images.get(f"{frame:03d}", "")
                    found.append(Item(split, name, image, uri if frame <= annotated else "", number, self.name))
        return found

    def heads(self, item: Item) -> Heads:
        """Heads of one frame, including those outside the region of interest."""
        return self.cached(item.annotation, _read_frames)[(item.number - 1) % CLIP_FRAMES]

    def camera(self, item: Item) -> Camera:
        """Region of interest, which is the walkway, and size of a person from the perspective map."""
        return self.cached(self._annotations, self._read_camera)

    def notes(self, splits: Sequence[str] = ()) -> list[str]:
        """Missing splits, clips and maps."""
        notes = super().notes(splits)
        if missing := [str(clip) for clip in range(CLIPS) if clip not in self._clips]:
            notes.append(f"clips {', '.join(missing)} are left out: their frames or their annotation are missing")
        if REGION not in self._names:
            notes.append(f"{REGION} is missing: all heads count, while published results count those on the walkway")
        if PERSPECTIVE not in self._names:
            notes.append(f"{PERSPECTIVE} is missing: depth comes from the annotated heads")
        return notes

    def _clip_folder(self, clip: int) -> str:
        return storage.join(self._frames, f"{_clip(clip)}.y")

    def _read_camera(self, folder: str) -> Camera:
        roi = depth = None
        if REGION in self._names:
            uri = storage.join(folder, REGION)
            roi = read_matlab(uri, lambda variables: as_map(variables["roi"]["mask"][0, 0]) > 0, "`roi` with `mask`")
        if self.uses_perspective:
            uri = storage.join(folder, PERSPECTIVE)
            depth = read_matlab(uri, lambda variables: 1.0 / _person_size(variables["dmap"]), "`dmap` with `pmapxy`")
        return Camera(folder, roi, depth)


def _read_frames(uri: str) -> list[Heads]:
    def extract(variables: dict[str, Any]) -> list[Heads]:
        frames = variables["frame"] if "frame" in variables else variables["fgt"]["frame"][0, 0]
        located = [frame["loc"] for frame in np.ravel(frames)]
        return [as_points(loc[0, 0] if loc.dtype == object else loc, COORDINATE_BASE) for loc in located]

    return read_matlab(uri, extract, "`frame` or `fgt.frame` with `loc` for each frame")


def _person_size(dmap: Any) -> NDArray[np.float64]:
    """Size of a person from `pmapxy`, which is proportional to a person's area or to its inverse.

    Some descriptions call it the scale of a person, larger = nearer, others the weight of a pixel, larger = farther.
    The camera looks down on the walkway, so the lower end must be the nearer one.
    """
    area = as_sizes(dmap["pmapxy"][0, 0])
    half = len(area) // 2
    return np.asarray(area ** (0.5 if area[half:].mean() >= area[:half].mean() else -0.5))


def frame_split(number: int) -> str:
    """Split of a frame by its number, counted from 1 through all clips."""
    return SPLITS[number not in TRAIN_FRAMES]


def _clip(clip: int) -> str:
    return f"vidf1_33_{clip:03d}"


def _frame_file(clip: int) -> str:
    return f"{_clip(clip)}_frame_full.mat"


def _first_existing(root: str, folders: Sequence[str], source: str) -> str:
    for folder in folders:
        if storage.exists(storage.join(root, folder)):
            return storage.join(root, folder)
    raise UserError(f"{source} is not UCSD: it contains none of {', '.join(folders)}; give the folder above them")
