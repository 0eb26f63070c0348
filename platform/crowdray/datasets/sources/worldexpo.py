"""WorldExpo'10: frames of 108 surveillance cameras at 576x720.

Layout: train_frame/<name>.jpg, train_label/<scene>/{<name>.mat, roi.mat}, train_perspective/<scene>.mat, and the
same with test_, whose frames lie in folders of their scenes. The five test scenes do not occur in the training split.
"""

from collections.abc import Sequence
from itertools import chain
from typing import Any

from crowdray import storage
from crowdray.datasets.sources import Item
from crowdray.datasets.sources.base import AnnotatedImages, Camera, Heads, pair_items
from crowdray.datasets.sources.layout import IMAGE, files_by_name, find_root
from crowdray.datasets.sources.matlab import as_map, as_points, as_sizes, read_matlab
from crowdray.datasets.sources.region import polygon_mask

COORDINATE_BASE = 1.0
"""The centre of the first pixel is (1, 1), as on MATLAB's axes, for heads and for the corners of a region.

Assumed, because the files are MATLAB's and the names of the corners are those of a script that shows images on such
axes; not verified on a copy.
"""

SIZE = (576, 720)
"""Height and width of every frame."""

SPLITS = ("train", "test")
BELOW = "(?:[^/]+/)*"
"""Pattern of folders: of scenes, or none."""
MATLAB, LABEL = r"(?P<name>[^/]+)\.mat", r"(?P<name>(?!roi\.)[^/]+)\.mat"

TEST_SCENES = {"104207": "S1", "200608": "S2", "200702": "S3", "202201": "S4", "500717": "S5"}
"""Scenes of the test split by their names in published tables."""

_BAD_CAMERA = "200778_C10-03-S20100717083000000E20100717233000000"
BAD = frozenset(
    name.upper()
    for name in (
        f"{_BAD_CAMERA}_4_clip1_2",
        f"{_BAD_CAMERA}_4_clip1_3",
        f"{_BAD_CAMERA}_clip1_3",
        "500674_E05-03-S20100717083000000E20100717233000000_5_clip1_2",
        "600079_E06-02-S20100717083000000E20100717233000000_7_clip1_2",
        "104207_1-04-S20100821071000000E20100821120000000_034550",
    )
)
"""Frames with unusable labels: five of the training split, and one of S1, which then has 119; in upper case."""


class WorldExpo(AnnotatedImages):
    """WorldExpo'10, from the folder that contains train_frame or test_frame."""

    name = "worldexpo"
    official_splits = SPLITS
    fixed_cameras = True

    def __init__(self, source: str, *, depth: str = "auto") -> None:
        example = f"train_frame/{_BAD_CAMERA}_4_clip1_2.jpg"
        root, files = find_root(source, "WorldExpo'10", example, BELOW + IMAGE, "(?:train|test)_frame")
        available = [split for split in SPLITS if files_by_name(files, BELOW + IMAGE, f"{split}_frame")]
        maps = {split: files_by_name(files, BELOW + MATLAB, f"{split}_perspective") for split in available}
        self._perspective = {split: uri.rpartition("/")[0] for split, found in maps.items() for uri in found.values()}
        super().__init__(root, available, depth, files=files, perspective=len(self._perspective) == len(available))

    def split_items(self, split: str) -> list[Item]:
        """Frames by name, which groups them by scene; known bad ones are left out."""
        images = files_by_name(self._visible_files, BELOW + IMAGE, f"{split}_frame")
        labels = files_by_name(self._visible_files, BELOW + LABEL, f"{split}_label")
        items = pair_items(split, images, labels, scene=lambda name: TEST_SCENES.get(name[:6], name[:6]))
        return [item for item in items if item.name.upper() not in BAD]

    def heads(self, item: Item) -> Heads:
        """All labelled heads, including those outside the region of interest, which evaluation ignores."""

        def extract(variables: dict[str, Any]) -> Heads:
            count = ("point_num", variables["point_num"])
            return as_points(variables["point_position"], COORDINATE_BASE, count=count)

        return read_matlab(item.annotation, extract, "`point_position` and `point_num`")

    def camera(self, item: Item) -> Camera:
        """Region of interest of the scene, and the inverse of its pixels per metre as depth."""
        return self.cached(f"camera {item.name[:6]}", lambda _: self._read_camera(item))

    def notes(self, splits: Sequence[str] = ()) -> list[str]:
        """Missing splits and perspective maps, and known bad frames."""
        notes = super().notes(splits)
        notes += [
            f"{split}_perspective is missing: depth comes from the annotated heads"
            for split in self._splits
            if split not in self._perspective
        ]
        images = (files_by_name(self._visible_files, BELOW + IMAGE, f"{split}_frame") for split in self._splits)
        bad = sorted(name for name in chain(*images) if name.upper() in BAD)
        if bad:
            notes.append(f"{len(bad)} frames with labels known to be bad are left out: {', '.join(bad)}")
        return notes

    def _read_camera(self, item: Item) -> Camera:
        uri = _map_file(item.annotation.rpartition("/")[0], "roi.mat")

        def roi(variables: dict[str, Any]) -> Any:
            x, y = (as_map(variables[f"maskVertices{axis}Coordinates"]) for axis in "XY")
            return polygon_mask(x - COORDINATE_BASE + 0.5, y - COORDINATE_BASE + 0.5, *SIZE)

        mask = read_matlab(uri, roi, "`maskVerticesXCoordinates` and `maskVerticesYCoordinates` of a polygon")
        if not self.uses_perspective:
            return Camera(uri, mask)
        perspective = _map_file(self._perspective[item.split], f"{item.name[:6]}.mat")
        depth = read_matlab(perspective, lambda variables: 1.0 / as_sizes(variables["pMap"]), "`pMap`")
        return Camera(f"{uri} or {perspective}", mask, depth)


def _map_file(folder: str, name: str) -> str:
    """URI of a camera's file, whose name may differ in case."""
    return next(iter(storage.list_files(folder, [name])), storage.join(folder, name))
