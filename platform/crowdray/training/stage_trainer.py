"""Training steps and epochs of one stage."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict
from itertools import islice
from time import perf_counter
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import update_bn

from crowdray.data.batch import Batch
from crowdray.data.loader import Loader
from crowdray.errors import InfeasibleConfigError
from crowdray.evaluation.metrics import Metrics
from crowdray.models.counter import DENSITY, DEPTH, Counter
from crowdray.training.checkpoint import BestEpoch, Checkpoint, EpochMetrics
from crowdray.training.errors import BatchTooLargeError, DivergedError, is_out_of_memory
from crowdray.training.flops import flops_per_window, peak_matmul_flops, peak_memory
from crowdray.training.loss_balancing import balanced_weights, measure_gradient_norms
from crowdray.training.losses import LocalCounts, build_targets, task_losses
from crowdray.training.optim import (
    ExponentialMovingAverage,
    Plateau,
    build_optimizer,
    restore_optimizer,
    set_learning_rate,
)
from crowdray.training.precision import bf16_allreduce_hook, full_fp32, resolve_precision
from crowdray.training.stages import ENCODER, Stage, module_of
from crowdray.training.state import StepProgress, TrainState

BATCH_NORM_BATCHES = 128
"""Batches on which BatchNorm's statistics are measured, at most an epoch. By statistics of 32 batches, the same weights
counted between 2 and 14 heads too few per photo of ShanghaiTech B."""

Validate = Callable[[Callable[[], AbstractContextManager[object]]], Metrics]
"""Returns the errors on the validation images with the current weights, given an autocast context."""


class TrainStats(NamedTuple):
    """Result of an epoch's training steps."""

    losses: dict[str, float]
    """Mean unweighted loss by task, over the epoch and all ranks."""
    data_wait_s: float
    """Seconds that this rank waited for batches."""
    windows: int
    """Windows of all ranks."""


class _PendingCheck(NamedTuple):
    """Losses and gradient norm of a step on their way from the GPU."""

    values: Tensor
    ready: torch.cuda.Event
    rows: Tensor


