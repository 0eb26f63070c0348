"""What a study may be, how many of its trials fit, and what its trials' time is counted as."""

import dataclasses
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from optuna.storages.journal import JournalFileBackend
from rich.console import Console

from crowdray.cluster.runtime import Resources
from crowdray.config import Config, NumericsConfig, StageConfig, to_json
from crowdray.console.study_display import StudyDisplay
from crowdray.data.shards import Dataset, write_index, write_shard
from crowdray.errors import InfeasibleConfigError, UserError
from crowdray.presets import preset
from crowdray.registry.tracking import NullTracker
from crowdray.stage_cache.keys import StageKey
from crowdray.stage_cache.session import StageCacheConfig
from crowdray.tune.driver import places_of, tune
from crowdray.tune.space import load_space
from crowdray.tune.study import SearchOptions, Study, plan_study
from crowdray.tune.trial import Account, TrialTask, run_trial
from crowdray.tune.trial_tracker import TrialTracker

from .test_search import study_in

CHAINS = (StageKey("b", "baseline", 2), StageKey("d", "decoders", 1), StageKey("j", "joint", 2))


@pytest.mark.parametrize(
    ("resources", "workers", "threads", "concurrent", "places"),
    [
        (Resources(8, 0, True, node_cpus=(8,)), 1, 1, None, 8),
        (Resources(8, 0, True, node_cpus=(8,)), 1, 3, None, 2),
        (Resources(8, 0, True, node_cpus=(8,)), 2, 1, 3, 3),
        (Resources(8, 0, False, node_cpus=(2, 2, 2, 2)), 1, 2, None, 4),
        (Resources(8, 4, True, node_cpus=(8,)), 2, 1, None, 2),
        (Resources(64, 0, False, node_cpus=(4,), max_node_cpus=(4,) * 16), 2, 1, None, 32),
        (Resources(64, 0, False, node_cpus=(0,), max_node_cpus=(8,) * 8), 1, 5, None, 8),
        (Resources(12, 0, False, node_cpus=(8, 2), max_node_cpus=(2,) * 2), 1, 4, None, 2),
    ],
)
def test_as_many_trials_run_as_fit(
    tmp_path: Path, resources: Resources, workers: int, threads: int, concurrent: int | None, places: int
) -> None:
    study = study_in(tmp_path, workers=workers)
    config = dataclasses.replace(study.config, numerics=NumericsConfig(threads=threads))
    assert places_of(dataclasses.replace(study, config=config), resources, concurrent, "auto")[0] == places


def test_a_trial_that_fits_on_no_node_is_refused_in_words(tmp_path: Path) -> None:
    study = study_in(tmp_path)
    config = dataclasses.replace(study.config, numerics=NumericsConfig(threads=3))
    with pytest.raises(UserError, match=r"3 CPUs.*nodes have 2 and 2.*--numerics.threads"):
        places_of(dataclasses.replace(study, config=config), Resources(4, 0, False, node_cpus=(2, 2)), None, "auto")
    growing = Resources(16, 0, False, node_cpus=(0,), max_node_cpus=(2, 2, 2))
    with pytest.raises(UserError, match=r"3 CPUs.*nodes have 2 and 2 and 2: "):
        places_of(dataclasses.replace(study, config=config), growing, None, "auto")


def test_a_study_is_judged_by_a_joint_stage(discs: Dataset) -> None:
    config = preset("debug")
    without = dataclasses.replace(config, stages=dataclasses.replace(config.stages, joint=StageConfig(0, 1e-3)))
    with pytest.raises(UserError, match=r"stages.joint.epochs can be 0"):
        plan_study(without, discs.uri, "debug", SearchOptions())
    with pytest.raises(UserError, match=r"stages.joint.epochs can be 0"):
        plan_study(config, discs.uri, "debug", SearchOptions(vary=("stages.joint.epochs=[0, 2]",)))


def test_all_trials_of_a_study_have_as_many_workers(discs: Dataset) -> None:
    with pytest.raises(UserError, match=r"--workers is '1:2'.*give one number"):
        plan_study(preset("debug"), discs.uri, "debug", SearchOptions(workers="1:2"))


