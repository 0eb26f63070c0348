"""Everything that is known about the errors of one counter on the images of one split."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from operator import attrgetter
from typing import Any

import numpy as np

from crowdray.evaluation.comparison import ErrorSummary, summarise_errors
from crowdray.evaluation.images import EvaluatedImage, FailedImage, RegionCount
from crowdray.evaluation.levels import Calibration, EmptyImages, LevelRow, calibrate, empty_images, error_levels
from crowdray.evaluation.localisation import Localisation, summarise_matches
from crowdray.evaluation.map_quality import MapQuality
from crowdray.evaluation.metrics import GAME_LEVELS, GridMetrics, ImageCount, scene_mae, summarise


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a split."""

    overall: GridMetrics | None
    """Inside the regions of interest: the numbers to report; None if no image could be evaluated."""
    without_roi: GridMetrics | None
    """On whole images; None if no image has a region of interest."""
    scenes: dict[str, GridMetrics]
    """Inside the regions of interest, per scene; empty if all images share a scene or none do."""
    scenes_without_roi: dict[str, GridMetrics]
    """On whole images, per scene; empty without scenes or regions of interest."""
    scene_mae: float | None
    """Unweighted mean of the scenes' MAE, WorldExpo'10's score; None without scenes."""
    scene_mae_without_roi: float | None
    """The same on whole images; None without scenes or regions of interest."""
    images: list[EvaluatedImage]
    """All evaluated images in the dataset's order."""
    failed: list[FailedImage]
    """Images that could not be evaluated, and are missing in all numbers."""
    block: int
    """Consecutive images that the intervals resample together."""
    errors: ErrorSummary | None
    """MAE, RMSE and bias of `overall` with their 95% intervals."""
    levels: list[LevelRow]
    """Errors by density level."""
    empty: EmptyImages
    """False counts on images without heads."""
    calibration: Calibration | None
    """How predicted counts follow the true ones."""
    quality: MapQuality | None
    """Means of PSNR and SSIM over images with heads; None without any."""
    localisation: tuple[Localisation, ...]
    """Scores of the located heads, a small and a large radius; empty if heads were not located."""

    def counts(self) -> list[ImageCount]:
        """Counts of each image, as the plots take them."""
        return [_image_count(image, image.inside) for image in self.images]

    def to_dict(self, **metadata: Any) -> dict[str, Any]:
        """The evaluation as JSON content after `metadata`; numbers that are not finite become None."""
        text = json.dumps({**metadata, "game_levels": GAME_LEVELS, **asdict(self)})
        content: dict[str, Any] = json.loads(text, parse_constant=lambda _: None)
        return content


def summarise_images(
    images: Sequence[EvaluatedImage], failed: Sequence[FailedImage] = (), *, block: int = 1
) -> Evaluation:
    """Metrics over all images and per scene, equal to the last bit for any order of the images.

    Args:
        images: Evaluated images.
        failed: Images that could not be evaluated.
        block: Consecutive images that the intervals resample together: those of a video resemble each other.
    """
    by_row, by_scene = attrgetter("row"), attrgetter("scene")
    ordered = sorted(images, key=by_row)
    with_roi = any(image.has_roi for image in ordered)
    groups = {scene: list(group) for scene, group in groupby(sorted(ordered, key=by_scene), by_scene)}
    if len(groups) in (1, len(ordered)):
        groups = {}
    inside = {scene: _metrics(group, _inside) for scene, group in groups.items()}
    whole = {scene: _metrics(group, _whole) for scene, group in groups.items()}
    counts = [_image_count(image, image.inside) for image in ordered]
    located = [image.matches for image in ordered if image.matches]
    return Evaluation(
        overall=_metrics(ordered, _inside) if ordered else None,
        without_roi=_metrics(ordered, _whole) if with_roi else None,
        scenes=inside,
        scenes_without_roi=whole if with_roi else {},
        scene_mae=scene_mae(inside),
        scene_mae_without_roi=scene_mae(whole) if with_roi else None,
        images=ordered,
        failed=sorted(failed, key=by_row),
        block=block,
        errors=summarise_errors([count.predicted - count.truth for count in counts], block) if counts else None,
        levels=error_levels(counts),
        empty=empty_images(counts),
        calibration=calibrate(counts, [image.interval for image in ordered]) if counts else None,
        quality=_mean_quality(ordered),
        localisation=summarise_matches(located, sum(count.truth for count in counts)) if located else (),
    )


_inside, _whole = attrgetter("inside"), attrgetter("whole")


def _image_count(image: EvaluatedImage, region: RegionCount) -> ImageCount:
    return ImageCount(image.row, region.truth, region.predicted, image.whole.predicted)


def _metrics(images: Sequence[EvaluatedImage], region: Callable[[EvaluatedImage], RegionCount]) -> GridMetrics:
    regions = [region(image) for image in images]
    counts = [_image_count(image, counted) for image, counted in zip(images, regions, strict=True)]
    game = np.mean([r.game for r in regions], axis=0).tolist()
    return GridMetrics(**asdict(summarise(counts)), heads=sum(r.truth for r in regions), game=tuple(game))


def _mean_quality(images: Sequence[EvaluatedImage]) -> MapQuality | None:
    values = [(image.quality.psnr, image.quality.ssim) for image in images if image.quality]
    return MapQuality(*np.mean(values, axis=0).tolist()) if values else None
