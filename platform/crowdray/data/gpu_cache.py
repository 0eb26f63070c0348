"""Decoded images in GPU memory, from which windows are cut on the GPU.

Batches equal those of `batch.collate` to the last bit, but take less work on the CPU, whose threads cut and copy
windows more slowly than a GPU trains on them.

Shape legend: B windows, H W window in working pixels, h w stored array.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crowdray.data.batch import Batch, Crop, Pixels, crop_targets, make_batch
from crowdray.data.image_cache import AnnotatedImage, DecodedImage, ImageCache, load_image
from crowdray.data.sampling import WindowConfig

_MAX_BYTES_PER_PIXEL = 6
"""Three of colour, one of the region of interest, two of depth."""
_DECODED_AHEAD = 64
"""Images that are decoded before they are copied to the device."""


@dataclass(frozen=True, eq=False)
class GpuImage(AnnotatedImage):
    """An image whose pixels are on the device."""

    number: int
    """Index among the images on the device."""


class GpuImageCache:
    """Images on a device by dataset row, at their own size only; `pixels` is the number of pixels of all images."""

    def __init__(self, images: Iterable[DecodedImage], pixels: int, device: torch.device, depth: bool = True) -> None:
        self._by_row: dict[int, GpuImage] = {}
        self._images = _PackedArrays(torch.empty(pixels, 3, dtype=torch.uint8, device=device))
        self._rois = _PackedArrays(torch.ones(pixels, dtype=torch.bool, device=device))
        depths: list[NDArray[np.float16]] = []
        has_depth: list[float] = []
        for image in images:
            self._by_row[image.row] = GpuImage(image.row, image.size, image.points, len(has_depth))
            self._images.append(image.image)
            self._rois.append(np.ones(image.size, bool) if image.roi is None else image.roi)
            known = image.depth if depth else None
            depths.append(np.zeros((1, 1), np.float16) if known is None else known)
            has_depth.append(float(known is not None))
        self._depths = _PackedArrays(torch.empty(sum(map(np.size, depths)), dtype=torch.float16, device=device))
        for values in depths:
            self._depths.append(values)
        for arrays in (self._images, self._rois, self._depths):
            arrays.finish()
        self._has_depth = torch.tensor(has_depth, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # other streams will read them

    def open(self, row: int) -> GpuImage:
        """The image of a row."""
        return self._by_row[row]

    def collate(self, crops: Iterable[Crop[GpuImage]], config: WindowConfig, global_size: int, depth: bool) -> Batch:
        """A batch like that of `batch.collate`, whose pixels are cut when it is moved to the device."""
        crops = list(crops)
        targets, number = [crop_targets(crop, config) for crop in crops], len(crops)
        pixels = Pixels(
            torch.empty(number, 3, 0, 0, dtype=torch.uint8),
            torch.empty(number, 1, 0, 0, dtype=torch.bool),
            torch.empty(number, 1, 0, 0),
            torch.full((number,), torch.nan),
        )
        windows = [
            (crop.image.number, w.top, w.left, w.height, w.width, w.flip) for crop in crops for w in [crop.window]
        ]
        batch = make_batch(targets, pixels, config, global_size)
        return _DeferredBatch(**vars(batch), windows=torch.tensor(windows), with_depth=depth, images=self)

    def cut(self, windows: Tensor, size: tuple[int, int], with_depth: bool) -> Pixels:
        """Cut windows on the device and pad them to a common size (H, W); depth is unknown without `with_depth`.

        `windows` is (B, 6) int64: number of the image; top, left, height and width of the window; 1 to flip it.
        """
        which, top, left, height, width, flip = windows.unbind(1)
        down, across = (torch.arange(side, device=windows.device)[None] for side in size)
        rows = top[:, None] + down
        columns = left[:, None] + torch.where(flip[:, None] > 0, width[:, None] - 1 - across, across)
        sizes = self._images.sizes[which]
        inside = ((down < height[:, None]) & (rows < sizes[:, :1]))[:, :, None]
        inside = inside & ((across < width[:, None]) & (columns < sizes[:, 1:]))[:, None, :]
        rows, columns = rows.minimum(sizes[:, :1] - 1), columns.clamp_min(0).minimum(sizes[:, 1:] - 1)
        image = self._images.at(which, rows, columns) * inside[..., None]
        roi = self._rois.at(which, rows, columns) & inside
        if with_depth:
            depth, has_depth = self._resized_depth(which, rows, columns) * inside, self._has_depth[which]
        else:
            depth, has_depth = torch.zeros_like(inside, dtype=torch.float32), torch.zeros_like(self._has_depth[which])
        return Pixels(image.permute(0, 3, 1, 2), roi[:, None], depth[:, None], has_depth)

    def _resized_depth(self, which: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Depth (B, H, W) float32 at these pixels, with the arithmetic of `image_cache.crop_map`."""
        sources, targets = self._depths.sizes[which], self._images.sizes[which]
        above, below, down = _neighbours(sources[:, :1], targets[:, :1], rows)
        before, after, across = _neighbours(sources[:, 1:], targets[:, 1:], columns)
        upper, lower = (
            _interpolate(self._depths.at(which, line, before), self._depths.at(which, line, after), across[:, None, :])
            for line in (above, below)
        )
        return _interpolate(upper, lower, down[:, :, None])


