"""The model card of a finished run."""

import shlex
from collections.abc import Sequence

from crowdray import storage
from crowdray.data.shards import Dataset
from crowdray.evaluation.levels import error_levels
from crowdray.evaluation.metrics import ImageCount
from crowdray.pipeline.run import CONFIG, Run
from crowdray.registry.card import ErrorRow, ModelCard
from crowdray.registry.packaging import Package
from crowdray.registry.tracking import GIT_REVISION
from crowdray.registry.training_data import TrainingData
from crowdray.training.result import StageResult, TrainingResult


def model_card(
    run: Run, result: TrainingResult, dataset: Dataset, data: TrainingData, package: Package, example: str
) -> ModelCard:
    """Collect the facts of a run's model card.

    Args:
        run: The run.
        result: Its result.
        dataset: The dataset that it was trained on.
        data: Description of its training images.
        package: Its packaged counter.
        example: Artifact of the run with a photo.
    """
    identity, best = run.identity, result.stages[result.best_stage]
    # Results of earlier releases have no counts of validation images.
    errors = {split: _errors(result, split) for split in ("validation", "test") if _counts(best, split)}
    workers = identity.workers if isinstance(identity.workers, int) else "{}:{}".format(*identity.workers)
    command = ["jobs/train.py", "--preset", storage.join(run.uri, CONFIG), "--data", identity.data]
    command += ["--workers", str(workers), "--name", f"{identity.name}-again"]
    model, seed = identity.config.model, identity.config.seed
    return ModelCard(
        name=identity.name,
        data=data,
        data_uri=dataset.uri,
        data_digest=dataset.digest,
        scenes=len(set(dataset.strings("scene", "train"))),
        downsample=identity.config.sampling.downsample,
        errors=errors,
        levels=error_levels(_counts(best, list(errors)[-1])) if errors else [],
        parameters=package.parameters,
        settings={"backbone": model.backbone, "stage": result.best_stage, "seed": str(seed)},
        start=model.init or model.weights,
        command=shlex.join(command),
        revision=package.tags[GIT_REVISION],
        folder=run.model,
        example=example,
    )


def _errors(result: TrainingResult, split: str) -> list[ErrorRow]:
    counts, mean = _counts(result.stages[result.best_stage], split), result.mean_count
    rows = [ErrorRow.of("this counter", counts)]
    if result.best_stage != "baseline" and (baseline := _counts(result.stages["baseline"], split)):
        rows.append(ErrorRow.of("baseline stage, density loss alone", baseline))
    constant = [ImageCount(count.row, count.truth, mean, mean) for count in counts]
    return [*rows, ErrorRow.of(f"always {mean:.1f}, the training mean", constant)]


def _counts(stage: StageResult, split: str) -> Sequence[ImageCount]:
    return stage.validation_counts if split == "validation" else stage.test_counts
