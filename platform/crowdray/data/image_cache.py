"""Images that windows are cut from: decoded where windows need them, or cached in memory; resized rectangles of them.

Shape legend: H W image in working pixels, N heads, h w rectangle of it.
"""

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from mmap import mmap
from threading import Lock

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from crowdray.data.decoding import Encoded, content_size, decode_image, decode_rows
from crowdray.data.sample import Sample, decode_depth, decode_roi
from crowdray.data.shards import Dataset
from crowdray.errors import DataError


@dataclass(frozen=True, eq=False)
class AnnotatedImage:
    """Size and heads of an image in working pixels; its pixels may be elsewhere."""

    row: int
    """Row in the dataset."""
    size: tuple[int, int]
    """Height and width."""
    points: NDArray[np.float32]
    """(N, 2) x y of the heads inside the region of interest."""


@dataclass(frozen=True, eq=False)
class DecodedImage(AnnotatedImage):
    """A decoded sample, from which windows are cut."""

    image: NDArray[np.uint8]
    """(h, W, 3) RGB: all H rows, or those that the windows need."""
    roi: NDArray[np.bool_] | None
    """(H, W), the region of interest; None means everywhere."""
    encoded_depth: bytes | None
    """Depth as in `Sample`; None if unknown."""
    top: int = 0
    """First decoded row."""

    @property
    def depth(self) -> NDArray[np.float16] | None:
        """Depth in [0, 1], larger = farther, at most (H, W), to be stretched over the image; None if unknown.

        Decoded on first access.
        """
        if self.encoded_depth is None:
            return None
        if "_depth" not in vars(self):  # until Python 3.12, functools.cached_property has one lock for all instances
            vars(self)["_depth"] = _shared_depth(self.encoded_depth, *self.size)
        depth: NDArray[np.float16] = vars(self)["_depth"]
        return depth

    @property
    def nbytes(self) -> int:
        """Bytes of image, points and decoded depth; regions of interest are shared within a scene and not counted."""
        size = self.image.nbytes + self.points.nbytes
        if self.encoded_depth is not None:
            height, width = content_size(self.encoded_depth)
            size += len(self.encoded_depth) + 2 * min(height, self.size[0]) * min(width, self.size[1])
        return size


@dataclass(frozen=True, eq=False)
class EncodedImage(AnnotatedImage):
    """A sample whose image is not decoded yet."""

    content: Encoded
    downsample: int
    """Factor between the encoded image and working pixels."""
    roi: NDArray[np.bool_] | None
    """As in `DecodedImage`."""
    encoded_depth: bytes | None
    """Depth as in `Sample`; None if unknown."""

    def decode(self, first: int = 0, last: int | None = None) -> DecodedImage:
        """Decode the rows `first` to `last` - 1 of the working pixels, by default all.

        Raises:
            DataError: The image is damaged, or has not the size that its sample states.
        """
        top, bottom = (row * self.downsample for row in (first, self.size[0] if last is None else last))
        pixels = decode_image(self.content) if last is None else decode_rows(self.content, top, bottom)
        image = downsample_image(pixels, self.downsample)
        expected = (self.size[0] if last is None else last) - first, self.size[1]
        if image.shape[:2] != expected:
            raise DataError(f"the image of row {self.row} has another size than its sample; convert the dataset again")
        return DecodedImage(self.row, self.size, self.points, image, self.roi, self.encoded_depth, first)


@dataclass(eq=False)
class ImageCache:
    """Thread-safe memory cache of a dataset's decoded images, without eviction.

    Every epoch visits each image once, in another order: keeping a fraction s of the images has a hit rate of s, while
    evicting the least recently used would have s^2 / 2.
    """

    dataset: Dataset
    downsample: int
    """Factor by which images are downsampled."""
    use_roi: bool
    """Whether to apply regions of interest."""
    cache_bytes: float
    """Capacity; of images that do not fit, the rows that windows need are decoded at each access."""

    def __post_init__(self) -> None:
        self._free_bytes = self.cache_bytes
        self._cached: dict[int, DecodedImage] = {}
        self._lock = Lock()

    def __getitem__(self, row: int) -> DecodedImage:
        """The whole image."""
        image = self.open(row)
        return image.decode() if isinstance(image, EncodedImage) else image

    def open(self, row: int) -> DecodedImage | EncodedImage:
        """The whole image if it is cached, now or before, else the encoded one."""
        if (cached := self._cached.get(row)) is not None:
            return cached
        encoded = open_sample(self.dataset.sample(row), row, self.downsample, self.use_roi)
        if 3 * math.prod(encoded.size) > self._free_bytes:
            return encoded
        image = encoded.decode()
        with self._lock:
            if row in self._cached or image.nbytes > self._free_bytes:
                return image
            self._free_bytes -= image.nbytes
            self._cached[row] = image
        self._cached[row] = _copy_outside_heap(image)
        return image


def _copy_outside_heap(image: DecodedImage) -> DecodedImage:
    """Copy the pixels to memory pages of their own.

    Long-lived arrays among the large temporary arrays of training steps keep the heap from shrinking (measured: three
    times the size of the images).
    """
    pixels = np.frombuffer(mmap(-1, image.image.nbytes), dtype=np.uint8).reshape(image.image.shape)
    pixels[:] = image.image
    return replace(image, image=pixels)


def load_image(sample: Sample, row: int, downsample: int, use_roi: bool) -> DecodedImage:
    """Decode a sample and convert it to working pixels; heads outside the region of interest are removed."""
    return open_sample(sample, row, downsample, use_roi).decode()


