"""Laws of the search: no epoch is trained twice, Optuna's record is true, and no trial is lost."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import FrozenTrial, TrialState

from crowdray import storage
from crowdray.cluster.runtime import MAX_RETRIES
from crowdray.errors import RESUME_HINT, UserError
from crowdray.stage_cache.keys import StageKey
from crowdray.stage_cache.store import StageStore
from crowdray.tune.optuna_study import open_optuna_storage, open_optuna_study, sampled_trials
from crowdray.tune.record import StageCost
from crowdray.tune.report import SPEC, Status, TrialReport, TrialSpec
from crowdray.tune.search import OUTAGE_S, REFERENCE, StageTreeSearch, StudyScheduler
from crowdray.tune.study import Study
from crowdray.tune.trial_tracker import TrialTracker

from ..support.studies import make_study

NUMERICS: dict[str, str | int] = {"threads": 1}


def make_search(study: Study, *, max_concurrent: int = 2, num_trials: int = 16, **options: Any) -> StageTreeSearch:
    opened = open_optuna_storage(study)
    trials = open_optuna_study(study, opened)
    tracker = TrialTracker(study, trials, lambda _: None, dataset="x", tracking_uri=None, parent=None)
    store = StageStore(f"{study.uri}/stages", 2**30)
    options |= {"max_concurrent": max_concurrent, "num_trials": num_trials, "store": store, "numerics": NUMERICS}
    return StageTreeSearch(study, tracker, opened, **options)


def trials_of(study: Study) -> list[FrozenTrial]:
    return sampled_trials(open_optuna_study(study))


def mae_of(spec: TrialSpec) -> float:
    return 3 + abs(spec.config.loss.depth - 1)


def is_finished(suggested: object) -> bool:
    return suggested == StageTreeSearch.FINISHED


class Cluster:
    """Trains what a search suggests, one epoch of every running trial in turn, and counts the epochs it trains."""

    def __init__(self, study: Study, search: StageTreeSearch) -> None:
        self.search, self.store = search, StageStore(f"{study.uri}/stages", 2**30)
        self.lengths = {stage: study.space.stage_lengths(stage) for stage in ("baseline", "decoders", "joint")}
        self.trained: Counter[tuple[str, int]] = Counter()
        self.running: dict[str, Iterator[TrialReport]] = {}
        self.started: list[TrialSpec] = []

    def train(self, spec: TrialSpec) -> Iterator[TrialReport]:
        found, reached_epoch = self.store.find(spec.keys) or (None, 0)
        reached = spec.keys.index(found) if found else -1
        rows: list[dict[str, Any]] = []
        curve: dict[int, float] = {}
        for index, key in enumerate(spec.keys):
            restored = key.epochs if index < reached else reached_epoch if index == reached else 0
            for epoch in range(1, key.epochs + 1):
                rows.append({"stage": key.stage, "epoch": len(rows) + 1})
                if index == len(spec.keys) - 1:
                    curve[epoch] = mae_of(spec) + 1 / epoch
                if epoch <= restored:
                    continue
                self.trained[key.key, epoch] += 1
                if epoch == key.epochs or epoch in self.lengths[key.stage]:
                    self.store.publish(key, epoch, lambda folder: (folder / "state").touch())
                yield self.report(spec, "running", rows, curve)
                curve = {}
        yield self.report(spec, "finished", rows, curve)

    def report(self, spec: TrialSpec, status: Status, rows: list[Any], curve: dict[int, float]) -> TrialReport:
        report = TrialReport(status, attempt=str(spec.number), rows=tuple(rows), curve=dict(curve))
        lengths = Counter(row["stage"] for row in rows)
        costs = (StageCost(key.key, key.stage, lengths[key.stage], 0, 1.0, 0.0) for key in spec.keys)
        report = replace(report, stage_costs=tuple(cost for cost in costs if cost.epochs))
        return replace(report, mae=mae_of(spec), rmse=9.0) if "joint" in lengths else report

    def start(self) -> bool:
        """Start one more trial, if the search suggests one."""
        trial_id = f"ray-{len(self.started)}"
        suggested = self.search.suggest(trial_id)
        if not isinstance(suggested, dict):
            return False
        self.started.append(suggested[SPEC])
        self.running[trial_id] = self.train(suggested[SPEC])
        return True

    def step(self) -> None:
        """Train one epoch of each running trial."""
        for trial_id, trial in list(self.running.items()):
            report = next(trial)
            if self.search.on_report(trial_id, report) or report.status == "finished":
                del self.running[trial_id]
                self.search.on_trial_complete(trial_id, {"report": report})

    def run(self) -> "Cluster":
        """Run until the search has no more trials."""
        while True:
            while self.start():
                pass
            if not self.running:
                return self
            self.step()


def test_search_trains_no_epoch_twice(tmp_path: Path) -> None:
    study = make_study(tmp_path, prune=False)
    cluster = Cluster(study, make_search(study)).run()
    assert [trial.state for trial in trials_of(study)] == [TrialState.COMPLETE] * 16
    assert max(cluster.trained.values()) == 1
    needed = {(key.key, epoch) for spec in cluster.started for key in spec.keys for epoch in range(1, key.epochs + 1)}
    assert set(cluster.trained) == needed
    assert len(needed) < sum(key.epochs for spec in cluster.started for key in spec.keys) / 1.5


def test_search_starts_the_longest_prefix_first_and_shorter_ones_once_their_state_is_stored(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    cluster = Cluster(study, make_search(study))
    assert cluster.start()
    assert cluster.started[0].config.stages.baseline.epochs == max(study.space.stage_lengths("baseline"))
    assert not cluster.start()  # all others wait for the same baseline
    shortest = min(study.space.stage_lengths("baseline"))
    while not cluster.start():
        cluster.step()
    assert cluster.started[1].config.stages.baseline.epochs == shortest
    assert max(epoch for _, epoch in cluster.trained) == shortest


@pytest.mark.parametrize(("sampler", "sampled"), [("tpe", 10), ("random", 16)])
def test_search_samples_all_trials_that_depend_on_no_result_at_once(tmp_path: Path, sampler: str, sampled: int) -> None:
    study = make_study(tmp_path, sampler=sampler)
    make_search(study).suggest("ray-0")
    assert len(trials_of(study)) == sampled


def test_optuna_record_states_what_happened(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    cluster = Cluster(study, make_search(study, num_trials=12)).run()
    specs = {spec.number: spec for spec in cluster.started}
    trials = trials_of(study)
    states = Counter(trial.state for trial in trials)
    assert states[TrialState.PRUNED] > 0 and states[TrialState.COMPLETE] > 1
    for trial in trials:
        spec = specs[trial.number]
        if trial.state == TrialState.PRUNED:
            assert REFERENCE not in trial.user_attrs
            assert max(trial.intermediate_values) < spec.config.stages.joint.epochs
        else:
            assert trial.value == mae_of(spec) < min(trial.intermediate_values.values(), default=99.0)


def test_pruning_happens_at_an_eighth_of_the_shortest_joint_stage_and_at_three_and_nine_times_that(
    tmp_path: Path,
) -> None:
    study = make_study(tmp_path, joint=32)
    assert min(study.space.stage_lengths("joint")) == 16
    Cluster(study, make_search(study, num_trials=24)).run()
    pruned = [trial for trial in trials_of(study) if trial.state == TrialState.PRUNED]
    stopped = Counter(max(trial.intermediate_values) for trial in pruned)
    assert set(stopped) <= {2, 6, 18}
    assert stopped[2] > len(pruned) / 2


def test_pruning_compares_equal_epochs_also_where_some_came_from_the_stage_cache(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    Cluster(study, make_search(study, num_trials=14)).run()
    for trial in trials_of(study):
        assert sorted(trial.intermediate_values) == list(range(1, max(trial.intermediate_values) + 1))
        rungs = [value for name, value in trial.system_attrs.items() if name.startswith("completed_rung")]
        assert rungs and rungs[0] == trial.intermediate_values[1]  # references are ranked too, for the comparison


def test_search_stops_when_its_driver_lock_is_lost(tmp_path: Path) -> None:
    study, lost = make_study(tmp_path), list[bool]()
    search = make_search(study, lock_is_lost=lambda: bool(lost))
    cluster = Cluster(study, search)
    cluster.start()
    lost.append(True)
    assert is_finished(search.suggest("ray-1"))
    assert search.on_report("ray-0", next(cluster.running["ray-0"]))
    assert search.stop_reason and "suspended" in search.stop_reason


@pytest.mark.parametrize(
    ("report", "reason"),
    [
        (TrialReport("failed", "density nan"), "density nan"),
        (TrialReport("finished", attempt="a"), "its validation errors are not finite"),
    ],
)
def test_search_continues_after_a_failed_trial(tmp_path: Path, report: TrialReport, reason: str) -> None:
    study = make_study(tmp_path)
    search = make_search(study, num_trials=3)
    cluster = Cluster(study, search)
    cluster.start()
    search.on_report("ray-0", report)
    search.on_trial_complete("ray-0", {"report": report})
    cluster.running.clear()
    cluster.run()
    trials = trials_of(study)
    failed = [trial.user_attrs["record"]["reason"] for trial in trials if trial.state == TrialState.FAIL]
    assert len(trials) == 3 and failed == [reason]


def test_trial_whose_process_dies_before_it_starts_is_restarted(tmp_path: Path) -> None:
    """Tune itself does not restart a trial whose process is lost while it is pending."""
    study = make_study(tmp_path)
    search = make_search(study, num_trials=3)
    scheduler, cluster = StudyScheduler(search), Cluster(study, search)
    for attempt in range(MAX_RETRIES + 1):
        cluster.start()
        dead = SimpleNamespace(trial_id=f"ray-{attempt}", status="PENDING", get_error=lambda: None)
        scheduler.on_trial_error(None, dead)
        search.on_trial_complete(dead.trial_id, error=True)
        states = [trial.state for trial in trials_of(study)]
        assert states.count(TrialState.FAIL) == (attempt == MAX_RETRIES)
    assert len({spec.number for spec in cluster.started}) == 1
    cluster.running.clear()
    cluster.run()
    assert len(trials_of(study)) == 3


@pytest.mark.parametrize("in_database", [False, True])
def test_search_after_a_killed_driver_resumes_its_trials_under_their_numbers(tmp_path: Path, in_database: bool) -> None:
    database = f"sqlite:///{tmp_path}/optuna.db" if in_database else None
    study = make_study(tmp_path, prune=False, database=database)
    cluster = Cluster(study, make_search(study))
    for _ in range(9):
        cluster.start()
        cluster.step()
    assert cluster.running
    before = {trial.number: trial.params for trial in trials_of(study)}
    again = Cluster(study, make_search(study)).run()
    after = trials_of(study)
    assert [trial.state for trial in after] == [TrialState.COMPLETE] * 16
    assert {number: after[number].params for number in before} == before
    assert {spec.number for spec in again.started} >= {
        cluster.started[int(name[4:])].number for name in cluster.running
    }
    assert len({str(sorted(trial.params.items())) for trial in after}) == 16  # no point is sampled again


def test_search_with_more_trials_continues_a_study(tmp_path: Path) -> None:
    study = make_study(tmp_path, prune=False)
    for num_trials in (3, 5, 4):  # 4 are fewer than there are: nothing to do
        Cluster(study, make_search(study, num_trials=num_trials)).run()
    trials = trials_of(study)
    assert [trial.number for trial in trials] == [0, 1, 2, 3, 4]
    assert sum(REFERENCE in trial.user_attrs for trial in trials) == 2


def test_user_error_stops_the_search_and_loses_no_trial(tmp_path: Path) -> None:
    study = make_study(tmp_path)
    search = make_search(study)
    Cluster(study, search).start()
    report = TrialReport("user_error", "no space left")
    search.on_report("ray-0", report)
    search.on_trial_complete("ray-0", {"report": report})
    assert search.stop_reason == f"no space left; then {RESUME_HINT}"
    assert search.on_report("ray-7", TrialReport("running"))  # all others stop too, and resume at the next start
    assert is_finished(search.suggest("ray-1"))
    assert TrialState.RUNNING in {trial.state for trial in trials_of(study)}


def test_search_tolerates_a_short_outage_of_the_stage_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, now = make_study(tmp_path), [0.0]
    search = make_search(study)
    monkeypatch.setattr("crowdray.tune.search.time.monotonic", lambda: now[0])

    def fail(*_: object) -> None:
        raise UserError("cannot list s3://bucket/stages: no route") from ConnectionError()

    with monkeypatch.context() as outage:
        outage.setattr(StageStore, "stored", fail)
        for _ in range(2):
            now[0] += OUTAGE_S / 2
            assert search.suggest("ray-0") is None and search.stop_reason is None
    assert isinstance(search.suggest("ray-0"), dict)
    now[0] += 10 * OUTAGE_S  # the cache was not asked meanwhile
    with monkeypatch.context() as outage:
        outage.setattr(StageStore, "stored", fail)
        assert search.suggest("ray-1") is None and search.stop_reason is None
        now[0] += 1.1 * OUTAGE_S
        assert is_finished(search.suggest("ray-1")) and "no route" in str(search.stop_reason)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_suggest_lists_the_stage_cache_once_however_many_trials_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    search = make_search(make_study(tmp_path, sampler=sampler), max_concurrent=4, num_trials=64)
    listings: list[str] = []
    find_files = storage.find_files

    def counted(uri: str) -> list[storage.FileInfo]:
        listings.append(uri)
        return find_files(uri)

    monkeypatch.setattr(storage, "find_files", counted)
    while isinstance(search.suggest(f"ray-{len(listings)}"), dict):
        listings.clear()
    assert len(listings) == 1


def test_final_state_of_the_best_trial_is_touched_whenever_a_trial_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, touched = make_study(tmp_path, prune=False), list[tuple[StageKey, int]]()
    monkeypatch.setattr(StageStore, "touch", lambda _, *state: touched.append(state))
    best = min(Cluster(study, make_search(study, num_trials=3)).run().started, key=lambda s: (mae_of(s), s.number))
    touched.clear()
    assert Cluster(study, make_search(study, num_trials=4)).start()
    assert touched == [(best.keys[-1], best.keys[-1].epochs)]


def test_infeasible_start_configuration_stops_the_search(tmp_path: Path) -> None:
    study, report = make_study(tmp_path), TrialReport("infeasible", "too large")
    search = make_search(study, num_trials=3)
    cluster = Cluster(study, search)
    while search.stop_reason is None:
        assert cluster.start()
        search.on_report(f"ray-{len(cluster.started) - 1}", report)
        search.on_trial_complete(f"ray-{len(cluster.started) - 1}", {"report": report})
    assert search.stop_reason.startswith("too large. No trial has finished yet")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), StorageInternalError("No space left")])
def test_failed_write_of_the_record_stops_the_search_and_loses_no_trial(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: object) -> None:
        raise error

    study = make_study(tmp_path, prune=False)
    search = make_search(study, num_trials=3)
    cluster = Cluster(study, search)
    cluster.start()
    with monkeypatch.context() as patched:
        patched.setattr(optuna.Trial, "set_user_attr", full)
        assert search.on_report("ray-0", next(cluster.running["ray-0"]))
        search.on_trial_complete("ray-0", {"report": TrialReport("finished")})
    assert search.stop_reason and "No space left" in search.stop_reason
    again = make_search(study, num_trials=3)
    with monkeypatch.context() as patched:
        patched.setattr(StageStore, "find", full)
        assert is_finished(again.suggest("ray-0")) and again.stop_reason
    Cluster(study, make_search(study, num_trials=3)).run()
    assert [trial.state for trial in trials_of(study)] == [TrialState.COMPLETE] * 3


def test_optuna_receives_both_of_two_objectives(tmp_path: Path) -> None:
    study = make_study(tmp_path, objectives="mae+rmse")
    Cluster(study, make_search(study, num_trials=3)).run()
    assert all(trial.values[1] == 9.0 and trial.state == TrialState.COMPLETE for trial in trials_of(study))