def build_gpu_cache(
    device: torch.device, images: ImageCache, rows: NDArray[np.int64], max_bytes: float, depth: bool = True
) -> GpuImageCache | None:
    """Decode the training images `rows` as `images` does, and copy them to a device.

    Returns None if they may need more than `max_bytes` or the device is out of memory.
    """
    dataset, factor = images.dataset, images.downsample
    chosen = np.isin(dataset.rows("train"), rows)
    pixels = int((-(-dataset.sizes("train")[chosen] // factor)).prod(axis=1).sum())
    if _MAX_BYTES_PER_PIXEL * pixels > max_bytes:
        return None

    def decode(row: int) -> DecodedImage:
        image = load_image(dataset.sample(row), row, factor, images.use_roi)
        if depth:
            _ = image.depth  # decode it in this thread
        return image

    def decoded(pool: ThreadPoolExecutor) -> Iterator[DecodedImage]:
        for start in range(0, len(rows), _DECODED_AHEAD):  # bounds the images that wait to be copied
            yield from pool.map(decode, rows[start : start + _DECODED_AHEAD].tolist())

    with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="crowdray-gpu-cache") as pool:
        try:
            return GpuImageCache(decoded(pool), pixels, device, depth)
        except torch.OutOfMemoryError:
            return None


@dataclass(frozen=True, eq=False)
class _DeferredBatch(Batch):
    """A batch whose pixels are cut when it is moved to the device."""

    windows: Tensor
    """(B, 6) int64, see `GpuImageCache.cut`."""
    with_depth: bool
    images: GpuImageCache

    def to(self, device: torch.device) -> Batch:
        moved = super().to(device)
        assert isinstance(moved, _DeferredBatch)
        values = {field.name: getattr(moved, field.name) for field in fields(Batch)}
        pixels = self.images.cut(moved.windows, self.size, self.with_depth)
        return Batch(**values | pixels._asdict())


class _PackedArrays:
    """Arrays (h, w, ...) of different sizes, concatenated in one preallocated tensor (pixels, ...)."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._sizes: list[tuple[int, int]] = []
        self._end = 0

    def append(self, array: NDArray[Any]) -> None:
        """Copy an array behind the previous ones."""
        start, (height, width) = self._end, array.shape[:2]
        self._end += height * width
        self._sizes.append((height, width))
        self._values[start : self._end] = torch.tensor(array).flatten(0, 1)

    def finish(self) -> None:
        """Prepare for `at` after the last array."""
        self.sizes = torch.tensor(self._sizes, device=self._values.device)
        lengths = self.sizes.prod(dim=1)
        self._starts = lengths.cumsum(0) - lengths

    def at(self, which: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Values (B, H, W, ...) of the arrays `which` (B,) at rows (B, H) and columns (B, W)."""
        starts, widths = self._starts[which, None], self.sizes[which, 1:]
        return self._values[(starts + rows * widths)[:, :, None] + columns[:, None, :]]


def _neighbours(source: Tensor, target: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As in `image_cache`, for positions (B, n) on axes resized from `source` to `target` (B, 1)."""
    position = (index.double() + 0.5) * (source.double() / target.double()) - 0.5
    position = position.clamp_min(0).minimum(source.double() - 1)
    before = position.long()
    return before, (before + 1).minimum(source - 1), (position - before).float()


def _interpolate(low: Tensor, high: Tensor, weight: Tensor) -> Tensor:
    low = low.float()
    return (high.float() - low) * weight + low
