"""Studies through Ray Tune, Optuna and MLflow: whatever is killed, no trial is lost and none is run twice."""

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
from .conftest import Workplace
from .test_training import query

pytestmark = [pytest.mark.end_to_end, pytest.mark.timeout(400)]


def study_of(workplace: Workplace, name: str) -> optuna.Study:
    journal = workplace.folder / "runs" / name / "journal.log"
    return optuna.load_study(study_name=name, storage=JournalStorage(JournalFileBackend(str(journal))))


def computed(outcome: dict[str, Any]) -> dict[int, Any]:
    """What each trial found, without what it cost."""
    return {trial["number"]: (trial["state"], trial["values"], trial["mae"]) for trial in outcome["record"]["trials"]}


@pytest.fixture(scope="module")
def searched(workplace: Workplace) -> Job:
    """A study that nobody disturbed."""
    job = workplace.tune("searched", 4)
    assert job.end() == 0, job.output
    return job


def test_a_study_ends_in_the_best_trial_registered(workplace: Workplace, searched: Job) -> None:
    outcome = workplace.outcome("searched")
    trials = outcome["record"]["trials"]
    assert [trial["state"] for trial in trials] == ["complete"] * 4
    best = min(trials, key=lambda trial: trial["mae"])
    assert outcome["best"] == best["number"]
    assert outcome["outcome"]["registered"].startswith("models:/crowdray-synthetic/")
    assert all(os.path.getsize(figure) > 5_000 for figure in outcome["figures"])
    assert sum(leg["reused"] for trial in trials for leg in trial["legs"]) > 0
    ((parent,),) = query(workplace, "select run_uuid from runs where name = 'searched'")
    children = query(
        workplace,
        "select status from runs join tags on runs.run_uuid = tags.run_uuid "
        "where tags.key = 'mlflow.parentRunId' and tags.value = ?",
        parent,
    )
    assert children == [("FINISHED",)] * 4


def stricken(workplace: Workplace, name: str, kills: int, moments: random.Random) -> int:
    """Run a study to its end, while a trial's process, the whole job, a trial's process, ... is killed; returns how
    often. A start after a kill asks for one trial more than the first one."""
    job, struck = workplace.tune(name, 4), 0
    while struck < kills:
        job.wait_for("searching")
        time.sleep(moments.uniform(0, 12))
        while job.running and not (trials := named(descendants(job.pid), "ray::ImplicitFunc")):
            time.sleep(0.1)
        if not job.running:
            break
        os.kill(trials[0], signal.SIGKILL)
        struck += 1
        time.sleep(moments.uniform(2, 8))
        if job.running:
            job.kill()
            struck += 1
            job = workplace.tune(name, 5)
    assert job.end() == 0, job.output
    return struck


@pytest.mark.timeout(3600)  # a minute for each of many --kills
def test_killed_trials_and_drivers_lose_nothing_and_more_trials_continue(
    workplace: Workplace, searched: Job, request: pytest.FixtureRequest
) -> None:
    kills, moments, studies = int(request.config.getoption("--kills")), random.Random(0), 0
    expected = computed(workplace.outcome("searched"))
    while kills > 0:
        name, studies = f"stricken-{studies}", studies + 1
        kills -= stricken(workplace, name, kills, moments)
        found = computed(workplace.outcome(name))
        assert {number: found[number] for number in expected} == expected
        told = study_of(workplace, name).trials
        assert [trial.state.name for trial in told] == ["COMPLETE"] * len(found)
        runs = query(workplace, "select run_uuid, status from runs where name like ?", f"{name}/%")
        assert [status for _, status in runs] == ["FINISHED"] * len(found)
        for run, _ in runs:
            twice = "select key, step from metrics where run_uuid = ? group by key, step having count(*) > 1"
            assert query(workplace, twice, run) == []
