"""Batches of windows for one rank: decoded once, cut anew in each epoch; while an accelerator trains, in threads.

Shape legend: B windows, H W window in working pixels, N heads (padded to the batch's largest number).
"""

from collections import OrderedDict
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from mmap import mmap
from operator import itemgetter
from threading import Lock
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from crowdray.data.sample import Sample, decode_depth, decode_image, decode_roi
from crowdray.data.sampling import (
    Window,
    WindowRule,
    draw_scale,
    draw_window,
    epoch_batches,
    loss_weight,
    rank_share,
)
from crowdray.data.shards import Dataset

_FEWEST_DECODERS, _MOST_DECODERS = 2, 8
"""Decoding threads of a rank: as many as it may use for anything else, within these bounds."""


@dataclass(frozen=True, eq=False)
class Picture:
    """A decoded sample in working pixels: everything that windows are cut from."""

    row: int
    """Row in the dataset."""
    image: NDArray[np.uint8]
    """(H, W, 3) RGB."""
    points: NDArray[np.float32]
    """(N, 2) heads that count, x y."""
    roi: NDArray[np.bool_] | None
    """(H, W), True where heads count; None everywhere."""
    depth: NDArray[np.float16] | None
    """(H, W) in [0, 1], larger = farther; None unknown."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.image.shape[0], self.image.shape[1]

    @property
    def nbytes(self) -> int:
        """Memory of the image and what belongs to it alone; a scene's shared region of interest is not
        counted."""
        return self.image.nbytes + self.points.nbytes + (0 if self.depth is None else self.depth.nbytes)


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows of one update on one rank; images are uint8, everything else float32 or int64."""

    image: Tensor
    """(B, 3, H, W) uint8 RGB, channels last in memory."""
    points: Tensor
    """(B, N, 2) heads in window pixels, some outside the window."""
    present: Tensor
    """(B, N) 1 for a head, 0 for padding."""
    extent: Tensor
    """(B, 4) left, top, right, bottom of the whole image in window pixels."""
    roi: Tensor
    """(B, 1, H, W) 1 where heads count."""
    depth: Tensor
    """(B, 1, H, W) raw depth in [0, 1], 0 where unknown."""
    has_depth: Tensor
    """(B,) 1 where the sample has depth."""
    weight: Tensor
    """(B, 1, H, W) weight of each pixel in the map losses, 0 outside the region of interest."""
    corners: Tensor
    """(B, 2) row and column of the crop in features."""
    count: Tensor
    """(B,) heads inside the crop."""
    brightness: Tensor
    """(B,) shift as a share of the full range."""
    contrast: Tensor
    """(B,) relative change of contrast."""
    colour: Tensor
    """(B, 3) relative change of red, green and blue."""
    rows: Tensor
    """(B,) dataset rows."""
    total: int
    """Windows of the update on all ranks together."""

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device; from pinned memory the copy does not block."""
        return self._each(lambda value: value.to(device, non_blocking=True))

    def pin(self) -> "Batch":
        """The batch in page-locked memory."""
        return self._each(Tensor.pin_memory)

    def parts(self, number: int) -> list["Batch"]:
        """The batch in so many parts, whose sizes differ by at most one window; in fewer where it has fewer."""
        bounds = [round(k * len(self.rows) / number) for k in range(number + 1)]
        pieces = [slice(start, stop) for start, stop in pairwise(bounds) if start < stop]
        return [self._each(itemgetter(piece)) for piece in pieces]

    def first(self, number: int) -> "Batch":
        """Its first windows."""
        return self._each(itemgetter(slice(number)))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {n: change(value) for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed)

    def augmented(self) -> Tensor:
        """Images as float32 (B, 3, H, W) in 0..255 with colour, contrast and brightness applied, on the
        batch's device."""
        image = self.image * (1 + self.colour)[:, :, None, None]
        scale = (1 + self.contrast)[:, None, None, None]
        shift = (255 * self.brightness)[:, None, None, None]
        return ((image - 127.5) * scale + (127.5 + shift)).clamp(0, 255)


class PictureStore:
    """Decoded pictures of a dataset, least recently used ones dropped beyond a bound in bytes; safe with many
    threads."""

    def __init__(self, dataset: Dataset, downsample: int, use_roi: bool, cache_bytes: float) -> None:
        self.dataset = dataset
        self.downsample = downsample
        self.use_roi = use_roi
        self._room = cache_bytes
        self._kept: OrderedDict[int, Picture] = OrderedDict()
        self._lock = Lock()

    def __getitem__(self, row: int) -> Picture:
        with self._lock:
            if row in self._kept:
                self._kept.move_to_end(row)
                return self._kept[row]
        picture = _outside_the_heap(open_picture(self.dataset.sample(row), row, self.downsample, self.use_roi))
        with self._lock:
            if row not in self._kept:
                self._kept[row] = picture
                self._room -= picture.nbytes
            while self._room < 0 and self._kept:
                self._room += self._kept.popitem(last=False)[1].nbytes
        return picture


