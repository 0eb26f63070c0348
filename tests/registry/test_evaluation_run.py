"""Evaluations in MLflow: one run for each setting, with errors, dataset and a table of all images."""

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from crowdray.pipeline.evaluation_run import track_evaluation

from ..support.evaluations import evaluated_image, evaluation_report

pytestmark = pytest.mark.slow

COUNTS = {"a.jpg": (10, 12.5), "b.jpg": (0, 0.25)}


def _track(uri: str, precision: str = "fp32", models: Sequence[str] = ("runs/model",)) -> list[str]:
    images = [evaluated_image(row, *counts, name=name) for row, (name, counts) in enumerate(COUNTS.items())]
    report = evaluation_report(dict.fromkeys(models, images))
    results = [replace(result, model=replace(result.model, precision=precision)) for result in report.results]
    return track_evaluation(replace(report, results=results), uri)


def test_track_evaluation_logs_each_setting_once(store: str) -> None:
    pages = [_track(store), _track(store), _track(store, "bf16")]
    assert pages[0] == pages[1] != pages[2]
    client = MlflowClient(store, store)
    experiment = client.get_experiment_by_name("crowdray-evaluated")
    assert experiment is not None
    run = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time ASC"])[0]
    assert run.data.metrics["test_mae"] == pytest.approx(1.375) and run.data.metrics["test_game1"] > 0
    assert len(client.get_metric_history(run.info.run_id, "test_mae")) == 1
    assert run.inputs is not None
    (entry,) = run.inputs.dataset_inputs
    assert entry.dataset.digest == "e" * 36 and entry.tags[0].value == "test"
    table = Path(client.download_artifacts(run.info.run_id, "images.csv")).read_text().splitlines()
    rows = [(row["image"], row["annotated"], row["error"]) for row in csv.DictReader(table)]
    assert rows == [("a.jpg", "10", "2.500000"), ("b.jpg", "0", "0.250000")]


def test_track_evaluation_logs_the_comparison_with_the_first_counter(store: str) -> None:
    assert len(set(_track(store, models=("runs/other/model", "runs/better/model")))) == 2
    client = MlflowClient(store, store)
    experiment = client.get_experiment_by_name("crowdray-evaluated")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id], 'tags."crowdray.compared_with" = "runs/other/model"')
    assert run.data.metrics["test_gain"] == run.data.metrics["test_gain_low"] == 0


def test_track_evaluation_without_a_server_warns(closed_port: str, caplog: pytest.LogCaptureFixture) -> None:
    assert _track(closed_port) == []
    assert "the evaluation is not tracked" in caplog.text
