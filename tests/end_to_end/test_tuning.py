"""Studies through Ray Tune, Optuna and MLflow: killed processes lose no trial and repeat none."""

import os
import random
import signal
import time
from typing import Any

import optuna
import pytest
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from ..support.processes import Job, descendants, named
from .conftest import Workspace
from .test_training import query

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(400)]


def study_of(workspace: Workspace, name: str) -> optuna.Study:
    journal = workspace.folder / "runs" / name / "journal.log"
    return optuna.load_study(study_name=name, storage=JournalStorage(JournalFileBackend(str(journal))))


def computed(outcome: dict[str, Any]) -> dict[int, Any]:
    """Values and errors of each trial, without its costs."""
    return {trial["number"]: (trial["state"], trial["values"], trial["mae"]) for trial in outcome["record"]["trials"]}


@pytest.fixture(scope="module")
def finished_study(workspace: Workspace) -> Job:
    """An uninterrupted study."""
    job = workspace.tune("study", 4)
    assert job.end() == 0, job.output
    return job


def test_tune_uninterrupted_registers_best_trial(workspace: Workspace, finished_study: Job) -> None:
    outcome = workspace.outcome("study")
    trials = outcome["record"]["trials"]
    assert [trial["state"] for trial in trials] == ["complete"] * 4
    best = min(trials, key=lambda trial: trial["mae"])
    assert outcome["best"] == best["number"]
    assert outcome["outcome"]["registered"].startswith("models:/crowdray-synthetic/")
    assert all(os.path.getsize(figure) > 5_000 for figure in outcome["figures"])
    assert sum(cost["reused"] for trial in trials for cost in trial["stage_costs"]) > 0
    ((parent,),) = query(workspace, "select run_uuid from runs where name = 'study'")
    children = query(
        workspace,
        "select status from runs join tags on runs.run_uuid = tags.run_uuid "
        "where tags.key = 'mlflow.parentRunId' and tags.value = ?",
        parent,
    )
    assert children == [("FINISHED",)] * 4


def run_with_kills(workspace: Workspace, name: str, kills: int, random_delays: random.Random) -> int:
    """Run a study to its end while killing, in turn, a trial's process and the whole job; return the number of kills.

    Each restart asks for one more trial than the first start.
    """
    job, killed = workspace.tune(name, 4), 0
    while killed < kills:
        job.wait_for("searching")
        time.sleep(random_delays.uniform(0, 12))
        while job.running and not (trials := named(descendants(job.pid), "ray::ImplicitFunc")):
            time.sleep(0.1)
        if not job.running:
            break
        os.kill(trials[0], signal.SIGKILL)
        killed += 1
        time.sleep(random_delays.uniform(2, 8))
        if job.running:
            job.kill()
            killed += 1
            job = workspace.tune(name, 5)
    assert job.end() == 0, job.output
    return killed


@pytest.mark.timeout(3600)  # up to a minute for each of --kills
def test_tune_after_kills_equals_uninterrupted_study(
    workspace: Workspace, finished_study: Job, request: pytest.FixtureRequest
) -> None:
    kills, random_delays, studies = int(request.config.getoption("--kills")), random.Random(0), 0
    expected = computed(workspace.outcome("study"))
    while kills > 0:
        name, studies = f"killed-{studies}", studies + 1
        kills -= run_with_kills(workspace, name, kills, random_delays)
        found = computed(workspace.outcome(name))
        assert {number: found[number] for number in expected} == expected
        optuna_trials = study_of(workspace, name).trials
        assert [trial.state.name for trial in optuna_trials] == ["COMPLETE"] * len(found)
        runs = query(workspace, "select run_uuid, status from runs where name like ?", f"{name}/%")
        assert [status for _, status in runs] == ["FINISHED"] * len(found)
        for run, _ in runs:
            duplicates = "select key, step from metrics where run_uuid = ? group by key, step having count(*) > 1"
            assert query(workspace, duplicates, run) == []
