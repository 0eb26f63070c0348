"""Batches of windows for one rank: decoded once, cut anew in each epoch; while an accelerator trains, in threads.

Shape legend: B windows, H W window in working pixels, N heads (padded to the batch's largest number).
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, groupby, islice, pairwise
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crowdray.data.pictures import Picture, PictureStore, image_part, map_part, mask_part, scaled_size
from crowdray.data.sampling import (
    Window,
    WindowRule,
    draw_scale,
    draw_window,
    epoch_batches,
    loss_weight,
    rank_share,
)

_FEWEST_DECODERS, _MOST_DECODERS = 2, 8
"""Decoding threads of a rank: as many as it may use for anything else, within these bounds."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows of one update on one rank; everything is float32 or int64 but images and roi."""

    image: Tensor
    """(B, 3, H, W) uint8 RGB, channels last in memory."""
    points: Tensor
    """(B, N, 2) heads in window pixels: those in the window, and those outside of it as far as the rule's reach."""
    present: Tensor
    """(B, N) 1 for a head, 0 for padding."""
    extent: Tensor
    """(B, 4) left, top, right, bottom of the whole image in window pixels."""
    roi: Tensor
    """(B, 1, H, W) bool, True where heads count, False beyond the image."""
    depth: Tensor
    """(B, 1, H, W) raw depth in [0, 1], 0 where unknown."""
    has_depth: Tensor
    """(B,) 1 where the sample has depth."""
    row_weight: Tensor
    """(B, H) weight of each row in the map losses."""
    column_weight: Tensor
    """(B, W) weight of each column."""
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

    @property
    def weight(self) -> Tensor:
        """(B, 1, H, W) weight of each pixel in the map losses, 0 outside the region of interest; on the batch's
        device."""
        return self.row_weight[:, None, :, None] * self.column_weight[:, None, None, :] * self.roi

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, but for its corners and rows, which are looked at on the CPU; from pinned memory the
        copy does not block."""
        moved = self._each(lambda value: value.to(device, non_blocking=True))
        return replace(moved, corners=self.corners, rows=self.rows)

    def used_by(self, stream: torch.cuda.Stream) -> None:
        """Keep its memory until a stream other than the one it was copied on has used it."""
        for value in vars(self).values():
            if isinstance(value, Tensor) and value.is_cuda:
                value.record_stream(stream)

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
        threads = max(_FEWEST_DECODERS, min(_MOST_DECODERS, torch.get_num_threads()))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="crowdray-loader")
        self._begun: tuple[int, bool, list[Future[Batch]]] = (0, False, [])
        """Epoch and depth of the batches that are under way for it, and these."""

    def steps(self) -> int:
        """Updates of one epoch."""
        return max(1, len(self.rows) * self.repeats // self.batch)

    def epoch(self, number: int, depth: bool = True) -> Generator[Batch, None, None]:
        """The batches of an epoch in order, prepared ahead of their use, and behind them the first of the next epoch;
        without depth where nothing is learned from it. Closing the iterator ends the preparations."""
        jobs = self._jobs(number, depth)
        if not self.ahead:
            yield from (job() for job in jobs)
            return
        begun_next = min(self.ahead, self.steps())
        pending = self._take_begun(number, depth)
        jobs = islice(chain(jobs, islice(self._jobs(number + 1, depth), begun_next)), len(pending), None)
        try:
            for job in jobs:
                pending.append(self._pool.submit(job))
                if len(pending) > self.ahead:
                    yield pending.pop(0).result()
            while len(pending) > begun_next:
                yield pending.pop(0).result()
            self._begun, pending = (number + 1, depth, pending), []
        finally:
            for future in pending:
                future.cancel()

    def _take_begun(self, number: int, depth: bool) -> list[Future[Batch]]:
        """The batches of this epoch that are under way already; those of another one are given up."""
        *begun, futures = self._begun
        self._begun = 0, False, []
        if begun == [number, depth]:
            return futures
        for future in futures:
            future.cancel()
        return []

    def _jobs(self, number: int, depth: bool) -> Iterator[Callable[[], Batch]]:
        """What prepares each batch of an epoch."""
        batches = epoch_batches(len(self.rows), self.batch, seed=self.seed, epoch=number, repeats=self.repeats)
        for position, batch in enumerate(batches):
            share = rank_share(batch, self.rank, self.world)
            yield partial(self._collect, share, number, position, len(batch), depth)

    def _collect(self, share: NDArray[np.int64], epoch: int, number: int, total: int, depth: bool) -> Batch:
        batch = collate(self._views(share, epoch, number), self.rule, total, depth)
        return batch.pin() if self.pin else batch

    def _views(self, share: NDArray[np.int64], epoch: int, number: int) -> Iterator["View"]:
        """One picture after the other, so that no more than two are decoded at a time."""
        scale = draw_scale(self.rule, seed=self.seed, epoch=epoch, batch=number)
        for position, draws in groupby(share.tolist(), lambda draw: draw // self.repeats):
            picture = self.store[int(self.rows[position])]
            size = scaled_size(picture, scale, self.rule.stride)
            for draw in draws:
                repeat = draw % self.repeats
                window = draw_window(self.rule, size, seed=self.seed, epoch=epoch, sample=picture.row, repeat=repeat)
                yield View(picture, size, window)


class View(NamedTuple):
    """A window of a picture that is shown at a size (H, W)."""

    picture: Picture
    size: tuple[int, int]
    window: Window


def collate(views: Iterable[View], rule: WindowRule, total: int | None = None, depth: bool = True) -> Batch:
    """Cut the views' windows and stack them, smaller ones padded at the bottom and the right without weight; `total`
    is the number of windows on all ranks, these alone when None. Without `depth` it is as good as unknown."""
    pieces = [_cut(view, rule, depth) for view in views]
    windows = [piece.window for piece in pieces]
    size = max(window.height for window in windows), max(window.width for window in windows)
    points = _stacked([piece.points for piece in pieces], (1, 2))
    heads = torch.tensor([[len(piece.points)] for piece in pieces])
    return Batch(
        image=_stacked([piece.image for piece in pieces], (*size, 3)).permute(0, 3, 1, 2),
        points=points,
        present=(torch.arange(points.shape[1]) < heads).float(),
        extent=_stacked([piece.extent for piece in pieces]),
        roi=_stacked([piece.roi for piece in pieces], size)[:, None],
        depth=_stacked([piece.depth for piece in pieces], size)[:, None],
        has_depth=torch.tensor([float(piece.depth.size > 0) for piece in pieces]),
        row_weight=_stacked([piece.row_weight for piece in pieces]),
        column_weight=_stacked([piece.column_weight for piece in pieces]),
        corners=_stacked([piece.crop // rule.stride for piece in pieces]),
        count=torch.tensor([piece.count for piece in pieces]),
        brightness=torch.tensor([window.brightness for window in windows]),
        contrast=torch.tensor([window.contrast for window in windows]),
        colour=torch.tensor([window.colour for window in windows]),
        rows=torch.tensor([piece.row for piece in pieces]),
        total=total or len(pieces),
    )


@dataclass(frozen=True, eq=False, slots=True)
class _Piece:
    """What a batch holds of one view; maps are as large as its window."""

    row: int
    window: Window
    image: NDArray[np.uint8]
    roi: NDArray[np.bool_]
    depth: NDArray[np.float32]
    points: NDArray[np.float32]
    extent: NDArray[np.float32]
    row_weight: NDArray[np.float32]
    column_weight: NDArray[np.float32]
    crop: NDArray[np.int64]
    count: float


def _cut(view: View, rule: WindowRule, with_depth: bool) -> _Piece:
    """A view's window; a depth that is unknown or not asked for is empty."""
    picture, size, window = view
    (height, width), corner = size, np.array([window.left, window.top], np.float32)
    rows = slice(window.top, min(window.top + window.height, height))
    columns = slice(window.left, min(window.left + window.width, width))
    image = image_part(picture.image, size, rows, columns)
    roi = np.ones(image.shape[:2], bool) if picture.roi is None else mask_part(picture.roi, size, rows, columns)
    known = picture.depth if with_depth else None
    depth = np.zeros((0, 0), np.float32) if known is None else map_part(known, size, rows, columns)
    points = picture.points * (np.array([width, height]) / picture.size[::-1]).astype(np.float32) - corner
    extent = np.array([0, 0, width, height], np.float32) - np.tile(corner, 2)
    row_weight, column_weight = loss_weight(rule, size, window)
    crop = np.array([window.crop_top, window.crop_left])
    if window.flip:
        # A mirror turns around the padded window, so that padding stays where the crop is not.
        image, roi, depth = (_mirrored(values, window.width) for values in (image, roi, depth))
        points[:, 0] = window.width - points[:, 0]
        extent[[0, 2]] = window.width - extent[[2, 0]]
        column_weight = column_weight[::-1]
        crop[1] = window.width - rule.crop - crop[1]
    if np.may_share_memory(image, picture.image):
        image = image.copy()  # else the whole picture would stay until the batch is full
    placed = np.clip(points, extent[:2], extent[2:])  # where the density map puts a head beyond the image
    near = points[_within(placed, -rule.reach, np.array([window.width, window.height]) + rule.reach)]
    count = _within(near, crop[::-1], crop[::-1] + rule.crop).sum()
    return _Piece(picture.row, window, image, roi, depth, near, extent, row_weight, column_weight, crop, float(count))


