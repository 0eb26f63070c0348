"""Count the heads of whole images with a counter."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crowdray.data.image_cache import DecodedImage, ImageCache
from crowdray.data.targets import cell_mask, whole_window
from crowdray.evaluation.metrics import ImageCount


def to_input(picture: DecodedImage, device: torch.device) -> Tensor:
    """The picture's image as uint8 (1, 3, H, W), channels last in memory."""
    return image_input(picture.image, device)


def image_input(image: NDArray[np.uint8], device: torch.device) -> Tensor:
    """An image (H, W, 3) as uint8 (1, 3, H, W), channels last in memory."""
    # Pillow's arrays are read-only, which torch has no notion of.
    owned = image if image.flags.writeable else image.copy()
    return torch.from_numpy(owned).to(device).permute(2, 0, 1)[None]


def cells_that_count(roi: NDArray[np.bool_], stride: int) -> NDArray[np.bool_]:
    """A region of interest (H, W) in cells of `stride` pixels, (ceil(H / stride), ceil(W / stride)), as in training."""
    mask = torch.from_numpy(roi.astype(np.float32))[None, None]
    extent = whole_window(mask, (roi.shape[0], roi.shape[1]))
    counted: NDArray[np.bool_] = cell_mask(mask, extent, stride)[0, 0].numpy() > 0
    return counted


def count_images(
    density: Callable[[Tensor], Tensor], store: ImageCache, rows: Iterable[int], device: torch.device, stride: int = 1
) -> Iterator[ImageCount]:
    """Count whole images one at a time, so that no result depends on its neighbours in a batch.

    `density` maps uint8 RGB (1, 3, H, W) to heads per cell of `stride` x `stride` pixels.
    """
    for row in rows:
        picture = store[int(row)]
        with torch.inference_mode():
            cells = density(to_input(picture, device))[0, 0].float().cpu().numpy().astype(np.float64)
        masked = cells if picture.roi is None else cells * cells_that_count(picture.roi, stride)
        yield ImageCount(int(row), len(picture.points), float(masked.sum()), float(cells.sum()))
