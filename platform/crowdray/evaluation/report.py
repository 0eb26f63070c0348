"""Evaluation of an exported counter on the whole images of a split, with and without regions of interest.

Shape legend: H W image, h w density = ceil(H / k), ceil(W / k) for cells of k x k pixels, N heads.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crowdray.data.decoding import decode_image
from crowdray.data.image_cache import load_image
from crowdray.data.sample import Sample
from crowdray.data.shards import Dataset
from crowdray.errors import DataError, UserError
from crowdray.evaluation.inference import image_to_tensor, roi_cells
from crowdray.evaluation.metrics import GAME_LEVELS, GridMetrics, ImageCount, game_error, scene_mae, summarise
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


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a split."""

    overall: GridMetrics
    """Inside the regions of interest: the numbers to report."""
    without_roi: GridMetrics | None
    """On whole images; None if no image has a region of interest."""
    scenes: dict[str, GridMetrics]
    """Inside the regions of interest, per scene; empty if all images share a scene or none do."""
    scene_mae: float | None
    """Unweighted mean of the scenes' MAE, WorldExpo'10's score; None without scenes."""
    scene_mae_without_roi: float | None
    """The same on whole images; None without scenes or regions of interest."""
    images: list[EvaluatedImage]
    """All images in the dataset's order."""

    def counts(self) -> list[ImageCount]:
        """Counts of each image, as the plots take them."""
        return [ImageCount(i.row, i.inside.truth, i.inside.predicted, i.whole.predicted) for i in self.images]

    def to_dict(self, **metadata: Any) -> dict[str, Any]:
        """The evaluation as JSON content after `metadata`; numbers that are not finite become None."""
        text = json.dumps({**metadata, "game_levels": GAME_LEVELS, **asdict(self)})
        content: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
        return content


def evaluate_images(
    density: Callable[[Tensor], Tensor],
    dataset: Dataset,
    rows: Iterable[int],
    device: torch.device = _CPU,
    geometry: Geometry | None = None,
) -> Iterator[EvaluatedImage]:
    """Count whole images one at a time, at their original size, and compare with their annotation.

    Points and regions of interest are brought to downsampled pixels, and regions then to cells, as in training.

    Args:
        density: Maps uint8 RGB (1, 3, H, W) to heads per cell (1, 1, h, w), as an exported counter does.
        dataset: The dataset.
        rows: Rows of the dataset.
        device: Where to put images.
        geometry: Downsampling and cell size of the density; None: cells are downsampled pixels.

    Raises:
        DataError: For an image that cannot be decoded.
        UserError: For a density whose shape is not a downsampling of its image's.
    """
    for row in rows:
        sample = dataset.sample(int(row))
        try:
            image = decode_image(sample.image)
        except DataError as error:
            raise DataError(f"{sample.name} (row {row} of {dataset.uri}): {error}") from error
        with torch.inference_mode():
            cells = density(image_to_tensor(image, device))
        yield evaluate_image(cells, sample, int(row), geometry)


def evaluate_image(density: Tensor, sample: Sample, row: int, geometry: Geometry | None) -> EvaluatedImage:
    """Compare the density (1, 1, h, w) of a sample's image with its annotation."""
    factor = density_stride((sample.height, sample.width), tuple(density.shape), sample.name)
    cells = density[0, 0].float().cpu().numpy().astype(np.float64)
    downsample, factor = (geometry.downsample, geometry.cell) if geometry else (factor, factor)
    image = load_image(sample, row, downsample, use_roi=True)
    points = np.asarray(sample.points, dtype=np.float32) / np.float32(factor)
    whole = inside = _count(cells, points)
    if image.roi is not None:
        stride = factor // downsample
        inside = _count(cells * roi_cells(image.roi, stride), image.points / np.float32(stride))
    return EvaluatedImage(row, sample.name, sample.scene, factor, inside, whole, image.roi is not None)


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


def summarise_images(images: Sequence[EvaluatedImage]) -> Evaluation:
    """Metrics over all images and per scene, for any order of the images; ValueError for none."""
    ordered = sorted(images, key=lambda image: image.row)
    with_roi = any(image.has_roi for image in ordered)
    by_scene = attrgetter("scene")
    groups = {scene: list(group) for scene, group in groupby(sorted(ordered, key=by_scene), by_scene)}
    if len(groups) in (1, len(ordered)):
        groups = {}
    inside = {scene: _metrics(group, _inside) for scene, group in groups.items()}
    whole = {scene: _metrics(group, _whole) for scene, group in groups.items()}
    return Evaluation(
        overall=_metrics(ordered, _inside),
        without_roi=_metrics(ordered, _whole) if with_roi else None,
        scenes=inside,
        scene_mae=scene_mae(inside),
        scene_mae_without_roi=scene_mae(whole) if with_roi else None,
        images=ordered,
    )


_inside, _whole = attrgetter("inside"), attrgetter("whole")


def _count(cells: NDArray[np.float64], points: NDArray[np.float32]) -> RegionCount:
    game = tuple(game_error(cells, points, level) for level in GAME_LEVELS)
    return RegionCount(len(points), float(cells.sum()), game)


def _metrics(images: Sequence[EvaluatedImage], region: Callable[[EvaluatedImage], RegionCount]) -> GridMetrics:
    regions = [region(image) for image in images]
    counts = [ImageCount(i.row, r.truth, r.predicted, i.whole.predicted) for i, r in zip(images, regions, strict=True)]
    game = np.mean([r.game for r in regions], axis=0).tolist()
    return GridMetrics(**asdict(summarise(counts)), heads=sum(r.truth for r in regions), game=tuple(game))
