"""The result of a finished training run: each stage's best weights, evaluated on validation and test images."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any, Self

from crowdray.documents import parse_as, parse_document, to_document
from crowdray.errors import DataError
from crowdray.evaluation.metrics import ImageCount, Metrics, summarise
from crowdray.training.checkpoint import BestEpoch, EpochMetrics, rename_old_metrics
from crowdray.training.trainer import Trainer

# Names in result.json before version 0.2, still read.
_OLD_FIELDS = {"shipped": "best_stage", "factors": "loss_weights"}  # previous names


@dataclass
class StageResult:
    """Result of one stage that trains the exported modules."""

    best: BestEpoch
    """Its best epoch, as validated during training."""
    validation: Metrics
    """Errors of the best weights on the validation images, in fp32."""
    test: Metrics | None
    """The same on the test split; None if the dataset has none."""
    test_counts: list[ImageCount] = field(default_factory=list)
    """Counts of every test image."""
    validation_counts: list[ImageCount] = field(default_factory=list)
    """Counts of every validation image; empty in results of earlier releases."""


@dataclass
class TrainingResult:
    """Result of a training run, stored as result.json next to the weights."""

    best_stage: str
    """The stage whose best weights are exported: the last one if it is annealed, else that with the lowest validation
    MAE; never selected on the test split."""
    stages: dict[str, StageResult]
    """Results by stage name."""
    history: list[EpochMetrics]
    """Metrics of every epoch."""
    loss_weights: dict[str, float]
    """Loss weights of the last stage."""
    mean_count: float
    """Mean heads of a training image, as a constant baseline predictor."""
    mean_predictor: Metrics | None
    """Errors of predicting that mean on the test split."""
    mean_predictor_validation: Metrics | None = None
    """The same on the validation images; None in results of earlier releases."""

    def to_json(self) -> str:
        """Return the result as JSON text."""
        return to_document(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes, uri: str) -> Self:
        """Parse what `to_json` returned, in its current or its previous form.

        Raises:
            DataError: the text is not a result; the message names `uri`.
        """
        try:
            return cls.from_fields(parse_document(text))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"{uri} is not the result of a training run ({error}); train again under a new --name"
            ) from error

    @classmethod
    def from_fields(cls, content: Mapping[str, Any]) -> Self:
        """Convert the fields of `to_json`, in their current or previous names; raise ValueError for others."""
        fields = {_OLD_FIELDS.get(name, name): value for name, value in content.items()}
        return parse_as(cls, fields | {"history": rename_old_metrics(fields["history"])})


def final_result(trainer: Trainer) -> TrainingResult:
    """Evaluate the best weights of every stage; a collective that returns the same result on every rank."""
    dataset, progress = trainer.images.dataset, trainer.state.progress
    has_test = "test" in dataset.index.splits
    stages = {}
    for name, best in progress.best.items():
        validation = _sorted(trainer.evaluate(name, trainer.validation_rows))
        test = _sorted(trainer.evaluate(name, dataset.rows("test"))) if has_test else []
        stages[name] = StageResult(best, summarise(validation), summarise(test) if test else None, test, validation)
    last = trainer.stages[-1]
    best_stage = last.name if last.schedule.anneal_epochs else min(stages, key=lambda name: stages[name].validation.mae)
    train_rows = set(trainer.train_rows.tolist())
    counts_by_row = zip(dataset.rows("train").tolist(), dataset.counts("train").tolist(), strict=True)
    heads = [count for row, count in counts_by_row if row in train_rows]
    mean = sum(heads) / len(heads)
    selected = stages[best_stage]
    return TrainingResult(
        best_stage,
        stages,
        progress.history,
        progress.loss_weights,
        mean,
        mean_predictor=_constant_errors(selected.test_counts, mean),
        mean_predictor_validation=_constant_errors(selected.validation_counts, mean),
    )


def _sorted(counts: list[ImageCount]) -> list[ImageCount]:
    return sorted(counts, key=lambda count: count.row)


def _constant_errors(counts: Sequence[ImageCount], predicted: float) -> Metrics | None:
    """Errors of predicting the same count for every image; None without images."""
    constant = [ImageCount(count.row, count.truth, predicted, predicted) for count in counts]
    return summarise(constant) if constant else None


def describe_workers(history: Sequence[EpochMetrics]) -> str:
    """Return the numbers of workers over the epochs, for example "2, 1 from epoch 9"."""
    known = [epoch for epoch in history if "workers" in epoch]
    changed = [epoch for before, epoch in pairwise(known) if before["workers"] != epoch["workers"]]
    return ", ".join(
        [f"{known[0]['workers']}", *(f"{epoch['workers']} from epoch {epoch['epoch']}" for epoch in changed)]
    )
