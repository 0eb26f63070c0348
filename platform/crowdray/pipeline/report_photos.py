"""The photos of an evaluation report: which are shown, and their layers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crowdray.data.decoding import decode_image
from crowdray.data.sample import decode_roi
from crowdray.data.shards import Dataset
from crowdray.evaluation.images import EvaluatedImage
from crowdray.evaluation.inference import image_to_tensor
from crowdray.evaluation.summary import Evaluation
from crowdray.plots.layers import density_layer, photo_layer, point_size, points_path, roi_layer

MAX_PHOTOS = 16
"""Most photos of a dataset; each counter counts them again."""
_GROUP_PHOTOS = 3
"""Photos of a group where there are not many datasets."""


@dataclass(frozen=True)
class PredictedLayer:
    """What one counter predicts on a photo."""

    image: EvaluatedImage
    """Its counts."""
    density: str
    """Its density as a data URI."""
    extent: tuple[int, int]
    """Width and height of the density in pixels of the photo: its last cells may extend beyond the photo."""


@dataclass(frozen=True)
class ReportPhoto:
    """A photo with its layers."""

    name: str
    """Name within its split."""
    width: int
    """Width of the photo in pixels, the unit of all layers."""
    height: int
    """Height in pixels."""
    truth: int
    """Annotated heads, inside the region of interest if there is one."""
    photo: str
    """The photo as a data URI."""
    outside: str
    """Shade outside the region of interest as a data URI; empty without one."""
    points: str
    """All annotated heads as an SVG path."""
    point_size: float
    """Diameter of their dots in pixels."""
    predictions: list[PredictedLayer]
    """One of each counter."""


def choose_rows(evaluations: Sequence[Evaluation], photos: int = _GROUP_PHOTOS) -> dict[str, list[int]]:
    """Choose photos that all counters have counted, by the mean absolute error of the counters; none twice.

    Args:
        evaluations: One of each counter, on the same split.
        photos: Most photos of a group.

    Returns:
        Rows of the dataset for each group, by the title of the group.
    """
    errors = [{i.row: i.inside.predicted - i.inside.truth for i in e.images} for e in evaluations]
    rows = sorted(set.intersection(*map(set, errors))) if errors else []
    signed = {row: np.array([counter[row] for counter in errors]) for row in rows}
    error = {row: float(np.abs(values).mean()) for row, values in signed.items()}
    truth = {image.row: image.inside.truth for image in evaluations[0].images} if evaluations else {}
    median = float(np.median(list(error.values()))) if rows else 0.0
    orders: dict[str, Callable[[int], float]] = {
        "Largest error": lambda row: -error[row],
        "Smallest error": lambda row: error[row],
        "Typical error, close to the median": lambda row: abs(error[row] - median),
        "Most heads": lambda row: -truth[row],
    }
    if len(evaluations) > 1:
        orders["Counters differ most"] = lambda row: float(-np.ptp(np.abs(signed[row])))
    chosen: dict[str, list[int]] = {}
    for title, order in orders.items():
        taken = {row for group in chosen.values() for row in group}
        if group := sorted((row for row in rows if row not in taken), key=order)[:photos]:
            chosen[title] = group
    return chosen


def group_photos(datasets: int, counters: int) -> int:
    """Photos of a group, such that a report with many datasets stays small."""
    return max(1, min(_GROUP_PHOTOS, MAX_PHOTOS // ((4 + (counters > 1)) * datasets)))


def render_photo(
    dataset: Dataset,
    row: int,
    evaluations: Sequence[Evaluation],
    densities: Sequence[Callable[[Tensor], Tensor]],
) -> ReportPhoto:
    """Count a photo again with each counter and draw its layers; the densities share one colour scale.

    Args:
        dataset: The dataset.
        row: A row that all counters have counted.
        evaluations: One of each counter.
        densities: Each counter: uint8 RGB (1, 3, H, W) to heads per cell (1, 1, h, w).
    """
    sample = dataset.sample(row)
    image = decode_image(sample.image)
    counted = [next(found for found in evaluation.images if found.row == row) for evaluation in evaluations]
    with torch.inference_mode():
        maps = [
            density(image_to_tensor(image, torch.device("cpu")))[0, 0].float().cpu().numpy() for density in densities
        ]
    top = max(float(cells.max()) / found.downsample**2 for cells, found in zip(maps, counted, strict=True))
    points = np.asarray(sample.points, dtype=np.float32)
    return ReportPhoto(
        name=sample.name,
        width=sample.width,
        height=sample.height,
        truth=counted[0].inside.truth,
        photo=photo_layer(image),
        outside="" if sample.roi is None else roi_layer(decode_roi(bytes(sample.roi))),
        points=points_path(points),
        point_size=point_size(points, (sample.height, sample.width)),
        predictions=[_predicted(found, cells, top) for found, cells in zip(counted, maps, strict=True)],
    )


def _predicted(image: EvaluatedImage, cells: NDArray[np.float32], top: float) -> PredictedLayer:
    height, width = (side * image.downsample for side in cells.shape)
    return PredictedLayer(image, density_layer(cells, image.downsample, top), (width, height))
