"""Tracking of an evaluation in MLflow: a run of its own, below that of the model where it is registered."""

import csv
import logging
import math
from pathlib import Path

from crowdray import storage
from crowdray.data.shards import Dataset
from crowdray.errors import UserError
from crowdray.evaluation.metrics import GAME_LEVELS
from crowdray.evaluation.report import Evaluation
from crowdray.pipeline.publish import experiment_of
from crowdray.registry.loading import LoadedCounter
from crowdray.registry.tracking import finish_on_exit, open_tracker
from crowdray.registry.versions import find_version

_log = logging.getLogger(__name__)


def track_evaluation(
    evaluation: Evaluation,
    counter: LoadedCounter,
    dataset: Dataset,
    *,
    model: str,
    split: str,
    tile: int,
    tracking_uri: str,
) -> str | None:
    """Log the errors, the dataset and a table of all images; the same evaluation again reopens its run.

    The errors belong to the registered model too, by dataset, so that MLflow compares models by them.

    Returns:
        Web page of the run; None if it could not be tracked, which costs a warning.
    """
    name = dataset.index.name
    setting = f"{dataset.digest} {split} {counter.precision} {tile}"
    try:
        version = find_version(model, tracking_uri)
        tracker = open_tracker(
            tracking_uri,
            experiment_of(name),
            f"{split} by {(version.uri if version else model).removeprefix('models:/')}",
            f"evaluation of {counter.digest} on {setting}",
            parent=version.run_id if version else None,
            note=f"Errors of `{version.uri if version else model}` on the split `{split}` of `{dataset.uri}`.",
        )
        with finish_on_exit(tracker), storage.scratch_folder("evaluation") as scratch:
            options = {"model": model, "split": split, "precision": counter.precision, "tile": tile}
            tracker.log_config(options, {"crowdray.model": version.uri if version else model})
            tracker.log_dataset(name, dataset.uri, dataset.digest, context=split)
            metrics = _metrics(evaluation, split)
            tracker.log_scores(metrics, name, dataset.digest, version.model_id if version else None)
            table = scratch / "images.csv"
            _write_table(evaluation, table)
            tracker.log_file(table)
    except UserError as error:
        _log.warning("the evaluation is not tracked: %s", error)
        return None
    return tracker.url


def _metrics(evaluation: Evaluation, split: str) -> dict[str, float]:
    overall = evaluation.overall
    errors = {name: getattr(overall, name) for name in ("mae", "rmse", "bias", "nae")}
    errors |= {f"game{level}": value for level, value in zip(GAME_LEVELS, overall.game, strict=True) if level}
    return {f"{split}_{name}": value for name, value in errors.items() if math.isfinite(value)}


def _write_table(evaluation: Evaluation, path: Path) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(["image", "scene", "annotated", "predicted", "error"])
        for image in evaluation.images:
            inside = image.inside
            error = inside.predicted - inside.truth
            table.writerow([image.name, image.scene, inside.truth, f"{inside.predicted:.3f}", f"{error:.3f}"])
