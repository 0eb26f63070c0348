"""Laws of a search over the stage tree: nothing is trained twice, Optuna is told the truth, and nothing is lost."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
from optuna.exceptions import StorageInternalError
from optuna.trial import TrialState

from crowdray import storage
from crowdray.cluster.train import RETRIES
from crowdray.config import StagesConfig, from_json
from crowdray.errors import UserError
from crowdray.presets import preset
from crowdray.stage_cache.keys import StageKey
from crowdray.stage_cache.store import StageStore
from crowdray.storage.lease import Keeper, Lease, take
from crowdray.tune.search import PATIENCE_S, REFERENCE, StageTreeSearch, StudyScheduler
from crowdray.tune.space import default_space
from crowdray.tune.study import Study, drawn_trials
from crowdray.tune.trial_tracker import TrialTracker

NUMERICS: dict[str, str | int] = {"threads": 1}


def study_in(folder: Path, prune: bool = True, joint: int = 4, **change: Any) -> Study:
    config, lengths = preset("debug"), {"joint": joint}
    stages = {
        name: dataclasses.replace(stage, epochs=lengths.get(name, 4)) for name, stage in vars(config.stages).items()
    }
    config = dataclasses.replace(config, stages=StagesConfig(**stages))
    told: dict[str, Any] = {
        "objectives": ("mae",),
        "sampler": "tpe",
        "workers": 1,
        "data": "data",
        "digest": "d" * 64,
    } | change
    return Study(config, default_space(config), prune=prune, storage=str(folder), name="study", **told)


@pytest.fixture
def keeper() -> Iterator[Keeper]:
    with Keeper() as keeper:
        yield keeper


def search_of(
    study: Study, keeper: Keeper, *, places: int = 2, trials: int = 16, driver: Lease | None = None
) -> StageTreeSearch:
    store = StageStore(f"{study.uri}/stages", 2**30)
    book = TrialTracker(
        study, study.optuna_study(), lambda _: None, dataset="x", tracking_uri=None, parent=None, tags={}
    )
    return StageTreeSearch(
        study, book, places=places, trials=trials, store=store, keeper=keeper, numerics=NUMERICS, driver=driver
    )


def write_nothing(folder: Path) -> None:
    (folder / "state").write_text("nothing")


class Cluster:
    """Trains what a search starts, an epoch of every trial in turn, and counts what is trained."""

    def __init__(self, search: StageTreeSearch, store: StageStore, quanta: dict[str, tuple[int, ...]]) -> None:
        self.search, self.store, self.quanta = search, store, quanta
        self.trained: Counter[tuple[str, int]] = Counter()
        self.running: dict[str, Iterator[dict[str, Any]]] = {}
        self.order: list[dict[str, Any]] = []

    def error_of(self, told: dict[str, Any]) -> float:
        depth = from_json(told["config"], "the trial").loss.depth
        return 3 + abs(depth - 1)

    def train(self, name: str, told: dict[str, Any]) -> Iterator[dict[str, Any]]:
        chains: tuple[StageKey, ...] = told["chains"]
        found = self.store.find(chains)
        reached = [chain.key for chain in chains].index(found.chain) if found else -1
        rows: list[dict[str, Any]] = []
        curve: list[tuple[int, float]] = []
        for place, chain in enumerate(chains):
            last = place == len(chains) - 1
            start = chain.epochs if place < reached else found.epoch if found and place == reached else 0
            for epoch in range(1, chain.epochs + 1):
                rows.append({"stage": chain.stage, "epoch": len(rows) + 1})
                curve += [(epoch, self.error_of(told) + 1 / epoch)] * last
                if epoch <= start:
                    continue
                self.trained[chain.key, epoch] += 1
                if epoch == chain.epochs or epoch in self.quanta[chain.stage]:
                    self.store.publish(chain, epoch, write_nothing)
                yield self.report(name, rows, curve, told)
                curve = []
        yield self.report(name, rows, curve, told) | {"finished": True}

    def report(self, name: str, rows: list[Any], curve: list[Any], told: dict[str, Any]) -> dict[str, Any]:
        errors = {"mae": self.error_of(told), "rmse": 9.0} if rows[-1]["stage"] == "joint" else {}
        return {"attempt": name, "rows": list(rows), "curve": list(curve), "legs": [], **errors}

    def start(self) -> bool:
        """Start one more trial, if the search gives one."""
        name = f"ray-{len(self.order)}"
        told = self.search.suggest(name)
        if not isinstance(told, dict):
            return False
        self.order.append(told)
        self.running[name] = self.train(name, told)
        return True

    def step(self) -> None:
        """One epoch of each running trial."""
        for name, trial in list(self.running.items()):
            report = next(trial)
            if self.search.heard(name, report) or report.get("finished"):
                del self.running[name]
                self.search.on_trial_complete(name, report)

    def run(self) -> None:
        """Until the search has no more trials."""
        while True:
            while self.start():
                pass
            if not self.running:
                return
            self.step()


def cluster_of(study: Study, search: StageTreeSearch) -> Cluster:
    quanta = {stage: study.space.quanta(stage) for stage in ("baseline", "decoders", "joint")}
    return Cluster(search, StageStore(f"{study.uri}/stages", 2**30), quanta)


def test_no_epoch_of_any_chain_is_trained_twice(tmp_path: Path, keeper: Keeper) -> None:
    study = study_in(tmp_path, prune=False)
    cluster = cluster_of(study, search_of(study, keeper))
    cluster.run()
    told = drawn_trials(study.optuna_study())
    assert [trial.state for trial in told] == [TrialState.COMPLETE] * 16
    assert max(cluster.trained.values()) == 1
    wanted = {
        (chain.key, epoch) for told in cluster.order for chain in told["chains"] for epoch in range(1, chain.epochs + 1)
    }
    assert set(cluster.trained) == wanted
    assert len(wanted) < sum(chain.epochs for told in cluster.order for chain in told["chains"]) / 1.5


def test_the_longest_beginning_goes_first_and_shorter_ones_follow_on_its_way(tmp_path: Path, keeper: Keeper) -> None:
    study = study_in(tmp_path)
    cluster = cluster_of(study, search_of(study, keeper))
    assert cluster.start()
    first = from_json(cluster.order[0]["config"], "the first")
    longest = max(study.space.quanta("baseline"))
    assert first.stages.baseline.epochs == longest
    assert not cluster.start()  # all others wait for the same baseline
    shortest = min(study.space.quanta("baseline"))
    while not cluster.start():
        cluster.step()
    second = from_json(cluster.order[1]["config"], "the second")
    assert second.stages.baseline.epochs == shortest
    assert max(epoch for _, epoch in cluster.trained) == shortest


@pytest.mark.parametrize(("sampler", "drawn"), [("tpe", 10), ("random", 16)])
def test_trials_that_look_at_no_result_are_drawn_at_once(
    tmp_path: Path, keeper: Keeper, sampler: str, drawn: int
) -> None:
    study = study_in(tmp_path, sampler=sampler)
    search_of(study, keeper).suggest("ray-0")
    assert len(drawn_trials(study.optuna_study())) == drawn


def test_optuna_is_told_what_happened(tmp_path: Path, keeper: Keeper) -> None:
    study = study_in(tmp_path)
    cluster = cluster_of(study, search_of(study, keeper, trials=12))
    cluster.run()
    trials = drawn_trials(study.optuna_study())
    states = Counter(trial.state for trial in trials)
    assert states[TrialState.PRUNED] > 0 and states[TrialState.COMPLETE] > 1
    for trial in trials:
        length = from_json(
            next(t for t in cluster.order if t["name"] == f"trial-{trial.number:04d}")["config"], "x"
        ).stages
        if trial.state == TrialState.PRUNED:
            assert REFERENCE not in trial.user_attrs
            assert max(trial.intermediate_values) < length.joint.epochs
        else:
            assert trial.value is not None and trial.value < min(trial.intermediate_values.values(), default=99.0)


def test_poor_trials_stop_after_an_eighth_of_the_shortest_joint_stage_or_three_or_nine_times_that(
    tmp_path: Path, keeper: Keeper
) -> None:
    study = study_in(tmp_path, joint=32)
    assert min(study.space.quanta("joint")) == 16
    cluster_of(study, search_of(study, keeper, trials=24)).run()
    pruned = [trial for trial in drawn_trials(study.optuna_study()) if trial.state == TrialState.PRUNED]
    stopped = Counter(max(trial.intermediate_values) for trial in pruned)
    assert set(stopped) <= {2, 6, 18}
    assert stopped[2] > len(pruned) / 2


def test_trials_are_judged_at_equal_epochs_though_they_found_some_in_the_store(tmp_path: Path, keeper: Keeper) -> None:
    study = study_in(tmp_path)
    cluster = cluster_of(study, search_of(study, keeper, trials=14))
    cluster.run()
    for trial in drawn_trials(study.optuna_study()):
        assert sorted(trial.intermediate_values) == list(range(1, max(trial.intermediate_values) + 1))
        rungs = [value for name, value in trial.system_attrs.items() if name.startswith("completed_rung")]
        assert rungs and rungs[0] == trial.intermediate_values[1]  # references are judged too, for the others' sake


def test_a_trial_that_ends_without_a_finite_error_has_failed(tmp_path: Path, keeper: Keeper) -> None:
    study = study_in(tmp_path)
    search = search_of(study, keeper)
    cluster_of(study, search).start()
    end: dict[str, Any] = {"attempt": "a", "rows": [], "curve": [], "legs": [], "finished": True}
    search.heard("ray-0", end)
    search.on_trial_complete("ray-0", end)
    failed = [trial for trial in drawn_trials(study.optuna_study()) if trial.state == TrialState.FAIL]
    assert [trial.user_attrs["record"]["state"] for trial in failed] == ["failed"]


def test_a_driver_that_lost_its_study_stops(tmp_path: Path, keeper: Keeper) -> None:
    study = study_in(tmp_path)
    driver = take(f"{study.uri}/leases", "driver", "me")
    assert driver is not None
    search = search_of(study, keeper, driver=driver)
    cluster = cluster_of(study, search)
    cluster.start()
    driver.release()
    assert str(search.suggest("ray-1")) == "FINISHED"
    assert search.heard("ray-0", next(cluster.running["ray-0"]))
    assert search.mistake and "suspended" in search.mistake


def test_a_failed_trial_is_told_as_failed_and_the_search_goes_on(tmp_path: Path, keeper: Keeper) -> None:
    study = study_in(tmp_path)
    search = search_of(study, keeper, trials=3)
    cluster = cluster_of(study, search)
    cluster.start()
    search.on_trial_complete("ray-0", {"failed": "density nan"})
    cluster.running.clear()
    cluster.run()
    told = drawn_trials(study.optuna_study())
    failed = [trial for trial in told if trial.state == TrialState.FAIL]
    assert len(told) == 3 and len(failed) == 1 and failed[0].user_attrs["record"]["reason"] == "density nan"


def test_a_trial_that_dies_before_it_begins_is_started_again(tmp_path: Path, keeper: Keeper) -> None:
    """Tune gives up on a trial whose process is lost while it is pending."""
    study = study_in(tmp_path)
    search = search_of(study, keeper, trials=3)
    scheduler, cluster = StudyScheduler(search), cluster_of(study, search)
    for attempt in range(RETRIES + 1):
        cluster.start()
        dead = SimpleNamespace(trial_id=f"ray-{attempt}", status="PENDING", get_error=lambda: None)
        scheduler.on_trial_error(None, dead)
        search.on_trial_complete(dead.trial_id, error=True)
        states = [trial.state for trial in study.optuna_study().trials if trial.state != TrialState.WAITING]
        assert states.count(TrialState.FAIL) == (attempt == RETRIES)
    assert len({told["name"] for told in cluster.order}) == 1
    cluster.running.clear()
    cluster.run()
    assert len(drawn_trials(study.optuna_study())) == 3


def test_a_search_whose_driver_died_goes_on_under_the_same_numbers(tmp_path: Path) -> None:
    study = study_in(tmp_path, prune=False)
    with Keeper() as keeper:
        cluster = cluster_of(study, search_of(study, keeper))
        for _ in range(9):
            cluster.start()
            cluster.step()
        assert cluster.running
    before = {trial.number: trial.params for trial in drawn_trials(study.optuna_study())}
    with Keeper() as keeper:
        again = cluster_of(study, search_of(study, keeper))
        again.run()
    after = drawn_trials(study.optuna_study())
    assert [trial.state for trial in after] == [TrialState.COMPLETE] * 16
    assert {number: after[number].params for number in before} == before
    names = Counter(told["name"] for told in [*cluster.order, *again.order])
    assert {name for name, times in names.items() if times > 1} <= {told["name"] for told in cluster.order}
    assert len({str(sorted(trial.params.items())) for trial in after}) == 16  # no point is drawn again


def test_more_trials_continue_a_study(tmp_path: Path, keeper: Keeper) -> None:
    study = study_in(tmp_path, prune=False)
    cluster_of(study, search_of(study, keeper, trials=3)).run()
    cluster_of(study, search_of(study, keeper, trials=5)).run()
    cluster_of(study, search_of(study, keeper, trials=4)).run()  # fewer than there are: nothing to do
    told = drawn_trials(study.optuna_study())
    assert [trial.number for trial in told] == [0, 1, 2, 3, 4]
    assert sum(REFERENCE in trial.user_attrs for trial in told) == 2


def test_a_mistake_of_the_user_ends_the_search_and_its_trial_is_not_lost(tmp_path: Path, keeper: Keeper) -> None:
    study = study_in(tmp_path)
    search = search_of(study, keeper)
    cluster = cluster_of(study, search)
    cluster.start()
    search.heard("ray-0", {"mistake": "no space left"})
    search.on_trial_complete("ray-0", {"mistake": "no space left"})
    assert search.mistake and search.mistake.startswith("no space left. The same command goes on")
    assert search.heard("ray-7", {})  # whatever else runs stops, and goes on at the next start
    assert str(search.suggest("ray-1")) == "FINISHED"
    assert TrialState.RUNNING in {trial.state for trial in study.optuna_study().trials}


def test_a_store_that_is_out_of_reach_for_a_while_is_waited_for(
    tmp_path: Path, keeper: Keeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, now = study_in(tmp_path), [0.0]
    search = search_of(study, keeper)
    monkeypatch.setattr("crowdray.tune.search.time.monotonic", lambda: now[0])
    with monkeypatch.context() as outage:

        def fail(*_: object) -> None:
            raise UserError("cannot list s3://bucket/stages: no route") from ConnectionError()

        outage.setattr(StageStore, "stored", fail)
        assert search.suggest("ray-0") is None and search.mistake is None
        now[0] += PATIENCE_S / 2
        assert search.suggest("ray-0") is None and search.mistake is None
    assert isinstance(search.suggest("ray-0"), dict)
    now[0] += 10 * PATIENCE_S  # nothing was asked meanwhile
    with monkeypatch.context() as outage:
        outage.setattr(StageStore, "stored", fail)
        assert search.suggest("ray-1") is None and search.mistake is None
        now[0] += 1.1 * PATIENCE_S
        assert str(search.suggest("ray-1")) == "FINISHED" and "no route" in str(search.mistake)


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_a_question_costs_the_store_two_listings_however_many_trials_wait(
    tmp_path: Path, keeper: Keeper, monkeypatch: pytest.MonkeyPatch, sampler: str
) -> None:
    search = search_of(study_in(tmp_path, sampler=sampler), keeper, places=4, trials=64)
    listings: list[str] = []
    find_files = storage.find_files

    def listed(uri: str) -> list[storage.FileInfo]:
        listings.append(uri)
        return find_files(uri)

    monkeypatch.setattr(storage, "find_files", listed)
    while isinstance(search.suggest(f"ray-{len(listings)}"), dict):
        listings.clear()
    assert len(listings) == 2


def test_settings_that_no_trial_can_have_end_the_search(tmp_path: Path, keeper: Keeper) -> None:
    """What it starts from does not fit: nor would the others."""
    report, study = {"failed": "too large", "settings": True}, study_in(tmp_path)
    search = search_of(study, keeper, trials=3)
    cluster = cluster_of(study, search)
    while search.mistake is None:
        assert cluster.start()
        search.heard(f"ray-{len(cluster.order) - 1}", report)
        search.on_trial_complete(f"ray-{len(cluster.order) - 1}", report)
    assert search.mistake.startswith("too large. No trial has ended")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), StorageInternalError("No space left")])
def test_an_end_that_cannot_be_written_down_ends_the_search_and_no_trial(
    tmp_path: Path, keeper: Keeper, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def full(*_: object) -> None:
        raise error

    study = study_in(tmp_path, prune=False)
    search = search_of(study, keeper, trials=3)
    cluster = cluster_of(study, search)
    cluster.start()
    with monkeypatch.context() as patched:
        patched.setattr(optuna.Trial, "set_user_attr", full)
        assert search.heard("ray-0", next(cluster.running["ray-0"]))
        search.on_trial_complete("ray-0", {"finished": True})
    assert search.mistake and "No space left" in search.mistake
    again = search_of(study, keeper, trials=3)
    with monkeypatch.context() as patched:
        patched.setattr(StageStore, "find", full)
        assert str(again.suggest("ray-0")) == "FINISHED" and again.mistake
    cluster_of(study, search_of(study, keeper, trials=3)).run()
    assert [trial.state for trial in drawn_trials(study.optuna_study())] == [TrialState.COMPLETE] * 3


def test_two_objectives_are_both_told(tmp_path: Path, keeper: Keeper) -> None:
    study = study_in(tmp_path, objectives=("mae", "rmse"))
    cluster_of(study, search_of(study, keeper, trials=3)).run()
    told: list[optuna.trial.FrozenTrial] = drawn_trials(study.optuna_study())
    assert all(trial.values[1] == 9.0 and trial.state == TrialState.COMPLETE for trial in told)
