"""From a finished training to what is used of it: the packaged counter, its version in the registry, a
picture."""

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

import torch

from crowdray import storage
from crowdray.data.image_cache import ImageCache
from crowdray.data.sample import decode_image
from crowdray.data.shards import Dataset
from crowdray.errors import DataError
from crowdray.models.build import build_counter
from crowdray.models.export import PackagedCounter
from crowdray.pipeline.run import RESULT, Run
from crowdray.plots.training import draw_calibration, draw_density_levels, draw_history, draw_overview
from crowdray.registry.loading import DESCRIPTION
from crowdray.registry.packaging import Package, package_counter
from crowdray.registry.registration import register
from crowdray.registry.tracking import Tracker
from crowdray.training.checkpoint import Checkpoint, load_checkpoint
from crowdray.training.result import TrainingResult

PICTURES = 4
"""Images in the overview."""


@dataclass(frozen=True)
class Outcome:
    """What came out of a run, and where everything lies."""

    run: str
    """The run's folder."""
    result: TrainingResult
    """Errors and history."""
    model: str
    """Folder of the packaged counter."""
    figure: str
    """The overview of what it sees."""
    registered: str | None
    """The registered version as models:/NAME/VERSION; None without a tracking URI."""
    alias: str | None
    """The alias that this version got; None where it got none, or may have lost it since."""
    tracking_uri: str | None
    """Where the run is tracked."""
    run_id: str | None
    """Its id there."""
    run_url: str | None
    """Its page, where a server shows it."""

    @property
    def counter(self) -> str:
        """URI that loads this very counter; an alias may move to another one."""
        return self.registered or self.model

    @classmethod
    def of_earlier(cls, run: Run, tracking_uri: str | None) -> Self | None:
        """What came out of a run that has ended and is tracked there; whether its version still has its alias is not
        known."""
        if not storage.exists(run.outcome):
            return None
        outcome = cls.from_json(storage.read_bytes(run.outcome), run.outcome)
        return replace(outcome, alias=None) if outcome.tracking_uri == tracking_uri else None

    def to_json(self) -> str:
        """The outcome as JSON text."""
        return json.dumps(asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: bytes, place: str) -> Self:
        """Parse what to_json gave; raises DataError naming `place` when it cannot be."""
        try:
            content: dict[str, Any] = json.loads(text)
            result = TrainingResult.from_json(json.dumps(content.pop("result")), place)
            return cls(result=result, **content)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{place} is damaged ({error}); remove it and give the same command again") from error


def publish_run(run: Run, tracker: Tracker, tracking_uri: str | None, tags: Mapping[str, str]) -> Outcome:
    """Package, register and draw the counter that a finished training chose; may be repeated.

    tags: where it comes from; they go with the model.
    """
    dataset = Dataset.open(run.data)
    with storage.local_copy(run.trained) as folder:
        checkpoint = load_checkpoint(folder)
        result = TrainingResult.from_json((folder / RESULT).read_bytes(), storage.join(run.trained, RESULT))
    tracker.sync_history(tracked_rows(checkpoint.progress.history))
    best = result.stages[result.shipped].best
    tracker.log_summary(_summary(result), checkpoint.progress.epochs)
    with tempfile.TemporaryDirectory(prefix="crowdray-ship-") as scratch:
        package = _package(run, checkpoint, result, dataset, tags, Path(scratch) / "model")
        if not storage.exists(storage.join(run.model, DESCRIPTION)):
            storage.publish_directory(package.path, run.model, last=DESCRIPTION)
        version = None
        if tracking_uri is not None and tracker.run_id is not None:
            name = f"crowdray-{dataset.index.name}"
            version = register(package, name, tracker.run_id, best.epoch, tracking_uri)
        pictures = _draw(checkpoint, result, dataset, Path(scratch))
        for picture in pictures:
            tracker.log_figure(picture, "figures")
        figure = storage.join(run.uri, pictures[0].name)
        storage.publish_file(pictures[0], figure)
    return Outcome(
        run.uri, result, run.model, figure, version.uri if version else None, version.alias if version else None,
        tracking_uri, tracker.run_id, tracker.url,
    )  # fmt: skip


