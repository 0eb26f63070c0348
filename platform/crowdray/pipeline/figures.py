"""Pictures of a finished training run, for its folder, its MLflow run and its model card."""

import io
from pathlib import Path

from PIL import Image

from crowdray.data.image_cache import ImageCache
from crowdray.data.shards import Dataset
from crowdray.models.build import build_counter
from crowdray.pipeline.run import Run
from crowdray.plots.training import draw_calibration, draw_density_levels, draw_history, draw_overview
from crowdray.registry.card import PICTURE
from crowdray.training.checkpoint import Checkpoint
from crowdray.training.result import TrainingResult

OVERVIEW_IMAGES = 4
"""Images in the overview figure."""
CARD_WIDTH = 800
"""Width in pixels of the overview in a model card."""


def draw_figures(
    run: Run, checkpoint: Checkpoint, result: TrainingResult, dataset: Dataset, folder: Path
) -> list[Path]:
    """Draw the overview (first) and the learning curves, and with a test split the figures of its counts."""
    names = ("overview", "curves", "calibration", "levels")
    overview, curves, calibration, levels = figures = [folder / f"{name}.png" for name in names]
    split = "test" if "test" in dataset.index.splits else "train"
    title = f"{dataset.index.name}, {split} images: {run.identity.name}"
    _draw_overview(checkpoint, result, dataset, split, title, overview)
    draw_history(checkpoint.progress.history, curves, f"{dataset.index.name}: {run.identity.name}")
    counts = result.stages[result.best_stage].test_counts
    if not counts:
        return figures[:2]
    draw_calibration(counts, calibration, title)
    draw_density_levels(counts, result.stages["baseline"].test_counts, levels, title)
    return figures


def _draw_overview(
    checkpoint: Checkpoint, result: TrainingResult, dataset: Dataset, split: str, title: str, path: Path
) -> None:
    """Draw images evenly spaced in a split."""
    config = checkpoint.config
    counter, baseline = (build_counter(config, checkpoint.progress.density_scale).eval() for _ in range(2))
    counter.load_state_dict(checkpoint.weights, strict=False)  # without the count decoder
    counter.load_state_dict(checkpoint.best_weights[result.best_stage], strict=False)
    baseline.load_state_dict(checkpoint.best_weights["baseline"], strict=False)
    chosen = overview_rows(dataset, split)
    images = ImageCache(dataset, config.sampling.downsample, config.sampling.roi, 0)
    draw_overview(
        counter,
        [images[row] for row in chosen],
        path,
        sigma=config.target.sigma,
        threshold=config.target.threshold,
        baseline=None if result.best_stage == "baseline" else baseline,
        title=title,
        names=[dataset.sample(row).name for row in chosen],
    )


def overview_rows(dataset: Dataset, split: str) -> list[int]:
    """Return up to OVERVIEW_IMAGES rows evenly spaced in a split."""
    rows, count = dataset.rows(split), OVERVIEW_IMAGES
    return sorted({int(rows[(2 * number + 1) * len(rows) // (2 * count)]) for number in range(count)})


def write_card_picture(overview: Path, folder: Path) -> Path:
    """Write the overview at the size that a model card shows."""
    path = folder / PICTURE
    with Image.open(overview) as image:
        image.resize((CARD_WIDTH, round(image.height * CARD_WIDTH / image.width))).save(path)
    return path


def write_example(dataset: Dataset, folder: Path) -> Path:
    """Write a photo of the test split, or of the training split if there is no other, for the model card's snippet."""
    rows = dataset.rows("test" if "test" in dataset.index.splits else "train")
    content = bytes(dataset.sample(int(rows[len(rows) // 2])).image)
    path = folder / f"example.{(Image.open(io.BytesIO(content)).format or 'jpeg').lower()}"
    path.write_bytes(content)
    return path