def open_sample(sample: Sample, row: int, downsample: int, use_roi: bool) -> EncodedImage:
    """The sample in working pixels, to be decoded; heads outside the region of interest are removed."""
    height, width = (-(-side // downsample) for side in (sample.height, sample.width))
    points = np.array(sample.points, dtype=np.float32) / np.float32(downsample)
    roi = None
    if use_roi and sample.roi is not None:
        roi = _shared_roi(bytes(sample.roi), height, width)
        column = np.clip(points[:, 0].astype(int), 0, width - 1)
        line = np.clip(points[:, 1].astype(int), 0, height - 1)
        points = points[roi[line, column]]
    depth = None if sample.depth is None else bytes(sample.depth)
    return EncodedImage(row, (height, width), points, sample.image, downsample, roi, depth)


# Images of one scene often have equal masks and depth: they share the arrays too.
@lru_cache(maxsize=16)
def _shared_roi(content: bytes, height: int, width: int) -> NDArray[np.bool_]:
    return _resized(decode_roi(content).astype(np.float32), height, width) >= 0.5


@lru_cache(maxsize=16)
def _shared_depth(content: bytes, height: int, width: int) -> NDArray[np.float16]:
    depth = decode_depth(content)
    return _resized(depth, min(depth.shape[0], height), min(depth.shape[1], width)).astype(np.float16)


def downsample_image(image: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    """Average-pool uint8 (H, W, 3) by a factor; incomplete squares at the border average the pixels they have.

    `models.export.ExportedCounter` does the same with its input, to the last bit.
    """
    if factor == 1:
        return image
    tensor = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float()
    small = torch.nn.functional.avg_pool2d(tensor, factor, ceil_mode=True, count_include_pad=False)
    return small.round().to(torch.uint8)[0].permute(1, 2, 0).contiguous().numpy()


def scaled_size(image: AnnotatedImage, scale: float, stride: int) -> tuple[int, int]:
    """Height and width after resizing by about `scale`, rounded to multiples of the stride unless `scale` is 1."""
    if scale == 1:
        return image.size
    height, width = (max(stride, round(side * scale / stride) * stride) for side in image.size)
    return height, width


def source_rows(image: AnnotatedImage, size: tuple[int, int], rows: slice) -> tuple[int, int]:
    """The first and last + 1 row of an image that `crop_image` reads for rows of the image resized to (H, W)."""
    if image.size == size:
        return rows.start, rows.stop
    return _source_span(image.size[0], size[0], rows)[2:]


def crop_image(image: DecodedImage, size: tuple[int, int], rows: slice, columns: slice) -> NDArray[np.uint8]:
    """Rows and columns (h, w, 3) of an image resized to (H, W), bilinear; only the rectangle is computed."""
    if image.size == size:
        return image.image[rows.start - image.top : rows.stop - image.top, columns]
    top, bottom, first, last = _source_span(image.size[0], size[0], rows)
    left, right, start, end = _source_span(image.size[1], size[1], columns)
    source = Image.fromarray(np.ascontiguousarray(image.image[first - image.top : last - image.top, start:end]))
    box = (left - start, top - first, right - start, bottom - first)
    shape = (columns.stop - columns.start, rows.stop - rows.start)
    return np.asarray(source.resize(shape, Image.Resampling.BILINEAR, box=box))


def _source_span(source: int, target: int, part: slice) -> tuple[float, float, int, int]:
    """Map a part of an axis of length `target` to the axis of length `source` from which it is resized.

    Returns start and end, and the first and last + 1 source pixel that the interpolation reads.
    """
    step = source / target
    start, end = part.start * step, min(part.stop * step, source)  # rounding must not exceed the last pixel
    support = max(1.0, step)
    return start, end, max(0, int(start - support)), min(source, int(end + support) + 1)


def crop_map(
    values: NDArray[np.float16 | np.bool_], size: tuple[int, int], rows: slice, columns: slice
) -> NDArray[np.float32]:
    """Rows and columns (h, w) of a map resized to (H, W), bilinear, half-pixel centres; only these are computed."""
    if values.shape == size:
        return values[rows, columns].astype(np.float32)
    above, below, down = _neighbours(values.shape[0], size[0], rows)
    before, after, across = _neighbours(values.shape[1], size[1], columns)
    first, start = above[0], before[0]
    known = values[first : below[-1] + 1, start : after[-1] + 1].astype(np.float32)
    wide = _interpolate(known, before - start, after - start, across, axis=1)
    return _interpolate(wide, above - first, below - first, down[:, None], axis=0)


def _neighbours(
    source: int, target: int, part: slice
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float32]]:
    """Indices of the values before and after each position of a resized axis, and the weight of the latter."""
    position = ((np.arange(part.start or 0, part.stop) + 0.5) * (source / target) - 0.5).clip(0, source - 1)
    before = position.astype(np.int64)
    return before, np.minimum(before + 1, source - 1), (position - before).astype(np.float32)


def _interpolate(
    values: NDArray[np.float32], low: NDArray[np.int64], high: NDArray[np.int64], weight: NDArray[np.float32], axis: int
) -> NDArray[np.float32]:
    below = values.take(low, axis)
    result: NDArray[np.float32] = values.take(high, axis)
    result -= below  # in place: three temporary arrays less
    result *= weight
    result += below
    return result


def _resized(array: NDArray[np.float32], height: int, width: int) -> NDArray[np.float32]:
    """Resize a map: area average when it shrinks, bilinear when it grows."""
    if array.shape == (height, width):
        return array
    tensor = torch.from_numpy(np.array(array))[None, None]
    mode = "area" if array.shape[0] >= height else "bilinear"
    resized = torch.nn.functional.interpolate(tensor, size=(height, width), mode=mode)
    result: NDArray[np.float32] = resized[0, 0].numpy()
    return result
