"""Batches: stacked windows of images with everything that targets are made from.

Shape legend: B windows, H W window in working pixels, N heads (padded to the largest number in the batch).
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

from crowdray.data.image_cache import AnnotatedImage, DecodedImage, crop_image, crop_map
from crowdray.data.sampling import Window, WindowConfig, loss_weight


@dataclass(frozen=True, eq=False)
class Batch:
    """Windows of one update on one rank; float32 or int64 where not stated otherwise."""

    image: Tensor
    """(B, 3, H, W) uint8 RGB, channels last in memory."""
    points: Tensor
    """(B, N, 2) x y of heads in window pixels: those in the window or within `WindowConfig.reach` of it."""
    valid_mask: Tensor
    """(B, N) 1 for a head, 0 for padding."""
    extent: Tensor
    """(B, 4) left, top, right, bottom edge of the whole image in window pixels."""
    roi: Tensor
    """(B, 1, H, W) bool, the region of interest; False outside the image."""
    depth: Tensor
    """(B, 1, H, W) raw depth in [0, 1], 0 where unknown."""
    has_depth: Tensor
    """(B,) 1 where the sample has depth."""
    row_weight: Tensor
    """(B, H) weight of each row in the losses of the maps."""
    column_weight: Tensor
    """(B, W) weight of each column."""
    corners: Tensor
    """(B, 2) row and column, in features, of the count decoder's square."""
    count: Tensor
    """(B,) heads inside that square."""
    brightness: Tensor
    """(B,) shift as a fraction of the full range."""
    contrast: Tensor
    """(B,) relative change of contrast."""
    colour: Tensor
    """(B, 3) relative change of red, green and blue."""
    rows: Tensor
    """(B,) dataset rows."""
    global_size: int
    """Number of windows of the update on all ranks."""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the windows."""
        return self.row_weight.shape[1], self.column_weight.shape[1]

    @property
    def weight(self) -> Tensor:
        """(B, 1, H, W) weight of each pixel in the losses of the maps, 0 outside the region of interest."""
        return self.row_weight[:, None, :, None] * self.column_weight[:, None, None, :] * self.roi

    def to(self, device: torch.device) -> "Batch":
        """Copy the batch to a device, asynchronously from page-locked memory; `rows` stays on the CPU."""
        return replace(self._map_tensors(lambda value: value.to(device, non_blocking=True)), rows=self.rows)

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keep the memory from being reused until a stream has finished its present work (see Tensor.record_stream)."""
        for value in vars(self).values():
            if isinstance(value, Tensor) and value.is_cuda:
                value.record_stream(stream)

    def pin(self) -> "Batch":
        """Copy the batch to page-locked memory."""
        return self._map_tensors(lambda value: value.pin_memory() if value.numel() else value)

    def microbatches(self, number: int) -> list["Batch"]:
        """Split into at most `number` nonempty batches whose sizes differ by at most one window."""
        bounds = [round(k * len(self.rows) / number) for k in range(number + 1)]
        pieces = [slice(start, stop) for start, stop in pairwise(bounds) if start < stop]
        return [self._map_tensors(itemgetter(piece)) for piece in pieces]

    def take(self, number: int) -> "Batch":
        """The batch of the first windows."""
        return self._map_tensors(itemgetter(slice(number)))

    def _map_tensors(self, change: Callable[[Tensor], Tensor]) -> "Batch":
        changed: dict[str, Any] = {n: change(value) for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **changed)

    def augmented_images(self) -> Tensor:
        """Images with changed colour, contrast and brightness, float32 (B, 3, H, W) in 0..255."""
        image = self.image * (1 + self.colour)[:, :, None, None]
        scale = (1 + self.contrast)[:, None, None, None]
        shift = (255 * self.brightness)[:, None, None, None]
        return ((image - 127.5) * scale + (127.5 + shift)).clamp(0, 255)


ImageT = TypeVar("ImageT", bound=AnnotatedImage)


class Crop(NamedTuple, Generic[ImageT]):
    """A window of an image that is resized to a size (H, W)."""

    image: ImageT
    size: tuple[int, int]
    window: Window


@dataclass(frozen=True, eq=False, slots=True)
class CropTargets:
    """Everything about one crop in a batch except its pixels."""

    row: int
    window: Window
    points: NDArray[np.float32]
    extent: NDArray[np.float32]
    row_weight: NDArray[np.float32]
    column_weight: NDArray[np.float32]
    corner: NDArray[np.int64]
    """(2,) row and column, in window pixels, of the square that the count decoder reads."""
    count: float


class Pixels(NamedTuple):
    """The fields of `Batch` that hold pixels."""

    image: Tensor
    roi: Tensor
    depth: Tensor
    has_depth: Tensor


