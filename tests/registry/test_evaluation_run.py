"""Evaluations in MLflow: one run for each setting, with errors, dataset and a table of all images."""

import csv
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from mlflow import MlflowClient

from crowdray.evaluation.report import EvaluatedImage, RegionCount, summarise_images
from crowdray.pipeline.evaluation_run import track_evaluation

pytestmark = pytest.mark.slow

COUNTS = {"a.jpg": (10, 12.5), "b.jpg": (0, 0.25)}
DATASET = SimpleNamespace(uri="/data/discs", digest="e" * 64, index=SimpleNamespace(name="evaluated"))


def _track(uri: str, precision: str = "fp32") -> str | None:
    images = []
    for row, (name, (truth, predicted)) in enumerate(COUNTS.items()):
        count = RegionCount(truth, predicted, (abs(predicted - truth),) * 4)
        images.append(EvaluatedImage(row, name, "", 1, count, count, has_roi=False))
    counter: Any = SimpleNamespace(digest="c" * 64, precision=precision)
    return track_evaluation(
        summarise_images(images),
        counter,
        cast(Any, DATASET),
        model="runs/model",
        split="test",
        tile=0,
        tracking_uri=uri,
    )


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
    assert rows == [("a.jpg", "10", "2.500"), ("b.jpg", "0", "0.250")]


def test_track_evaluation_without_a_server_warns(closed_port: str, caplog: pytest.LogCaptureFixture) -> None:
    assert _track(closed_port) is None
    assert "the evaluation is not tracked" in caplog.text