def _outside_the_heap(picture: Picture) -> Picture:
    """The picture with its image in pages of its own: among the large arrays of each training step, arrays
    that stay would keep the heap from ever shrinking (measured: three times the size of the pictures)."""
    image = np.frombuffer(mmap(-1, picture.image.nbytes), dtype=np.uint8).reshape(picture.image.shape)
    image[:] = picture.image
    return replace(picture, image=image)


def open_picture(sample: Sample, row: int, downsample: int, use_roi: bool) -> Picture:
    """Decode a sample and bring everything to working pixels; heads outside the region of interest are left
    out."""
    image = shrink(decode_image(sample.image), downsample)
    height, width = image.shape[:2]
    points = np.array(sample.points, dtype=np.float32) / np.float32(downsample)
    roi = depth = None
    if use_roi and sample.roi is not None:
        roi = _shared_roi(bytes(sample.roi), height, width)
        column = np.clip(points[:, 0].astype(int), 0, width - 1)
        line = np.clip(points[:, 1].astype(int), 0, height - 1)
        points = points[roi[line, column]]
    if sample.depth is not None:
        depth = _shared_depth(bytes(sample.depth), height, width)
    return Picture(row, image, points, roi, depth)


# Images of one scene often have one mask and one depth: then their pictures share the arrays too.
@lru_cache(maxsize=16)
def _shared_roi(content: bytes, height: int, width: int) -> NDArray[np.bool_]:
    return _resized(decode_roi(content).astype(np.float32), height, width) >= 0.5


@lru_cache(maxsize=16)
def _shared_depth(content: bytes, height: int, width: int) -> NDArray[np.float16]:
    return _resized(decode_depth(content), height, width).astype(np.float16)


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


def rescaled(picture: Picture, scale: float, stride: int) -> Picture:
    """The picture at about `scale` times its size, each side a multiple of the stride; points, masks and
    depth go along."""
    if scale == 1:
        return picture
    height, width = (max(stride, round(side * scale / stride) * stride) for side in picture.size)
    image = np.asarray(Image.fromarray(picture.image).resize((width, height), Image.Resampling.BILINEAR))
    points = picture.points * np.array([width / picture.size[1], height / picture.size[0]], np.float32)
    roi = None if picture.roi is None else _resized(picture.roi.astype(np.float32), height, width) >= 0.5
    depth = (
        None if picture.depth is None else _resized(picture.depth.astype(np.float32), height, width).astype(np.float16)
    )
    return Picture(picture.row, image, points, roi, depth)


