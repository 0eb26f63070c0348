"""What a study accepts, how many of its trials fit, and what its trials cost."""

import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from optuna.storages.journal import JournalFileBackend

from crowdray.cluster.runtime import Resources
from crowdray.config import Config, StageConfig
from crowdray.data.shards import Dataset, write_index, write_shard
from crowdray.errors import InfeasibleConfigError, UserError
from crowdray.presets import preset
from crowdray.registry.tracking import Tracker
from crowdray.stage_cache.keys import StageKey
from crowdray.stage_cache.session import StageCacheConfig
from crowdray.training.checkpoint import EpochMetrics
from crowdray.tune.driver import trial_slots, tune
from crowdray.tune.options import SearchOptions
from crowdray.tune.optuna_study import open_optuna_study
from crowdray.tune.record import StageCost, TrialRecord
from crowdray.tune.report import REPORT, SPEC, TrialReport, TrialReporter, TrialSpec
from crowdray.tune.space import load_space
from crowdray.tune.study import Study, plan_study
from crowdray.tune.trial import TrialTask, run_trial
from crowdray.tune.trial_tracker import RECORD, TrialTracker

from ..support.studies import make_study

KEYS = (StageKey("b", "baseline", 2), StageKey("d", "decoders", 1), StageKey("j", "joint", 2))
SPEC_OF_TRIAL = TrialSpec(0, preset("debug"), KEYS)


def make_tracker(study: Study) -> TrialTracker:
    trials = open_optuna_study(study)
    return TrialTracker(study, trials, lambda _: None, dataset="x", tracking_uri=None, parent=None)


def make_task(study: Study, stage_cache: Path) -> TrialTask:
    cache = StageCacheConfig(str(stage_cache), 2**30)
    return TrialTask(study, Resources(2, 0, True), "cpu", False, cache)


@pytest.fixture
def reports(monkeypatch: pytest.MonkeyPatch) -> list[TrialReport]:
    """What trials report to Ray Tune."""
    sent: list[TrialReport] = []
    monkeypatch.setattr("ray.tune.report", lambda metrics: sent.append(metrics[REPORT]))
    return sent


@pytest.mark.parametrize(
    ("resources", "workers", "threads", "concurrent", "slots"),
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
def test_trial_slots_are_as_many_as_fit(
    tmp_path: Path, resources: Resources, workers: int, threads: int, concurrent: int | None, slots: int
) -> None:
    study = make_study(tmp_path, workers=workers, threads=threads)
    assert trial_slots(study, resources, concurrent, "auto")[0] == slots


@pytest.mark.parametrize(
    ("resources", "cpus"),
    [
        (Resources(4, 0, False, node_cpus=(2, 2)), "2 and 2"),
        (Resources(16, 0, False, node_cpus=(0,), max_node_cpus=(2, 2, 2)), "2 and 2 and 2"),
    ],
)
def test_trial_slots_without_a_node_that_is_large_enough_are_refused(
    tmp_path: Path, resources: Resources, cpus: str
) -> None:
    with pytest.raises(UserError, match=rf"3 CPUs.*nodes have {cpus}: lower --workers or --numerics.threads"):
        trial_slots(make_study(tmp_path, threads=3), resources, None, "auto")


def test_default_name_of_a_study_depends_on_everything_that_is_searched(discs: Dataset) -> None:
    def name_of(config: Config, **options: Any) -> str:
        return plan_study(config, discs.uri, "debug", SearchOptions(**options)).identity.name

    config = preset("debug")
    others = [
        name_of(replace(config, seed=1)),
        name_of(config, vary=("loss.depth=null",)),
        name_of(config, objectives="mae+rmse"),
        name_of(config, sampler="random"),
        name_of(config, prune=False),
        name_of(config, workers=2),
    ]
    assert len({name_of(config), *others}) == 7 and name_of(config) == name_of(config)


WEIGHT = '{"low": 0.1, "high": 1, "log": true}'


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (["optimizer.clip=[0.5, 1.0]"], [], r"optimizer.clip: recorded .*, given missing"),
        ([], ["optimizer.clip=[0.5, 1.0]"], r"optimizer.clip: recorded missing"),
        (
            [f"loss.depth={WEIGHT}"],
            ['loss.depth={"low": 0.1, "high": 1}'],
            r"loss.depth.log: recorded True, given missing",
        ),
        (["loss.count=null"], [], r"loss.count: recorded None"),
        ([], ["loss.count=null"], r"loss.count: recorded .*, given None"),
    ],
)
def test_study_started_with_another_space_or_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, first: list[str], second: list[str], message: str
) -> None:
    study = make_study(tmp_path)
    one, other = (replace(study, space=load_space(None, vary, study.config)) for vary in (first, second))
    one.create_or_verify()
    one.create_or_verify()
    with pytest.raises(UserError, match=rf"another --name.*\n.*space\.{message}"):
        other.create_or_verify()
    monkeypatch.setattr("crowdray.tune.study.code_digest", lambda: "other")
    with pytest.raises(UserError, match=r"another --name.*\n  code: recorded \w+, given other"):
        one.create_or_verify()


