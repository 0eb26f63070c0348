"""The driver of a study: sample with Optuna, run trials on Ray Tune, publish the best one."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Protocol

from crowdray import storage
from crowdray.cluster.runtime import (
    MAX_RETRIES,
    Resources,
    choose_gpu,
    connect,
    deletion_warning,
    run_in_thread,
    wait_for_workers,
)
from crowdray.cluster.train import run_training
from crowdray.config import Config, Device
from crowdray.data.shards import Dataset
from crowdray.data.splits import split_rows
from crowdray.errors import JobFailed, UserError
from crowdray.pipeline.outcome import Outcome
from crowdray.pipeline.publish import open_run, publish_run
from crowdray.registry.metrics import BEST_VAL_MAE
from crowdray.registry.tracking import Tracker, finish_on_exit
from crowdray.stage_cache.keys import numerics_facts
from crowdray.stage_cache.session import StageCacheConfig
from crowdray.storage.lock import Lock
from crowdray.training.checkpoint import EpochMetrics
from crowdray.training.state import StepProgress
from crowdray.tune.figures import draw_importance, draw_optimization, draw_slices
from crowdray.tune.importance import importance_intervals, importances
from crowdray.tune.optuna_study import open_optuna_storage, open_optuna_study
from crowdray.tune.record import StudyOutcome, StudyRecord, TrialRecord
from crowdray.tune.stage_tree import draw_stage_tree
from crowdray.tune.study import Study
from crowdray.tune.trial_tracker import TrialTracker, cost_metrics

if TYPE_CHECKING:
    from crowdray.tune.search import StageTreeSearch
    from crowdray.tune.trial import TrialTask

_TUNE_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # Optuna and MLflow have these records
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class StudyFailed(JobFailed):
    """No trial of a study finished."""


class StudyCallback(Protocol):
    """Progress of a study, for a display."""

    def on_status(self, text: str, /) -> None:
        """The job starts another step."""
        ...

    def on_record(self, record: StudyRecord, /) -> None:
        """A trial started, reported or ended."""
        ...

    def on_step(self, step: StepProgress, /) -> None:
        """The evaluation of the best trial progressed; called at most twice a second."""
        ...


def tune(
    study: Study,
    callback: StudyCallback,
    *,
    trials: int,
    concurrent: int | None,
    tracking_uri: str | None,
    stage_cache: StageCacheConfig,
    device: Device = "auto",
) -> StudyOutcome:
    """Search until there are `trials` trials, resuming an earlier start, and publish the best one.

    Args:
        study: What to search.
        callback: Receives the progress.
        trials: Trials in total, including those of earlier starts.
        concurrent: Most trials that run at once; None for as many as fit.
        tracking_uri: Where MLflow tracks the study; None for nowhere.
        stage_cache: Where trials share the states of their stages.
        device: Where trials train.

    Raises:
        UserError: A problem that the user can fix.
        StudyFailed: No trial finished.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in _TUNE_SETTINGS.items()})
    for option, value in (("--trials", trials), ("--concurrent", concurrent)):
        if value is not None and value < 1:
            raise UserError(f"{option} is {value}; give at least 1")
    dataset = Dataset.open(study.identity.data)
    first = study.space.configure(study.config, study.space.nearest(study.config))
    split_rows(first, dataset, study.identity.max_workers)  # fails before any folder is created
    study.create_or_verify()
    if warning := deletion_warning(study.uri):
        callback.on_status(warning)
    lengths = {stage: study.space.stage_lengths(stage) for stage in ("baseline", "decoders", "joint")}
    driver = _Driver(
        study, callback, dataset.index.name, tracking_uri, replace(stage_cache, snapshot_epochs=lengths), device
    )
    with Lock(
        storage.join(study.uri, "driver"),
        f"the study {study.uri}",
        "wait for it, or give another --name",
        on_status=callback.on_status,
    ) as lock:
        return driver.run(trials, concurrent, lock)