def test_the_name_of_a_study_is_a_function_of_all_that_is_searched(discs: Dataset) -> None:
    def named(config: Config, **options: Any) -> str:
        return plan_study(config, discs.uri, "debug", SearchOptions(**options)).name

    config = preset("debug")
    others = [
        named(dataclasses.replace(config, seed=1)),
        named(config, vary=("loss.depth=null",)),
        named(config, objectives="mae+rmse"),
        named(config, sampler="random"),
        named(config, prune=False),
        named(config, workers=2),
    ]
    assert len({named(config), *others}) == 7 and named(config) == named(config)


def test_trials_of_two_codes_are_never_in_one_study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = study_in(tmp_path)
    study.claim()
    study.claim()
    monkeypatch.setattr("crowdray.tune.study.code_digest", lambda: "other")
    with pytest.raises(UserError, match=r"another --name.*\n  code is \w+ there, other here"):
        study.claim()


WEIGHT = '{"low": 0.1, "high": 1, "log": true}'


@pytest.mark.parametrize(
    ("first", "second", "said"),
    [
        (["optimizer.clip=[0.5, 1.0]"], [], r"optimizer.clip is .* there, missing here"),
        ([], ["optimizer.clip=[0.5, 1.0]"], r"optimizer.clip is missing there"),
        (
            [f"loss.depth={WEIGHT}"],
            ['loss.depth={"low": 0.1, "high": 1}'],
            r"loss.depth.log is True there, missing here",
        ),
        (["loss.count=null"], [], r"loss.count is None there"),
        ([], ["loss.count=null"], r"loss.count is .* there, None here"),
    ],
)
def test_a_study_has_one_space(tmp_path: Path, first: list[str], second: list[str], said: str) -> None:
    study = study_in(tmp_path)
    spaces = (load_space(None, vary, study.config) for vary in (first, second))
    one, other = (dataclasses.replace(study, space=space) for space in spaces)
    one.claim()
    one.claim()
    with pytest.raises(UserError, match=rf"another --name.*\n.*space\.{said}"):
        other.claim()


def test_half_a_line_of_a_journal_costs_that_line(tmp_path: Path) -> None:
    study, journal = study_in(tmp_path), tmp_path / "study" / "journal.log"
    study.optuna_study().enqueue_trial({"a": 1})
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole.splitlines()[-1][:20])
    study.optuna_study().enqueue_trial({"a": 2})
    assert journal.read_bytes().startswith(whole)
    assert len(study.optuna_study().trials) == 2