def test_journal_with_half_a_line_loses_only_that_line(tmp_path: Path) -> None:
    study, journal = make_study(tmp_path), tmp_path / "study" / "journal.log"
    open_optuna_study(study).enqueue_trial({"a": 1})
    whole = journal.read_bytes()
    journal.write_bytes(whole + whole.splitlines()[-1][:20])
    open_optuna_study(study).enqueue_trial({"a": 2})
    assert journal.read_bytes().startswith(whole)
    assert len(open_optuna_study(study).trials) == 2


def test_journal_removes_half_a_line_that_a_full_disk_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same process continues the study once there is free space."""

    def half(self: JournalFileBackend, logs: list[dict[str, Any]]) -> None:
        with (tmp_path / "study" / "journal.log").open("ab") as journal:
            journal.write(b'{"op_code": 4, "wor')
        raise OSError(28, "No space left on device")

    study = make_study(tmp_path)
    trials = open_optuna_study(study)
    with monkeypatch.context() as patched, pytest.raises(OSError, match="No space"):
        patched.setattr(JournalFileBackend, "append_logs", half)
        trials.enqueue_trial({"a": 1})
    trials.enqueue_trial({"a": 2})
    trials.enqueue_trial({"a": 3})
    assert len(open_optuna_study(study).trials) == 2


def test_tune_refuses_what_no_trial_can_train_before_it_creates_a_folder(
    discs: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"trials": 1, "concurrent": None, "tracking_uri": None}
    options["stage_cache"] = StageCacheConfig(str(tmp_path / "stages"), 2**30)
    study = make_study(tmp_path, workers=99, data=discs.uri, digest=discs.digest)
    with pytest.raises(UserError, match="too small for 99 workers"):
        tune(study, Mock(), **options)
    assert not (tmp_path / "study").exists()
    wide = make_study(tmp_path, workers=16, data=discs.uri, digest=discs.digest)
    wide = replace(wide, space=load_space(None, ["sampling.batch=[128, 256]"], study.config))
    monkeypatch.setattr(Study, "create_or_verify", Mock(side_effect=RuntimeError("accepted")))
    with pytest.raises(RuntimeError, match="accepted"):
        tune(wide, Mock(), **options)


@pytest.mark.parametrize(
    ("folder", "database", "message"),
    [
        ("runs", "nonsense", r"--database cannot be used.*postgresql://"),
        ("runs", "nodatabase://host/name", r"--database cannot be used.*postgresql://"),
        ("memory://bucket", None, r"cannot be stored in memory://bucket/study.*--database"),
    ],
)
def test_record_in_an_unusable_location_is_refused(folder: str, database: str | None, message: str) -> None:
    study = make_study(Path(), database=database)
    with pytest.raises(UserError, match=message):
        open_optuna_study(replace(study, identity=replace(study.identity, storage=folder)))


def test_database_refuses_a_study_of_the_same_name_in_another_folder(tmp_path: Path) -> None:
    database = f"sqlite:///{tmp_path}/optuna.db"
    first, second = (make_study(tmp_path / name, database=database) for name in ("first", "second"))
    open_optuna_study(first)
    with pytest.raises(UserError, match=rf"belongs to {first.uri}, this one is {second.uri}.*--name"):
        open_optuna_study(second)
    open_optuna_study(first)


@pytest.mark.parametrize(
    ("error", "status"), [(InfeasibleConfigError("too large"), "infeasible"), (UserError("no disk"), "user_error")]
)
def test_run_trial_reports_errors_that_would_repeat(
    monkeypatch: pytest.MonkeyPatch, reports: list[TrialReport], tmp_path: Path, error: UserError, status: Any
) -> None:
    monkeypatch.setattr("crowdray.tune.trial.run_training", Mock(side_effect=error))
    run_trial(make_task(make_study(tmp_path, workers=2), tmp_path), {SPEC: SPEC_OF_TRIAL})
    assert reports == [TrialReport(status, str(error))]


@pytest.mark.parametrize(("digest", "message"), [("e" * 64, "dataset"), (None, "is not the folder")])
def test_run_trial_reports_a_node_with_other_folders_or_data(
    discs: Dataset, tmp_path: Path, reports: list[TrialReport], digest: str | None, message: str
) -> None:
    study = make_study(tmp_path, data=discs.uri, digest=digest or discs.digest)
    if digest:
        study.create_or_verify()
    run_trial(make_task(study, tmp_path / "stages"), {SPEC: replace(SPEC_OF_TRIAL, config=study.config)})
    (report,) = reports
    assert report.status == "user_error" and message in report.message


REDUCED = 'numerics.grad_allreduce_dtype=["fp32", "bf16"]'


@pytest.mark.parametrize(
    ("joint", "depth", "options", "message"),
    [
        (0, True, {}, r"stages.joint.epochs can be 0"),
        (2, True, {"vary": ("stages.joint.epochs=[0, 2]",)}, r"stages.joint.epochs can be 0"),
        (2, True, {"workers": "1:2"}, r"--workers is '1:2'.*give one number"),
        (2, True, {"vary": (REDUCED,)}, r"numerics.grad_allreduce_dtype.*single worker"),
        (2, False, {"vary": ("loss.depth=[0.1, 1]",)}, r"loss.depth.*no depth"),
    ],
)
def test_plan_study_refuses_what_cannot_be_compared_or_changes_nothing(
    discs: Dataset, tmp_path: Path, joint: int, depth: bool, options: dict[str, Any], message: str
) -> None:
    config, data = preset("debug"), discs.uri if depth else str(tmp_path / "flat")
    if not depth:
        shards = [write_shard([discs.sample(row) for row in range(len(discs))], data, 0)]
        write_index(data, shards, source="discs", depth_teacher="none")
    space = plan_study(config, data, "debug", SearchOptions(vary=(REDUCED,), workers=2)).space
    assert "numerics.grad_allreduce_dtype" in space.dimensions and ("loss.depth" in space.dimensions) == depth
    config = replace(config, stages=replace(config.stages, joint=StageConfig(joint, 1e-3)))
    with pytest.raises(UserError, match=message):
        plan_study(config, data, "debug", SearchOptions(**options))


def make_row(epoch: int, stage: str) -> EpochMetrics:
    errors = {"val/mae": 10.0 - epoch, "val/rmse": 20.0 - epoch} if stage == "joint" else {}
    return {"epoch": epoch, "stage": stage, "seconds": 4.0, **errors}


STAGES = ("baseline", "baseline", "decoders", "joint", "joint")
HISTORY = [make_row(epoch, stage) for epoch, stage in enumerate(STAGES, 1)]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that a test sets."""
    now = [0.0]
    monkeypatch.setattr("crowdray.tune.report.time", SimpleNamespace(monotonic=lambda: now[0], time=time.time))
    return now


