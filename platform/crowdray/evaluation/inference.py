"""Inference on whole images, in overlapping tiles where they are large.

Shape legend: H W image, h w density.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crowdray.data.image_cache import ImageCache
from crowdray.data.targets import cell_mask, window_extent
from crowdray.evaluation.metrics import ImageCount
from crowdray.models.export import Geometry

TILE = 2048
"""Default side of a tile in pixels."""


def image_to_tensor(image: NDArray[np.uint8], device: torch.device) -> Tensor:
    """An image (H, W, 3) as uint8 (1, 3, H, W) on a device, channels last in memory."""
    writable = image if image.flags.writeable else image.copy()  # torch has no read-only tensors
    return torch.from_numpy(writable).to(device).permute(2, 0, 1)[None]


def roi_cells(roi: NDArray[np.bool_], stride: int) -> NDArray[np.bool_]:
    """A region of interest (H, W) in cells of `stride` pixels, (ceil(H / stride), ceil(W / stride)), as in training."""
    mask = torch.from_numpy(roi.astype(np.float32))[None, None]
    extent = window_extent(mask, (roi.shape[0], roi.shape[1]))
    cells: NDArray[np.bool_] = cell_mask(mask, extent, stride)[0, 0].numpy() > 0
    return cells


def count_images(
    density: Callable[[Tensor], Tensor], cache: ImageCache, rows: Iterable[int], device: torch.device, stride: int = 1
) -> Iterator[ImageCount]:
    """Count whole images one at a time, so that no result depends on the other images of a batch.

    `density` maps uint8 RGB (1, 3, H, W) to heads per cell of `stride` x `stride` pixels.
    """
    for row in rows:
        image = cache[int(row)]
        with torch.inference_mode():
            cells = density(image_to_tensor(image.image, device))[0, 0].float().cpu().numpy().astype(np.float64)
        masked = cells if image.roi is None else cells * roi_cells(image.roi, stride)
        yield ImageCount(int(row), len(image.points), float(masked.sum()), float(cells.sum()))


def tiled_density(density: Callable[[Tensor], Tensor], geometry: Geometry, side: int) -> Callable[[Tensor], Tensor]:
    """A density function that processes an image in overlapping tiles of about `side` pixels, to bound memory.

    The result equals `density` of the whole image up to the rounding of sums: each tile is padded with all the pixels
    that can change the cells kept from it.
    """
    step = max(1, side // geometry.grid) * geometry.grid
    padding = -(-geometry.reach // geometry.grid) * geometry.grid

    def tiled(image: Tensor) -> Tensor:
        height, width = image.shape[-2:]
        if height <= step and width <= step:
            return density(image)
        rows, columns = (list(_tiles(length, step, padding, geometry.cell)) for length in (height, width))
        return torch.cat(
            [
                torch.cat([density(image[..., y, x])[..., kept_y, kept_x] for x, kept_x in columns], dim=-1)
                for y, kept_y in rows
            ],
            dim=-2,
        )

    return tiled


def _tiles(length: int, step: int, padding: int, cell: int) -> Iterator[tuple[slice, slice]]:
    """Pixels of each padded tile along an axis, and the cells of it that belong to the tile itself."""
    for start in range(0, length, step):
        first, end = max(0, start - padding), min(length, start + step)
        pixels = slice(first, min(length, start + step + padding))
        yield pixels, slice((start - first) // cell, -(-(end - first) // cell))