class StageTrainer:
    """Optimizer, weight average and DDP wrapper of one stage.

    Built at the start of a stage, as DDP fixes the set of gradients that it reduces.

    Args:
        restored: checkpoint to resume from, if it is inside this stage.
    """

    def __init__(self, state: TrainState, stage: Stage, loader: Loader, restored: Checkpoint | None = None) -> None:
        self.state = state
        self.stage = stage
        self.loader = loader
        config, progress, counter = state.config, state.progress, state.counter
        for name, parameter in counter.named_parameters():
            parameter.requires_grad_(module_of(name) in stage.modules)
        self.parameters = [parameter for parameter in counter.parameters() if parameter.requires_grad]
        self.precision = resolve_precision(config.numerics.precision, state.device)
        self.optimizer = build_optimizer(config.optimizer, self.parameters, stage.schedule.learning_rate)
        self.plateau = Plateau(self.optimizer, config.optimizer)
        self.ema = ExponentialMovingAverage(_exported_parameters(counter), config.optimizer.ema_decay)
        self.learning_rate = stage.schedule.learning_rate
        if restored is not None and progress.stage_epochs > 0:
            self.learning_rate = progress.learning_rate
            restore_optimizer(self.optimizer, restored.optimizer, self.learning_rate)
            self.plateau.load_state_dict(progress.plateau)
            self.ema.restore(restored.ema, progress.ema_updates)
        else:
            progress.loss_weights = self._initial_loss_weights()
        weights = [progress.loss_weights[task] for task in stage.tasks]
        self._loss_weights = torch.tensor(weights, device=state.device)  # sending them each step would block a GPU
        self._window_flops = 0  # counted in the first step
        self._pending_check: _PendingCheck | None = None
        self.model: nn.Module = counter
        if state.world.size > 1:
            self.model = DistributedDataParallel(counter, gradient_as_bucket_view=True, forward_sync_buffers=False)
            if config.numerics.grad_allreduce_dtype == "bf16":
                self.model.register_comm_hook(None, bf16_allreduce_hook)
        # The next replay of a CUDA graph overwrites its outputs: accumulated gradients need memory outside of it.
        self._keep_gradients = config.numerics.compile == "graphs" and config.optimizer.grad_accumulation_steps > 1
        for parameter in self.parameters if self._keep_gradients else ():
            parameter.grad = torch.zeros_like(parameter)
        if (compiled := config.numerics.compile) != "no":
            self.model.compile(mode="reduce-overhead" if compiled == "graphs" else None)

    def fit_epoch(self, validate: Validate) -> EpochMetrics:
        """Train one epoch, validate if the encoder trains, keep the best weights; returns the epoch's metrics."""
        state, progress = self.state, self.state.progress
        progress.epochs += 1
        progress.stage_epochs += 1
        rate = self.annealed_rate
        torch.manual_seed(hash((state.config.seed, progress.epochs, state.world.rank)) % 2**63)
        started = perf_counter()
        losses, data_wait_s, windows = self.train_epoch()
        elapsed = perf_counter() - started
        metrics: EpochMetrics = {
            "epoch": progress.epochs,
            "stage": self.stage.name,
            "updates": progress.updates,
            "workers": state.world.size,
            **{f"loss/{task}": value for task, value in losses.items()},
            **{f"weighted/{task}": value * progress.loss_weights[task] for task, value in losses.items()},
            "learning_rate": rate,
            "images_per_s": windows / elapsed,
            "data_wait_fraction": data_wait_s / elapsed,
            "memory_gib": peak_memory(state.device) / 2**30,
            "mfu": self.mfu(windows / elapsed / state.world.size),
        }
        set_learning_rate(self.optimizer, self.learning_rate)
        if self.stage.trains_encoder:
            metrics |= self._validate_average(validate)
        else:
            self._step_plateau(sum(losses.values()))
        self.learning_rate = progress.learning_rate = self.optimizer.param_groups[0]["lr"]
        progress.plateau = self.plateau.state_dict()
        progress.ema_updates = self.ema.updates
        metrics["seconds"] = perf_counter() - started
        progress.history.append(metrics)
        return metrics

    @property
    def annealed_rate(self) -> float:
        """Learning rate of the next update, without warmup."""
        annealed = self.stage.schedule.anneal_epochs * self.loader.steps()
        left = self.stage.schedule.epochs * self.loader.steps() - self.ema.updates
        return self.learning_rate * min(1.0, left / annealed) if annealed else self.learning_rate

    def train_epoch(self) -> TrainStats:
        """Run all training steps of the current epoch, without validation."""
        state = self.state
        self.set_train_mode()
        sums = torch.zeros(len(self.stage.tasks), device=state.device)
        data_wait_s, steps, windows, total = 0.0, 0, 0, self.loader.steps()
        batches = self.loader.epoch(state.progress.epochs, depth=DEPTH in self.stage.tasks)
        while True:
            requested = perf_counter()
            batch = next(batches, None)
            data_wait_s += perf_counter() - requested
            if batch is None:
                break
            sums += self.train_step(batch)
            steps += 1
            windows += batch.global_size
            state.on_step(StepProgress("training", self.stage.name, state.progress.stage_epochs, steps, total))
        self._finish_pending_check()
        state.progress.updates += steps
        self._average_buffers()
        means = (sums / steps).tolist()
        return TrainStats(dict(zip(self.stage.tasks, means, strict=True)), data_wait_s, windows)

    def train_step(self, batch: Batch) -> Tensor:
        """Take one optimizer step on a global batch, of which `batch` is this rank's slice.

        Returns:
            Unweighted losses (tasks,) of the global batch, on the device.

        Raises:
            BatchTooLargeError: its forward and backward pass do not fit into memory.
            InfeasibleConfigError: the optimizer's state does not fit into memory.
            DivergedError: a loss or gradient is not finite; on a GPU, in the next step or at the epoch's end.
        """
        state, config = self.state, self.state.config
        if not self._window_flops:
            frozen = not self.stage.trains_encoder
            self._window_flops = flops_per_window(state.counter, self.stage.tasks, batch.size, frozen_encoder=frozen)
            self.set_train_mode()
        self.optimizer.zero_grad(set_to_none=not self._keep_gradients)
        try:
            batch = self._to_device(batch)
            microbatches = batch.microbatches(config.optimizer.grad_accumulation_steps)
            losses = torch.stack([self._backward(part, batch, part is microbatches[-1]) for part in microbatches])
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            error.__traceback__ = None  # its frames reference the tensors that did not fit
            raise BatchTooLargeError(batch) from None
        total = state.world.all_reduce_mean(losses.sum(dim=0))
        norm = nn.utils.clip_grad_norm_(self.parameters, config.optimizer.clip or float("inf"))
        self._check_finite(torch.cat([total, norm[None]]), batch.rows)
        warmup = min(1.0, (self.ema.updates + 1) / max(1, config.optimizer.warmup))
        set_learning_rate(self.optimizer, self.annealed_rate * warmup)
        self._optimizer_step()
        self.ema.update()
        return total

    def microbatch_losses(self, model: Callable[..., dict[str, Tensor]], microbatch: Batch, batch: Batch) -> Tensor:
        """Return a microbatch's part of the unweighted losses (tasks,).

        The mean over ranks of the sum over microbatches is the loss of the global batch.
        """
        state = self.state
        microbatch = microbatch.to(state.device)
        with full_fp32():
            targets = build_targets(microbatch, state.config, state.counter.encoder.output_stride)
        with self.autocast():
            frozen = not self.stage.trains_encoder
            outputs = model(microbatch.augmented_images(), self.stage.tasks, microbatch.corners, frozen)
        local_counts = LocalCounts.of(state.config, state.counter.encoder.output_stride)
        losses = task_losses(outputs, targets, state.scales, local_counts)
        fraction = len(microbatch.rows) * state.world.size / batch.global_size
        return torch.stack([losses[task] for task in self.stage.tasks]) * fraction

    def autocast(self) -> AbstractContextManager[object]:
        """Return the autocast context of the network's forward pass."""
        return torch.autocast(self.state.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def mfu(self, windows_per_s: float) -> float:
        """Return this rank's model FLOP/s as a fraction of its device's peak matmul throughput."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        return self._window_flops * windows_per_s / peak_matmul_flops(self.state.device, dtype, torch.get_num_threads())

    def set_train_mode(self) -> None:
        """Put the stage's modules into training mode and frozen ones into evaluation mode."""
        counter = self.state.counter
        for name, module in {ENCODER: counter.encoder, **counter.decoders}.items():
            module.train(name in self.stage.modules)

    def _to_device(self, batch: Batch) -> Batch:
        """Move a batch to the device; a GPU copies it during the previous step."""
        stream = self.state.copy_stream
        if stream is None:
            return batch.to(self.state.device)
        with torch.cuda.stream(stream):
            moved = batch.to(self.state.device)
        current = torch.cuda.current_stream()
        current.wait_stream(stream)
        moved.record_stream(current)
        return moved

    def _backward(self, microbatch: Batch, batch: Batch, last: bool) -> Tensor:
        """Accumulate a microbatch's gradients, reduced over ranks after the last one; returns its losses."""
        no_sync = isinstance(self.model, DistributedDataParallel) and not last
        with self.model.no_sync() if no_sync else nullcontext():  # type: ignore[operator]
            losses = self.microbatch_losses(self.model, microbatch, batch)
            (losses * self._loss_weights).sum().backward()  # type: ignore[no-untyped-call]
        return losses.detach()

    def _optimizer_step(self) -> None:
        try:
            self.optimizer.step()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise InfeasibleConfigError(
                f"{self.stage.name} stage: the optimizer state of {sum(map(Tensor.numel, self.parameters)):,} "
                f"parameters (--optimizer.name {self.state.config.optimizer.name}) does not fit into the memory of "
                f"{self.state.device}; set --optimizer.name sgd or --model.count-decoder pooled"
            ) from error

    def _check_finite(self, values: Tensor, rows: Tensor) -> None:
        """Raise DivergedError unless a step's losses (tasks,) and, after them, its gradient norm are finite.

        On a CPU before the weights change. Reading the values would block a GPU, so there it happens in the
        next step, and for an epoch's last step before the epoch is saved.
        """
        if values.device.type == "cpu":
            self._raise_if_diverged(values, rows)
            return
        self._finish_pending_check()
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._pending_check = _PendingCheck(values.to("cpu", non_blocking=True), ready, rows)
        ready.record()

    def _finish_pending_check(self) -> None:
        if (pending := self._pending_check) is not None:
            self._pending_check = None
            pending.ready.synchronize()
            self._raise_if_diverged(pending.values, pending.rows)

    def _raise_if_diverged(self, values: Tensor, rows: Tensor) -> None:
        *losses, norm = values.tolist()
        if np.isfinite([*losses, norm]).all():
            return
        found = dict(zip(self.stage.tasks, losses, strict=True))
        if np.isfinite(losses).all():
            found = {"gradient norm": norm}
        listed = ", ".join(f"{name} {value}" for name, value in found.items())
        raise DivergedError(
            f"{self.stage.name} stage, epoch {self.state.progress.epochs}: {listed} on dataset rows {rows.tolist()}; "
            f"no checkpoint contains this step. Lower stages.{self.stage.name}.learning_rate "
            f"({self.learning_rate:g} now) or inspect these rows"
        )

    def _validate_average(self, validate: Validate) -> EpochMetrics:
        """Validate the averaged weights, keep them if they are the best, and step the plateau schedule."""
        state, progress = self.state, self.state.progress
        with self._averaged_weights():
            self._update_batch_norm()
            state.counter.eval()
            metrics = validate(self.autocast)
            exported = {name: value.clone() for name, value in _exported_state(state.counter).items()}
        self._step_plateau(metrics.mae)
        progress.epochs_since_best += 1
        best = progress.best.get(self.stage.name)
        if best is None or metrics.mae < best.mae or self.stage.schedule.anneal_epochs:
            progress.best[self.stage.name] = BestEpoch(progress.epochs, metrics.mae, metrics.rmse)
            state.best_weights[self.stage.name] = {name: value.cpu() for name, value in exported.items()}
            progress.epochs_since_best = 0
        return {
            f"val/{name}": value for name, value in asdict(metrics).items() if name != "images" and np.isfinite(value)
        }

    def _update_batch_norm(self) -> None:
        """Measure BatchNorm's statistics for the current weights, on windows of the next epoch without augmentation.

        Averages of running statistics are not the statistics of averaged weights (Izmailov et al., UAI 2018), and those
        of resized windows are not the statistics of images.
        """
        exported = self.state.counter.strip()
        if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in exported.modules()):
            return
        loader = self.loader.without_augmentation()
        with closing(loader.epoch(self.state.progress.epochs + 1, depth=False)) as batches:
            images = (self._to_device(batch).augmented_images() for batch in islice(batches, BATCH_NORM_BATCHES))
            with self.autocast():
                update_bn(images, exported)
        self._average_buffers()

    def _step_plateau(self, error: float) -> None:
        """Update the plateau schedule; an annealed stage has none."""
        if not self.stage.schedule.anneal_epochs:
            self.plateau.step(error)

    @contextmanager
    def _averaged_weights(self) -> Iterator[None]:
        """Swap the averaged weights into the counter within a block."""
        current = _exported_parameters(self.state.counter)
        saved = {name: value.detach().clone() for name, value in current.items()}
        with torch.no_grad():
            for name, value in current.items():
                value.copy_(self.ema.values[name])
            try:
                yield
            finally:
                for name, value in current.items():
                    value.copy_(saved[name])

    def _average_buffers(self) -> None:
        """Average the running statistics (BatchNorm) over all ranks."""
        counter = self.state.counter
        parameters = {name for name, _ in counter.named_parameters()}
        for name, value in counter.state_dict().items():
            if name not in parameters and value.is_floating_point():
                value.copy_(self.state.world.all_reduce_mean(value))

    def _initial_loss_weights(self) -> dict[str, float]:
        """Return weights of 1, or balance the losses on the first batches of the stage's first epoch."""
        state, tasks = self.state, self.stage.tasks
        if not self.stage.balanced:
            return dict.fromkeys(tasks, 1.0)
        batches = self.loader.epoch(state.progress.epochs + 1)
        norms = measure_gradient_norms(state.counter, batches, tasks, state.config, state.scales, self.autocast)
        own = torch.tensor([norms[task] for task in tasks], device=state.device)
        state.progress.gradient_norms = dict(zip(tasks, state.world.all_reduce_mean(own).tolist(), strict=True))
        return balanced_weights(state.config.loss, state.progress.gradient_norms)


def _exported_state(counter: Counter) -> dict[str, Tensor]:
    """Parameters and buffers of the exported modules, as references."""
    return {name: value for name, value in counter.state_dict().items() if module_of(name) in (ENCODER, DENSITY)}


def _exported_parameters(counter: Counter) -> dict[str, Tensor]:
    """The parameters among them."""
    return dict(counter.strip().named_parameters())
