"""Counters side by side: equal to each alone, compared on common images, and whole as JSON."""

import json
from collections.abc import Sequence

import numpy as np
import pytest

from crowdray.evaluation.comparison import compare_errors
from crowdray.evaluation.images import FailedImage
from crowdray.evaluation.intervals import VIDEO_BLOCK
from crowdray.evaluation.report import Outcome, block_length

from ..support.evaluations import evaluated_image, evaluated_model, evaluation_report

TRUTHS = np.random.default_rng(0).integers(0, 90, 40)


def outcomes(seed: int, failed: Sequence[int] = ()) -> list[Outcome]:
    errors = np.random.default_rng(seed).normal(0, 3, len(TRUTHS))
    return [
        FailedImage(row, str(row), "cut off") if row in failed else evaluated_image(row, int(truth), truth + error)
        for row, (truth, error) in enumerate(zip(TRUTHS, errors, strict=True))
    ]


def errors_of(images: Sequence[Outcome], rows: Sequence[int]) -> list[float]:
    by_row = {image.row: image for image in images if not isinstance(image, FailedImage)}
    return [by_row[row].inside.predicted - by_row[row].inside.truth for row in rows]


def test_counters_side_by_side_equal_each_alone() -> None:
    images = {"models:/a/1": outcomes(1), "models:/b/2": outcomes(2)}
    together = evaluation_report(images)
    for number, (uri, of_one) in enumerate(images.items()):
        (alone,) = evaluation_report({uri: of_one}).results
        assert together.results[number].evaluation == alone.evaluation
        assert together.results[number].model.version == uri and alone.comparison is None


def test_comparison_is_paired_on_images_that_both_counters_have_counted() -> None:
    first, second = outcomes(1, failed=[3]), outcomes(2, failed=[7, 8])
    rows = [row for row in range(len(TRUTHS)) if row not in (3, 7, 8)]
    report = evaluation_report({"models:/a/1": first, "models:/b/2": second[::-1]})
    result = report.results[1]
    assert result.comparison == compare_errors(errors_of(first, rows), errors_of(second, rows))
    assert result.reference == "models:/a/1" and report.results[0].comparison is None
    assert [image.row for image in result.evaluation.failed] == [7, 8] and len(result.evaluation.images) == 38


def test_report_without_an_evaluated_image_has_no_errors() -> None:
    report = evaluation_report({"models:/a/1": outcomes(1, failed=range(40)), "models:/b/2": outcomes(2)})
    assert report.results[0].evaluation.overall is None and report.results[1].comparison is None
    assert len(report.results[0].evaluation.failed) == 40


def test_report_to_dict_is_the_result_of_a_single_counter_and_lists_several() -> None:
    one, two = (
        evaluation_report({f"models:/a/{version}": outcomes(version) for version in versions}).to_dict()
        for versions in ((1,), (1, 2))
    )
    json.dumps([one, two], allow_nan=False)
    assert one["overall"]["images"] == 40 and one["model"] == "models:/a/1" and one["comparison"] is None
    assert [result["model"] for result in two["results"]] == ["models:/a/1", "models:/a/2"]
    assert two["results"][0] == {key: one[key] for key in two["results"][0]}
    assert two["results"][1]["comparison"]["gain"] == pytest.approx(
        one["overall"]["mae"] - two["results"][1]["overall"]["mae"]
    )


@pytest.mark.parametrize(("dataset", "block"), [("mall", VIDEO_BLOCK), ("shanghaitech-b", 1), ("my photos", 1)])
def test_block_length_is_that_of_video_for_datasets_validated_on_runs(dataset: str, block: int) -> None:
    assert block_length(dataset) == block


@pytest.mark.parametrize(
    ("version", "label"),
    [("models:/crowdray-mall/2", "crowdray-mall/2"), ("/r/mall-1/model", "mall-1"), ("/r/exported", "exported")],
)
def test_label_names_the_version_or_the_run(version: str, label: str) -> None:
    assert evaluated_model(version).label == label
