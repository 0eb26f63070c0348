"""Names of metrics and addresses of pages in MLflow."""

import json
from urllib.parse import parse_qs, urlsplit

import pytest

from crowdray.credentials import redacted
from crowdray.registry.metrics import exported_metrics, metric_rows
from crowdray.registry.pages import VIEW, model_page, run_page, runs_page, server_of

ROW: dict[str, float | int | str] = {
    "stage": "joint", "epoch": 3, "workers": 2, "updates": 90, "seconds": 7.5, "images_per_s": 8.0,
    "learning_rate": 0.001, "loss/density": 0.5, "weighted/density": 0.4, "val/mae": 2.0, "val/rmse": 3.0,
    "val/bias": 1.0, "val/nae": 0.2, "val/mae_unmasked": 2.5,
}  # fmt: skip


def test_metric_rows_have_one_name_for_each_number() -> None:
    (row,) = metric_rows([ROW])
    assert row == {
        "epoch": 3, "train/loss_density": 0.5, "train/learning_rate": 0.001, "val/mae": 2.0, "val/rmse": 3.0,
        "val/bias": 1.0, "system/images_per_s": 8.0, "system/epoch_seconds": 7.5,
    }  # fmt: skip
    single = exported_metrics({"val/mae": 1.0, "val/rmse": 2.0, "test/mae": 3.0})
    assert single == {"best_val_mae": 1.0, "best_val_rmse": 2.0, "test_mae": 3.0}
    assert not single.keys() & row.keys()


@pytest.mark.parametrize(
    ("uri", "server"),
    [
        ("https://ann:secret@host/mlflow/", "https://host/mlflow"),
        ("sqlite:////a/mlflow.db", "http://127.0.0.1:5000"),
    ],
)
def test_pages_of_a_store_open_the_table_of_training_runs(uri: str, server: str) -> None:
    assert server_of(uri) == server
    for page in (runs_page(server, "7"), run_page(server, "7", "abc"), model_page(server, "crowdray-mall")):
        assert redacted(page) == page
        assert parse_qs(urlsplit(urlsplit(page).fragment).query)["workflowType"] == ["machine_learning"]
    view = json.loads(VIEW)
    assert view["orderByKey"] in view["selectedColumns"]
    assert len(VIEW) < 5000  # longest tag of an experiment
