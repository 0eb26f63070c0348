"""The result of a training run: its JSON, also in its previous form, and its description of workers."""

import json
from dataclasses import replace

import pytest

from crowdray.documents import parse_document
from crowdray.errors import DataError
from crowdray.evaluation.metrics import ImageCount, Metrics
from crowdray.training.checkpoint import BestEpoch, EpochMetrics
from crowdray.training.result import StageResult, TrainingResult, describe_workers

METRICS = Metrics(images=2, mae=1.0, rmse=1.5, bias=0.5, nae=0.1, mae_unmasked=1.0)
RESULT = TrainingResult(
    best_stage="joint",
    stages={"joint": StageResult(BestEpoch(3, 1.0, 1.5), METRICS, METRICS, [ImageCount(0, 4, 3.5, 3.75)])},
    history=[{"epoch": 1, "stage": "joint", "data_wait_fraction": 0.1, "mfu": 0.2}],
    loss_weights={"density": 1.0},
    mean_count=4.0,
    mean_predictor=None,
)


def test_training_result_from_json_returns_what_was_written() -> None:
    assert TrainingResult.from_json(RESULT.to_json(), "result.json") == RESULT
    without_test = replace(RESULT, stages={"joint": StageResult(BestEpoch(3, 1.0, 1.5), METRICS, None)})
    assert TrainingResult.from_json(without_test.to_json(), "result.json") == without_test


def test_training_result_from_json_in_previous_form_renames_its_fields() -> None:
    content = parse_document(RESULT.to_json())
    content["shipped"] = content.pop("best_stage")  # previous names
    content["factors"] = content.pop("loss_weights")
    epoch = content["history"][0]
    epoch["wait_share"], epoch["matrix_share"] = epoch.pop("data_wait_fraction"), epoch.pop("mfu")  # previous names
    assert TrainingResult.from_json(json.dumps(content), "result.json") == RESULT


@pytest.mark.parametrize("text", ["", "[]", "{}", RESULT.to_json()[:-20], '{"stages": {"joint": {}}}'])
def test_training_result_from_invalid_json_raises_with_its_uri(text: str) -> None:
    with pytest.raises(DataError, match=r"runs/a/result.json is not the result of a training run"):
        TrainingResult.from_json(text, "runs/a/result.json")


def test_describe_workers_with_changes_names_their_first_epochs() -> None:
    numbers = (2, 2, 1, 1, 3)
    history: list[EpochMetrics] = [{"epoch": epoch, "workers": workers} for epoch, workers in enumerate(numbers, 1)]
    assert describe_workers(history) == "2, 1 from epoch 3, 3 from epoch 5"
    assert describe_workers(history[:2]) == "2"
