"""One worker of a training run: trains one rank and reports every epoch to Ray Train."""

import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import ray.train
import ray.train.torch
import torch

from crowdray import storage
from crowdray.cluster.runtime import node_resources
from crowdray.cluster.single import final_checkpoint
from crowdray.config import Config
from crowdray.credentials import redacted
from crowdray.errors import RESUME_HINT, UserError
from crowdray.pipeline.identity import open_verified
from crowdray.pipeline.run import RESULT, Run
from crowdray.pipeline.warm_start import read_init
from crowdray.stage_cache.session import StageCacheConfig, StageCacheSession
from crowdray.training.checkpoint import (
    STATE,
    Checkpoint,
    EpochMetrics,
    disk_full_as_user_error,
    load_checkpoint,
    save_checkpoint,
)
from crowdray.training.distributed import World
from crowdray.training.result import final_result
from crowdray.training.state import StepProgress
from crowdray.training.trainer import Trainer

ROWS = "rows"
"""Key of reported rows: the newest one, or the whole history in a worker's first report."""

PROGRESS_INTERVAL_S = 0.5
"""Seconds between two messages about the progress within an epoch."""

_RETRY = f"then {RESUME_HINT}"


@dataclass(frozen=True)
class WorkerTask:
    """What each worker receives from the driver."""

    run: Run
    resume: str | None
    """Folder of a checkpoint to resume from where Ray knows of none."""
    stage_cache: StageCacheConfig
    """Where runs share the states of their stages."""
    queue: Any = None
    """Queue to which rank 0 sends its progress within an epoch; None for nowhere."""


class ProgressSender:
    """Sends progress to the driver, at most twice a second, and waits for nothing."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue
        self._due = 0.0

    def __call__(self, step: StepProgress) -> None:
        """Send the progress, unless the last one was sent just before."""
        if (now := time.monotonic()) >= self._due:
            self._due = now + PROGRESS_INTERVAL_S
            self._queue.actor.put_nowait.remote(step)


def train_worker(loop_config: dict[str, Any]) -> None:
    """Train one rank, from the last checkpoint where there is one, and publish the result."""
    task: WorkerTask = loop_config["task"]
    try:
        _train(task)
    except Exception as error:
        # Ray passes on the exception without its traceback.
        error.add_note(redacted(traceback.format_exc()))
        error.__cause__ = error.__context__ = None  # Ray logs them, and they may quote a URI with credentials
        raise


def _train(task: WorkerTask) -> None:
    run, config = task.run, task.run.identity.config
    context = ray.train.get_context()
    threads = threads_of(config, context.get_local_world_size())
    torch.set_num_threads(threads)
    dataset, device = open_verified(run.identity, run.identity_file), ray.train.torch.get_device()
    world = World(context.get_world_rank(), context.get_world_size())
    session = StageCacheSession(task.stage_cache, config, dataset, world=world, device=device, threads=threads)
    own = _own_checkpoint(task)
    restored = session.restore() if own is None else session.resume_from(own)
    initial = read_init(run.identity.init_file) if restored is None else None
    trainer = Trainer(config, dataset, world=world, device=device, restored=restored, initial=initial)
    if task.queue is not None and world.rank == 0:
        trainer.state.on_step = ProgressSender(task.queue)
    first = True

    def report(row: EpochMetrics, save: Callable[[Path], None]) -> None:
        nonlocal first
        rows = list(trainer.state.progress.history) if first else [row]  # a copy: Ray serializes it later
        first = False
        with (
            disk_full_as_user_error(f"a checkpoint under {run.uri}", _RETRY),
            storage.scratch_folder("checkpoint") as folder,
        ):
            checkpoint = None
            if world.rank == 0:
                session.save(trainer, save)
                if not run.study_file:  # the states of a trial are in the stage cache alone
                    save(folder)
                    checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(
                {ROWS: rows},
                checkpoint=checkpoint,
                checkpoint_dir_name=f"checkpoint-{row['epoch']:05d}",
                checkpoint_upload_fn=partial(upload, run.uri),
            )

    trainer.fit(report)
    if run.study_file:
        if first:  # the stage cache held the final state
            ray.train.report({ROWS: list(trainer.state.progress.history)})
        return
    _publish(run, trainer)


def _publish(run: Run, trainer: Trainer) -> None:
    """Evaluate the finished run on all ranks, and publish its weights and result from rank 0."""
    result = final_result(trainer)
    if trainer.state.world.rank == 0 and not run.is_trained:
        with storage.scratch_folder("trained") as folder:
            save_checkpoint(final_checkpoint(trainer), folder)
            (folder / RESULT).write_text(result.to_json())
            storage.publish_directory(folder, run.trained, last=RESULT)


def upload(run: str, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
    """Publish a checkpoint in the run's folder, replacing what a killed epoch left there.

    Ray's own upload, through Arrow, does not report a failure of a file's last write.
    """
    uri = storage.join(run, name)
    try:
        storage.unpublish_directory(uri, last=STATE)
        storage.publish_directory(Path(checkpoint.path), uri, last=STATE)
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and storage.is_transient(error):
            raise cause from None  # worth a restart
        raise UserError(f"{error}; {_RETRY}") from error
    context = ray.train.get_context().get_storage()
    return ray.train.Checkpoint(f"{context.experiment_fs_path}/{name}", context.storage_filesystem)


def _own_checkpoint(task: WorkerTask) -> Checkpoint | None:
    """The checkpoint of this run to resume from."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with storage.local_copy(storage.join(task.run.uri, PurePosixPath(checkpoint.path).name)) as folder:
            return load_checkpoint(folder)
    return None if task.resume is None else load_checkpoint(Path(task.resume))


def threads_of(config: Config, workers_on_node: int) -> int:
    """CPU threads of this worker: as configured, else its fraction of Ray's CPUs on its node."""
    return config.numerics.threads or max(1, int(node_resources().get("CPU", 1)) // workers_on_node)