def test_reporter_counts_spent_and_saved_worker_seconds(clock: list[float]) -> None:
    reporter = TrialReporter(KEYS, workers=2)
    reporter.start(HISTORY[:2])
    clock[0] = 10.0
    first = reporter.after_epoch(HISTORY[:3])
    clock[0] = 15.0
    second = reporter.after_epoch(HISTORY[:4])
    assert [row["epoch"] for row in first.rows] == [1, 2, 3] and first.mae is None
    assert [row["epoch"] for row in second.rows] == [4] and second.curve == {1: 6.0} and second.mae == 6.0
    assert second.stage_costs == (
        StageCost("b", "baseline", 2, 2, 0.0, 16.0),
        StageCost("d", "decoders", 1, 0, 20.0, 0.0),
        StageCost("j", "joint", 1, 0, 10.0, 0.0),
    )


@pytest.mark.parametrize(("annealed", "mae"), [(False, 5.0), (True, 7.0)])
def test_reporter_of_an_annealed_joint_stage_reports_its_latest_error(annealed: bool, mae: float) -> None:
    epochs: list[EpochMetrics] = [
        {"epoch": number, "stage": "joint", "seconds": 1.0, "val/mae": error, "val/rmse": error + 1}
        for number, error in enumerate((6.0, 5.0, 7.0), 1)
    ]
    report = TrialReporter(KEYS, workers=1, annealed=annealed).after_epoch(epochs)
    assert (report.mae, report.rmse) == (mae, mae + 1)