def tracked_rows(history: Sequence[Mapping[str, float | str]]) -> list[dict[str, float]]:
    """History as numbers alone: a stage's name becomes its place in the order of stages."""
    order = list(dict.fromkeys(row["stage"] for row in history))
    return [
        {key: float(value) for key, value in row.items() if not isinstance(value, str)}
        | {"stage": float(order.index(row["stage"]))}
        for row in history
    ]


def _summary(result: TrainingResult) -> dict[str, float]:
    figures: dict[str, float] = {}
    for name, stage in result.stages.items():
        for split, metrics in (("val", stage.validation), ("test", stage.test)):
            if metrics is not None:
                figures |= {f"final/{name}/{split}/{key}": float(value) for key, value in asdict(metrics).items()}
    if result.mean_predictor is not None:
        figures["final/mean_predictor/test/mae"] = result.mean_predictor.mae
    return figures


def _package(
    run: Run, checkpoint: Checkpoint, result: TrainingResult, dataset: Dataset, tags: Mapping[str, str], dest: Path
) -> Package:
    counter = build_counter(run.config, checkpoint.progress.density_scale).strip()
    counter.load_state_dict(checkpoint.best[result.shipped])
    stage = result.stages[result.shipped]
    metrics = {f"val/{key}": value for key, value in _errors(stage.validation).items()}
    if stage.test is not None:
        metrics |= {f"test/{key}": value for key, value in _errors(stage.test).items()}
    image = decode_image(dataset.sample(int(dataset.rows("train")[0])).image)
    return package_counter(
        PackagedCounter(counter, run.config.sampling.downsample),
        torch.from_numpy(image.copy()).permute(2, 0, 1)[None],
        dest,
        config=asdict(run.config),
        metrics=metrics,
        tags=tags,
    )


def _errors(metrics: Any) -> dict[str, float]:
    return {name: getattr(metrics, name) for name in ("mae", "rmse", "bias")}


def _draw(checkpoint: Checkpoint, result: TrainingResult, dataset: Dataset, folder: Path) -> list[Path]:
    """Draw the overview (first), the curves, and where there is a test split what the counts look like there."""
    overview, curves, calibration, levels = (
        folder / f"{name}.png" for name in ("overview", "curves", "calibration", "density-levels")
    )
    _draw_overview(checkpoint, result, dataset, overview)
    draw_history(checkpoint.progress.history, curves)
    counts = result.stages[result.shipped].test_counts
    if not counts:
        return [overview, curves]
    draw_calibration(counts, calibration)
    draw_density_levels(counts, result.stages["baseline"].test_counts, levels)
    return [overview, curves, calibration, levels]


def _draw_overview(checkpoint: Checkpoint, result: TrainingResult, dataset: Dataset, path: Path) -> None:
    """Draw images spread over the test split, or over the training split where there is no other."""
    config = checkpoint.config
    counter, baseline = (build_counter(config, checkpoint.progress.density_scale).eval() for _ in range(2))
    counter.load_state_dict(checkpoint.weights)
    counter.load_state_dict(checkpoint.best[result.shipped], strict=False)
    baseline.load_state_dict(checkpoint.best["baseline"], strict=False)
    rows = dataset.rows("test" if "test" in dataset.index.splits else "train")
    chosen = sorted({rows[(2 * number + 1) * len(rows) // (2 * PICTURES)] for number in range(PICTURES)})
    store = ImageCache(dataset, config.sampling.downsample, config.sampling.roi, 0)
    draw_overview(
        counter,
        [store[int(row)] for row in chosen],
        path,
        sigma=config.target.sigma,
        threshold=config.target.threshold,
        baseline=None if result.shipped == "baseline" else baseline,
    )
