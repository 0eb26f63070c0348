"""What runs inside each worker of a training: one rank of the loop, reporting to Ray Train after every
epoch."""

import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch

from crowdray import storage
from crowdray.config import Config
from crowdray.errors import UserError
from crowdray.pipeline.run import RESULT, open_as_begun
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
from crowdray.training.trainer import Trainer

ROWS = "rows"
"""Key of the reported rows: the newest one; the whole history at a worker's first report."""


GOES_ON = "then give the same command again: it goes on from the last whole checkpoint"


@dataclass(frozen=True)
class Task:
    """What each worker is told."""

    config: Config
    data: str
    """URI of the dataset."""
    digest: str
    """Its identity."""
    begun: str
    """File that the driver has written before."""
    run: str
    """URI of the run's folder."""
    trained: str
    """URI of the folder in which the finished training is published."""
    resume: str | None
    """Folder of a checkpoint to go on from where Ray knows of none."""
    stage_cache: StageCacheConfig
    """Where trainings leave their states for each other; what was never begun here begins there."""
    scored: bool
    """Whether the end is scored, on the test split too, and published."""


def train_worker(told: dict[str, Any]) -> None:
    """Train one rank, from the last checkpoint where there is one, and publish the end."""
    task: Task = told["task"]
    try:
        _train(task)
    except Exception as error:
        # Ray hands over the exception without its traceback.
        error.add_note(traceback.format_exc())
        raise


def _train(task: Task) -> None:
    context = ray.train.get_context()
    threads = threads_of(task.config, context.get_local_world_size())
    torch.set_num_threads(threads)
    dataset, device = open_as_begun(task.data, task.digest, task.begun), ray.train.torch.get_device()
    world = World(context.get_world_rank(), context.get_world_size())
    session = StageCacheSession(task.stage_cache, task.config, dataset, world=world, device=device, threads=threads)
    own = _own(task)
    restored = session.restore() if own is None else session.resume_from(own)
    training = Trainer(task.config, dataset, world=world, device=device, restored=restored)
    first = True

    def report(row: EpochMetrics, save: Callable[[Path], None]) -> None:
        nonlocal first
        rows = list(training.state.progress.history) if first else [row]  # a copy: Ray serialises it later
        first = False
        name = f"checkpoint-{row['epoch']:05d}"
        with (
            disk_full_as_user_error(f"a checkpoint under {task.run}", GOES_ON),
            tempfile.TemporaryDirectory(prefix="crowdray-checkpoint-") as folder,
        ):
            checkpoint = None
            if training.state.world.rank == 0:
                session.keep(training, save)
                if task.scored:  # a trial has its states on the shelf alone
                    save(Path(folder))
                    checkpoint = ray.train.Checkpoint.from_directory(folder)
            ray.train.report(
                {ROWS: rows},
                checkpoint=checkpoint,
                checkpoint_dir_name=name,
                checkpoint_upload_fn=partial(upload, task.run),
            )

    if not task.scored:  # a trial of a search, which has announced it
        training.fit(report)
        if first:  # all of it was found on the shelf
            ray.train.report({ROWS: list(training.state.progress.history)})
        return
    with session.advertise(task.run):
        training.fit(report)
    result = final_result(training)
    if training.state.world.rank == 0 and not storage.exists(storage.join(task.trained, RESULT)):
        with tempfile.TemporaryDirectory(prefix="crowdray-trained-") as folder:
            done = Checkpoint(
                task.config,
                training.state.progress,
                training.state.counter.state_dict(),
                best_weights=training.state.best_weights,
            )
            save_checkpoint(done, Path(folder))
            (Path(folder) / RESULT).write_text(result.to_json())
            storage.publish_directory(Path(folder), task.trained, last=RESULT)


def upload(run: str, checkpoint: ray.train.Checkpoint, name: str) -> ray.train.Checkpoint:
    """Publish a checkpoint in the run's folder; Ray's own copy, through Arrow, is silent where a file's last write
    fails. What a killed epoch left there gives way."""
    place = storage.join(run, name)
    try:
        storage.unpublish_directory(place, last=STATE)
        storage.publish_directory(Path(checkpoint.path), place, last=STATE)
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, OSError) and storage.is_transient(error):
            raise cause from None  # worth another start
        raise UserError(f"{error}; {GOES_ON}") from error
    there = ray.train.get_context().get_storage()
    return ray.train.Checkpoint(f"{there.experiment_fs_path}/{name}", there.storage_filesystem)


def _own(task: Task) -> Checkpoint | None:
    """The checkpoint of its own that this run goes on from."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is not None:
        with storage.local_copy(storage.join(task.run, PurePosixPath(checkpoint.path).name)) as folder:
            return load_checkpoint(folder)
    return None if task.resume is None else load_checkpoint(Path(task.resume))


def threads_of(config: Config, workers_here: int) -> int:
    """This worker's share of the CPUs that Ray may use on its node."""
    node = ray.get_runtime_context().get_node_id()
    nodes = ray.nodes()  # type: ignore[no-untyped-call]
    cpus = next(int(entry["Resources"].get("CPU", 1)) for entry in nodes if entry["NodeID"] == node)
    return config.numerics.threads or max(1, cpus // workers_here)
