"""Tracking of evaluations in MLflow: a run for each counter and dataset, below that of the counter if registered."""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from crowdray import storage
from crowdray.errors import UserError
from crowdray.evaluation.metrics import GAME_LEVELS
from crowdray.evaluation.report import EvaluationReport, ModelResult
from crowdray.pipeline.image_table import image_table
from crowdray.pipeline.publish import experiment_of
from crowdray.registry.tracking import finish_on_exit, open_tracker
from crowdray.registry.versions import find_version

_log = logging.getLogger(__name__)


def track_evaluation(report: EvaluationReport, tracking_uri: str, files: Sequence[Path] = ()) -> list[str]:
    """Log the errors, the dataset and a table of all images of each result; the same evaluation again reopens its run.

    The errors belong to the registered model too, by dataset, so that MLflow compares models by them.

    Args:
        report: The evaluations.
        tracking_uri: MLflow server or database.
        files: Files to attach to each run.

    Returns:
        Web pages of the runs; those that could not be tracked cost a warning and are left out.
    """
    pages = []
    for result in report.results:
        try:
            page = _track(result, report.tile, tracking_uri, files)
        except UserError as error:
            _log.warning("the evaluation is not tracked: %s", error)
            continue
        if page is not None:
            pages.append(page)
    return pages


def _track(result: ModelResult, tile: int, tracking_uri: str, files: Sequence[Path]) -> str | None:
    model, dataset = result.model, result.dataset
    version = find_version(model.version, tracking_uri)
    tracker = open_tracker(
        tracking_uri,
        experiment_of(dataset.name),
        f"{dataset.split} by {model.version.removeprefix('models:/')}",
        f"evaluation of {model.digest} on {dataset.digest} {dataset.split} {model.precision} {tile}",
        parent=version.run_id if version else None,
        note=f"Errors of `{model.version}` on the split `{dataset.split}` of `{dataset.uri}`.",
    )
    with finish_on_exit(tracker), storage.scratch_folder("evaluation") as scratch:
        options = {"model": model.uri, "split": dataset.split, "precision": model.precision, "tile": tile}
        tracker.log_config(options, {"crowdray.model": model.version})
        tracker.log_dataset(dataset.name, dataset.uri, dataset.digest, context=dataset.split)
        metrics = {f"{dataset.split}_{name}": value for name, value in _metrics(result).items() if math.isfinite(value)}
        tracker.log_scores(metrics, dataset.name, dataset.digest, version.model_id if version else None)
        if result.reference:
            tracker.set_tags({"crowdray.compared_with": result.reference})
        table = scratch / "images.csv"
        table.write_bytes(image_table([result]))
        for file in (table, *files):
            tracker.log_file(file)
    return tracker.url


def _metrics(result: ModelResult) -> dict[str, float]:
    evaluation, comparison = result.evaluation, result.comparison
    overall, errors, quality = evaluation.overall, evaluation.errors, evaluation.quality
    metrics: dict[str, float] = {"failed": len(evaluation.failed)}
    if overall is not None and errors is not None:
        metrics |= {name: getattr(overall, name) for name in ("mae", "rmse", "bias", "nae")}
        metrics |= {f"game{level}": value for level, value in zip(GAME_LEVELS, overall.game, strict=True) if level}
        metrics |= {"mae_low": errors.mae_interval.low, "mae_high": errors.mae_interval.high}
    if quality is not None:
        metrics |= asdict(quality)
    if comparison is not None:
        low, high = comparison.interval.low, comparison.interval.high
        metrics |= {"gain": comparison.gain, "gain_low": low, "gain_high": high}
    return metrics | {f"f1_{scores.radius:g}px": scores.f1 for scores in evaluation.localisation}