@dataclass(frozen=True)
class _Driver:
    """The steps of `tune`, and what they have in common."""

    study: Study
    callback: StudyCallback
    dataset: str
    """Name of the dataset."""
    tracking_uri: str | None
    stage_cache: StageCacheConfig
    device: Device

    def run(self, trials: int, concurrent: int | None, lock: Lock) -> StudyOutcome:
        """Search, publish the best trial, and draw the figures."""
        study, identity = self.study, self.study.identity
        space = study.space.to_json()
        note = f"Search with {len(study.space.dimensions)} varied fields, minimizing {' and '.join(study.objectives)},"
        with finish_on_exit(open_run(identity, self.dataset, self.tracking_uri, space=space, note=note)) as tracker:
            opened = open_optuna_storage(study)
            trial_tracker = TrialTracker(
                study,
                open_optuna_study(study, opened),
                self.callback.on_record,
                dataset=self.dataset,
                tracking_uri=self.tracking_uri,
                parent=tracker.run_id,
            )
            # Ray frees the workers of a stopped trial's own group through its dashboard.
            with trial_tracker, connect(dashboard=identity.max_workers > 1) as resources:
                from crowdray.tune.search import StageTreeSearch  # imports Ray, which `connect` has configured
                from crowdray.tune.trial import TrialTask

                slots, use_gpu = trial_slots(study, resources, min(concurrent or trials, trials), self.device)
                per_worker = {"CPU": study.config.numerics.threads, "GPU": int(use_gpu)}
                wait_for_workers(resources, identity.max_workers, per_worker, self.callback.on_status)
                at_once = "1 trial" if slots == 1 else f"{slots} trials"
                self.callback.on_status(f"searching: {at_once} at once, {trials} in total")
                search = StageTreeSearch(
                    study,
                    trial_tracker,
                    opened,
                    max_concurrent=slots,
                    num_trials=trials,
                    store=self.stage_cache.open(),
                    numerics=_trial_numerics(study.config, use_gpu),
                    lock_is_lost=lambda: not lock.held,
                )
                task = TrialTask(study, resources, self.device, use_gpu, self.stage_cache)
                _run_trials(study, search, task)
                best = _best(trial_tracker.record, study)
                self.callback.on_status(
                    f"trial {best.number} is the best: evaluating it on the test split, registering it"
                )
                outcome = self.publish(best, trial_tracker, resources)
            self.callback.on_status("drawing figures")
            figures = _draw(trial_tracker.record, study, tracker)
            return StudyOutcome(study.uri, trial_tracker.record, best.number, outcome, figures, tracker.url)

    def publish(self, best: TrialRecord, trial_tracker: TrialTracker, resources: Resources) -> Outcome:
        """Evaluate the best trial on the test split, package and register it under its own MLflow run."""
        config = self.study.space.configure(self.study.config, best.values)
        run = self.study.run_of(best.number, config)
        run.create_or_verify()
        if outcome := Outcome.of_finished(run, self.tracking_uri):
            return outcome
        if not run.is_trained:
            evicted = f"the state of trial {best.number} was evicted: training epoch"

            def on_history(history: Sequence[EpochMetrics]) -> None:  # not called if the cache holds the final state
                self.callback.on_status(f"{evicted} {len(history)} again")

            run_training(
                run,
                resources,
                device=self.device,
                stage_cache=self.stage_cache,
                on_history=on_history,
                on_step=self.callback.on_step,
            )
        with finish_on_exit(trial_tracker.open_run(best.number, config)) as tracker:
            return publish_run(run, tracker, self.tracking_uri)


