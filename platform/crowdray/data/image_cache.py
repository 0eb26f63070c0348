"""Decoded pictures, kept while there is room, and parts of them at any size.

Shape legend: H W a picture in working pixels, N its heads, h w a part of it.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from mmap import mmap
from threading import Lock
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from crowdray.data.sample import Sample, content_size, decode_depth, decode_image, decode_roi
from crowdray.data.shards import Dataset


class Outline(Protocol):
    """What a picture has without its pixels."""

    @property
    def row(self) -> int:
        """Row in the dataset."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""

    @property
    def points(self) -> NDArray[np.float32]:
        """(N, 2) heads that count, x y."""


@dataclass(frozen=True, eq=False)
class DecodedImage:
    """A decoded sample in working pixels: everything that windows are cut from."""

    row: int
    """Row in the dataset."""
    image: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    points: NDArray[np.float32]
    """(N, 2) heads that count, x y."""
    roi: NDArray[np.bool_] | None
    """(H, W), True where heads count; None everywhere."""
    encoded_depth: bytes | None
    """As a sample holds it; None unknown."""

    @property
    def depth(self) -> NDArray[np.float16] | None:
        """In [0, 1], larger = farther, stretched over the picture and no larger than it; None unknown. Decoded when it
        is first asked for."""
        if self.encoded_depth is None:
            return None
        if "_depth" not in vars(self):  # up to Python 3.11, functools.cached_property has one lock for all pictures
            vars(self)["_depth"] = _shared_depth(self.encoded_depth, *self.size)
        depth: NDArray[np.float16] = vars(self)["_depth"]
        return depth

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape[0], self.image.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory of the image, its points and its depth, decoded or not; a scene's shared region of interest is not
        counted."""
        held = self.image.nbytes + self.points.nbytes
        if self.encoded_depth is not None:
            stored, own = content_size(self.encoded_depth), self.size
            held += len(self.encoded_depth) + 2 * min(stored[0], own[0]) * min(stored[1], own[1])
        return held


class ImageCache:
    """Decoded pictures of a dataset; those that came first stay, as long as they have room. Safe with many threads.

    In an epoch each picture comes once, in an order of its own. So a share s of the pictures, if it stays, is found s
    of the time, whereas if the least recently used ones gave way, only s^2 / 2 would be.
    """

    def __init__(self, dataset: Dataset, downsample: int, use_roi: bool, cache_bytes: float) -> None:
        self.dataset = dataset
        self.downsample = downsample
        self.use_roi = use_roi
        self._room = cache_bytes
        self._kept: dict[int, DecodedImage] = {}
        self._lock = Lock()

    def __getitem__(self, row: int) -> DecodedImage:
        if (kept := self._kept.get(row)) is not None:
            return kept
        picture = load_image(self.dataset.sample(row), row, self.downsample, self.use_roi)
        taken = picture.nbytes
        with self._lock:
            if row in self._kept or taken > self._room:
                return picture
            self._room -= taken
            self._kept[row] = picture
        self._kept[row] = _outside_the_heap(picture)
        return picture


def _outside_the_heap(picture: DecodedImage) -> DecodedImage:
    """The picture with its image in pages of its own: among the large arrays of each training step, arrays
    that stay would keep the heap from ever shrinking (measured: three times the size of the pictures)."""
    image = np.frombuffer(mmap(-1, picture.image.nbytes), dtype=np.uint8).reshape(picture.image.shape)
    image[:] = picture.image
    return replace(picture, image=image)


def load_image(sample: Sample, row: int, downsample: int, use_roi: bool) -> DecodedImage:
    """Decode a sample and bring everything to working pixels; heads outside the region of interest are left
    out."""
    image = shrink(decode_image(sample.image), downsample)
    height, width = image.shape[:2]
    points = np.array(sample.points, dtype=np.float32) / np.float32(downsample)
    roi = None
    if use_roi and sample.roi is not None:
        roi = _shared_roi(bytes(sample.roi), height, width)
        column = np.clip(points[:, 0].astype(int), 0, width - 1)
        line = np.clip(points[:, 1].astype(int), 0, height - 1)
        points = points[roi[line, column]]
    return DecodedImage(row, image, points, roi, None if sample.depth is None else bytes(sample.depth))


# Images of one scene often have one mask and one depth: then their pictures share the arrays too.
@lru_cache(maxsize=16)
def _shared_roi(content: bytes, height: int, width: int) -> NDArray[np.bool_]:
    return _resized(decode_roi(content).astype(np.float32), height, width) >= 0.5


@lru_cache(maxsize=16)
def _shared_depth(content: bytes, height: int, width: int) -> NDArray[np.float16]:
    depth = decode_depth(content)
    return _resized(depth, min(depth.shape[0], height), min(depth.shape[1], width)).astype(np.float16)


def shrink(image: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Average uint8 (H, W, 3) over squares of factor x factor pixels; squares at the rim average what they
    have.

    The shipped model does the same with its input (models.packaged), to the bit.
    """
    if factor == 1:
        return image
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    small = torch.nn.functional.avg_pool2d(tensor, factor, ceil_mode=True, count_include_pad=False)
    return small.round().to(torch.uint8)[0].permute(1, 2, 0).contiguous().numpy()