def _mirrored(values: NDArray[Any], width: int) -> NDArray[Any]:
    """Rows (h, w, ...) the other way round, padded on the left to a width; nothing where there is nothing."""
    if not values.size:
        return values
    if missing := width - values.shape[1]:
        values = np.pad(values, [(0, 0), (0, missing), *[(0, 0)] * (values.ndim - 2)])
    # Pixels of three bytes are taken in a third of the time in which they are copied from a view with a negative step.
    return values[:, ::-1] if values.ndim == 2 else values.take(np.arange(width)[::-1], axis=1)


def _within(points: NDArray[np.float32], low: Any, high: Any) -> NDArray[np.bool_]:
    inside: NDArray[np.bool_] = ((points >= low) & (points < high)).all(axis=1)
    return inside


def _stacked(arrays: Sequence[NDArray[Any]], least: tuple[int, ...] = ()) -> Tensor:
    """Arrays of as many axes one upon the other, with zeros behind where one is smaller than others or than `least`."""
    shape = np.max([least or arrays[0].shape, *(array.shape for array in arrays)], axis=0)
    stacked = np.zeros((len(arrays), *shape), arrays[0].dtype)
    for place, array in zip(stacked, arrays, strict=True):
        place[tuple(map(slice, array.shape))] = array
    return torch.from_numpy(stacked)
