"""Publication of a finished training run: packaged counter, registered version, figures."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from crowdray import storage
from crowdray.credentials import redacted
from crowdray.data.decoding import decode_image
from crowdray.data.shards import Dataset
from crowdray.data.splits import split_rows
from crowdray.evaluation.metrics import ImageCount
from crowdray.models.build import build_counter
from crowdray.models.export import ExportedCounter
from crowdray.pipeline.figures import draw_figures, write_card_picture, write_example
from crowdray.pipeline.identity import RunIdentity
from crowdray.pipeline.model_card import model_card
from crowdray.pipeline.outcome import Outcome
from crowdray.pipeline.results import RESULTS, WEIGHTS, results_csv, weights_file
from crowdray.pipeline.run import CARD, RESULT, Run, remove_checkpoints
from crowdray.registry.aliases import MEAN_PREDICTOR_MAE, VALIDATION_IMAGES
from crowdray.registry.card import FIGURES
from crowdray.registry.interval import CountInterval
from crowdray.registry.loading import DESCRIPTION
from crowdray.registry.metrics import exported_metrics, metric_rows
from crowdray.registry.packaging import Package, package_counter
from crowdray.registry.provenance import git_revision
from crowdray.registry.registration import RegisteredVersion, register
from crowdray.registry.tracking import (
    DATA_DIGEST,
    DATASET_URI,
    GIT_REVISION,
    INIT,
    INIT_WEIGHTS,
    Tracker,
    open_tracker,
)
from crowdray.registry.training_data import TrainingData, describe_training_data
from crowdray.training.checkpoint import Checkpoint, load_checkpoint
from crowdray.training.result import StageResult, TrainingResult


def open_run(
    identity: RunIdentity,
    dataset: str,
    tracking_uri: str | None,
    *,
    name: str = "",
    parent: str | None = None,
    space: str | None = None,
    note: str = "",
) -> Tracker:
    """Open the MLflow run of a training run, study or trial, with its configuration, dataset and provenance.

    Args:
        identity: The run or study.
        dataset: Name of the dataset, part of the experiment's name.
        tracking_uri: Where MLflow tracks it; None for nowhere.
        name: Name of the MLflow run; that of the folder by default.
        parent: Id of the parent run, such as that of a study.
        space: Search space of a study, as JSON.
        note: First sentence of its description.
    """
    note = f"{note or 'Training run'} on `{identity.data}`. Folder: `{identity.uri}`"
    experiment = experiment_of(dataset)
    tracker = open_tracker(tracking_uri, experiment, name or identity.name, identity.uri, parent=parent, note=note)
    try:
        config = asdict(identity.config) | ({"space": space} if space else {})
        tracker.log_config(config, _provenance(identity))
    except BaseException:
        tracker.finish("FAILED")
        raise
    tracker.log_dataset(dataset, identity.data, identity.data_digest)
    return tracker


def experiment_of(dataset: str) -> str:
    """Return the name of the MLflow experiment, and of the registered model, of a dataset."""
    return f"crowdray-{dataset}"


def _provenance(identity: RunIdentity) -> dict[str, str]:
    revision = git_revision(Path(__file__).parent)
    model = identity.config.model
    init = {INIT: redacted(model.init), INIT_WEIGHTS: model.init_sha256} if model.init else {}
    return {DATA_DIGEST: identity.data_digest, DATASET_URI: identity.data, GIT_REVISION: revision} | init


def publish_run(run: Run, tracker: Tracker, tracking_uri: str | None) -> Outcome:
    """Package, register and plot the counter that a finished run selected, and store the outcome; safe to repeat."""
    dataset = Dataset.open(run.identity.data)
    with storage.local_copy(run.trained) as folder:
        checkpoint = load_checkpoint(folder)
        result = TrainingResult.from_json((folder / RESULT).read_bytes(), storage.join(run.trained, RESULT))
    history, weights = checkpoint.progress.history, checkpoint.best_weights[result.best_stage]
    epoch = result.stages[result.best_stage].best.epoch
    tracker.sync_history(metric_rows(history))
    tracker.log_summary(_summary(result), epoch)
    with storage.scratch_folder("publish") as scratch:
        rows = split_rows(run.identity.config, dataset, run.identity.min_workers)
        data = describe_training_data(dataset, np.sort(np.concatenate(rows)))
        package = _package(run, checkpoint, result, dataset, data, scratch / "model")
        if not storage.exists(storage.join(run.model, DESCRIPTION)):
            storage.publish_directory(package.path, run.model, last=DESCRIPTION)
        figures = draw_figures(run, checkpoint, result, dataset, scratch)
        example, picture = write_example(dataset, scratch), write_card_picture(figures[0], scratch)
        for file in (*figures, picture, example):
            tracker.log_file(file, FIGURES)
        for file in figures:
            storage.publish_file(file, storage.join(run.uri, file.name))
        storage.write_bytes(storage.join(run.uri, RESULTS), results_csv(history).encode())
        storage.write_bytes(storage.join(run.uri, WEIGHTS), weights_file(weights))
        card, version = model_card(run, result, dataset, data, package, f"{FIGURES}/{example.name}"), None
        if tracking_uri is not None and tracker.run_id is not None:
            version = register(
                package, experiment_of(dataset.index.name), tracker.run_id, epoch, tracking_uri, card=card
            )
        text = version.card if version else redacted(card.to_markdown())
        (scratch / CARD).write_text(text, encoding="utf-8")
        tracker.log_file(scratch / CARD)
        storage.publish_file(scratch / CARD, storage.join(run.uri, CARD))
    outcome = _outcome(run, result, figures[0].name, tracker, tracking_uri, version)
    storage.write_bytes(run.outcome, outcome.to_json().encode())
    remove_checkpoints(run.uri)
    return outcome


def _outcome(
    run: Run,
    result: TrainingResult,
    figure: str,
    tracker: Tracker,
    tracking_uri: str | None,
    version: RegisteredVersion | None,
) -> Outcome:
    return Outcome(
        run=run.uri,
        result=result,
        model=run.model,
        figure=storage.join(run.uri, figure),
        registered=version.uri if version else None,
        alias=version.alias if version else None,
        tracking_uri=tracking_uri and redacted(tracking_uri),
        run_id=tracker.run_id,
        run_url=tracker.url,
        runs_url=tracker.runs_url,
        decision=version.decision if version else None,
    )


def _summary(result: TrainingResult) -> dict[str, float]:
    """Errors of the exported counter, and of what it has to beat."""
    summary = exported_metrics(_best_metrics(result.stages[result.best_stage]))
    for split, constant in (("val", result.mean_predictor_validation), ("test", result.mean_predictor)):
        if constant is not None:
            summary[f"mean_predictor_{split}_mae"] = constant.mae
    baseline = result.stages["baseline"]
    for split, errors in (("val", baseline.validation), ("test", baseline.test)):
        if errors is not None:
            summary[f"baseline_{split}_mae"] = errors.mae
    return summary


def _package(
    run: Run, checkpoint: Checkpoint, result: TrainingResult, dataset: Dataset, data: TrainingData, dest: Path
) -> Package:
    counter = build_counter(run.identity.config, checkpoint.progress.density_scale).strip()
    counter.load_state_dict(checkpoint.best_weights[result.best_stage])
    stage = result.stages[result.best_stage]
    image = decode_image(dataset.sample(int(dataset.rows("train")[0])).image)
    return package_counter(
        ExportedCounter(counter, run.identity.config.sampling.downsample),
        torch.from_numpy(image.copy()).permute(2, 0, 1)[None],
        dest,
        config=asdict(run.identity.config),
        metrics=_best_metrics(stage),
        tags=_provenance(run.identity) | _validation_tags(run, result, dataset),
        training_data=data,
        interval=_interval(stage.test_counts),
    )


def _interval(counts: Sequence[ImageCount]) -> CountInterval | None:
    """Interval of counts; None with regions of interest, as photos are counted whole."""
    if any(count.predicted != count.unmasked for count in counts):
        return None
    return CountInterval.of([count.truth for count in counts], [count.predicted for count in counts])


def _best_metrics(stage: StageResult) -> dict[str, float]:
    return {
        f"{split}/{name}": getattr(metrics, name)
        for split, metrics in (("val", stage.validation), ("test", stage.test))
        if metrics is not None
        for name in ("mae", "rmse", "bias")
    }


def _validation_tags(run: Run, result: TrainingResult, dataset: Dataset) -> dict[str, str]:
    """What decides whether the version becomes `candidate`."""
    config = run.identity.config
    _, rows = split_rows(config, dataset, run.identity.min_workers)
    judged = f"{dataset.digest} {config.sampling.roi} {rows.tolist()}"
    tags = {VALIDATION_IMAGES: hashlib.sha256(judged.encode()).hexdigest()}
    if result.mean_predictor_validation is not None:
        tags[MEAN_PREDICTOR_MAE] = f"{result.mean_predictor_validation.mae:.6g}"
    return tags