@pytest.mark.parametrize(("stored", "reused", "saved"), [(2, 2, 16.0), (1, 1, 8.0)])
def test_group_trial_reports_epochs_that_the_stage_cache_held(
    clock: list[float],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    reports: list[TrialReport],
    stored: int,
    reused: int,
    saved: float,
) -> None:
    monkeypatch.setattr("crowdray.tune.trial.run_training", lambda *_, on_history, **__: on_history(HISTORY))
    task = make_task(make_study(tmp_path, workers=2), tmp_path / "stages")
    task.stage_cache.open().publish(KEYS[-1], stored, lambda folder: (folder / "state").touch())
    run_trial(task, {SPEC: SPEC_OF_TRIAL})
    cost = reports[-1].stage_costs[-1]
    assert (cost.stage, cost.epochs, cost.reused, cost.saved) == ("joint", 2, reused, saved)
    assert reports[-1].status == "finished" and reports[-1].mae == 5.0


def test_tracker_exit_ends_the_runs_of_running_trials(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, ends = make_study(tmp_path), list[str]()
    with make_tracker(study) as tracker:
        monkeypatch.setattr(Tracker, "finish", lambda _, status: ends.append(status))
        tracker.on_start(0, {}, study.config)
        tracker.on_start(1, {}, study.config)
        tracker.on_end(1, "complete", "")
    assert ends == ["FINISHED", "KILLED"]


@pytest.mark.parametrize("restored", [0, 2], ids=["state-lost", "baseline-stored"])
def test_tracker_adds_the_costs_of_lost_attempts_and_no_saving_for_their_epochs(
    clock: list[float], tmp_path: Path, restored: int
) -> None:
    study, spent = make_study(tmp_path), list[float]()
    tracker = make_tracker(study)
    tracker.on_start(0, {}, study.config)
    for start, end in ((0, 3), (restored, 4), (restored, 5)):
        attempt = TrialReporter(KEYS, workers=1)
        attempt.start(HISTORY[:start])
        for epoch in range(start + 1, end + 1):
            clock[0] += 10
            tracker.on_report(0, attempt.after_epoch(HISTORY[:epoch]))
            spent.append(tracker.record.trials[0].spent)
    tracker.on_report(0, attempt.at_end(HISTORY))
    (record,) = tracker.record.trials
    assert spent == [10.0 * count for count in range(1, len(spent) + 1)] and record.saved == 0.0
    assert record.curve == {1: 6.0, 2: 5.0} and record.mae == 5.0


def test_tracker_reads_records_with_previous_names(tmp_path: Path) -> None:
    costs = (StageCost("b", "baseline", 2, 1, 4.0, 4.0),)
    record = TrialRecord(0, "complete", {"loss.depth": 0.5}, 3.0, 4.0, {1: 3.0}, costs)
    old = asdict(record)
    old["legs"] = [{"chain": cost.pop("key"), **cost} for cost in old.pop("stage_costs")]  # previous name
    study = make_study(tmp_path)
    trial = open_optuna_study(study).ask()
    trial.set_user_attr(RECORD, old)
    assert make_tracker(study).record.trials == (record,)
