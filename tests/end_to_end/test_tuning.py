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
from PIL import Image

from ..support.cluster import Cluster, kill
from ..support.processes import Job, descendants, named, until
from .conftest import Workspace

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(400)]


OPTIONS = ("--prune", "False", "--vary", "stages.joint.epochs=[6,8]")


def study_of(workspace: Workspace, name: str) -> optuna.Study:
    journal = workspace.folder / "runs" / name / "journal.log"
    return optuna.load_study(study_name=name, storage=JournalStorage(JournalFileBackend(str(journal))))


def computed(outcome: dict[str, Any]) -> dict[int, Any]:
    """Values and errors of each trial, without its costs."""
    return {trial["number"]: (trial["state"], trial["values"], trial["mae"]) for trial in outcome["record"]["trials"]}


@pytest.fixture(scope="module")
def submitted_study(workspace: Workspace, cluster: Cluster) -> Job:
    """A study of three trials at a time on a cluster that loses a node."""
    options = [*workspace.arguments("submitted"), "--trials", "4", *OPTIONS]
    job = cluster.submit("tune.py", options, workspace.tracking_uri)
    last = cluster.nodes[-1]
    until(lambda: bool(named(descendants(last.pid), "ray::ImplicitFunc")), 120, "no trial ran on the last node")
    kill(last)
    assert job.end() == 0, job.output
    cluster.check_drivers()
    return job


def test_tune_submitted_survives_loss_of_node(workspace: Workspace, submitted_study: Job) -> None:
    outcome = workspace.outcome("submitted")
    trials = outcome["record"]["trials"]
    assert [trial["state"] for trial in trials] == ["complete"] * 4
    assert outcome["best"] == min(trials, key=lambda trial: trial["mae"])["number"]
    assert outcome["outcome"]["registered"].startswith("models:/crowdray-synthetic/")
    assert sum(cost["reused"] for trial in trials for cost in trial["stage_costs"]) > 0
    for path in outcome["figures"]:
        with Image.open(path) as figure:
            assert figure.format == "PNG"
    ((parent,),) = workspace.query("select run_uuid from runs where name = 'submitted'")
    children = workspace.query(
        "select status from runs join tags on runs.run_uuid = tags.run_uuid "
        "where tags.key = 'mlflow.parentRunId' and tags.value = ?",
        parent,
    )
    assert children == [("FINISHED",)] * 4


def run_with_kills(workspace: Workspace, name: str, kills: int, random_delays: random.Random) -> int:
    """Run a study to its end while killing, in turn, a trial's process and the whole job; return the number of kills.

    Each restart asks for one more trial than the first start.
    """
    job, killed = workspace.tune(name, 3, *OPTIONS), 0
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
            job = workspace.tune(name, 4, *OPTIONS)
    assert job.end() == 0, job.output
    return killed


@pytest.mark.timeout(3600)  # up to a minute for each of --kills
def test_tune_after_kills_equals_submitted_study(
    workspace: Workspace, submitted_study: Job, request: pytest.FixtureRequest
) -> None:
    kills, random_delays, studies = int(request.config.getoption("--kills")), random.Random(0), 0
    submitted = computed(workspace.outcome("submitted"))
    expected = {number: submitted[number] for number in range(3)}
    while kills > 0:
        name, studies = f"killed-{studies}", studies + 1
        kills -= run_with_kills(workspace, name, kills, random_delays)
        found = computed(workspace.outcome(name))
        assert {number: found[number] for number in expected} == expected
        optuna_trials = study_of(workspace, name).trials
        assert [trial.state.name for trial in optuna_trials] == ["COMPLETE"] * len(found)
        runs = workspace.query("select run_uuid, status from runs where name like ?", f"% of {name}")
        assert [status for _, status in runs] == ["FINISHED"] * len(found)
        for run, _ in runs:
            workspace.assert_no_duplicates(run)
