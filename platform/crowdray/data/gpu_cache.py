"""Pictures in the memory of a device, where windows are cut: the same batches as of the loader's threads, to the bit,
without most of their work.

An accelerator trains on windows faster than the threads of one Python process cut and copy them.

Shape legend: B windows, H W a window in working pixels, h w a stored array.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crowdray.data.batch import Batch, Pixels, View, assemble, place
from crowdray.data.image_cache import DecodedImage, ImageCache, load_image
from crowdray.data.sampling import WindowRule

_BYTES_A_PIXEL = 6
"""At most: three of colour, one of the region of interest, two of depth."""
_AT_ONCE = 64
"""Pictures decoded before they are moved to the device."""


@dataclass(frozen=True, eq=False)
class GpuImage:
    """A picture whose pixels lie on the device."""

    row: int
    """Row in the dataset."""
    size: tuple[int, int]
    """Height and width."""
    points: NDArray[np.float32]
    """(N, 2) heads that count, x y."""
    number: int
    """Its place among those on the device."""


class GpuImageCache:
    """Pictures on a device, by their rows in the dataset; they are shown at their own size only."""

    def __init__(self, pictures: Iterable[DecodedImage], pixels: int, device: torch.device, depth: bool = True) -> None:
        """pixels: how many all pictures have together; depth: whether it will be asked for."""
        self._pictures: dict[int, GpuImage] = {}
        self._images = _Planes(torch.empty(pixels, 3, dtype=torch.uint8, device=device))
        self._rois = _Planes(torch.ones(pixels, dtype=torch.bool, device=device))
        depths: list[NDArray[np.float16]] = []
        known: list[float] = []
        for picture in pictures:
            self._pictures[picture.row] = GpuImage(picture.row, picture.size, picture.points, len(known))
            self._images.append(picture.image)
            self._rois.append(np.ones(picture.size, bool) if picture.roi is None else picture.roi)
            found = picture.depth if depth else None
            depths.append(np.zeros((1, 1), np.float16) if found is None else found)
            known.append(float(found is not None))
        self._depths = _Planes(torch.empty(sum(map(np.size, depths)), dtype=torch.float16, device=device))
        for values in depths:
            self._depths.append(values)
        for planes in (self._images, self._rois, self._depths):
            planes.finish()
        self._has_depth = torch.tensor(known, device=device)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # other streams cut from them

    def __getitem__(self, row: int) -> GpuImage:
        return self._pictures[row]

    def collate(self, views: Iterable[View[GpuImage]], rule: WindowRule, total: int, depth: bool) -> Batch:
        """What `batch.collate` makes of these views, once it is on the device."""
        views = list(views)
        placed, number = [place(view, rule) for view in views], len(views)
        pixels = Pixels(
            torch.empty(number, 3, 0, 0, dtype=torch.uint8),
            torch.empty(number, 1, 0, 0, dtype=torch.bool),
            torch.empty(number, 1, 0, 0),
            torch.full((number,), torch.nan),
        )
        windows = [
            (view.picture.number, w.top, w.left, w.height, w.width, w.flip) for view in views for w in [view.window]
        ]
        known = vars(assemble(placed, pixels, rule, total))
        return _UncutBatch(**known, windows=torch.tensor(windows), with_depth=depth, pictures=self)

    def cut(self, windows: Tensor, size: tuple[int, int], with_depth: bool) -> Pixels:
        """Pixels in common windows of a size (H, W), on the device.

        windows (B, 6) int64: a picture's number; top, left, height and width of its window; 1 to mirror it.
        """
        which, top, left, height, width, mirrored = windows.unbind(1)
        down, across = (torch.arange(side, device=windows.device)[None] for side in size)
        rows = top[:, None] + down
        columns = left[:, None] + torch.where(mirrored[:, None] > 0, width[:, None] - 1 - across, across)
        have = self._images.sizes[which]
        inside = ((down < height[:, None]) & (rows < have[:, :1]))[:, :, None]
        inside = inside & ((across < width[:, None]) & (columns < have[:, 1:]))[:, None, :]
        rows, columns = rows.minimum(have[:, :1] - 1), columns.clamp_min(0).minimum(have[:, 1:] - 1)
        image = self._images.at(which, rows, columns) * inside[..., None]
        roi = self._rois.at(which, rows, columns) & inside
        if with_depth:
            depth, has_depth = self._stretched_depth(which, rows, columns) * inside, self._has_depth[which]
        else:
            depth, has_depth = torch.zeros_like(inside, dtype=torch.float32), torch.zeros_like(self._has_depth[which])
        return Pixels(image.permute(0, 3, 1, 2), roi[:, None], depth[:, None], has_depth)

    def _stretched_depth(self, which: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """(B, H, W) float32 at these pixels; the arithmetic of `pictures.map_part`."""
        have, want = self._depths.sizes[which], self._images.sizes[which]
        above, below, down = _neighbours(have[:, :1], want[:, :1], rows)
        before, after, across = _neighbours(have[:, 1:], want[:, 1:], columns)
        upper, lower = (
            _mixed(self._depths.at(which, line, before), self._depths.at(which, line, after), across[:, None, :])
            for line in (above, below)
        )
        return _mixed(upper, lower, down[:, :, None])


def keep_on(
    device: torch.device, store: ImageCache, rows: NDArray[np.int64], most: float, depth: bool = True
) -> GpuImageCache | None:
    """The pictures of these training rows on a device; None where they might take more than `most` bytes of it, or
    more than it has. depth: whether it will be asked for."""
    dataset, factor = store.dataset, store.downsample
    chosen = np.isin(dataset.rows("train"), rows)
    pixels = int((-(-dataset.sizes("train")[chosen] // factor)).prod(axis=1).sum())
    if _BYTES_A_PIXEL * pixels > most:
        return None

    def opened(row: int) -> DecodedImage:
        picture = load_image(dataset.sample(row), row, factor, store.use_roi)
        if depth:
            _ = picture.depth  # decoded here, by the thread
        return picture

    def in_turn(pool: ThreadPoolExecutor) -> Iterator[DecodedImage]:
        for start in range(0, len(rows), _AT_ONCE):  # so that they do not pile up
            yield from pool.map(opened, rows[start : start + _AT_ONCE].tolist())

    with ThreadPoolExecutor(torch.get_num_threads(), thread_name_prefix="crowdray-resident") as pool:
        try:
            return GpuImageCache(in_turn(pool), pixels, device, depth)
        except torch.OutOfMemoryError:
            return None


@dataclass(frozen=True, eq=False)
class _UncutBatch(Batch):
    """A batch that has its pixels once it is on the device."""

    windows: Tensor
    """(B, 6) int64, see `ResidentPictures.cut`."""
    with_depth: bool
    """Whether depth is asked for."""
    pictures: GpuImageCache

    def to(self, device: torch.device) -> Batch:
        moved = super().to(device)
        assert isinstance(moved, _UncutBatch)
        known = {field.name: getattr(moved, field.name) for field in fields(Batch)}
        pixels = self.pictures.cut(moved.windows, self.size, self.with_depth)
        return Batch(**known | pixels._asdict())


class _Planes:
    """Arrays (h, w, ...) of many sizes, one behind the other in a tensor (pixels, ...) with room for all."""

    def __init__(self, values: Tensor) -> None:
        self._values = values
        self._sizes: list[tuple[int, int]] = []
        self._end = 0

    def append(self, array: NDArray[Any]) -> None:
        """Put one behind the others."""
        start, (height, width) = self._end, array.shape[:2]
        self._end += height * width
        self._sizes.append((height, width))
        self._values[start : self._end] = torch.tensor(array).flatten(0, 1)

    def finish(self) -> None:
        """Make `at` ready, once all are there."""
        self.sizes = torch.tensor(self._sizes, device=self._values.device)
        lengths = self.sizes.prod(dim=1)
        self._starts = lengths.cumsum(0) - lengths

    def at(self, which: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Values (B, H, W, ...) of the arrays `which` (B,) at rows (B, H) and columns (B, W)."""
        starts, widths = self._starts[which, None], self.sizes[which, 1:]
        return self._values[(starts + rows * widths)[:, :, None] + columns[:, None, :]]


def _neighbours(have: Tensor, want: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As in `pictures`: of places (B, n) on axes stretched from `have` to `want` (B, 1)."""
    place = ((index.double() + 0.5) * (have.double() / want.double()) - 0.5).clamp_min(0).minimum(have.double() - 1)
    before = place.long()
    return before, (before + 1).minimum(have - 1), (place - before).float()


def _mixed(low: Tensor, high: Tensor, share: Tensor) -> Tensor:
    low = low.float()
    return (high.float() - low) * share + low