def collate(
    crops: Iterable[Crop[DecodedImage]], config: WindowConfig, global_size: int | None = None, depth: bool = True
) -> Batch:
    """Cut and stack crops into a batch; smaller windows are padded at the bottom and the right, with weight 0.

    Args:
        crops: At least one crop.
        config: The configuration of their windows.
        global_size: Number of windows on all ranks; None: only these.
        depth: Whether depth is needed; without it all depth counts as unknown.
    """
    targets, cut = [], []
    for crop in crops:
        targets.append(crop_targets(crop, config))
        cut.append(_cut(crop, depth))
    size = max(one.window.height for one in targets), max(one.window.width for one in targets)
    images, rois, depths = zip(*cut, strict=True)
    pixels = Pixels(
        image=_stack(images, (*size, 3)).permute(0, 3, 1, 2),
        roi=_stack(rois, size)[:, None],
        depth=_stack(depths, size)[:, None],
        has_depth=torch.tensor([float(values.size > 0) for values in depths]),
    )
    return make_batch(targets, pixels, config, global_size)


def make_batch(targets: Sequence[CropTargets], pixels: Pixels, config: WindowConfig, global_size: int | None) -> Batch:
    """Combine targets and pixels of crops into a batch."""
    windows = [one.window for one in targets]
    points = _stack([one.points for one in targets], (1, 2))
    heads = torch.tensor([[len(one.points)] for one in targets])
    return Batch(
        **pixels._asdict(),
        points=points,
        valid_mask=(torch.arange(points.shape[1]) < heads).float(),
        extent=_stack([one.extent for one in targets]),
        row_weight=_stack([one.row_weight for one in targets]),
        column_weight=_stack([one.column_weight for one in targets]),
        corners=_stack([one.corner // config.stride for one in targets]),
        count=torch.tensor([one.count for one in targets]),
        brightness=torch.tensor([window.brightness for window in windows]),
        contrast=torch.tensor([window.contrast for window in windows]),
        colour=torch.tensor([window.colour for window in windows]),
        rows=torch.tensor([one.row for one in targets]),
        global_size=global_size or len(targets),
    )


def crop_targets(crop: Crop[ImageT], config: WindowConfig) -> CropTargets:
    """Heads, image edges and loss weights of a crop in the pixels of its window."""
    image, (height, width), window = crop
    origin = np.array([window.left, window.top], np.float32)
    points = image.points * (np.array([width, height]) / image.size[::-1]).astype(np.float32) - origin
    extent = np.array([0, 0, width, height], np.float32) - np.tile(origin, 2)
    row_weight, column_weight = loss_weight(config, crop.size, window)
    corner = np.array([window.crop_top, window.crop_left])
    if window.flip:
        points[:, 0] = window.width - points[:, 0]
        extent[[0, 2]] = window.width - extent[[2, 0]]
        column_weight = column_weight[::-1]
        corner[1] = window.width - config.sampling.crop - corner[1]
    clamped = np.clip(points, extent[:2], extent[2:])  # as the density map does with heads outside the image
    near = points[_within(clamped, -config.reach, np.array([window.width, window.height]) + config.reach)]
    count = _within(near, corner[::-1], corner[::-1] + config.sampling.crop).sum()
    return CropTargets(image.row, window, near, extent, row_weight, column_weight, corner, float(count))


def _cut(
    crop: Crop[DecodedImage], with_depth: bool
) -> tuple[NDArray[np.uint8], NDArray[np.bool_], NDArray[np.float32]]:
    """Image, region of interest and depth inside a window, without padding; unknown or unneeded depth is empty."""
    source, size, window = crop
    rows = slice(window.top, min(window.top + window.height, size[0]))
    columns = slice(window.left, min(window.left + window.width, size[1]))
    image = crop_image(source, size, rows, columns)
    roi = np.ones(image.shape[:2], bool) if source.roi is None else crop_map(source.roi, size, rows, columns) >= 0.5
    known = source.depth if with_depth else None
    depth = np.zeros((0, 0), np.float32) if known is None else crop_map(known, size, rows, columns)
    if window.flip:
        # Flip the padded window, so that the padding is on the same side as in the targets.
        image, roi, depth = (_flip(values, window.width) for values in (image, roi, depth))
    if np.may_share_memory(image, source.image):
        image = image.copy()  # a view would keep the whole image in memory until the batch is complete
    return image, roi, depth


def _flip(values: NDArray[Any], width: int) -> NDArray[Any]:
    """Pad (h, w, ...) on the right to a width and flip it horizontally; empty arrays stay empty."""
    if not values.size:
        return values
    if missing := width - values.shape[1]:
        values = np.pad(values, [(0, 0), (0, missing), *[(0, 0)] * (values.ndim - 2)])
    # For pixels of three bytes, take is three times as fast as the later copy from a view with negative stride.
    return values[:, ::-1] if values.ndim == 2 else values.take(np.arange(width)[::-1], axis=1)


def _within(points: NDArray[np.float32], low: Any, high: Any) -> NDArray[np.bool_]:
    inside: NDArray[np.bool_] = ((points >= low) & (points < high)).all(axis=1)
    return inside


def _stack(arrays: Sequence[NDArray[Any]], min_shape: tuple[int, ...] = ()) -> Tensor:
    """Stack arrays, zero-padded at the end of each axis to the largest shape and at least `min_shape`."""
    shape = np.max([min_shape or arrays[0].shape, *(array.shape for array in arrays)], axis=0)
    stacked = np.zeros((len(arrays), *shape), arrays[0].dtype)
    for target, array in zip(stacked, arrays, strict=True):
        target[tuple(map(slice, array.shape))] = array
    return torch.from_numpy(stacked)
