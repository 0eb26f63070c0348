"""What a packaged counter is worth on a split: its errors on whole photos, with and without their ROI.

Shape legend: H W photo, h w density = ceil(H / k), ceil(W / k) for cells of k x k pixels, N heads.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from crowdray.data.image_cache import load_image
from crowdray.data.sample import Sample, decode_image
from crowdray.data.shards import Dataset
from crowdray.errors import DataError, UserError
from crowdray.evaluation.inference import cells_that_count, image_input
from crowdray.evaluation.metrics import GAME_LEVELS, ImageCount, grid_error, scene_mean, summarise
from crowdray.models.export import Geometry

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class RegionCount:
    """Heads of one image in a region: its region of interest, or all of it."""

    truth: int
    """Number of annotated heads there."""
    predicted: float
    """Sum of the density there."""
    game: tuple[float, ...]
    """Grid errors at GAME_LEVELS."""


@dataclass(frozen=True, slots=True)
class EvaluatedImage:
    """One photo with what was counted in it."""

    row: int
    """Row in the dataset."""
    name: str
    """Name within its split."""
    scene: str
    """The camera or place."""
    downsample: int
    """Pixels of the photo, along a side, in one cell of its density."""
    inside: RegionCount
    """Inside the region of interest; the same as `whole` where there is none."""
    whole: RegionCount
    """The whole image, every annotated head."""
    has_roi: bool
    """Whether the image has a region of interest."""


@dataclass(frozen=True, slots=True)
class Score:
    """Errors over a set of images, in heads; the fields are those of `Metrics` where they share a name."""

    images: int
    """Number of images."""
    heads: int
    """Annotated heads in all of them."""
    mae: float
    """Mean absolute error; GAME(0) is the same number."""
    rmse: float
    """Root of the mean squared error."""
    bias: float
    """Mean of prediction minus truth."""
    nae: float
    """Mean of the error relative to the truth, over images with heads; nan when there is none."""
    game: tuple[float, ...]
    """Grid average mean absolute errors at GAME_LEVELS."""


@dataclass(frozen=True)
class Evaluation:
    """A split evaluated."""

    overall: Score
    """Inside the regions of interest: the figures to quote."""
    without_roi: Score | None
    """Whole images; None where no image has a region of interest."""
    scenes: dict[str, Score]
    """Inside the regions of interest, scene by scene; empty when there is only one, or one for each image."""
    scene_mae: float | None
    """Unweighted mean of the scenes' MAE, which is how WorldExpo'10 is scored; None without scenes."""
    scene_mae_without_roi: float | None
    """The same over whole images; None without scenes or regions of interest."""
    images: list[EvaluatedImage]
    """Every image, in the dataset's order."""

    def counts(self) -> list[ImageCount]:
        """Per-image counts, as the figures take them."""
        return [ImageCount(i.row, i.inside.truth, i.inside.predicted, i.whole.predicted) for i in self.images]

    def content(self, **about: Any) -> dict[str, Any]:
        """The evaluation as JSON content, what is said `about` it first; what is no number becomes None."""
        content: dict[str, Any] = _finite({**about, "game_levels": GAME_LEVELS, **asdict(self)})
        return content


def evaluate_images(
    density: Callable[[Tensor], Tensor],
    dataset: Dataset,
    rows: Iterable[int],
    device: torch.device = _CPU,
    geometry: Geometry | None = None,
) -> Iterator[EvaluatedImage]:
    """Count whole photos one at a time, as they lie in the dataset, and compare with their annotation.

    `density` maps raw uint8 RGB (1, 3, H, W) to heads per cell (1, 1, h, w), as a packaged counter does.
    `geometry` says where its cells lie; without it they are taken for pixels of the smaller photo that it looks at.
    Regions of interest and points are looked at in those pixels, regions then in cells, as in training. Raises
    DataError for a photo that cannot be decoded, UserError for a density that fits no whole downsampling of its photo.
    """
    for row in rows:
        sample = dataset.sample(int(row))
        try:
            photo = decode_image(sample.image)
        except DataError as error:
            raise DataError(f"{sample.name} (row {row} of {dataset.uri}): {error}") from error
        with torch.inference_mode():
            cells = density(image_input(photo, device))
        yield judge(cells, sample, int(row), geometry)


def judge(density: Tensor, sample: Sample, row: int, geometry: Geometry | None) -> EvaluatedImage:
    """Compare the density (1, 1, h, w) of a sample's photo with its annotation."""
    factor = downsampling((sample.height, sample.width), tuple(density.shape), sample.name)
    cells = density[0, 0].float().cpu().numpy().astype(np.float64)
    downsample, factor = (geometry.downsample, geometry.cell) if geometry else (factor, factor)
    picture = load_image(sample, row, downsample, use_roi=True)
    everywhere = np.asarray(sample.points, dtype=np.float32) / np.float32(factor)
    whole = inside = _count(cells, everywhere)
    if picture.roi is not None:
        stride = factor // downsample
        inside = _count(cells * cells_that_count(picture.roi, stride), picture.points / np.float32(stride))
    return EvaluatedImage(row, sample.name, sample.scene, factor, inside, whole, picture.roi is not None)


