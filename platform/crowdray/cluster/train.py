"""The driver of a training: tracked, fed by workers under Ray Train of which killed ones come back, and
shipped."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from crowdray import storage
from crowdray.cluster.runtime import PACKAGE, Resources, choose_gpu, connect, deletion_warning, run_in_thread
from crowdray.config import Device
from crowdray.console.progress import TrainingDisplay
from crowdray.data.shards import Dataset
from crowdray.data.splits import split_rows
from crowdray.errors import InfeasibleConfigError, JobFailed, UserError
from crowdray.pipeline.outcome import Outcome
from crowdray.pipeline.publish import metric_rows, publish_run
from crowdray.pipeline.run import RESULT, Run
from crowdray.registry.provenance import git_revision
from crowdray.registry.tracking import DATA_DIGEST, DATASET_URI, GIT_REVISION, Tracker, finish_on_exit, open_tracker
from crowdray.stage_cache.session import StageCacheConfig
from crowdray.training.checkpoint import EpochMetrics
from crowdray.training.errors import DivergedError, is_out_of_memory
from crowdray.training.result import describe_workers

RETRIES = 3
"""Times that a group of workers is started again after one of them was lost."""

ELASTIC_RETRIES = 100
"""The same for a group that follows the cluster, where losing some is nothing unusual."""

LOOK_S = 60.0
"""Seconds between two looks at whether the cluster has room for another number of workers."""

_ROOM_S = "5"
"""Seconds that Ray Train waits for the room that it believes to be there, where fewer workers do too; its own 60 pass
after each loss of a node, of which it hears only within 20."""

Follow = Callable[[Sequence[EpochMetrics]], None]
"""Told the whole history of a training after each of its epochs."""


class TrainingStopped(JobFailed):
    """Workers were lost more often than they are brought back, or the cluster was; the same command goes on
    where they stopped."""


def train(
    run: Run,
    display: TrainingDisplay,
    *,
    tracking_uri: str | None,
    stage_cache: StageCacheConfig,
    device: Device = "auto",
) -> Outcome:
    """Train, track, package and register a run, from wherever an earlier start of it stopped; returns what
    came out.

    A run that has ended already gives what it gave then. Raises as `run_training` does.
    """
    dataset = Dataset.open(run.data)
    split_rows(run.config, dataset, run.most)  # what is wrong with that is told now, and leaves no folder
    run.claim()
    if outcome := Outcome.of_finished(run, tracking_uri):
        display.status(f"run {run.uri} is already finished; showing its results")
        return outcome
    if warning := deletion_warning(run.uri):
        display.status(warning)
    with finish_on_exit(open_tracker(tracking_uri, f"crowdray-{dataset.index.name}", run.name, run.uri)) as tracker:
        tags = {DATA_DIGEST: run.digest, DATASET_URI: run.data, GIT_REVISION: git_revision(PACKAGE)}
        tracker.log_config(asdict(run.config), tags)
        tracker.log_dataset(dataset.index.name, run.data, run.digest)
        if not storage.exists(storage.join(run.trained, RESULT)):
            display.status("starting Ray")
            with connect() as resources:
                number = f"{run.fewest} to {run.most}" if run.elastic else run.most
                display.status(f"starting {number} workers")
                run_training(run, resources, device=device, stage_cache=stage_cache, follow=_follower(display, tracker))
        display.status("packaging and registering the counter")
        outcome = publish_run(run, tracker, tracking_uri, tags)
        storage.write_bytes(run.outcome, outcome.to_json().encode())
    return outcome


def _follower(display: TrainingDisplay, tracker: Tracker) -> Follow:
    def follow(history: Sequence[EpochMetrics]) -> None:
        display.history(history)
        tracker.sync_history(metric_rows(history))
        last = history[-1]
        marks = {f"crowdray.stage.{last['stage']}": f"up to epoch {last['epoch']:.0f}"}
        tracker.set_tags(marks | {"crowdray.workers": describe_workers(history)})

    return follow


def run_training(
    run: Run,
    resources: Resources,
    *,
    stage_cache: StageCacheConfig,
    device: Device = "auto",
    follow: Follow = lambda rows: None,
    study: str | None = None,
) -> None:
    """Train to the end inside a connected Ray cluster; afterwards `run.trained` holds the finished training.

    Goes on from the last checkpoint in the run's folder, else from the longest beginning on the shelf.

    study: for a trial of a study, the file that says what the study is; the trial's end lies on the shelf alone, and
    the test split is not looked at.

    Raises UserError for what the user can mend, DivergedError for a loss that is no number, and TrainingStopped when
    too many workers were lost.
    """
    import ray
    from ray.exceptions import RayError
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from crowdray.cluster.callbacks import ReportCallback
    from crowdray.cluster.worker import Task, train_worker

    use_gpu = choose_gpu(resources, run.fewest, device)
    if run.elastic:
        os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", _ROOM_S)
    path, filesystem = _for_ray(run.storage)
    # The driver's node: an actor without demands may land on one that has just died, and then never runs.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    rows: Any = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
    begun, scored = study or run.identity, study is None
    task = Task(
        run.config,
        run.data,
        run.digest,
        begun,
        run.uri,
        run.trained,
        run.mend(),
        stage_cache=stage_cache,
        scored=scored,
    )
    own = {"CPU": float(run.config.numerics.threads), "GPU": float(use_gpu)}  # what a trial's place was counted with
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"task": task},
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=run.workers,  # type: ignore[arg-type]
            use_gpu=use_gpu,
            resources_per_worker=None if scored else own,
            elastic_resize_monitor_interval_s=LOOK_S,
        ),
        run_config=RunConfig(
            name=run.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=ELASTIC_RETRIES if run.elastic else RETRIES),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=[ReportCallback(rows)],  # type: ignore[list-item]
        ),
    )

    def fit() -> None:
        try:
            trainer.fit()
        finally:
            with suppress(RayError):  # the cluster itself may be gone
                if ray.is_initialized():
                    rows.put(None)

    waiting, errors = run_in_thread(fit)
    try:
        _read(rows, follow)
    except RayError as error:
        errors.append(error)
    waiting.join()
    if errors:
        raise translated_errors(errors[0], run) from errors[0]
    ray.kill(rows.actor)


def _read(rows: Any, follow: Follow) -> None:
    """Hand on what arrives until None does; a repeated epoch takes the place of the one it repeats."""
    history: list[EpochMetrics] = []
    while (arrived := rows.get()) is not None:
        history = [row for row in history if row["epoch"] < arrived[0]["epoch"]] + arrived
        follow(history)


def _for_ray(uri: str) -> tuple[str, Any]:
    """A storage URI as path and file system for Ray: local paths are its own, everything else goes through
    fsspec."""
    if storage.is_local(uri):
        return uri, None
    import fsspec
    import pyarrow.fs

    filesystem, path = fsspec.core.url_to_fs(uri)
    return path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem))


def translated_errors(error: BaseException, run: Run) -> BaseException:
    """What Ray wrapped, if it is for the user or our own mistake; else what happened, in a sentence."""
    from crowdray.cluster.callbacks import is_worker_loss
    from crowdray.cluster.worker import GOES_ON

    causes: list[BaseException] = [error]
    for cause in causes:  # the list grows while it is read
        failures = [getattr(cause, "controller_failure", None), *getattr(cause, "worker_failures", {}).values()]
        causes += [failure for failure in failures if isinstance(failure, BaseException)]
    for cause in causes:
        if isinstance(cause, (UserError, DivergedError)):
            return cause
    deepest = causes[-1]
    if isinstance(deepest, PermissionError) and deepest.errno is None:  # a store's own words, about Ray's list
        return UserError(f"cannot write to {run.uri}: {deepest}; renew your credentials, {GOES_ON}")
    if is_out_of_memory(deepest):
        return InfeasibleConfigError(
            f"the training under {run.uri} does not fit into memory ({str(deepest).splitlines()[0]}); lower "
            "--sampling.batch, --sampling.crop or --sampling.gpu-cache-gib, or give fewer workers a node"
        )
    if not is_worker_loss(deepest):
        return deepest
    lines = [type(deepest).__name__, *filter(None, map(str.strip, str(deepest).splitlines()))]
    return TrainingStopped(
        f"the training under {run.uri} lost its workers or its cluster for good: {lines[-1]}. The same command goes on "
        "from its last checkpoint"
    )
