"""The loop: one for all stages, in one process or in each of many. Imports neither Ray nor MLflow."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from crowdray.config import Config
from crowdray.data.loader import Batch, Loader, PictureStore
from crowdray.data.sampling import WindowRule, split_validation
from crowdray.data.shards import Dataset
from crowdray.errors import DataError, UserError
from crowdray.evaluation.counting import count_pictures
from crowdray.evaluation.metrics import ImageCount, Metrics, summarise
from crowdray.models.build import build_counter
from crowdray.models.counter import DENSITY, Counter
from crowdray.training.calibration import calibrated_weights, measured_norms
from crowdray.training.checkpoint import Best, Checkpoint, Progress, save_checkpoint
from crowdray.training.losses import Scales, measured_scales, targets_of, task_losses
from crowdray.training.numerics import resolve_precision
from crowdray.training.optimizer import (
    Plateau,
    WeightAverage,
    build_optimizer,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
)
from crowdray.training.stages import ENCODER, Stage, module_of, stages_of
from crowdray.training.world import World

BATCHES_AHEAD = 3
"""Batches prepared while an accelerator trains."""

Row = dict[str, float | str]
"""What is told of an epoch: numbers by name, and the stage's name."""


class DivergedError(RuntimeError):
    """A loss or a gradient stopped being a finite number; raised on all ranks before any of them steps."""


class Report(Protocol):
    """Told of each finished epoch, on every rank: the row, and a function that writes a complete checkpoint
    to a folder."""

    def __call__(self, row: Row, save: Callable[[Path], None]) -> None:
        """Hear of an epoch; every rank calls equally often."""


def ignore(row: Row, save: Callable[[Path], None]) -> None:
    """A report that nobody reads."""


class Training:
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
        self.config = config
        self.world = world
        self.device = device
        self.stages = stages_of(config)
        sampling = config.sampling
        rows = dataset.rows("train")
        self.train_rows, self.validation_rows = split_validation(
            rows, sampling.validation_fraction, sampling.validation, config.seed
        )
        _check_sizes(dataset, len(self.train_rows), len(self.validation_rows))
        self.store = PictureStore(dataset, sampling.downsample, sampling.roi, sampling.cache_gib * 2**30)
        self.progress = restored.progress if restored else self._first_progress()
        _check_same(self.progress, dataset)
        self.counter = build_counter(config, self.progress.density_scale).to(device)
        self.best: dict[str, dict[str, Tensor]] = restored.best if restored else {}
        if restored:
            self._load(restored.weights)
        self._restored = restored
        self.loader = Loader(
            self.store,
            self.train_rows,
            _window_rule(config, self.counter),
            batch=sampling.batch,
            repeats=sampling.crops_per_image,
            seed=config.seed,
            rank=world.rank,
            world=world.size,
            pin=device.type == "cuda",
            ahead=0 if device.type == "cpu" else BATCHES_AHEAD,
        )

    @property
    def scales(self) -> Scales:
        """Units of the regressed quantities."""
        return Scales(self.progress.density_scale, self.progress.count_scale)

    @property
    def stage_is_over(self) -> bool:
        """Whether the stage under way has had its last epoch."""
        schedule, progress = self.stages[self.progress.stage].schedule, self.progress
        stopped = schedule.patience > 0 and progress.stale >= schedule.patience
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
        running = _RunningStage(self, stage, self._restored)
        self._restored = None
        while not self.stage_is_over:
            row = running.epoch()
            report(row, partial(self._save, running=running))

    def shipped(self, stage: str) -> Counter:
        """The stripped counter with the best weights of a stage, on the training's device, for evaluation."""
        counter = build_counter(self.config, self.progress.density_scale).strip().to(self.device)
        counter.load_state_dict(self.best[stage])
        return counter.eval()

    def evaluate(self, stage: str, rows: NDArray[np.int64]) -> list[ImageCount]:
        """Count whole images with a stage's best weights in fp32, each rank a share; every rank gets all
        counts."""
        counter = self.shipped(stage)
        return self._count(counter.density, rows)

    def validate(self, autocast: Callable[[], AbstractContextManager[object]]) -> Metrics:
        """Errors on the whole validation images with the counter as it stands."""

        def density(image: Tensor) -> Tensor:
            with autocast():
                return self.counter.density(image)

        return summarise(self._count(density, self.validation_rows))

    def _count(self, density: Callable[[Tensor], Tensor], rows: NDArray[np.int64]) -> list[ImageCount]:
        share = rows[self.world.rank :: self.world.size]
        return self.world.gather(list(count_pictures(density, self.store, share.tolist(), self.device)))

    def _first_progress(self) -> Progress:
        dataset = self.store.dataset
        scales = measured_scales(self.config, dataset, self.train_rows)
        return Progress(scales.density, scales.count, dataset.digest, self.world.size)

    def _advance(self) -> None:
        progress = self.progress
        progress.stage += 1
        progress.stage_epochs = progress.stale = progress.average_updates = 0
        progress.plateau = {}

    def _save(self, folder: Path, running: "_RunningStage") -> None:
        touched = {module for stage in self.stages[: self.progress.stage + 1] for module in stage.modules}
        weights = {name: value for name, value in self.counter.state_dict().items() if module_of(name) in touched}
        optimizer = optimizer_tensors(running.optimizer)
        checkpoint = Checkpoint(self.config, self.progress, weights, running.average.values, optimizer, self.best)
        save_checkpoint(checkpoint, folder)

    def _load(self, weights: dict[str, Tensor]) -> None:
        self.counter.load_state_dict(weights, strict=False)


