"""Base class of all sources of annotated image files: loading, depth, and the maps of fixed cameras."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from crowdray import storage
from crowdray.data.decoding import image_size
from crowdray.data.sample import Sample, encode_depth, encode_roi, make_sample, validate_points
from crowdray.datasets.depth import open_teacher
from crowdray.datasets.depth.analytic import PointSpacingDepth, SourceDepth, fit_head_scale
from crowdray.datasets.depth.teacher import DepthInput
from crowdray.datasets.sources import Item
from crowdray.datasets.sources.layout import chosen_splits, natural_key, paired
from crowdray.errors import DataError, UserError

T = TypeVar("T")

MAX_CACHED = 16
"""Results cached at a time: all clips of UCSD, and few of WorldExpo'10's hundred cameras with megabytes each."""

Heads = NDArray[np.float64]
"""(N, 2) heads as (x, y) in continuous pixels: the centre of the first pixel is 0.5."""


@dataclass(frozen=True, slots=True)
class Camera:
    """Maps of a fixed camera, of the size (H, W) of its images."""

    uri: str
    """Where the maps were read from, for messages."""
    roi: NDArray[np.bool_] | None = None
    """True where heads are annotated; None means everywhere."""
    depth: NDArray[np.float64] | None = None
    """Depth, any unit: the inverse of a person's size in pixels."""


class AnnotatedImages:
    """A dataset of image files with annotated heads.

    A subclass defines the attributes below, `split_items` and `heads`, and for fixed cameras `camera`. What many items
    need is read through `cached`.
    """

    name: str
    """Name on the command line and in the index."""
    official_splits: tuple[str, ...]
    """Splits of the official dataset."""
    fixed_cameras = False
    """Whether images of one scene come from one fixed camera."""

    def __init__(
        self, root: str, splits: Sequence[str], depth: str, *, files: Sequence[str] = (), perspective: bool = False
    ) -> None:
        self._root = root
        self._visible_files = files
        self._splits = tuple(splits)
        self.teacher = open_teacher(depth, ("perspective", "points", "none") if perspective else ("points", "none"))
        self._cache: dict[str, Any] = {}

    @property
    def uses_perspective(self) -> bool:
        """Whether depth comes from perspective maps, which then must be read."""
        return isinstance(self.teacher, SourceDepth)

    def split_items(self, split: str) -> list[Item]:
        """Items of an available split, without head scale, in natural order."""
        raise NotImplementedError

    def heads(self, item: Item) -> Heads:
        """Heads of an item with an annotation; DataError names the damaged file."""
        raise NotImplementedError

    def camera(self, item: Item) -> Camera | None:
        """Fixed camera of an image, the same for its whole scene; None for photos."""
        return None

    def image(self, item: Item, heads: Heads) -> tuple[bytes, Heads]:
        """Encoded image of an item, and its heads in pixels of that image; unchanged by default."""
        return storage.read_bytes(item.image), heads

    def region(self, item: Item, size: tuple[int, int]) -> NDArray[np.bool_] | None:
        """Region of interest of a photo of this size (H, W), True where heads are annotated; None means everywhere."""
        return None

    def size(self, item: Item) -> tuple[int, int]:
        """Size (H, W) of an image, without decoding it; read once for each fixed camera."""
        if self.fixed_cameras:
            return self.cached(f"size of {item.scene}", lambda _: image_size(item.image))
        return image_size(item.image)

    def items(self, splits: Sequence[str] = ()) -> list[Item]:
        """Items in natural order; load() refuses an image without annotation and an annotation without image."""
        wanted = chosen_splits(self.name, self._splits, splits)
        found = [item for split in wanted for item in self.split_items(split)]
        return self._with_head_scale(found) if isinstance(self.teacher, PointSpacingDepth) else found

    def load(self, item: Item) -> Sample:
        """One image with its heads, and the depth and region of interest of its camera."""
        if not item.image:
            raise DataError(f"{item.annotation} annotates {item.name}, whose image is missing; copy it again")
        if not item.annotation:
            raise DataError(f"{item.image} has no annotation; copy it again, or remove the image")
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
        """Official splits that this copy lacks."""
        return [f"this copy has no {split} split" for split in self.official_splits if split not in self._splits]

    def __getstate__(self) -> dict[str, Any]:
        # Workers read the files that they need; cached ones and the list of all are too large to send.
        return {**self.__dict__, "_cache": {}, "_visible_files": ()}

    def cached(self, key: str, read: Callable[[str], T]) -> T:
        """Result of `read` for a key, such as the URI of a file; the last MAX_CACHED results stay in memory."""
        if key not in self._cache:
            while len(self._cache) >= MAX_CACHED:
                self._cache.pop(next(iter(self._cache)))
            self._cache[key] = read(key)
        result: T = self._cache[key]
        return result

    def _usable_heads(self, item: Item) -> Heads:
        heads = self.heads(item)
        try:
            validate_points(heads)
        except DataError as error:
            raise DataError(f"{item.annotation}: {error}") from error
        return heads

    def _maps(self, item: Item, sample: Sample) -> tuple[bytes | None, bytes | None]:
        """Encoded region of interest and depth; computed once per camera if the teacher ignores the image."""
        camera = self.camera(item)
        for map_ in (camera.roi, camera.depth) if camera else ():
            if camera and map_ is not None and map_.shape != (sample.height, sample.width):
                raise DataError(
                    f"{item.image} is {(sample.height, sample.width)}, but a map in {camera.uri} is {map_.shape}; "
                    "copy both again"
                )

        def encode(_: str) -> tuple[bytes | None, bytes | None]:
            inputs = DepthInput(
                sample=sample,
                source_depth=camera.depth if camera else None,
                head_scale=item.head_scale,
                fixed_camera=camera is not None,
            )
            depth = self.teacher.depth(inputs)
            roi = camera.roi if camera else self.region(item, (sample.height, sample.width))
            return None if roi is None else encode_roi(roi), None if depth is None else encode_depth(depth)

        shared = camera is not None and not self.teacher.per_image
        return self.cached(f"maps of {item.scene}, {item.head_scale}", encode) if shared else encode("")

    def _with_head_scale(self, items: Sequence[Item]) -> list[Item]:
        """Items with the head scale of their fixed camera, or else of their split.

        A camera is fit to its training frames only, if it has any: heads of test frames must not reach training
        through its depth maps.
        """
        pool = list(items)
        if self.fixed_cameras and "train" in self._splits and all(item.split != "train" for item in items):
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
        """Head scale of some items; unreadable ones are skipped, since load() reports them."""
        images = []
        for item in items:
            with contextlib.suppress(UserError):
                if item.image and item.annotation:
                    heads = self._usable_heads(item)
                    if len(heads) > 1:
                        images.append((heads, self.size(item)[0]))
        return fit_head_scale(images, one_camera=self.fixed_cameras)


def pair_items(
    split: str, images: dict[str, str], annotations: dict[str, str], scene: Callable[[str], str] = lambda name: ""
) -> list[Item]:
    """Items of a split in natural order, from URIs of images and annotations by name; `scene` maps a name."""
    annotations = paired(images, annotations)
    names = sorted(images.keys() | annotations.keys(), key=natural_key)
    return [Item(split, name, images.get(name, ""), annotations.get(name, ""), scene=scene(name)) for name in names]
