"""The driver of a study: Optuna proposes, Ray Tune runs the trials, the stage store trains each beginning once, and
the best trial is scored on the test split, stripped and registered."""

import os
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from crowdray import storage
from crowdray.cluster.runtime import PACKAGE, Resources, choose_gpu, connect, deletion_warning, run_in_thread
from crowdray.cluster.train import RETRIES, run_training
from crowdray.config import Device
from crowdray.console.study_display import StudyDisplay
from crowdray.data.shards import Dataset
from crowdray.data.splits import split_rows
from crowdray.errors import JobFailed, UserError
from crowdray.pipeline.outcome import Outcome
from crowdray.pipeline.publish import publish_run
from crowdray.pipeline.run import RESULT
from crowdray.registry.provenance import git_revision
from crowdray.registry.tracking import DATA_DIGEST, DATASET_URI, GIT_REVISION, Tracker, finish_on_exit, open_tracker
from crowdray.stage_cache.keys import numerics_facts
from crowdray.stage_cache.session import StageCacheConfig
from crowdray.storage.lease import LEASE_S, Keeper, Lease, take
from crowdray.training.checkpoint import EpochMetrics
from crowdray.tune.figures import draw_importance, draw_optimisation, draw_slices
from crowdray.tune.record import StudyRecord, TrialRecord, importances
from crowdray.tune.stage_tree import draw_stage_tree
from crowdray.tune.study import Study
from crowdray.tune.trial_tracker import TrialTracker

if TYPE_CHECKING:
    from crowdray.tune.search import StageTreeSearch
    from crowdray.tune.trial import TrialTask

_SETTINGS = {
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",  # what they would write lies in Optuna's and MLflow's record
    "TUNE_DISABLE_STRICT_METRIC_CHECKING": "1",  # only epochs of the joint stage are scored
    "TUNE_WARN_EXCESSIVE_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": "0",
    "RAY_AIR_NEW_OUTPUT": "0",
}


class StudyFailed(JobFailed):
    """No trial of a study came to its end."""


@dataclass(frozen=True)
class StudyOutcome:
    """What came out of a study, and where everything lies."""

    study: str
    """The study's folder."""
    record: StudyRecord
    """All trials."""
    best: int
    """Number of the best trial."""
    outcome: Outcome
    """The best trial, shipped."""
    figures: tuple[str, ...]
    """Pictures of the search."""


def tune(
    study: Study,
    display: StudyDisplay,
    *,
    trials: int,
    concurrent: int | None,
    tracking_uri: str | None,
    stage_cache: StageCacheConfig,
    device: Device = "auto",
) -> StudyOutcome:
    """Search until there are `trials` trials, from wherever an earlier start of the study stopped, and ship the best.

    concurrent: trials at once at most; None: as many as fit. Raises UserError for what the user can mend, and
    StudyFailed when no trial came to its end.
    """
    os.environ.update({name: os.environ.get(name, value) for name, value in _SETTINGS.items()})
    for option, value in (("--trials", trials), ("--concurrent", concurrent)):
        if value is not None and value < 1:
            raise UserError(f"{option} is {value}; give at least 1")
    dataset = Dataset.open(study.data)
    first = study.space.configure(study.config, study.space.nearest(study.config))
    split_rows(first, dataset, study.workers)  # what is wrong with that is told now, and leaves no folder
    study.claim()
    if warning := deletion_warning(study.uri):
        display.status(warning)
    tags = {DATA_DIGEST: study.digest, DATASET_URI: study.data, GIT_REVISION: git_revision(PACKAGE)}
    stage_cache = replace(
        stage_cache, quanta={stage: study.space.quanta(stage) for stage in ("baseline", "decoders", "joint")}
    )
    with (
        Keeper() as keeper,
        _alone(study, keeper, display) as driver,
        finish_on_exit(open_tracker(tracking_uri, f"crowdray-{dataset.index.name}", study.name, study.uri)) as tracker,
    ):
        tracker.log_config(asdict(study.config) | {"space": study.space.to_json()}, tags)
        tracker.log_dataset(dataset.index.name, study.data, study.digest)
        kept = TrialTracker(
            study,
            study.optuna_study(),
            display.show,
            dataset=dataset.index.name,
            tracking_uri=tracking_uri,
            parent=tracker.run_id,
            tags=tags,
        )
        # Ray frees the workers of a stopped trial's own group through its dashboard.
        with kept as book, connect(dashboard=study.workers > 1) as resources:
            places, use_gpu = places_of(study, resources, min(concurrent or trials, trials), device)
            search = _search_of(study, book, stage_cache, keeper, driver, places=places, trials=trials, use_gpu=use_gpu)
            display.status(f"searching: {places} trials at once, {trials} in all")
            _run_trials(study, search, _task_of(study, stage_cache, resources, device, use_gpu))
            best = _best(book.record, study)
            display.status(f"trial {best.number} is the best: scoring it on the test split, packaging, registering")
            outcome = _ship(study, book, best, resources, tracking_uri, stage_cache, device, tags, display)
        display.status("drawing")
        figures = _draw(book.record, study, tracker)
        return StudyOutcome(study.uri, book.record, best.number, outcome, figures)


