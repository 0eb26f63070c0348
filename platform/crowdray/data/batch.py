"""Batches: windows of pictures, cut and stacked, with everything that targets are made of.

Shape legend: B windows, H W window in working pixels, N heads (padded to the batch's largest number).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from operator import itemgetter
from typing import Any, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crowdray.data.image_cache import DecodedImage, Outline, image_part, map_part, mask_part
from crowdray.data.sampling import Window, WindowRule, loss_weight


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
    def size(self) -> tuple[int, int]:
        """Height and width of its windows."""
        return self.row_weight.shape[1], self.column_weight.shape[1]

    @property
    def weight(self) -> Tensor:
        """(B, 1, H, W) weight of each pixel in the map losses, 0 outside the region of interest; on the batch's
        device."""
        return self.row_weight[:, None, :, None] * self.column_weight[:, None, None, :] * self.roi

    def to(self, device: torch.device) -> "Batch":
        """The batch on a device, but for its rows, which are looked at on the CPU; from pinned memory the copy does not
        block."""
        return replace(self._each(lambda value: value.to(device, non_blocking=True)), rows=self.rows)

    def used_by(self, stream: torch.cuda.Stream) -> None:
        """Keep its memory until a stream other than the one it was copied on has used it."""
        for value in vars(self).values():
            if isinstance(value, Tensor) and value.is_cuda:
                value.record_stream(stream)

    def pin(self) -> "Batch":
        """The batch in page-locked memory."""
        return self._each(lambda value: value.pin_memory() if value.numel() else value)

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


P = TypeVar("P", bound=Outline)


class View(NamedTuple, Generic[P]):
    """A window of a picture that is shown at a size (H, W)."""

    picture: P
    size: tuple[int, int]
    window: Window


@dataclass(frozen=True, eq=False, slots=True)
class Placed:
    """What a batch holds of one view beside its pixels."""

    row: int
    window: Window
    points: NDArray[np.float32]
    extent: NDArray[np.float32]
    row_weight: NDArray[np.float32]
    column_weight: NDArray[np.float32]
    crop: NDArray[np.int64]
    count: float


class Pixels(NamedTuple):
    """The pixel fields of a `Batch`."""

    image: Tensor
    roi: Tensor
    depth: Tensor
    has_depth: Tensor


def collate(
    views: Iterable[View[DecodedImage]], rule: WindowRule, total: int | None = None, depth: bool = True
) -> Batch:
    """Cut the views' windows and stack them, smaller ones padded at the bottom and the right without weight; `total`
    is the number of windows on all ranks, these alone when None. Without `depth` it is as good as unknown."""
    placed, cut = [], []
    for view in views:
        placed.append(place(view, rule))
        cut.append(_cut(view, depth))
    size = common_size(placed)
    images, rois, depths = zip(*cut, strict=True)
    pixels = Pixels(
        image=_stacked(images, (*size, 3)).permute(0, 3, 1, 2),
        roi=_stacked(rois, size)[:, None],
        depth=_stacked(depths, size)[:, None],
        has_depth=torch.tensor([float(values.size > 0) for values in depths]),
    )
    return assemble(placed, pixels, rule, total)


def common_size(placed: Sequence[Placed]) -> tuple[int, int]:
    """Height and width in which all windows of a batch have room."""
    return max(one.window.height for one in placed), max(one.window.width for one in placed)


def assemble(placed: Sequence[Placed], pixels: Pixels, rule: WindowRule, total: int | None) -> Batch:
    """The batch of these windows, as in `collate`."""
    windows = [one.window for one in placed]
    points = _stacked([one.points for one in placed], (1, 2))
    heads = torch.tensor([[len(one.points)] for one in placed])
    return Batch(
        **pixels._asdict(),
        points=points,
        present=(torch.arange(points.shape[1]) < heads).float(),
        extent=_stacked([one.extent for one in placed]),
        row_weight=_stacked([one.row_weight for one in placed]),
        column_weight=_stacked([one.column_weight for one in placed]),
        corners=_stacked([one.crop // rule.stride for one in placed]),
        count=torch.tensor([one.count for one in placed]),
        brightness=torch.tensor([window.brightness for window in windows]),
        contrast=torch.tensor([window.contrast for window in windows]),
        colour=torch.tensor([window.colour for window in windows]),
        rows=torch.tensor([one.row for one in placed]),
        total=total or len(placed),
    )


def place(view: View[P], rule: WindowRule) -> Placed:
    """A view's heads, edges and weights in the pixels of its window."""
    picture, (height, width), window = view
    corner = np.array([window.left, window.top], np.float32)
    points = picture.points * (np.array([width, height]) / picture.size[::-1]).astype(np.float32) - corner
    extent = np.array([0, 0, width, height], np.float32) - np.tile(corner, 2)
    row_weight, column_weight = loss_weight(rule, view.size, window)
    crop = np.array([window.crop_top, window.crop_left])
    if window.flip:
        points[:, 0] = window.width - points[:, 0]
        extent[[0, 2]] = window.width - extent[[2, 0]]
        column_weight = column_weight[::-1]
        crop[1] = window.width - rule.crop - crop[1]
    kept_in = np.clip(points, extent[:2], extent[2:])  # where the density map puts a head beyond the image
    near = points[_within(kept_in, -rule.reach, np.array([window.width, window.height]) + rule.reach)]
    count = _within(near, crop[::-1], crop[::-1] + rule.crop).sum()
    return Placed(picture.row, window, near, extent, row_weight, column_weight, crop, float(count))


def _cut(
    view: View[DecodedImage], with_depth: bool
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.float32]]:
    """Image, region of interest and depth of a view, as large as its window is inside the picture; a depth that is
    unknown or not asked for is empty."""
    picture, size, window = view
    rows = slice(window.top, min(window.top + window.height, size[0]))
    columns = slice(window.left, min(window.left + window.width, size[1]))
    image = image_part(picture.image, size, rows, columns)
    roi = np.ones(image.shape[:2], bool) if picture.roi is None else mask_part(picture.roi, size, rows, columns)
    known = picture.depth if with_depth else None
    depth = np.zeros((0, 0), np.float32) if known is None else map_part(known, size, rows, columns)
    if window.flip:
        # A mirror turns around the padded window, so that padding stays where the crop is not.
        image, roi, depth = (_mirrored(values, window.width) for values in (image, roi, depth))
    if np.may_share_memory(image, picture.image):
        image = image.copy()  # else the whole picture would stay until the batch is full
    return image, roi, depth


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