def test_half_a_line_that_a_full_disk_leaves_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the study goes on in the same process, once there is space."""

    def half(self: JournalFileBackend, logs: list[dict[str, Any]]) -> None:
        with (tmp_path / "study" / "journal.log").open("ab") as journal:
            journal.write(b'{"op_code": 4, "wor')
        raise OSError(28, "No space left on device")

    study = study_in(tmp_path)
    record = study.optuna_study()
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(JournalFileBackend, "append_logs", half)
        record.enqueue_trial({"a": 1})
    record.enqueue_trial({"a": 2})
    record.enqueue_trial({"a": 3})
    assert len(study.optuna_study().trials) == 2


def test_what_no_trial_could_do_is_said_before_the_study_begins(
    discs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_in(tmp_path, workers=99, data=discs.uri, digest=discs.digest)
    stage_cache = StageCacheConfig(str(tmp_path / "stages"), 2**30)
    with StudyDisplay(Console()) as display, pytest.raises(UserError, match="too small for 99 workers"):
        tune(study, display, trials=1, concurrent=None, tracking_uri=None, stage_cache=stage_cache)
    assert not (tmp_path / "study").exists()
    space = load_space(None, ["sampling.batch=[128, 256]"], study.config)
    with monkeypatch.context() as patched, pytest.raises(RuntimeError, match="so far"):
        patched.setattr(Study, "claim", Mock(side_effect=RuntimeError("so far")))
        wide = dataclasses.replace(study, workers=16, space=space)
        tune(wide, display, trials=1, concurrent=None, tracking_uri=None, stage_cache=stage_cache)


@pytest.mark.parametrize("database", ["nonsense", "nodatabase://host/name"])
def test_a_database_that_is_none_is_refused(tmp_path: Path, database: str) -> None:
    with pytest.raises(UserError, match=r"--database cannot be used.*postgresql://"):
        study_in(tmp_path, database=database).optuna_study()


def test_a_database_knows_the_folder_of_each_of_its_studies(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/optuna.db"
    here, elsewhere = (study_in(tmp_path / name, database=database) for name in ("here", "elsewhere"))
    here.optuna_study()
    with pytest.raises(UserError, match=rf"belongs to {here.uri}, this one is {elsewhere.uri}.*--name"):
        elsewhere.optuna_study()
    here.optuna_study()


def test_a_journal_on_an_object_store_is_refused() -> None:
    study = dataclasses.replace(study_in(Path("x")), storage="memory://bucket")
    with pytest.raises(UserError, match=r"cannot lie in memory://bucket/study.*--database"):
        study.optuna_study()


@pytest.mark.parametrize(
    ("error", "key"), [(InfeasibleConfigError("too large"), "failed"), (UserError("no disk"), "mistake")]
)
def test_settings_that_cannot_be_trained_cost_their_trial_alone(
    monkeypatch: pytest.MonkeyPatch, error: UserError, key: str
) -> None:
    def refuse(*_: object) -> None:
        raise error

    reports: list[dict[str, Any]] = []
    monkeypatch.setattr("crowdray.tune.trial._train_here", refuse)
    monkeypatch.setattr("ray.tune.report", reports.append)
    run_trial(SimpleNamespace(workers=1), {})  # type: ignore[arg-type]
    assert reports == [{key: str(error)} | ({"settings": True} if key == "failed" else {})]


@pytest.mark.parametrize(("digest", "said"), [("e" * 64, "dataset"), (None, "is not the folder")])
def test_a_trial_that_sees_other_folders_than_the_driver_ends_the_search(
    discs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, digest: str | None, said: str
) -> None:
    study = dataclasses.replace(study_in(tmp_path), data=discs.uri, digest=digest or discs.digest)
    study = dataclasses.replace(study, config=dataclasses.replace(study.config, numerics=NumericsConfig(threads=1)))
    if digest:
        study.claim()
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.tune.report", reports.append)
    stage_cache = StageCacheConfig(str(tmp_path / "stages"), 2**30)
    task = TrialTask(
        study.data, study.digest, study.uri, study.identity, 1, Resources(2, 0, True), "cpu", False, stage_cache
    )
    run_trial(task, {"config": to_json(study.config), "chains": CHAINS, "name": "trial"})
    assert len(reports) == 1 and said in reports[0]["mistake"]


def test_what_changes_nothing_is_not_searched(discs: Dataset, tmp_path: Path) -> None:
    config = preset("debug")
    with pytest.raises(UserError, match=r"numerics.grad_allreduce_dtype.*one worker"):
        plan_study(config, discs.uri, "debug", SearchOptions(vary=('numerics.grad_allreduce_dtype=["fp32", "bf16"]',)))
    plan_study(
        config, discs.uri, "debug", SearchOptions(vary=('numerics.grad_allreduce_dtype=["fp32", "bf16"]',), workers=2)
    )
    flat = str(tmp_path / "flat")
    shards = [write_shard([discs.sample(row) for row in range(len(discs))], flat, 0)]
    write_index(flat, shards, source="discs", depth_teacher="none")
    assert "loss.depth" in plan_study(config, discs.uri, "debug", SearchOptions()).space.dimensions
    assert "loss.depth" not in plan_study(config, flat, "debug", SearchOptions()).space.dimensions
    with pytest.raises(UserError, match=r"loss.depth.*no depth"):
        plan_study(config, flat, "debug", SearchOptions(vary=("loss.depth=[0.1, 1]",)))


def row(epoch: int, stage: str) -> dict[str, Any]:
    errors = {"val/mae": 10.0 - epoch, "val/rmse": 20.0 - epoch} if stage == "joint" else {}
    return {"epoch": epoch, "stage": stage, "seconds": 4.0, **errors}


HISTORY = [row(epoch, stage) for epoch, stage in enumerate(["baseline", "baseline", "decoders", "joint", "joint"], 1)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that a test sets by hand."""
    now = [0.0]
    monkeypatch.setattr("crowdray.tune.trial.time.monotonic", lambda: now[0])
    return now