def trial_slots(study: Study, resources: Resources, concurrent: int | None, device: Device) -> tuple[int, bool]:
    """How many trials run at once, and whether each of their workers gets a GPU.

    Raises:
        UserError: Not even one trial fits; it would wait forever.
    """
    workers, threads = study.identity.max_workers, study.config.numerics.threads
    use_gpu = choose_gpu(resources, workers, device)
    nodes = resources.node_cpus or (resources.cpus,)
    slots = max(sum(cpus // threads for cpus in group) for group in (nodes, resources.max_node_cpus)) // workers
    if slots == 0:
        cpus = " and ".join(str(cpus) for cpus in max(nodes, resources.max_node_cpus, key=sum))
        raise UserError(
            f"a trial needs {workers} times {threads} CPUs, each {threads} on one node, and the nodes have {cpus}: "
            "lower --workers or --numerics.threads"
        )
    if use_gpu:
        slots = min(slots, resources.gpus // workers)
    return min(slots, concurrent or slots), use_gpu


def _trial_numerics(config: Config, use_gpu: bool) -> dict[str, str | int]:
    """How a trial's process computes, asked in a process with its resources."""
    import ray

    from crowdray.cluster.single import single_device

    def numerics() -> dict[str, str | int]:
        return numerics_facts(config, single_device(use_gpu), config.numerics.threads)

    result = ray.remote(numerics).options(num_cpus=1, num_gpus=int(use_gpu)).remote()
    found: dict[str, str | int] = ray.get(result)
    return found


def _run_trials(study: Study, search: "StageTreeSearch", task: "TrialTask") -> None:
    """Run the trials that the search suggests until it ends."""
    from pyarrow.fs import LocalFileSystem
    from ray import tune as ray_tune

    from crowdray.tune.search import StudyScheduler
    from crowdray.tune.trial import run_trial

    single = study.identity.max_workers == 1
    resources = {"CPU": float(study.config.numerics.threads), "GPU": float(task.use_gpu)}
    if not single:  # its workers reserve their own; the trial itself only waits for them
        resources = {"memory": 1.0}
    # Tune's thread may still write there after an interrupt.
    with storage.scratch_folder("tune") as scratch:
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(partial(run_trial, task), resources),
            tune_config=ray_tune.TuneConfig(
                search_alg=search,
                scheduler=StudyScheduler(search),
                num_samples=-1,
                reuse_actors=single,  # the next trial finds torch imported
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=ray_tune.RunConfig(
                name=study.identity.name,
                storage_path=str(scratch),
                storage_filesystem=LocalFileSystem(),
                failure_config=ray_tune.FailureConfig(max_failures=MAX_RETRIES),
                verbose=0,
            ),
        )
        thread, errors = run_in_thread(tuner.fit)
        while thread.is_alive():
            thread.join(timeout=0.5)
    if search.stop_reason is not None:
        raise UserError(search.stop_reason)
    if errors:
        raise errors[0]


def _best(record: StudyRecord, study: Study) -> TrialRecord:
    best = record.best()
    if best is None:
        reasons = sorted({trial.reason for trial in record.trials if trial.reason})
        raise StudyFailed(f"no trial of {study.uri} finished: " + ("; ".join(reasons) or "all were stopped"))
    return best


def _draw(record: StudyRecord, study: Study, tracker: Tracker) -> tuple[str, ...]:
    """Draw the search, and store its record next to the figures."""
    uris = []
    with storage.scratch_folder("figures") as folder:
        names = ("optimization", "importance", "slices", "stage-tree")
        paths = [folder / f"{name}.png" for name in names]
        draw_optimization(record, paths[0])
        draw_importance(record, importances(record), paths[1], importance_intervals(record))
        draw_slices(record, paths[2])
        draw_stage_tree(record, paths[3])
        for path in paths:
            tracker.log_file(path, "figures")
            uris.append(storage.join(study.uri, path.name))
            storage.publish_file(path, uris[-1])
    storage.write_bytes(storage.join(study.uri, "record.json"), record.to_json().encode())
    best = record.best()
    if best is not None and best.mae is not None:
        tracker.log_summary({BEST_VAL_MAE: best.mae} | cost_metrics(record), len(record.trials))
        states = Counter(trial.state for trial in record.trials)
        counts = ", ".join(f"{count} {state}" for state, count in states.items())
        tracker.set_tags({"crowdray.trials": counts, "crowdray.best_trial": str(best.number)})
    return tuple(uris)
