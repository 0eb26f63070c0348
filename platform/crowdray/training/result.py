"""What a finished training found: each stage's best weights scored once on validation and test images, and
which of them ships."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Self

from crowdray.errors import DataError
from crowdray.evaluation.metrics import ImageCount, Metrics, summarise
from crowdray.training.checkpoint import Best, Row
from crowdray.training.trainer import Trainer


@dataclass
class StageResult:
    """One stage that changes what ships."""

    best: Best
    """Its best epoch, as validated during training."""
    validation: Metrics
    """The best weights on the validation images, in fp32."""
    test: Metrics | None
    """The same on the test split; None where the dataset has none."""
    test_counts: list[ImageCount] = field(default_factory=list)
    """Every test image."""


@dataclass
class TrainingResult:
    """The end of a training; as JSON it lies beside the weights as result.json."""

    shipped: str
    """The stage whose best weights ship: the lowest validation MAE, never chosen on the test split."""
    stages: dict[str, StageResult]
    """Results by stage name."""
    history: list[Row]
    """One row per epoch."""
    factors: dict[str, float]
    """Factors of the losses in the last stage."""
    mean_count: float
    """Mean heads of a training image: the predictor that any model has to beat."""
    mean_predictor: Metrics | None
    """Errors of predicting that mean on the test split."""

    def to_json(self) -> str:
        """The result as JSON text."""
        return json.dumps(asdict(self)) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, place: str) -> Self:
        """Parse what to_json gave; raises DataError naming `place` when it cannot be."""
        try:
            content = json.loads(text)
            stages = {
                name: StageResult(
                    Best(**stage["best"]),
                    Metrics(**stage["validation"]),
                    Metrics(**stage["test"]) if stage["test"] else None,
                    [ImageCount(**count) for count in stage["test_counts"]],
                )
                for name, stage in content.pop("stages").items()
            }
            mean = content.pop("mean_predictor")
            return cls(stages=stages, mean_predictor=Metrics(**mean) if mean else None, **content)
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{place} is no result of a training ({error}); train again under a new --name") from error


def final_result(training: Trainer) -> TrainingResult:
    """Score the best weights of every stage; every rank calls it and every rank gets the result."""
    dataset = training.store.dataset
    has_test = "test" in dataset.index.splits
    stages = {}
    for name, best in training.progress.best.items():
        validation = summarise(training.evaluate(name, training.validation_rows))
        counts = training.evaluate(name, dataset.rows("test")) if has_test else []
        counts.sort(key=lambda count: count.row)
        stages[name] = StageResult(best, validation, summarise(counts) if counts else None, counts)
    shipped = min(stages, key=lambda name: stages[name].validation.mae)
    chosen = set(training.train_rows.tolist())
    heads = [
        h
        for row, h in zip(dataset.rows("train").tolist(), dataset.counts("train").tolist(), strict=True)
        if row in chosen
    ]
    mean = sum(heads) / len(heads)
    naive = [ImageCount(count.row, count.truth, mean, mean) for count in stages[shipped].test_counts]
    return TrainingResult(
        shipped,
        stages,
        training.progress.history,
        training.progress.factors,
        mean,
        summarise(naive) if naive else None,
    )


def describe_workers(history: Sequence[Row]) -> str:
    """Numbers of workers over the epochs, for example "2, 1 from epoch 9"."""
    known = [row for row in history if "workers" in row]
    changed = [row for before, row in pairwise(known) if before["workers"] != row["workers"]]
    return ", ".join([f"{known[0]['workers']}", *(f"{row['workers']} from epoch {row['epoch']}" for row in changed)])