class Loader:
    """Batches of one rank. Nothing is remembered between epochs: an epoch's batches depend on its number
    alone."""

    def __init__(
        self,
        store: PictureStore,
        rows: NDArray[np.int64],
        rule: WindowRule,
        *,
        batch: int,
        repeats: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        pin: bool = False,
        ahead: int = 0,
    ) -> None:
        self.store = store
        self.rows = rows
        self.rule = rule
        self.batch = batch
        self.repeats = repeats
        self.seed = seed
        self.rank = rank
        self.world = world
        self.pin = pin
        self.ahead = ahead

    def steps(self) -> int:
        """Updates of one epoch."""
        return max(1, len(self.rows) * self.repeats // self.batch)

    def epoch(self, number: int) -> Generator[Batch, None, None]:
        """The batches of an epoch in order, prepared ahead of their use. Closing the iterator stops the
        threads."""
        batches = epoch_batches(len(self.rows), self.batch, seed=self.seed, epoch=number, repeats=self.repeats)
        shares = [rank_share(batch, self.rank, self.world) for batch in batches]
        total = len(batches[0])
        if not self.ahead:
            for position, share in enumerate(shares):
                yield self._collect(share, number, position, total)
            return
        decoders = max(_FEWEST_DECODERS, min(_MOST_DECODERS, torch.get_num_threads()))
        with ThreadPoolExecutor(decoders, thread_name_prefix="crowdray-loader") as pool:
            pending: list[Future[Batch]] = []
            try:
                for position in range(len(shares) + self.ahead):
                    if position < len(shares):
                        pending.append(pool.submit(self._collect, shares[position], number, position, total))
                    if position >= self.ahead:
                        yield pending.pop(0).result()
            finally:
                for future in pending:
                    future.cancel()

    def _collect(self, share: NDArray[np.int64], epoch: int, number: int, total: int) -> Batch:
        scale = draw_scale(self.rule, seed=self.seed, epoch=epoch, batch=number)
        pairs = []
        for position, repeat in (divmod(draw, self.repeats) for draw in share.tolist()):
            picture = rescaled(self.store[int(self.rows[position])], scale, self.rule.stride)
            window = draw_window(
                self.rule, picture.size, seed=self.seed, epoch=epoch, sample=picture.row, repeat=repeat
            )
            pairs.append((picture, window))
        batch = collate(pairs, self.rule, total)
        return batch.pin() if self.pin else batch


def collate(pairs: list[tuple[Picture, Window]], rule: WindowRule, total: int | None = None) -> Batch:
    """Cut one window from each picture and stack them, smaller windows padded at the bottom and the right
    without weight; `total` is the number of windows on all ranks, these alone when None."""
    height = max(window.height for _, window in pairs)
    width = max(window.width for _, window in pairs)
    heads = max(1, max(len(picture.points) for picture, _ in pairs))
    size = len(pairs)
    image = np.zeros((size, height, width, 3), np.uint8)
    maps = np.zeros((3, size, 1, height, width), np.float32)
    points = np.zeros((size, heads, 2), np.float32)
    present = np.zeros((size, heads), np.float32)
    extent = np.zeros((size, 4), np.float32)
    corners = np.zeros((size, 2), np.int64)
    count = np.zeros(size, np.float32)
    for index, (picture, window) in enumerate(pairs):
        cut = (slice(window.top, window.top + window.height), slice(window.left, window.left + window.width))
        shown = picture.image[cut]
        rows, columns = shown.shape[:2]
        # A mirror turns around the padded window, so that padding stays where the crop is not.
        inside = (slice(rows), slice(width - columns, width) if window.flip else slice(columns))
        step = -1 if window.flip else 1
        image[index][inside] = shown[:, ::step]
        for target, source in zip(maps[:, index, 0], _maps(picture, window, cut, rule), strict=True):
            target[inside] = source[:, ::step]
        moved = picture.points - np.array([window.left, window.top], np.float32)
        edges = np.array([0, 0, picture.size[1], picture.size[0]], np.float32) - np.tile([window.left, window.top], 2)
        crop = np.array([window.crop_top, window.crop_left], np.int64)
        if window.flip:
            moved[:, 0] = width - moved[:, 0]
            edges[[0, 2]] = width - edges[[2, 0]]
            crop[1] = width - rule.crop - crop[1]
        in_crop = (moved >= crop[::-1]) & (moved < crop[::-1] + rule.crop)
        points[index, : len(moved)] = moved
        present[index, : len(moved)] = 1
        extent[index] = edges
        corners[index] = crop // rule.stride
        count[index] = in_crop.all(axis=1).sum()
    roi, depth, weight = (torch.from_numpy(m) for m in maps)
    return Batch(
        image=torch.from_numpy(image).permute(0, 3, 1, 2),
        points=torch.from_numpy(points),
        present=torch.from_numpy(present),
        extent=torch.from_numpy(extent),
        roi=roi,
        depth=depth,
        has_depth=torch.tensor([float(picture.depth is not None) for picture, _ in pairs]),
        weight=weight,
        corners=torch.from_numpy(corners),
        count=torch.from_numpy(count),
        brightness=torch.tensor([window.brightness for _, window in pairs]),
        contrast=torch.tensor([window.contrast for _, window in pairs]),
        colour=torch.tensor([window.colour for _, window in pairs]),
        rows=torch.tensor([picture.row for picture, _ in pairs]),
        total=total or size,
    )


def _maps(
    picture: Picture, window: Window, cut: tuple[slice, slice], rule: WindowRule
) -> tuple[NDArray[np.float32], ...]:
    """Region of interest, depth and loss weight of a window: float32, as large as the part of it inside the
    image."""
    inside = picture.image[cut].shape[:2]
    roi = np.ones(inside, np.float32) if picture.roi is None else picture.roi[cut].astype(np.float32)
    depth = np.zeros(inside, np.float32) if picture.depth is None else picture.depth[cut].astype(np.float32)
    weight = loss_weight(rule, picture.size, window)[: inside[0], : inside[1]]
    return roi, depth, weight * roi


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
