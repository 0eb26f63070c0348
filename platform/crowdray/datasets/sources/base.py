"""What sources of annotated image files share: items with the head scale of their camera or split, loading with
checks, the depth and region of interest of fixed cameras, notes on missing splits."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from crowdray import storage
from crowdray.data.sample import Sample, encode_depth, encode_roi, image_size, make_sample, usable_points
from crowdray.datasets.depth import Perspective, Points, View, fit_head_scale, open_teacher
from crowdray.datasets.sources import Item
from crowdray.datasets.sources.layout import chosen_splits, natural_key
from crowdray.errors import DataError, UserError

T = TypeVar("T")

MOST_REMEMBERED = 16
"""Files remembered at a time: all clips of UCSD, and few of WorldExpo'10's hundred cameras with megabytes each."""

Heads = NDArray[np.float64]
"""(N, 2) heads as (x, y) in continuous pixels: the centre of the first pixel is 0.5."""


@dataclass(frozen=True, slots=True)
class Camera:
    """What is known of a fixed camera; its maps are as large as its images, (H, W)."""

    place: str
    """Where its maps were read, for messages."""
    roi: NDArray[np.bool_] | None = None
    """True where heads are annotated; None means everywhere."""
    person_size: NDArray[np.float64] | None = None
    """Size of a person in pixels, any unit."""

    @property
    def size(self) -> tuple[int, int] | None:
        """(H, W) of its images, None when no map tells."""
        known = self.roi if self.roi is not None else self.person_size
        return None if known is None else (known.shape[0], known.shape[1])


class AnnotatedImages:
    """A dataset of image files and their heads; an adapter names the files and reads the annotation.

    It gives the attributes below, `split_items` and `heads`, and for fixed cameras `camera`; what many items need
    it reads through `remembered`, which stays behind when the source is sent to a worker.
    """

    name: str
    """On the command line and in the index."""
    published: tuple[str, ...]
    """Splits that the dataset was published with."""
    fixed_cameras = False
    """Whether images of one scene come from one fixed camera."""

    def __init__(self, root: str, there: Sequence[str], depth: str, teachers: Sequence[str]) -> None:
        self._root = root
        self._there = tuple(there)
        self._teacher = open_teacher(depth, teachers)
        self.depth_teacher, self.gpu = self._teacher.name, self._teacher.gpu
        self._encoded: dict[tuple[str, float], tuple[bytes | None, bytes | None]] = {}
        self._memory: dict[str, Any] = {}

    @property
    def uses_perspective(self) -> bool:
        """Whether depth comes from perspective maps, so that they have to be read."""
        return isinstance(self._teacher, Perspective)

    def split_items(self, split: str) -> list[Item]:
        """The items of a split that is there, without head scale, in natural order."""
        raise NotImplementedError

    def heads(self, item: Item) -> Heads:
        """The heads of an item whose annotation is there; a DataError names the file that is broken."""
        raise NotImplementedError

    def camera(self, item: Item) -> Camera | None:
        """The fixed camera that took the image, the same for all of its scene; None for photos."""
        return None

    def image(self, item: Item, heads: Heads) -> tuple[bytes, Heads]:
        """The encoded image of an item that has one, and its heads there: by default both as they are."""
        assert item.image is not None
        return storage.read_bytes(item.image), heads

    def items(self, splits: Sequence[str] = ()) -> list[Item]:
        """Items in natural order; an image without annotation, or the reverse, is one that load() refuses."""
        wanted = chosen_splits(self.name, self._there, splits)
        found = [item for split in wanted for item in self.split_items(split)]
        return self._with_head_scale(found) if isinstance(self._teacher, Points) else found

    def load(self, item: Item) -> Sample:
        """One image with its heads, and the depth and region of interest of its camera."""
        if item.image is None:
            raise DataError(f"{item.annotation} annotates {item.name}, whose image is missing; copy it again")
        if item.annotation is None:
            raise DataError(f"{item.image} has no annotation; copy that again or remove the image")
        heads = self._usable_heads(item)
        try:
            image, points = self.image(item, heads)
            sample = make_sample(
                name=item.name,
                split=item.split,
                scene=item.scene or f"{item.split}/{item.name}",
                image=image,
                points=points,
            )
        except DataError as error:
            raise DataError(f"{item.image}: {error}") from error
        roi, depth = self._maps(item, sample)
        return replace(sample, roi=roi, depth=depth)

    def notes(self, splits: Sequence[str] = ()) -> list[str]:
        """Which of the published splits this copy lacks."""
        return [f"this copy has no {split} split" for split in self.published if split not in self._there]

    def __getstate__(self) -> dict[str, Any]:
        # Workers read the files of the cameras that they meet; they are not worth sending.
        return {**self.__dict__, "_encoded": {}, "_memory": {}}

    def remembered(self, uri: str, read: Callable[[str], T]) -> T:
        """What `read` makes of a file that many items need; the last MOST_REMEMBERED of them stay in memory."""
        if uri not in self._memory:
            while len(self._memory) >= MOST_REMEMBERED:
                self._memory.pop(next(iter(self._memory)))
            self._memory[uri] = read(uri)
        found: T = self._memory[uri]
        return found

    def _usable_heads(self, item: Item) -> Heads:
        heads = self.heads(item)
        try:
            usable_points(heads)
        except DataError as error:
            raise DataError(f"{item.annotation}: {error}") from error
        return heads

    def outside_regions(self, items: Iterable[Item]) -> int:
        """How many heads of the items lie outside their regions of interest; they are kept."""
        outside = 0
        for item in items:
            camera = self.camera(item)
            if camera is not None and camera.roi is not None and item.annotation is not None:
                x, y = np.floor(self._usable_heads(item)).astype(int).T
                height, width = camera.roi.shape
                outside += int((~camera.roi[y.clip(0, height - 1), x.clip(0, width - 1)]).sum())
        return outside

    def _maps(self, item: Item, sample: Sample) -> tuple[bytes | None, bytes | None]:
        """Region of interest and depth, encoded: once for each camera where the teacher looks at no image."""
        camera = self.camera(item)
        for given in (camera.roi, camera.person_size) if camera else ():
            if camera and given is not None and given.shape != (sample.height, sample.width):
                raise DataError(
                    f"{item.image} is {(sample.height, sample.width)}, but a map in {camera.place} is {given.shape}; "
                    "copy both again"
                )
        shared = camera is not None and not self._teacher.per_image
        key = item.scene, item.head_scale
        if shared and key in self._encoded:
            return self._encoded[key]
        view = View(
            image=bytes(sample.image),
            height=sample.height,
            width=sample.width,
            points=sample.points,
            split=item.split,
            name=item.name,
            person_size=camera.person_size if camera else None,
            head_scale=item.head_scale,
            fixed_camera=camera is not None,
        )
        depth = self._teacher.depth(view)
        roi = camera.roi if camera else None
        encoded = (None if roi is None else encode_roi(roi), None if depth is None else encode_depth(depth))
        if shared:
            self._encoded[key] = encoded
        return encoded

    def _with_head_scale(self, items: Sequence[Item]) -> list[Item]:
        """The items with the fit over their camera, or over their split where nothing says who shares one.

        A camera is fitted to its training frames alone, where it has any: the heads of test frames must not
        reach training through its depth maps.
        """
        pool = list(items)
        if self.fixed_cameras and "train" in self._there and all(item.split != "train" for item in items):
            pool += self.split_items("train")
        groups: dict[str, list[Item]] = {}
        for item in pool:
            groups.setdefault(self._group(item), []).append(item)
        scales = {
            name: self._head_scale([item for item in group if item.split == "train"] or group)
            for name, group in groups.items()
        }
        return [replace(item, head_scale=scales[self._group(item)]) for item in items]

    def _group(self, item: Item) -> str:
        return item.scene if self.fixed_cameras else item.split

    def _head_scale(self, items: Sequence[Item]) -> float:
        """The fit over some items; those that cannot be read are left to load() to report."""
        images = []
        for item in items:
            with contextlib.suppress(UserError):
                if item.image is not None and item.annotation is not None:
                    camera = self.camera(item)
                    height, _ = (camera.size if camera else None) or image_size(item.image)
                    images.append((self._usable_heads(item), height))
        return fit_head_scale(images, one_camera=self.fixed_cameras)


def paired(
    split: str, images: dict[str, str], annotations: dict[str, str], scene: Callable[[str], str] = lambda name: ""
) -> list[Item]:
    """Items of a split from the URIs of images and annotations by name, in natural order; `scene` of a name."""
    names = sorted(images.keys() | annotations.keys(), key=natural_key)
    return [Item(split, name, images.get(name), annotations.get(name), scene=scene(name)) for name in names]