def downsampling(size: tuple[int, int], density: tuple[int, ...], name: str) -> int:
    """The whole k for which a density (1, 1, ceil(H / k), ceil(W / k)) fits a photo of size (H, W).

    Raises UserError, naming the photo, when there is none.
    """
    for factor in range(1, max(size) + 1):
        if density == (1, 1, math.ceil(size[0] / factor), math.ceil(size[1] / factor)):
            return factor
    raise UserError(
        f"the model turns {name} of {size[0]}x{size[1]} pixels into {density}; a counter gives (1, 1, h, w), "
        "h and w a whole fraction of the photo's: name a model that jobs/train.py registered"
    )


def summarise_images(images: Sequence[EvaluatedImage]) -> Evaluation:
    """Errors over all images and over each scene, whatever the images' order; ValueError for none."""
    ordered = sorted(images, key=lambda image: image.row)
    with_roi = any(image.has_roi for image in ordered)
    groups: dict[str, list[EvaluatedImage]] = {}
    for image in sorted(ordered, key=lambda image: image.scene):
        groups.setdefault(image.scene, []).append(image)
    if len(groups) in (1, len(ordered)):
        groups = {}
    inside = {scene: _score([(image.row, image.inside) for image in group]) for scene, group in groups.items()}
    whole = {scene: _score([(image.row, image.whole) for image in group]) for scene, group in groups.items()}
    return Evaluation(
        overall=_score([(image.row, image.inside) for image in ordered]),
        without_roi=_score([(image.row, image.whole) for image in ordered]) if with_roi else None,
        scenes=inside,
        scene_mae=scene_mean({scene: score.mae for scene, score in inside.items()}),
        scene_mae_without_roi=scene_mean({scene: score.mae for scene, score in whole.items()}) if with_roi else None,
        images=ordered,
    )


def evaluation_table(evaluation: Evaluation, title: str) -> Table:
    """The evaluation as a table for the terminal."""
    table = Table(
        title=Text(title),
        title_justify="left",
        box=box.SIMPLE_HEAVY,
        collapse_padding=True,
        pad_edge=False,
        caption="Heads per image. RMSE is what crowd-counting tables print as MSE; MAE is GAME0.",
        caption_justify="left",
    )
    table.add_column("where")
    for name in ("images", "heads", "MAE", "RMSE", "bias", "NAE", *(f"GAME{n}" for n in GAME_LEVELS if n)):
        table.add_column(name, justify="right", no_wrap=True)
    first = "images" if evaluation.without_roi is None else "ROI"
    table.add_row(first, *_cells(evaluation.overall), style="bold", end_section=True)
    if evaluation.without_roi is not None:
        table.add_row("images", *_cells(evaluation.without_roi), end_section=True)
    for scene, score in evaluation.scenes.items():
        table.add_row(Text(scene), *_cells(score))
    for place, mae in ((first, evaluation.scene_mae), ("images", evaluation.scene_mae_without_roi)):
        if mae is not None:
            table.add_row(f"mean of scenes, {place}", "", "", f"{mae:.2f}")
    return table


def _count(cells: NDArray[np.float64], points: NDArray[np.float32]) -> RegionCount:
    game = tuple(grid_error(cells, points, level) for level in GAME_LEVELS)
    return RegionCount(len(points), float(cells.sum()), game)


def _score(counted: Sequence[tuple[int, RegionCount]]) -> Score:
    metrics = summarise([ImageCount(row, c.truth, c.predicted, c.predicted) for row, c in counted])
    game = np.mean([c.game for _, c in counted], axis=0).tolist()
    heads = sum(c.truth for _, c in counted)
    return Score(metrics.images, heads, metrics.mae, metrics.rmse, metrics.bias, metrics.nae, tuple(game))


def _cells(score: Score) -> list[str]:
    nae = f"{score.nae:.1%}" if math.isfinite(score.nae) else "-"
    errors = [f"{score.mae:.2f}", f"{score.rmse:.2f}", f"{score.bias:+.2f}", nae]
    games = [f"{value:.2f}" for level, value in zip(GAME_LEVELS, score.game, strict=True) if level]
    return [f"{score.images:,}", f"{score.heads:,}", *errors, *games]


def _finite(value: Any) -> Any:
    """The value with None for numbers that JSON cannot write."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