def test_a_trial_accounts_for_what_it_spent_and_what_it_found(clock: list[float]) -> None:
    account = Account(CHAINS, workers=2)
    account.begin(HISTORY[:2])
    clock[0] = 10.0
    first = account.after_epoch(HISTORY[:3])
    clock[0] = 15.0
    second = account.after_epoch(HISTORY[:4])
    assert [told["epoch"] for told in first["rows"]] == [1, 2, 3] and "mae" not in first
    assert [told["epoch"] for told in second["rows"]] == [4] and second["curve"] == [(1, 6.0)] and second["mae"] == 6.0
    legs = [(leg["stage"], leg["epochs"], leg["reused"], leg["seconds"], leg["saved"]) for leg in second["legs"]]
    assert legs == [("baseline", 2, 2, 0.0, 16.0), ("decoders", 1, 0, 20.0, 0.0), ("joint", 1, 0, 10.0, 0.0)]


@pytest.mark.parametrize(("there", "reused", "saved"), [(2, 2, 16.0), (1, 1, 8.0)])
def test_a_trial_of_several_workers_that_was_found_whole_trained_nothing(
    clock: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: int, reused: int, saved: float
) -> None:
    reports: list[dict[str, Any]] = []
    monkeypatch.setattr("ray.tune.report", reports.append)
    monkeypatch.setattr("crowdray.tune.trial.run_training", lambda *_, follow, **__: follow(HISTORY))
    stage_cache = StageCacheConfig(str(tmp_path / "stages"), 2**30)
    stage_cache.open().publish(CHAINS[-1], there, lambda folder: (folder / "state").touch())
    task = TrialTask("data", "d", "runs", "runs/study.json", 2, Resources(2, 0, True), "cpu", False, stage_cache)
    run_trial(task, {"config": to_json(preset("debug")), "chains": CHAINS, "name": "trial"})
    leg = reports[-1]["legs"][-1]
    assert (leg["stage"], leg["epochs"], leg["reused"], leg["saved"]) == ("joint", 2, reused, saved)
    assert reports[-1]["finished"] and reports[-1]["mae"] == 5.0


def test_a_driver_that_ends_ends_the_runs_of_its_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, ends = study_in(tmp_path), list[str]()
    with TrialTracker(
        study, study.optuna_study(), lambda _: None, dataset="x", tracking_uri=None, parent=None, tags={}
    ) as book:
        monkeypatch.setattr(NullTracker, "finish", lambda _, status: ends.append(status))
        book.started(0, {}, study.config)
        book.started(1, {}, study.config)
        book.ended(1, "complete", "")
    assert ends == ["FINISHED", "KILLED"]


def test_what_a_lost_process_spent_counts_and_its_epochs_are_no_saving(clock: list[float], tmp_path: Path) -> None:
    study = study_in(tmp_path)
    book = TrialTracker(
        study, study.optuna_study(), lambda _: None, dataset="x", tracking_uri=None, parent=None, tags={}
    )
    book.started(0, {}, study.config)
    lost = Account(CHAINS, workers=1)
    lost.begin([])
    for epoch in (1, 2, 3):
        clock[0] += 10
        book.heard(0, lost.after_epoch(HISTORY[:epoch]))
    again = Account(CHAINS, workers=1)  # after the kill it finds the baseline in the store, where it left it
    again.begin(HISTORY[:2])
    for epoch in (3, 4, 5):
        clock[0] += 10
        book.heard(0, again.after_epoch(HISTORY[:epoch]))
    book.heard(0, again.at_end(HISTORY))
    (record,) = book.record.trials
    assert record.spent == 60.0 and record.saved == 0.0
    assert record.curve == {1: 6.0, 2: 5.0} and record.mae == 5.0


def test_what_lost_processes_spent_never_falls(clock: list[float], tmp_path: Path) -> None:
    study = study_in(tmp_path)
    book = TrialTracker(
        study, study.optuna_study(), lambda _: None, dataset="x", tracking_uri=None, parent=None, tags={}
    )
    book.started(0, {}, study.config)
    spent = []
    for _ in range(3):  # its states are gone each time
        account = Account(CHAINS, workers=1)
        account.begin([])
        for epoch in (1, 2, 3, 4):
            clock[0] += 10
            book.heard(0, account.after_epoch(HISTORY[:epoch]))
            spent.append(book.record.trials[0].spent)
    assert spent == [10.0 * count for count in range(1, 13)]
