"""One cell of an ablation in a Ray task: train it, or evaluate it on the test split, and publish its record."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from crowdray import storage
from crowdray.ablation.protocol import CELL_FILE, TESTED_FILE, Ablation, Cell
from crowdray.ablation.result import CellResult
from crowdray.cluster.single import final_checkpoint, single_device, train_single
from crowdray.data.image_cache import ImageCache
from crowdray.data.shards import Dataset
from crowdray.evaluation.inference import TILE, count_images, tiled_density
from crowdray.evaluation.metrics import ImageCount
from crowdray.models.build import build_counter
from crowdray.models.export import density_geometry
from crowdray.pipeline.identity import open_verified
from crowdray.stage_cache.session import StageCacheConfig
from crowdray.training.checkpoint import Checkpoint, EpochMetrics, load_checkpoint, save_checkpoint
from crowdray.training.precision import full_fp32
from crowdray.training.trainer import Trainer


@dataclass(frozen=True)
class CellTask:
    """What all cells of an ablation have in common."""

    ablation: Ablation
    stage_cache: StageCacheConfig
    """Where cells share the states of their stages."""
    use_gpu: bool
    """Whether a cell has a GPU, or a part of one."""
    queue: Any
    """Queue for the progress of cells."""


@dataclass(frozen=True)
class CellProgress:
    """How far the training run of a cell is."""

    cell: str
    """Its name."""
    stage: str
    epoch: int
    """Finished epochs of the stage."""
    mae: float | None
    """Validation MAE of the last validated epoch."""


def train_cell(task: CellTask, cell: Cell) -> None:
    """Train a cell and publish its weights and record; a published one stays as it is."""
    folder = task.ablation.folder(cell)
    if storage.exists(storage.join(folder, CELL_FILE)):  # the process was lost after publishing it
        return
    send = partial(_send, task.queue, cell.name)
    trainer = train_single(
        task.ablation.config(cell, Dataset.open(task.ablation.identity.data)),
        task.ablation.identity,
        task.ablation.identity_file,
        task.stage_cache,
        use_gpu=task.use_gpu,
        on_start=send,
        on_epoch=send,
    )
    with storage.scratch_folder("cell") as scratch:
        save_checkpoint(final_checkpoint(trainer), scratch)
        (scratch / CELL_FILE).write_text(_result(cell, trainer).to_json())
        storage.publish_directory(scratch, folder, last=CELL_FILE)


def count_cell(task: CellTask, cell: Cell) -> None:
    """Count the test split with a finished cell, and publish its record with these counts."""
    folder, identity = task.ablation.folder(cell), task.ablation.identity
    torch.set_num_threads(identity.config.numerics.threads)
    dataset = open_verified(identity, task.ablation.identity_file)
    result = load_cell(folder)
    with storage.local_copy(folder) as local:
        checkpoint = load_checkpoint(local)
    counts = count_split(checkpoint, dataset, dataset.rows("test"), single_device(task.use_gpu))
    tested = replace(result, test=counts)
    storage.write_bytes(storage.join(folder, TESTED_FILE), tested.to_json().encode())


def load_cell(folder: str) -> CellResult:
    """Load the record of a finished cell, with its counts of the test split once they are there."""
    tested, trained = (storage.join(folder, name) for name in (TESTED_FILE, CELL_FILE))
    content = storage.read_bytes_or_none(tested)
    if content is not None:
        return CellResult.from_json(content, tested)
    return CellResult.from_json(storage.read_bytes(trained), trained)


def count_split(
    checkpoint: Checkpoint, dataset: Dataset, rows: NDArray[np.int64], device: torch.device
) -> list[ImageCount]:
    """Count whole images in fp32 with the weights of the last stage of a finished run, as `Trainer.evaluate` does."""
    sampling, last = checkpoint.config.sampling, [*checkpoint.progress.best][-1]
    counter = build_counter(checkpoint.config, checkpoint.progress.density_scale).strip().to(device)
    counter.load_state_dict(checkpoint.best_weights[last])
    counter.eval()
    geometry = density_geometry(counter)
    images = ImageCache(dataset, sampling.downsample, sampling.roi, 0)
    with full_fp32():
        density = tiled_density(counter.density, geometry, TILE)
        return list(count_images(density, images, rows.tolist(), device, geometry.cell))


def _result(cell: Cell, trainer: Trainer) -> CellResult:
    progress, last = trainer.state.progress, trainer.stages[-1].name
    validation = sorted(trainer.evaluate(last, trainer.validation_rows), key=lambda count: count.row)
    return CellResult(
        arm=cell.arm.name,
        fraction=cell.fraction,
        backbone=cell.backbone,
        seed=cell.seed,
        updates=progress.updates,
        seconds=sum(float(row["seconds"]) for row in progress.history),
        validation=validation,
        test=None,
    )


def _send(queue: Any, cell: str, history: Sequence[EpochMetrics]) -> None:
    """Send the progress of a cell, waiting for nothing."""
    if history:
        stage = str(history[-1]["stage"])
        epochs = sum(row["stage"] == stage for row in history)
        errors = [float(row["val/mae"]) for row in history if "val/mae" in row]
        progress = CellProgress(cell, stage, epochs, errors[-1] if errors else None)
        queue.actor.put_nowait.remote(progress)
