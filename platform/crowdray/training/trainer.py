"""The loop: one for all stages, in one process or in each of many. Imports neither Ray nor MLflow."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from crowdray.config import Config
from crowdray.data.gpu_cache import keep_on
from crowdray.data.image_cache import ImageCache
from crowdray.data.loader import Loader
from crowdray.data.sampling import WindowRule
from crowdray.data.shards import Dataset
from crowdray.data.splits import split_rows
from crowdray.data.targets import REACH
from crowdray.errors import DataError
from crowdray.evaluation.inference import TILE, count_images, tiled_density
from crowdray.evaluation.metrics import ImageCount, Metrics, summarise
from crowdray.models.build import backbone_class, build_counter
from crowdray.models.counter import DEPTH, Counter
from crowdray.models.export import density_geometry
from crowdray.models.pretrained import load_pretrained
from crowdray.training.checkpoint import Checkpoint, Progress, Row, save_checkpoint
from crowdray.training.distributed import World
from crowdray.training.losses import Scales, measured_scales
from crowdray.training.optim import optimizer_tensors
from crowdray.training.precision import full_products, require_compiler, set_products
from crowdray.training.stage_trainer import StageTrainer
from crowdray.training.stages import Stage, module_of, stages_of

BATCHES_AHEAD = 3
"""Batches prepared while an accelerator trains."""


class Report(Protocol):
    """Told of each finished epoch, on every rank: the row, and a function that writes a complete checkpoint
    to a folder."""

    def __call__(self, row: Row, save: Callable[[Path], None]) -> None:
        """Hear of an epoch; every rank calls equally often."""


def ignore(row: Row, save: Callable[[Path], None]) -> None:
    """A report that nobody reads."""


class Trainer:
    """One training on one rank: the data, the counter and where it stands. `run` goes through what is left of
    the stages."""

    def __init__(
        self,
        config: Config,
        dataset: Dataset,
        *,
        world: World,
        device: torch.device,
        restored: Checkpoint | None = None,
    ) -> None:
        require_compiler(config.numerics.compile)
        self.config = config
        self.world = world
        self.device = device
        self.stages = stages_of(config)
        sampling = config.sampling
        self.train_rows, self.validation_rows = split_rows(config, dataset, world.size)
        self.store = ImageCache(dataset, sampling.downsample, sampling.roi, sampling.cache_gib * 2**30)
        self.progress = restored.progress if restored else self._first_progress()
        _check_same(self.progress, dataset)
        self.progress.world_size = world.size
        self.counter = build_counter(config, self.progress.density_scale)
        if not restored:
            load_pretrained(self.counter, config)
        if device.type == "cuda" and world.size > 1:
            self.counter = nn.SyncBatchNorm.convert_sync_batchnorm(self.counter)  # type: ignore[no-untyped-call]
        if device.type == "cuda":  # a process that trained before has its own peak
            torch.cuda.reset_peak_memory_stats(device)
        self.counter.to(device)
        self.counter.activation_checkpointing = config.numerics.activation_checkpointing
        set_products(config.numerics.tf32, device)
        self.best: dict[str, dict[str, Tensor]] = restored.best if restored else {}
        if restored:
            self._load(restored.weights)
        self._restored = restored

    @cached_property
    def loader(self) -> Loader:
        """Batches of this rank's windows; a training with nothing left to do asks for none."""
        sampling, on_gpu = self.config.sampling, self.device.type == "cuda"
        resident = None
        if on_gpu and not sampling.scale:
            depth = any(DEPTH in stage.tasks for stage in self.stages)
            resident = keep_on(self.device, self.store, self.train_rows, sampling.gpu_cache_gib * 2**30, depth)
        return Loader(
            resident or self.store,
            self.train_rows,
            _window_rule(self.config, self.counter),
            batch=sampling.batch,
            repeats=sampling.crops_per_image,
            seed=self.config.seed,
            rank=self.world.rank,
            world=self.world.size,
            pin=on_gpu,
            ahead=BATCHES_AHEAD if on_gpu else 0,
        )

    @cached_property
    def copies(self) -> torch.cuda.Stream | None:
        """The stream on which a GPU copies batches: one for all stages, as each keeps memory of its own."""
        on_gpu = self.device.type == "cuda"
        return torch.cuda.Stream(self.device) if on_gpu else None  # type: ignore[no-untyped-call]

    @property
    def scales(self) -> Scales:
        """Units of the regressed quantities."""
        return Scales(self.progress.density_scale, self.progress.count_scale)

    @property
    def stage_is_over(self) -> bool:
        """Whether the stage under way has had its last epoch."""
        schedule, progress = self.stages[self.progress.stage].schedule, self.progress
        stopped = schedule.patience > 0 and progress.epochs_since_best >= schedule.patience
        return progress.stage_epochs >= schedule.epochs or stopped

    def run(self, report: Report = ignore) -> None:
        """Train what is left. Afterwards `best` holds the best shipped weights of each stage that trains the
        encoder."""
        while self.progress.stage < len(self.stages):
            stage = self.stages[self.progress.stage]
            if not self.stage_is_over:  # a checkpoint from a stage's end has nothing left of its stage
                self._run_stage(stage, report)
            if stage.trains_encoder:  # the next stage begins where this one was best
                self._load(self.best[stage.name])
            self._advance()

    def _run_stage(self, stage: Stage, report: Report) -> None:
        running = StageTrainer(self, stage, self._restored)
        self._restored = None
        try:
            while not self.stage_is_over:
                row = running.epoch()
                report(row, partial(self._save, running=running))
        finally:
            running.model._compiled_call_impl = None  # it refers back to the model, and would keep both on the device

    def shipped(self, stage: str) -> Counter:
        """The stripped counter with the best weights of a stage, on the training's device, for evaluation."""
        counter = build_counter(self.config, self.progress.density_scale).strip().to(self.device)
        counter.load_state_dict(self.best[stage])
        return counter.eval()

    def evaluate(self, stage: str, rows: NDArray[np.int64]) -> list[ImageCount]:
        """Count whole images with a stage's best weights in fp32, each rank a share; every rank gets all
        counts."""
        counter = self.shipped(stage)
        with full_products():
            return self._count(counter.density, rows)

    def validate(self, autocast: Callable[[], AbstractContextManager[object]]) -> Metrics:
        """Errors on the whole validation images with the counter as it stands."""

        def density(image: Tensor) -> Tensor:
            with autocast():
                return self.counter.density(image)

        return summarise(self._count(density, self.validation_rows))

    def _count(self, density: Callable[[Tensor], Tensor], rows: NDArray[np.int64]) -> list[ImageCount]:
        share = rows[self.world.rank :: self.world.size].tolist()
        geometry = density_geometry(self.counter)  # pictures are downsampled already
        tiled = tiled_density(density, geometry, TILE)
        return self.world.all_gather(list(count_images(tiled, self.store, share, self.device, geometry.cell)))

    def _first_progress(self) -> Progress:
        dataset = self.store.dataset
        stride = backbone_class(self.config).output_stride
        scales = measured_scales(self.config, dataset, self.train_rows, stride)
        return Progress(scales.density, scales.count, dataset.digest, self.world.size)

    def _advance(self) -> None:
        progress = self.progress
        progress.stage += 1
        progress.stage_epochs = progress.epochs_since_best = progress.average_updates = 0
        progress.plateau = {}

    def _save(self, folder: Path, running: StageTrainer) -> None:
        touched = {module for stage in self.stages[: self.progress.stage + 1] for module in stage.modules}
        weights = {name: value for name, value in self.counter.state_dict().items() if module_of(name) in touched}
        optimizer = optimizer_tensors(running.optimizer)
        checkpoint = Checkpoint(self.config, self.progress, weights, running.average.values, optimizer, self.best)
        save_checkpoint(checkpoint, folder)

    def _load(self, weights: dict[str, Tensor]) -> None:
        self.counter.load_state_dict(weights, strict=False)


def _window_rule(config: Config, counter: Counter) -> WindowRule:
    sampling, backbone = config.sampling, counter.encoder
    return WindowRule(
        crop=sampling.crop,
        context=sampling.context,
        margin=backbone.receptive_radius,
        stride=backbone.stride,
        flip=sampling.flip,
        brightness=sampling.brightness,
        contrast=sampling.contrast,
        colour=sampling.colour,
        scale=sampling.scale,
        reach=REACH * config.target.sigma,
    )


def _check_same(progress: Progress, dataset: Dataset) -> None:
    if progress.data_digest != dataset.digest:
        raise DataError(
            f"the checkpoint was trained on data {progress.data_digest[:12]}, {dataset.uri} is {dataset.digest[:12]}; "
            "train under a new --name"
        )
