"""Evaluations of one or several counters on one or several datasets, side by side."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np

from crowdray.evaluation.comparison import Comparison, compare_errors
from crowdray.evaluation.images import EvaluatedImage, FailedImage
from crowdray.evaluation.intervals import VIDEO_BLOCK
from crowdray.evaluation.summary import Evaluation, summarise_images
from crowdray.presets import preset, preset_for

Outcome = EvaluatedImage | FailedImage
"""What becomes of an image."""


@dataclass(frozen=True)
class EvaluatedModel:
    """A counter that was evaluated."""

    uri: str
    """As it was given, without credentials."""
    version: str
    """models:/NAME/VERSION where it is registered, else `uri`."""
    digest: str
    """SHA-256 of its exported program."""
    trained_on: str
    """Description of its training images; empty if its package does not say."""
    training_dataset: str
    """Name of their dataset, such as mall; empty if its package does not say."""
    cell: int
    """Side of a cell of its density in image pixels."""
    downsample: int
    """Factor by which it downsamples images."""
    precision: str
    """Arithmetic of its convolutions."""
    revision: str
    """Git revision of the code that trained it; empty if unknown."""
    training_digest: str = ""
    """Digest of the dataset that it was trained on; empty if unknown."""

    @property
    def label(self) -> str:
        """Short name: NAME/VERSION of a registered counter, else the name of the run in whose folder it lies."""
        if self.version.startswith("models:/"):
            return self.version.removeprefix("models:/")
        return self.version.rstrip("/").removesuffix("/model").rpartition("/")[2] or self.version


@dataclass(frozen=True)
class EvaluatedDataset:
    """A split on which counters were evaluated."""

    uri: str
    """Location without credentials."""
    name: str
    """Name of its source, such as mall."""
    digest: str
    """Its content digest."""
    split: str
    """The split."""
    images: int
    """Number of images of the split, with those that could not be evaluated."""
    heads: int
    """Number of annotated heads of the split."""


@dataclass(frozen=True)
class ModelResult:
    """One counter on one dataset."""

    model: EvaluatedModel
    dataset: EvaluatedDataset
    evaluation: Evaluation
    comparison: Comparison | None
    """Paired comparison with `reference` on the same images; None for the first counter, or without images."""
    reference: str = ""
    """Version of the first counter; empty for itself."""

    @property
    def trained_here(self) -> bool:
        """Whether the counter was trained on this dataset, whatever the split."""
        return self.model.training_dataset == self.dataset.name or self.model.training_digest == self.dataset.digest

    @property
    def relative_mae(self) -> float | None:
        """MAE divided by that of a constant, the mean count of the images; None unless their counts differ."""
        counts = self.evaluation.counts()
        truth = np.array([count.truth for count in counts], dtype=np.float64)
        if len(np.unique(truth)) < 2:
            return None
        predicted = np.array([count.predicted for count in counts])
        return float(np.abs(predicted - truth).mean() / np.abs(truth - truth.mean()).mean())

    def to_dict(self) -> dict[str, Any]:
        """The result as JSON content."""
        return self.evaluation.to_dict(
            model=self.model.uri,
            data=self.dataset.uri,
            digest=self.dataset.digest,
            split=self.dataset.split,
            counter=asdict(self.model),
            dataset=asdict(self.dataset),
            comparison=asdict(self.comparison) if self.comparison else None,
            reference=self.reference,
        )


@dataclass(frozen=True)
class EvaluationReport:
    """All counters on all datasets."""

    models: Sequence[EvaluatedModel]
    """The counters in the order of the command line; the others are compared with the first."""
    datasets: Sequence[EvaluatedDataset]
    """The datasets in the order of the command line."""
    results: Sequence[ModelResult]
    """A result for each pair, dataset by dataset."""
    device: str
    """Device on which images were counted."""
    tile: int
    """Side of the tiles in which large images were counted; 0 for whole images."""
    created: str
    """UTC time at which the evaluation ended, ISO 8601."""

    def result(self, model: EvaluatedModel, dataset: EvaluatedDataset) -> ModelResult:
        """The result of one counter on one dataset."""
        return next(r for r in self.results if r.model is model and r.dataset is dataset)

    @property
    def failed(self) -> bool:
        """Whether an image could not be evaluated."""
        return any(result.evaluation.failed for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """JSON content: the fields of a single result; of several, a list of these in `results`."""
        results = [result.to_dict() for result in self.results]
        settings = {"device": self.device, "tile": self.tile, "created": self.created}
        return settings | (results[0] if len(results) == 1 else {"results": results})


def make_report(
    models: Sequence[EvaluatedModel],
    datasets: Sequence[EvaluatedDataset],
    outcomes: Mapping[tuple[int, int], Sequence[Outcome]],
    *,
    block: int | None = None,
    device: str = "cpu",
    tile: int = 0,
) -> EvaluationReport:
    """Summarise all counters on all datasets.

    Args:
        models: The counters; the others are compared with the first.
        datasets: The datasets.
        outcomes: The images of each pair of indices of dataset and counter, in any order.
        block: Consecutive images that intervals resample together; None: `block_length` of each dataset.
        device: Where images were counted.
        tile: Side of tiles in pixels; 0 for whole images.
    """
    results = [
        result
        for number, dataset in enumerate(datasets)
        for result in _compare(
            models, dataset, [outcomes.get((number, index), ()) for index in range(len(models))], block
        )
    ]
    return EvaluationReport(models, datasets, results, device, tile, datetime.now(UTC).isoformat(timespec="seconds"))


def block_length(dataset: str) -> int:
    """Consecutive images that intervals resample together, by the dataset's name: VIDEO_BLOCK for a known video."""
    return VIDEO_BLOCK if preset(preset_for(dataset)).sampling.validation == "run" else 1


def _compare(
    models: Sequence[EvaluatedModel],
    dataset: EvaluatedDataset,
    outcomes: Sequence[Sequence[Outcome]],
    block: int | None,
) -> list[ModelResult]:
    evaluations = [
        summarise_images(
            [image for image in images if isinstance(image, EvaluatedImage)],
            [image for image in images if isinstance(image, FailedImage)],
            block=block or block_length(dataset.name),
        )
        for images in outcomes
    ]
    first, others = ModelResult(models[0], dataset, evaluations[0], None), zip(models[1:], evaluations[1:], strict=True)
    return [
        first,
        *(
            ModelResult(model, dataset, evaluation, _paired(evaluations[0], evaluation), models[0].version)
            for model, evaluation in others
        ),
    ]


def _paired(reference: Evaluation, other: Evaluation) -> Comparison | None:
    """Compare the errors of two counters on the images that both have counted; None if there are none."""
    first, second = ({count.row: count.predicted - count.truth for count in e.counts()} for e in (reference, other))
    rows = sorted(first.keys() & second.keys())
    if not rows:
        return None
    return compare_errors([first[row] for row in rows], [second[row] for row in rows], reference.block)
