"""The training loop over all stages, on one rank; imports neither Ray nor MLflow."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from crowdray.config import Config
from crowdray.data.loader import Loader
from crowdray.data.shards import Dataset
from crowdray.data.splits import split_rows
from crowdray.evaluation.inference import TILE, count_images, tiled_density
from crowdray.evaluation.metrics import ImageCount, Metrics, summarise
from crowdray.models.build import build_counter
from crowdray.models.counter import Counter
from crowdray.models.export import density_geometry
from crowdray.models.initial import InitialWeights
from crowdray.training.batch_size_finder import explain_too_large
from crowdray.training.checkpoint import Checkpoint, EpochMetrics, save_checkpoint
from crowdray.training.distributed import World
from crowdray.training.errors import BatchTooLargeError
from crowdray.training.inputs import build_loader, open_images
from crowdray.training.optim import optimizer_tensors
from crowdray.training.precision import full_fp32
from crowdray.training.stage_trainer import StageTrainer
from crowdray.training.stages import Stage, build_stages, module_of
from crowdray.training.state import StepProgress, create_state

EpochCallback = Callable[[EpochMetrics, Callable[[Path], None]], None]
"""Called on every rank after each epoch, with its metrics and a function that saves a checkpoint to a folder."""


def ignore_epoch(metrics: EpochMetrics, save: Callable[[Path], None]) -> None:
    """Do nothing: the default callback."""


class Trainer:
    """Trains all stages of a configuration on one rank.

    Args:
        initial: The weights of config.model.init; not needed with `restored`.
        rows: Training and validation rows; by default those that `split_rows` draws with the seed.
    """

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        *,
        world: World,
        device: torch.device,
        restored: Checkpoint | None = None,
        initial: InitialWeights | None = None,
        rows: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None,
    ) -> None:
        if config.model.init and restored is None and initial is None:
            raise ValueError(f"pass the weights of model.init {config.model.init!r} as `initial`")
        self.stages = build_stages(config)
        self.train_rows, self.validation_rows = rows or split_rows(config, dataset, world.size)
        self.images = open_images(config, dataset)
        self.state = create_state(
            config, dataset, self.train_rows, world=world, device=device, restored=restored, initial=initial
        )
        self._restored = restored

    @cached_property
    def loader(self) -> Loader:
        """The loader of this rank's windows, built when an epoch is left to train."""
        return build_loader(self.state, self.images, self.train_rows)

    @property
    def stage_finished(self) -> bool:
        """Whether the current stage has trained its last epoch."""
        progress = self.state.progress
        schedule = self.stages[progress.stage].schedule
        stopped_early = schedule.patience > 0 and progress.epochs_since_best >= schedule.patience
        return progress.stage_epochs >= schedule.epochs or stopped_early

    def fit(self, on_epoch: EpochCallback = ignore_epoch) -> None:
        """Train all remaining epochs; `state.best_weights` then has the best weights of each stage."""
        progress = self.state.progress
        while progress.stage < len(self.stages):
            stage = self.stages[progress.stage]
            if not self.stage_finished:  # a checkpoint may be from the last epoch of its stage
                self._fit_stage(stage, on_epoch)
            if stage.trains_encoder:  # the next stage starts from the best epoch of this one
                self.state.load(self.state.best_weights[stage.name])
            progress.stage += 1
            progress.stage_epochs = progress.epochs_since_best = progress.ema_updates = 0
            progress.plateau = {}

    def stage_trainer(self, stage: Stage) -> StageTrainer:
        """Build the trainer of a stage; the first one resumes from the checkpoint, if any."""
        restored, self._restored = self._restored, None
        return StageTrainer(self.state, stage, self.loader, restored)

    def _fit_stage(self, stage: Stage, on_epoch: EpochCallback) -> None:
        stage_trainer = self.stage_trainer(stage)
        try:
            while not self.stage_finished:
                try:
                    metrics = stage_trainer.fit_epoch(self.validate)
                except BatchTooLargeError as error:
                    raise explain_too_large(stage_trainer, error.batch) from None
                on_epoch(metrics, partial(self._save, stage_trainer=stage_trainer))
        finally:
            # The compiled call references the model in a cycle, which would keep both on the device.
            stage_trainer.model._compiled_call_impl = None

    def best_counter(self, stage: str) -> Counter:
        """Return the exported counter with the best weights of a stage, on the run's device."""
        state = self.state
        counter = build_counter(state.config, state.progress.density_scale).strip().to(state.device)
        counter.load_state_dict(state.best_weights[stage])
        return counter.eval()

    def evaluate(self, stage: str, rows: NDArray[np.int64]) -> list[ImageCount]:
        """Count whole images with a stage's best weights in fp32; the ranks split the rows, all get all counts."""
        counter = self.best_counter(stage)
        with full_fp32():
            return self._count(counter.density, rows, "evaluation", stage)

    def validate(self, autocast: Callable[[], AbstractContextManager[object]]) -> Metrics:
        """Compute the errors on whole validation images with the current weights."""

        def density(image: Tensor) -> Tensor:
            with autocast():
                return self.state.counter.density(image)

        stage = self.stages[self.state.progress.stage].name
        return summarise(self._count(density, self.validation_rows, "validation", stage))

    def _count(
        self,
        density: Callable[[Tensor], Tensor],
        rows: NDArray[np.int64],
        phase: Literal["validation", "evaluation"],
        stage: str,
    ) -> list[ImageCount]:
        state, world, counts = self.state, self.state.world, list[ImageCount]()
        own_rows = rows[world.rank :: world.size].tolist()
        geometry = density_geometry(state.counter)  # the images are already downsampled
        tiled = tiled_density(density, geometry, TILE)
        for count in count_images(tiled, self.images, own_rows, state.device, geometry.cell):
            counts.append(count)
            done = min(len(rows), len(counts) * world.size)
            state.on_step(StepProgress(phase, stage, state.progress.stage_epochs, done, len(rows)))
        return world.all_gather(counts)

    def _save(self, folder: Path, stage_trainer: StageTrainer) -> None:
        state = self.state
        trained = {module for stage in self.stages[: state.progress.stage + 1] for module in stage.modules}
        weights = {name: value for name, value in state.counter.state_dict().items() if module_of(name) in trained}
        optimizer = optimizer_tensors(stage_trainer.optimizer)
        ema = stage_trainer.ema.values
        save_checkpoint(Checkpoint(state.config, state.progress, weights, ema, optimizer, state.best_weights), folder)
