"""Train a run on a Ray cluster: start workers, restart lost ones, track, publish."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from crowdray import storage
from crowdray.cluster.runtime import (
    MAX_RETRIES,
    START_LIMIT_S,
    Resources,
    choose_gpu,
    connect,
    deletion_warning,
    run_in_thread,
    wait_for_workers,
)
from crowdray.config import Device
from crowdray.data.shards import Dataset
from crowdray.data.splits import split_rows
from crowdray.pipeline.outcome import Outcome
from crowdray.pipeline.publish import open_run, publish_run
from crowdray.pipeline.run import Run, remove_checkpoints
from crowdray.pipeline.run_log import RunLog
from crowdray.registry.metrics import metric_rows
from crowdray.registry.tracking import Tracker, finish_on_exit
from crowdray.stage_cache.session import StageCacheConfig
from crowdray.storage.lock import Lock
from crowdray.training.checkpoint import EpochMetrics
from crowdray.training.result import describe_workers
from crowdray.training.state import StepProgress, ignore_step

ELASTIC_RETRIES = 100
"""Restarts of an elastic group, for which losing workers is normal."""

RESIZE_CHECK_S = 60.0
"""Seconds between two checks whether the cluster has capacity for another number of workers."""

_GROUP_START_TIMEOUT = "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"
_GROUP_START_TIMEOUT_S, _ELASTIC_START_TIMEOUT_S = 60, 5
"""Seconds after which Ray Train tries again to start a group of workers: by default, and where fewer workers suffice,
since 60 would pass after each loss of a node, which Ray notices only within 20."""

HistoryCallback = Callable[[Sequence[EpochMetrics]], None]
"""Receives the whole history of a run after each epoch."""
StepCallback = Callable[[StepProgress], None]


class TrainingCallback(Protocol):
    """Progress of a training job, for a display."""

    def on_status(self, text: str, /) -> None:
        """The job starts another step."""
        ...

    def on_history(self, history: Sequence[EpochMetrics], /) -> None:
        """An epoch ended; `history` holds all epochs so far."""
        ...

    def on_step(self, step: StepProgress, /) -> None:
        """Training or an evaluation progressed; called at most twice a second."""
        ...


def train(
    run: Run,
    callback: TrainingCallback,
    *,
    tracking_uri: str | None,
    stage_cache: StageCacheConfig,
    device: Device = "auto",
) -> Outcome:
    """Train, track, package and register a run, or resume it; a finished run returns its recorded outcome.

    Raises:
        UserError, DivergedError, TrainingStopped: As `run_training`.
    """
    identity = run.identity
    dataset = Dataset.open(identity.data)
    split_rows(identity.config, dataset, identity.max_workers)  # fails before any folder is created
    if storage.exists(run.outcome):
        run.create_or_verify()
        if outcome := Outcome.of_finished(run, tracking_uri):
            callback.on_status(f"run {run.uri} is already finished; showing its results")
            remove_checkpoints(run.uri)  # of a start that was killed at its very end
            return outcome
    if warning := deletion_warning(run.uri):
        callback.on_status(warning)
    fix = "wait for it, or give another --name"
    with Lock(storage.join(run.uri, "driver"), f"the run {run.uri}", fix, callback.on_status):
        run.create_or_verify()
        with RunLog(run.uri) as log:
            logged = _Logged(callback, log)
            return _train_and_publish(run, logged, dataset.index.name, tracking_uri, stage_cache, device)


@dataclass(frozen=True)
class _Logged:
    """Progress for a display and for the log of the run."""

    callback: TrainingCallback
    log: RunLog

    def on_status(self, text: str, /) -> None:
        """The job starts another step."""
        self.log.write(text)
        self.callback.on_status(text)

    def on_history(self, history: Sequence[EpochMetrics], /) -> None:
        """An epoch ended."""
        self.log.write_epoch(history[-1])
        self.callback.on_history(history)

    def on_step(self, step: StepProgress, /) -> None:
        """Training or an evaluation progressed, which the log does not record."""
        self.callback.on_step(step)


def _train_and_publish(
    run: Run,
    callback: TrainingCallback,
    dataset: str,
    tracking_uri: str | None,
    stage_cache: StageCacheConfig,
    device: Device,
) -> Outcome:
    identity = run.identity
    with finish_on_exit(open_run(identity, dataset, tracking_uri)) as tracker:
        if not run.is_trained:
            callback.on_status("starting Ray")
            with connect() as resources:
                most = identity.max_workers
                workers = "1 worker" if most == 1 else f"{most} workers"
                callback.on_status(f"starting {f'{identity.min_workers} to ' * identity.is_elastic}{workers}")
                per_worker = {"CPU": 1, "GPU": int(choose_gpu(resources, identity.min_workers, device))}
                wait_for_workers(resources, identity.min_workers, per_worker, callback.on_status)
                callback.on_status("loading the libraries, the dataset and the network")
                on_history = _tracked(callback, tracker)
                run_training(
                    run,
                    resources,
                    device=device,
                    stage_cache=stage_cache,
                    on_history=on_history,
                    on_step=callback.on_step,
                )
        callback.on_status("packaging and registering the model")
        return publish_run(run, tracker, tracking_uri)


def _tracked(callback: TrainingCallback, tracker: Tracker) -> HistoryCallback:
    def on_history(history: Sequence[EpochMetrics]) -> None:
        callback.on_history(history)
        tracker.sync_history(metric_rows(history))
        last = {row["stage"]: row["epoch"] for row in history}
        stages = ", ".join(f"{stage} to epoch {epoch}" for stage, epoch in last.items())
        tracker.set_tags({"crowdray.stages": stages, "crowdray.workers": describe_workers(history)})

    return on_history


def run_training(
    run: Run,
    resources: Resources,
    *,
    stage_cache: StageCacheConfig,
    device: Device = "auto",
    on_history: HistoryCallback = lambda history: None,
    on_step: StepCallback | None = None,
) -> None:
    """Train a run to its end inside a connected Ray cluster; `run.trained` then holds the result.

    Resumes from the last checkpoint in the run's folder, else from the longest prefix in the stage cache. The states
    of a trial (`run.study_file`) go to the stage cache alone, and its end is not evaluated.

    Raises:
        UserError: A problem that the user can fix.
        DivergedError: The loss is not finite.
        TrainingStopped: Workers were lost more often than they are restarted.
    """
    import ray
    from ray.exceptions import RayError
    from ray.util.queue import Queue
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from crowdray.cluster.failures import translated_error

    use_gpu = choose_gpu(resources, run.identity.min_workers, device)
    # On the driver's node: an actor without demands may be placed on a node that has just died, and never start.
    driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    rows: Any = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": driver_node})
    trainer = _torch_trainer(run, rows, stage_cache, use_gpu, local=resources.local, steps=on_step is not None)

    def fit() -> None:
        try:
            trainer.fit()
        finally:
            with suppress(RayError):  # the cluster itself may be lost
                if ray.is_initialized():
                    rows.put(None)

    thread, errors = run_in_thread(fit)
    try:
        _read_rows(rows, on_history, on_step or ignore_step)
    except RayError as error:
        errors.append(error)
    thread.join()
    if errors:
        raise translated_error(errors[0], run) from errors[0]
    ray.kill(rows.actor)


def _torch_trainer(
    run: Run, rows: Any, stage_cache: StageCacheConfig, use_gpu: bool, *, local: bool, steps: bool
) -> Any:
    from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from crowdray.cluster.callbacks import ReportCallback
    from crowdray.cluster.worker import WorkerTask, train_worker

    identity = run.identity
    if identity.is_elastic:
        os.environ.setdefault(_GROUP_START_TIMEOUT, str(_ELASTIC_START_TIMEOUT_S))
    start_timeout_s = float(os.environ.get(_GROUP_START_TIMEOUT, _GROUP_START_TIMEOUT_S))
    path, filesystem = _ray_storage(identity.storage)
    # The workers of a trial reserve what the search counted per trial.
    per_worker = {"CPU": float(identity.config.numerics.threads), "GPU": float(use_gpu)} if run.study_file else None
    return TorchTrainer(
        train_worker,
        train_loop_config={"task": WorkerTask(run, run.repair(), stage_cache, rows if steps else None)},
        scaling_config=ScalingConfig(  # type: ignore[call-arg]
            num_workers=identity.workers,  # type: ignore[arg-type]
            use_gpu=use_gpu,
            resources_per_worker=per_worker,
            elastic_resize_monitor_interval_s=RESIZE_CHECK_S,
        ),
        run_config=RunConfig(
            name=identity.name,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=ELASTIC_RETRIES if identity.is_elastic else MAX_RETRIES,
                controller_failure_limit=int(START_LIMIT_S[local] / start_timeout_s),
            ),
            checkpoint_config=CheckpointConfig(num_to_keep=2),
            callbacks=[ReportCallback(rows)],  # type: ignore[list-item]
        ),
    )


def _read_rows(queue: Any, on_history: HistoryCallback, on_step: StepCallback) -> None:
    """Pass on progress and reported rows until None arrives; a repeated epoch replaces its earlier row."""
    history: list[EpochMetrics] = []
    while (rows := queue.get()) is not None:
        if isinstance(rows, StepProgress):
            on_step(rows)
            continue
        history = [row for row in history if row["epoch"] < rows[0]["epoch"]] + rows
        on_history(history)


def _ray_storage(uri: str) -> tuple[str, Any]:
    """Path and file system for Ray: local paths as they are, which Ray would parse, everything else through fsspec."""
    import pyarrow.fs

    if storage.is_local(uri):
        return storage.resolve(uri), pyarrow.fs.LocalFileSystem()
    filesystem, path = storage.filesystem(uri)
    return path, pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(filesystem))