@contextmanager
def _alone(study: Study, keeper: Keeper, display: StudyDisplay) -> Iterator[Lease]:
    """The right to be a study's only driver; one that was killed keeps it until its lease expires."""
    folder, end = storage.join(study.uri, "leases"), time.monotonic() + 1.5 * LEASE_S
    while (lease := take(folder, "driver", f"{socket.gethostname()}:{os.getpid()}")) is None:
        if time.monotonic() > end:
            raise UserError(f"another driver runs the study {study.uri}; wait for it, or give another --name")
        display.status(f"waiting for the driver of an earlier start, which died less than {LEASE_S:.0f} s ago or lives")
        time.sleep(5)
    keeper.add(lease)
    yield lease  # the keeper releases it


def places_of(study: Study, resources: Resources, concurrent: int | None, device: Device) -> tuple[int, bool]:
    """How many trials run at once, and whether their workers get a GPU each.

    Raises UserError in words where not even one trial fits, which would wait for ever.
    """
    use_gpu = choose_gpu(resources, study.workers, device)
    threads = study.config.numerics.threads
    nodes = resources.node_cpus or (resources.cpus,)
    fit = max(sum(cpus // threads for cpus in those) for those in (nodes, resources.max_node_cpus)) // study.workers
    if fit == 0:
        there = " and ".join(str(cpus) for cpus in max(nodes, resources.max_node_cpus, key=sum))
        raise UserError(
            f"a trial needs {study.workers} times {threads} CPUs, each {threads} on one node, and the nodes have "
            f"{there}: lower --workers or --numerics.threads"
        )
    if use_gpu:
        fit = min(fit, resources.gpus // study.workers)
    return min(fit, concurrent or fit), use_gpu


def _search_of(
    study: Study,
    book: TrialTracker,
    stage_cache: StageCacheConfig,
    keeper: Keeper,
    driver: Lease,
    *,
    places: int,
    trials: int,
    use_gpu: bool,
) -> "StageTreeSearch":
    from crowdray.tune.search import StageTreeSearch

    return StageTreeSearch(
        study,
        book,
        places=places,
        trials=trials,
        store=stage_cache.open(),
        keeper=keeper,
        numerics=_numerics(study, use_gpu),
        driver=driver,
    )


def _task_of(
    study: Study, stage_cache: StageCacheConfig, resources: Resources, device: Device, use_gpu: bool
) -> "TrialTask":
    from crowdray.tune.trial import TrialTask

    return TrialTask(
        data=study.data,
        digest=study.digest,
        storage=study.uri,
        begun=study.identity,
        workers=study.workers,
        resources=resources,
        device=device,
        use_gpu=use_gpu,
        stage_cache=stage_cache,
    )


def _run_trials(study: Study, search: "StageTreeSearch", task: "TrialTask") -> None:
    """Run what the search gives until it gives no more."""
    from ray import tune as ray_tune

    from crowdray.tune.search import StudyScheduler
    from crowdray.tune.trial import run_trial

    own = {"CPU": float(study.config.numerics.threads), "GPU": float(task.use_gpu)}
    if study.workers > 1:  # the workers have their own; a trial that only waits for them takes a byte of memory
        own = {"memory": 1.0}
    # Tune's thread may still write there after an interrupt.
    with tempfile.TemporaryDirectory(prefix="crowdray-tune-", ignore_cleanup_errors=True) as scratch:
        tuner = ray_tune.Tuner(
            ray_tune.with_resources(partial(run_trial, task), own),
            tune_config=ray_tune.TuneConfig(
                search_alg=search,
                scheduler=StudyScheduler(search),
                num_samples=-1,
                reuse_actors=study.workers == 1,  # the next trial finds torch imported
                trial_dirname_creator=lambda trial: str(trial.trial_id),
            ),
            run_config=ray_tune.RunConfig(
                name=study.name,
                storage_path=scratch,
                failure_config=ray_tune.FailureConfig(max_failures=RETRIES),
                verbose=0,
            ),
        )
        waiting, errors = run_in_thread(tuner.fit)
        while waiting.is_alive():
            waiting.join(timeout=0.5)
    if search.mistake is not None:
        raise UserError(search.mistake)
    if errors:
        raise errors[0]


def _numerics(study: Study, use_gpu: bool) -> dict[str, str | int]:
    """How a trial's process computes, asked where one would run."""
    import ray

    from crowdray.tune.trial import trial_device

    config = study.config

    def ask() -> dict[str, str | int]:
        return numerics_facts(config, trial_device(use_gpu), config.numerics.threads)

    asked = ray.remote(ask).options(num_cpus=1, num_gpus=int(use_gpu)).remote()
    found: dict[str, str | int] = ray.get(asked)
    return found


def _best(record: StudyRecord, study: Study) -> TrialRecord:
    best = record.best()
    if best is None:
        reasons = sorted({trial.reason for trial in record.trials if trial.reason})
        raise StudyFailed(f"no trial of {study.uri} came to its end: " + ("; ".join(reasons) or "all were stopped"))
    return best


def _ship(
    study: Study,
    book: TrialTracker,
    best: TrialRecord,
    resources: Resources,
    tracking_uri: str | None,
    stage_cache: StageCacheConfig,
    device: Device,
    tags: Mapping[str, str],
    display: StudyDisplay,
) -> Outcome:
    """Score the best trial on the test split, package and register it, under its own MLflow run."""
    config = study.space.configure(study.config, best.values)
    run = study.trial(best.number, config)
    run.claim()
    if outcome := Outcome.of_finished(run, tracking_uri):
        return outcome
    if not storage.exists(storage.join(run.trained, RESULT)):

        def follow(history: Sequence[EpochMetrics]) -> None:
            display.status(f"the state of trial {best.number} is gone: training it again, epoch {len(history)}")

        run_training(run, resources, device=device, stage_cache=stage_cache, follow=follow)
    with finish_on_exit(book.tracker(best.number, config)) as tracker:
        outcome = publish_run(run, tracker, tracking_uri, tags)
    storage.write_bytes(run.outcome, outcome.to_json().encode())
    return outcome


def _draw(record: StudyRecord, study: Study, tracker: Tracker) -> tuple[str, ...]:
    """Draw the search, and keep its record beside the pictures."""
    places = []
    with tempfile.TemporaryDirectory(prefix="crowdray-figures-") as folder:
        names = ("optimisation", "importance", "slices", "stage-tree")
        paths = [Path(folder) / f"{name}.png" for name in names]
        draw_optimisation(record, paths[0])
        draw_importance(record, importances(record), paths[1])
        draw_slices(record, paths[2])
        draw_stage_tree(record, paths[3])
        for path in paths:
            tracker.log_file(path, "figures")
            places.append(storage.join(study.uri, path.name))
            storage.publish_file(path, places[-1])
    storage.write_bytes(storage.join(study.uri, "record.json"), record.to_json().encode())
    best = record.best()
    if best is not None and best.mae is not None:
        costs = {"worker_seconds/spent": record.spent, "worker_seconds/saved": record.saved}
        tracker.log_summary({"best/val/mae": best.mae, "trials": float(len(record.trials))} | costs, len(record.trials))
    return tuple(places)
