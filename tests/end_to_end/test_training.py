"""Training runs through Ray and MLflow: killed processes do not change the result."""

import os
import signal
import sqlite3
from typing import Any

import pytest
import torch
from PIL import Image

from crowdray.registry.loading import load_counter
from crowdray.training.checkpoint import MEASURED_METRICS

from ..support.processes import Job, descendants, named
from .conftest import Workspace

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(400)]


def computed(outcome: dict[str, Any]) -> dict[str, Any]:
    """Return a training result without its timings."""
    result: dict[str, Any] = dict(outcome["result"])
    result["history"] = [{k: v for k, v in row.items() if k not in MEASURED_METRICS} for row in result["history"]]
    return result


def query(workspace: Workspace, sql: str, *values: str) -> list[Any]:
    with sqlite3.connect(workspace.tracking) as database:
        return database.execute(sql, values).fetchall()


def assert_tracked_once(workspace: Workspace, name: str, epochs: int) -> None:
    """There is one finished MLflow run of that name, and each metric has each epoch exactly once."""
    runs = query(workspace, "select run_uuid, status from runs where name = ?", name)
    assert [status for _, status in runs] == ["FINISHED"]
    steps = query(
        workspace, "select step from metrics where run_uuid = ? and key = 'updates' order by step", runs[0][0]
    )
    assert [step for (step,) in steps] == list(range(1, epochs + 1))
    duplicates = query(
        workspace, "select key, step from metrics where run_uuid = ? group by key, step having count(*) > 1", runs[0][0]
    )
    assert duplicates == []


def test_train_uninterrupted_registers_loadable_counter(workspace: Workspace, reference_run: Job) -> None:
    outcome = workspace.outcome("reference")
    assert outcome["registered"].startswith("models:/crowdray-synthetic/")
    table = reference_run.output
    for text in ("baseline", "decoders", "joint", "val MAE", "test RMSE", outcome["registered"], "jobs/predict.py"):
        assert text in table
    assert_tracked_once(workspace, "reference", epochs=24)

    tracking = workspace.environment["MLFLOW_TRACKING_URI"]
    registered = load_counter(outcome["registered"], tracking_uri=tracking)
    image = torch.randint(0, 256, (1, 3, 101, 150), dtype=torch.uint8)
    assert registered(image).shape == (1, 1, 101, 150)
    assert torch.equal(registered(image), load_counter(outcome["model"])(image))
    with Image.open(outcome["figure"]) as figure:
        assert figure.format == "PNG"


def test_train_after_kills_equals_uninterrupted_run(workspace: Workspace, reference_run: Job) -> None:
    job = workspace.train("interrupted")
    job.wait_for("decoders 2/")
    job.kill()

    resumed = workspace.train("interrupted")
    resumed.wait_for("resuming after epoch ")
    resumed.wait_for("decoders ")
    workers = named(descendants(resumed.pid), "ray::RayTrainWorker")
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    assert resumed.end() == 0, resumed.output

    assert computed(workspace.outcome("interrupted")) == computed(workspace.outcome("reference"))
    assert_tracked_once(workspace, "interrupted", epochs=24)


def test_train_finished_run_returns_result_without_ray(workspace: Workspace, reference_run: Job) -> None:
    before = workspace.outcome("reference")
    job = workspace.train("reference")
    assert job.end() == 0, job.output
    assert "is already finished" in job.output and "starting Ray" not in job.output
    assert workspace.outcome("reference") == before | {"alias": None}  # the alias may have moved


def test_train_diverged_fails_once_without_retry(workspace: Workspace) -> None:
    job = workspace.train("diverged", "--loss.gradient_share", "1e300", workers=1)
    assert job.end() == 1
    message = job.lines[-1]
    assert message.startswith("error: joint stage, epoch 4: gradient norm ") and "Lower stages.joint" in message
    assert "Traceback" not in job.output and job.output.count("error:") == 1
    assert query(workspace, "select status from runs where name = 'diverged'") == [("FAILED",)]