class _RunningStage:
    """Optimizer, average and wrapper of one stage: rebuilt at its start, since DDP fixes which gradients it
    reduces."""

    def __init__(self, training: Training, stage: Stage, restored: Checkpoint | None) -> None:
        self.training = training
        self.stage = stage
        config, progress, counter = training.config, training.progress, training.counter
        for name, parameter in counter.named_parameters():
            parameter.requires_grad_(module_of(name) in stage.modules)
        self.parameters = [parameter for parameter in counter.parameters() if parameter.requires_grad]
        self.precision = resolve_precision(config.numerics.precision, training.device)
        self.optimizer = build_optimizer(config.optimizer, self.parameters, stage.schedule.learning_rate)
        self.plateau = Plateau(self.optimizer, config.optimizer)
        self.average = WeightAverage(_shipped_parameters(counter), config.optimizer.average)
        self.rate = stage.schedule.learning_rate
        resumes = restored is not None and progress.stage_epochs > 0
        if restored is not None and resumes:
            self.rate = progress.learning_rate
            restore_optimizer(self.optimizer, restored.optimizer, self.rate)
            self.plateau.restore(progress.plateau)
            self.average.restore(restored.average, progress.average_updates)
        else:
            progress.factors = self._factors()
        self.model: nn.Module = counter
        if training.world.size > 1:
            self.model = DistributedDataParallel(counter, gradient_as_bucket_view=True, forward_sync_buffers=False)

    def epoch(self) -> Row:
        """Train one epoch, validate, remember the best; returns what to tell of it."""
        training, progress = self.training, self.training.progress
        progress.epochs += 1
        progress.stage_epochs += 1
        torch.manual_seed(hash((training.config.seed, progress.epochs, training.world.rank)) % 2**63)
        started = time.perf_counter()
        losses, waited, images = self._train_epoch()
        elapsed = time.perf_counter() - started
        row: Row = {
            "epoch": progress.epochs,
            "stage": self.stage.name,
            "updates": progress.updates,
            **{f"loss/{task}": value for task, value in losses.items()},
            **{f"weighted/{task}": value * progress.factors[task] for task, value in losses.items()},
            "learning_rate": self.rate,
            "images_per_s": images / elapsed,
            "wait_share": waited / elapsed,
        }
        set_learning_rate(self.optimizer, self.rate)
        row |= self._validate(losses)
        self.rate = progress.learning_rate = self.optimizer.param_groups[0]["lr"]
        progress.plateau = self.plateau.state()
        progress.average_updates = self.average.updates
        row["seconds"] = time.perf_counter() - started
        progress.history.append(row)
        return row

    def autocast(self) -> AbstractContextManager[object]:
        """The arithmetic of the convolutions."""
        return torch.autocast(self.training.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _train_epoch(self) -> tuple[dict[str, float], float, int]:
        """Mean unweighted losses over the epoch and all ranks, seconds spent waiting for data, and images
        seen by all ranks."""
        training, progress = self.training, self.training.progress
        self.training.counter.train()
        sums = torch.zeros(len(self.stage.tasks))
        waited, steps, images = 0.0, 0, 0
        batches = training.loader.epoch(progress.epochs)
        while True:
            asked = time.perf_counter()
            batch = next(batches, None)
            waited += time.perf_counter() - asked
            if batch is None:
                break
            sums += self._step(batch)
            steps += 1
            images += len(batch.rows) * training.world.size
        progress.updates += steps
        means = (sums / steps).tolist()
        return dict(zip(self.stage.tasks, means, strict=True)), waited, images

    def _step(self, batch: Batch) -> Tensor:
        """One update; returns the unweighted losses (tasks,) of the whole batch."""
        training = self.training
        batch = batch.to(training.device)
        targets = targets_of(batch, training.config)
        with self.autocast():
            outputs = self.model(batch.augmented(), self.stage.tasks, batch.corners, not self.stage.trains_encoder)
        losses = task_losses(outputs, targets, training.scales)
        seen = training.world.mean(torch.stack([losses[task].detach() for task in self.stage.tasks])).cpu()
        if not torch.isfinite(seen).all():
            raise DivergedError(self._diverged(dict(zip(self.stage.tasks, seen.tolist(), strict=True)), batch))
        total = torch.stack([training.progress.factors[task] * losses[task] for task in self.stage.tasks]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.parameters, training.config.optimizer.clip or float("inf"))
        if not torch.isfinite(norm):
            raise DivergedError(self._diverged({"gradient norm": float(norm)}, batch))
        ramp = min(1.0, (self.average.updates + 1) / max(1, training.config.optimizer.warmup))
        set_learning_rate(self.optimizer, self.rate * ramp)
        self.optimizer.step()
        self.average.update()
        return seen

    def _validate(self, losses: dict[str, float]) -> Row:
        """Validate what ships, if this stage changes it, and feed the plateau rule."""
        training, progress = self.training, self.training.progress
        if not self.stage.trains_encoder:
            self.plateau.step(sum(losses.values()))
            return {}
        with self._averaged():
            training.counter.eval()
            metrics = training.validate(self.autocast)
            shipped = {name: value.clone() for name, value in _shipped_parameters(training.counter).items()}
        self.plateau.step(metrics.mae)
        progress.stale += 1
        best = progress.best.get(self.stage.name)
        if best is None or metrics.mae < best.mae:
            progress.best[self.stage.name] = Best(progress.epochs, metrics.mae, metrics.rmse)
            training.best[self.stage.name] = {name: value.cpu() for name, value in shipped.items()}
            progress.stale = 0
        return {
            f"val/{name}": value for name, value in asdict(metrics).items() if name != "images" and np.isfinite(value)
        }

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the counter's place."""
        live = _shipped_parameters(self.training.counter)
        kept = {name: value.detach().clone() for name, value in live.items()}
        with torch.no_grad():
            for name, value in live.items():
                value.copy_(self.average.values[name])
            try:
                yield
            finally:
                for name, value in live.items():
                    value.copy_(kept[name])

    def _factors(self) -> dict[str, float]:
        """Loss factors: one each, or calibrated on the first batches of the stage's first epoch."""
        if not self.stage.calibrated:
            return dict.fromkeys(self.stage.tasks, 1.0)
        training = self.training
        batches = training.loader.epoch(training.progress.epochs + 1)
        norms = measured_norms(
            training.counter, batches, self.stage.tasks, training.config, training.scales, self.autocast
        )
        means = training.world.mean(torch.tensor([norms[task] for task in self.stage.tasks])).tolist()
        training.progress.norms = dict(zip(self.stage.tasks, means, strict=True))
        return calibrated_weights(training.config.loss, training.progress.norms)

    def _diverged(self, values: dict[str, float], batch: Batch) -> str:
        listed = ", ".join(f"{name} {value}" for name, value in values.items())
        return (
            f"{self.stage.name} stage, epoch {self.training.progress.epochs}: {listed} on dataset rows "
            f"{batch.rows.tolist()}; no weight was changed by it. Lower stages.{self.stage.name}.learning_rate "
            f"(now {self.rate:g}), or look at these rows"
        )


def _shipped_parameters(counter: Counter) -> dict[str, Tensor]:
    return {name: value for name, value in counter.named_parameters() if module_of(name) in (ENCODER, DENSITY)}


def _window_rule(config: Config, counter: Counter) -> WindowRule:
    sampling, backbone = config.sampling, counter.backbone
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
    )


def _check_sizes(dataset: Dataset, training: int, validation: int) -> None:
    if training == 0 or validation == 0:
        raise UserError(
            f"{dataset.uri} leaves {training} images for training and {validation} for validation; both need at "
            "least one: change sampling.validation_fraction or convert more images"
        )


def _check_same(progress: Progress, dataset: Dataset) -> None:
    if progress.data_digest != dataset.digest:
        raise DataError(
            f"the checkpoint was trained on data {progress.data_digest[:12]}, {dataset.uri} is {dataset.digest[:12]}; "
            "train under a new --name"
        )
