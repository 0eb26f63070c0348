"""Evaluation of an exported counter on whole images, with and without regions of interest.

Shape legend: H W image, h w density = ceil(H / k), ceil(W / k) for cells of k x k pixels, N heads.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crowdray.data.decoding import decode_image
from crowdray.data.image_cache import load_image
from crowdray.data.sample import decode_roi
from crowdray.data.shards import Dataset
from crowdray.errors import DataError, UserError
from crowdray.evaluation.inference import image_to_tensor, roi_cells
from crowdray.evaluation.localisation import HeadMatches, head_points, match_heads
from crowdray.evaluation.map_quality import MapQuality, map_quality
from crowdray.evaluation.metrics import GAME_LEVELS, game_error
from crowdray.models.export import Geometry

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class RegionCount:
    """True and predicted count in a region of one image: its region of interest, or all of it."""

    truth: int
    """Annotated heads in the region."""
    predicted: float
    """Sum of the density in the region."""
    game: tuple[float, ...]
    """`game_error` at GAME_LEVELS."""


@dataclass(frozen=True, slots=True)
class EvaluatedImage:
    """One image with its counts."""

    row: int
    """Row in the dataset."""
    name: str
    """Name within its split."""
    scene: str
    """Its camera or location."""
    downsample: int
    """Side in image pixels of one cell of its density."""
    inside: RegionCount
    """Counts inside the region of interest; equal to `whole` without one."""
    whole: RegionCount
    """Counts in the whole image."""
    has_roi: bool
    """Whether the image has a region of interest."""
    quality: MapQuality | None = None
    """Similarity of its density to the true one, inside the region of interest; None without heads."""
    matches: HeadMatches | None = None
    """Heads found inside the region of interest."""
    interval: tuple[float, float] | None = None
    """95% interval that the counter states for the count inside the region of interest."""


@dataclass(frozen=True, slots=True)
class FailedImage:
    """An image that could not be evaluated."""

    row: int
    """Row in the dataset."""
    name: str
    """Name within its split."""
    error: str
    """Why, in one line."""


CountInterval = Callable[[NDArray[np.uint8], float, float], tuple[float, float] | None]
"""Called with an image (H, W, 3), the count of all of it and that inside its region of interest: the lower and upper
end of the 95% interval of the latter, None if the counter states none."""


def evaluate_images(
    density: Callable[[Tensor], Tensor],
    dataset: Dataset,
    rows: Iterable[int],
    device: torch.device = _CPU,
    geometry: Geometry | None = None,
) -> Iterator[EvaluatedImage]:
    """Count images as `evaluate_image` does; the first that fails ends it."""
    for row in rows:
        yield evaluate_image(density, dataset, int(row), geometry, device=device)


def evaluate_image(
    density: Callable[[Tensor], Tensor],
    dataset: Dataset,
    row: int,
    geometry: Geometry | None,
    *,
    device: torch.device = _CPU,
    maps: bool = False,
    interval: CountInterval | None = None,
) -> EvaluatedImage:
    """Count a whole image at its original size, and compare with its annotation.

    Points and regions of interest are brought to downsampled pixels, and regions then to cells, as in training.

    Args:
        density: Maps uint8 RGB (1, 3, H, W) to heads per cell (1, 1, h, w), as an exported counter does.
        dataset: The dataset.
        row: Row of the dataset.
        geometry: Downsampling and cell size of the density; None: cells are downsampled pixels.
        device: Where to put the image.
        maps: Whether to compare the density with the true one, and to locate heads.
        interval: Returns the interval of its count.

    Raises:
        DataError: The image cannot be decoded.
        UserError: The shape of the density is not a downsampling of the image's.
    """
    sample = dataset.sample(row)
    try:
        pixels = decode_image(sample.image)
    except DataError as error:
        raise DataError(f"{sample.name} (row {row} of {dataset.uri}): {error}") from error
    with torch.inference_mode():
        output = density(image_to_tensor(pixels, device))
    cell = density_stride((sample.height, sample.width), tuple(output.shape), sample.name)
    cells = output[0, 0].float().cpu().numpy().astype(np.float64)
    downsample, cell = (geometry.downsample, geometry.cell) if geometry else (cell, cell)
    image = load_image(sample, row, downsample, use_roi=True)
    whole = inside = _count(cells, np.asarray(sample.points, dtype=np.float32) / np.float32(cell))
    if image.roi is not None:
        stride = cell // downsample
        cells = cells * roi_cells(image.roi, stride)
        inside = _count(cells, image.points / np.float32(stride))
    quality = matches = None
    if maps:
        points = image.points * np.float32(downsample)
        roi = None if sample.roi is None else decode_roi(bytes(sample.roi))
        quality = map_quality(cells, points, (sample.height, sample.width), cell, roi)
        matches = match_heads(head_points(cells, cell), points)
    stated = interval(pixels, whole.predicted, inside.predicted) if interval else None
    return EvaluatedImage(
        row, sample.name, sample.scene, cell, inside, whole, image.roi is not None, quality, matches, stated
    )


def density_stride(size: tuple[int, int], density: tuple[int, ...], name: str) -> int:
    """The integer k for which an image of size (H, W) has a density (1, 1, ceil(H / k), ceil(W / k)).

    Raises:
        UserError: If there is none; `name` identifies the image.
    """
    for factor in range(1, max(size) + 1):
        if density == (1, 1, math.ceil(size[0] / factor), math.ceil(size[1] / factor)):
            return factor
    raise UserError(
        f"the model's output for {name} of {size[0]}x{size[1]} pixels has shape {density}, expected (1, 1, H/k, W/k) "
        "for an integer k; give a model that jobs/train.py registered"
    )


def _count(cells: NDArray[np.float64], points: NDArray[np.float32]) -> RegionCount:
    game = tuple(game_error(cells, points, level) for level in GAME_LEVELS)
    return RegionCount(len(points), float(cells.sum()), game)
