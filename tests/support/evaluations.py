"""Reports of invented evaluations."""

from collections.abc import Mapping, Sequence

from crowdray.evaluation.images import EvaluatedImage, RegionCount
from crowdray.evaluation.report import EvaluatedDataset, EvaluatedModel, EvaluationReport, Outcome, make_report


def evaluated_image(
    row: int,
    truth: int,
    predicted: float,
    *,
    scene: str = "",
    whole: float | None = None,
    name: str | None = None,
) -> EvaluatedImage:
    """An image with errors, which has a region of interest if its count on the whole image is given."""
    inside = RegionCount(truth, predicted, (abs(predicted - truth),) * 4)
    outside = inside if whole is None else RegionCount(truth, whole, (abs(whole - truth),) * 4)
    return EvaluatedImage(row, name or str(row), scene, 1, inside, outside, whole is not None)


def evaluated_model(uri: str = "models:/crowdray-mall/1", digest: str = "c" * 64) -> EvaluatedModel:
    return EvaluatedModel(uri, uri, digest, "720 photos of mall", "mall", 1, 1, "fp32", "")


def evaluation_report(
    models: Mapping[str, Sequence[Outcome]], *, data: str = "/data/discs", name: str = "evaluated"
) -> EvaluationReport:
    """A report of counters by their URI on the split `test` of one dataset."""
    images = max(map(len, models.values()))
    dataset = EvaluatedDataset(data, name, "e" * 64, "test", images, 10 * images)
    outcomes = {(0, number): images for number, images in enumerate(models.values())}
    return make_report([evaluated_model(uri, f"{n}" * 64) for n, uri in enumerate(models)], [dataset], outcomes)
