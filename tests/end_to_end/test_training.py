"""Trainings through Ray and MLflow: whatever is killed, the end is that of the unbroken run."""

import os
import signal
import sqlite3
from typing import Any

import pytest
import torch

from crowdray.registry.loading import load_counter
from crowdray.training.checkpoint import CLOCKED

from ..support.processes import Job, descendants, named
from .conftest import Workplace

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(400)]


def computed(outcome: dict[str, Any]) -> dict[str, Any]:
    """A training's result without what a clock measured."""
    result: dict[str, Any] = dict(outcome["result"])
    result["history"] = [{k: v for k, v in row.items() if k not in CLOCKED} for row in result["history"]]
    return result


def query(workplace: Workplace, sql: str, *values: str) -> list[Any]:
    with sqlite3.connect(workplace.tracking) as database:
        return database.execute(sql, values).fetchall()


def assert_tracked_once(workplace: Workplace, name: str, epochs: int) -> None:
    """One run of that name, finished, and each epoch exactly once in each of its curves."""
    runs = query(workplace, "select run_uuid, status from runs where name = ?", name)
    assert [status for _, status in runs] == ["FINISHED"]
    steps = query(
        workplace, "select step from metrics where run_uuid = ? and key = 'updates' order by step", runs[0][0]
    )
    assert [step for (step,) in steps] == list(range(1, epochs + 1))
    twice = query(
        workplace, "select key, step from metrics where run_uuid = ? group by key, step having count(*) > 1", runs[0][0]
    )
    assert twice == []


def test_an_unbroken_training_ends_in_a_registered_counter(workplace: Workplace, unbroken: Job) -> None:
    outcome = workplace.outcome("unbroken")
    assert outcome["registered"].startswith("models:/crowdray-synthetic/")
    table = unbroken.output
    for shown in ("baseline", "decoders", "joint", "val MAE", "test RMSE", outcome["registered"], "jobs/predict.py"):
        assert shown in table
    assert_tracked_once(workplace, "unbroken", epochs=24)

    tracking = workplace.environment["MLFLOW_TRACKING_URI"]
    registered = load_counter(outcome["registered"], tracking_uri=tracking)
    image = torch.randint(0, 256, (1, 3, 101, 150), dtype=torch.uint8)
    assert registered(image).shape == (1, 1, 101, 150)
    assert torch.equal(registered(image), load_counter(outcome["model"])(image))
    assert os.path.getsize(outcome["figure"]) > 10_000


def test_killed_jobs_and_workers_change_nothing(workplace: Workplace, unbroken: Job) -> None:
    job = workplace.train("broken")
    job.wait_for("decoders 2/")
    job.kill()

    again = workplace.train("broken")
    again.wait_for("going on after epoch ")
    again.wait_for("decoders ")
    workers = named(descendants(again.pid), "ray::RayTrainWorker")
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    assert again.end() == 0, again.output

    assert computed(workplace.outcome("broken")) == computed(workplace.outcome("unbroken"))
    assert_tracked_once(workplace, "broken", epochs=24)


def test_an_ended_training_gives_its_result_again_without_ray(workplace: Workplace, unbroken: Job) -> None:
    before = workplace.outcome("unbroken")
    job = workplace.train("unbroken")
    assert job.end() == 0, job.output
    assert "has ended already" in job.output and "starting Ray" not in job.output
    assert workplace.outcome("unbroken") == before | {"alias": None}  # it may have moved


def test_a_training_that_diverges_says_so_once_and_is_not_repeated(workplace: Workplace) -> None:
    job = workplace.train("diverged", "--loss.gradient_share", "1e300", workers=1)
    assert job.end() == 1
    told = job.lines[-1]
    assert told.startswith("error: joint stage, epoch 4: gradient norm ") and "Lower stages.joint" in told
    assert "Traceback" not in job.output and job.output.count("error:") == 1
    assert query(workplace, "select status from runs where name = 'diverged'") == [("FAILED",)]