def scaled_size(picture: Outline, scale: float, stride: int) -> tuple[int, int]:
    """Height and width of the picture at about `scale` times its size, each a multiple of the stride; at 1 its own."""
    if scale == 1:
        return picture.size
    height, width = (max(stride, round(side * scale / stride) * stride) for side in picture.size)
    return height, width


def image_part(image: NDArray[np.uint8], size: tuple[int, int], rows: slice, columns: slice) -> NDArray[np.uint8]:
    """Rows and columns (h, w, 3) of what an image (H, W, 3) is at another size, interpolated, which is never made
    whole."""
    if image.shape[:2] == size:
        return image[rows, columns]
    spans = [
        _source_span(have, want, part) for have, want, part in zip(image.shape, size, (rows, columns), strict=False)
    ]
    (top, bottom, first, last), (left, right, start, end) = spans
    source = Image.fromarray(np.ascontiguousarray(image[first:last, start:end]))
    box = (left - start, top - first, right - start, bottom - first)
    shape = (columns.stop - columns.start, rows.stop - rows.start)
    return np.asarray(source.resize(shape, Image.Resampling.BILINEAR, box=box))


def _source_span(have: int, want: int, part: slice) -> tuple[float, float, int, int]:
    """Where a part of an axis of length `want` begins and ends on the axis of length `have` that it is made of; and the
    first and last + 1 of the pixels that have a say in it."""
    step = have / want
    start, end = part.start * step, min(part.stop * step, have)  # rounding must not lead beyond the last pixel
    reach = max(1.0, step)
    return start, end, max(0, int(start - reach)), min(have, int(end + reach) + 1)


def map_part(
    values: NDArray[np.float16 | np.bool_], size: tuple[int, int], rows: slice, columns: slice
) -> NDArray[np.float32]:
    """Rows and columns (h, w) of what a map is when it is stretched over (H, W), bilinear, pixel centres at halves;
    never made whole."""
    if values.shape == size:
        return values[rows, columns].astype(np.float32)
    above, below, share = _neighbours(values.shape[0], size[0], rows)
    before, after, part = _neighbours(values.shape[1], size[1], columns)
    first, start = above[0], before[0]
    known = values[first : below[-1] + 1, start : after[-1] + 1].astype(np.float32)
    wide = _mixed(known, before - start, after - start, part, axis=1)
    return _mixed(wide, above - first, below - first, share[:, None], axis=0)


def mask_part(mask: NDArray[np.bool_], size: tuple[int, int], rows: slice, columns: slice) -> NDArray[np.bool_]:
    """The same of a mask: True where at least half is."""
    if mask.shape == size:
        return mask[rows, columns]
    return map_part(mask, size, rows, columns) >= 0.5


def _neighbours(have: int, want: int, part: slice) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """For each place of a part of an axis stretched from `have` to `want`: the values before and after it, and the
    share of the latter."""
    place = ((np.arange(part.start or 0, part.stop) + 0.5) * (have / want) - 0.5).clip(0, have - 1)
    before = place.astype(np.int64)
    return before, np.minimum(before + 1, have - 1), (place - before).astype(np.float32)


def _mixed(
    values: NDArray[np.float32],
    low: NDArray[np.int64],
    high: NDArray[np.int64],
    share: NDArray[np.float32],
    axis: int,
) -> NDArray[np.float32]:
    mixed: NDArray[np.float32] = values.take(high, axis)
    below = values.take(low, axis)
    mixed -= below
    mixed *= share
    mixed += below
    return mixed


def _resized(array: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """A map at another size: averaged when it shrinks, interpolated when it grows."""
    if array.shape == (height, width):
        return array
    tensor = torch.from_numpy(np.array(array))[None, None]
    mode = "area" if array.shape[0] >= height else "bilinear"
    resized: NDArray[np.float32] = torch.nn.functional.interpolate(tensor, size=(height, width), mode=mode)[
        0, 0
    ].numpy()
    return resized
