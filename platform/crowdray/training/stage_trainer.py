"""A stage under way: its optimizer, average and wrapper, and what an update and an epoch are."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict
from time import perf_counter
from typing import TYPE_CHECKING, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from crowdray.data.batch import Batch
from crowdray.errors import InfeasibleConfigError
from crowdray.models.counter import DENSITY, DEPTH, Counter
from crowdray.training.checkpoint import Best, Checkpoint, Row
from crowdray.training.errors import DivergedError, is_out_of_memory
from crowdray.training.flops import operations_per_window, peak_matmul_flops, peak_memory
from crowdray.training.loss_balancing import calibrated_weights, measured_norms
from crowdray.training.losses import targets_of, task_losses
from crowdray.training.optim import (
    ExponentialMovingAverage,
    Plateau,
    build_optimizer,
    restore_optimizer,
    set_learning_rate,
)
from crowdray.training.precision import bf16_allreduce_hook, full_products, resolve_precision
from crowdray.training.stages import ENCODER, Stage, module_of

if TYPE_CHECKING:
    from crowdray.training.trainer import Trainer


class _Seen(NamedTuple):
    """What a GPU will have said of an update when it is ready."""

    values: Tensor
    ready: torch.cuda.Event
    rows: Tensor


class StageTrainer:
    """Optimizer, average and wrapper of one stage: rebuilt at its start, since DDP fixes which gradients it
    reduces."""

    def __init__(self, training: "Trainer", stage: Stage, restored: Checkpoint | None) -> None:
        self.training = training
        self.stage = stage
        config, progress, counter = training.config, training.progress, training.counter
        for name, parameter in counter.named_parameters():
            parameter.requires_grad_(module_of(name) in stage.modules)
        self.parameters = [parameter for parameter in counter.parameters() if parameter.requires_grad]
        self.precision = resolve_precision(config.numerics.precision, training.device)
        self.optimizer = build_optimizer(config.optimizer, self.parameters, stage.schedule.learning_rate)
        self.plateau = Plateau(self.optimizer, config.optimizer)
        self.average = ExponentialMovingAverage(_shipped_numbers(counter), config.optimizer.ema_decay)
        self.rate = stage.schedule.learning_rate
        resumes = restored is not None and progress.stage_epochs > 0
        if restored is not None and resumes:
            self.rate = progress.learning_rate
            restore_optimizer(self.optimizer, restored.optimizer, self.rate)
            self.plateau.restore(progress.plateau)
            self.average.restore(restored.average, progress.average_updates)
        else:
            progress.factors = self._factors()
        self.factors = torch.tensor([progress.factors[task] for task in stage.tasks], device=training.device)
        """(tasks,) what each loss counts; there already, for a GPU would stand still while it is sent."""
        self.operations = 0
        """FLOPs of one window, counted at the first."""
        self._unchecked: _Seen | None = None
        self.model: nn.Module = counter
        if training.world.size > 1:
            self.model = DistributedDataParallel(counter, gradient_as_bucket_view=True, forward_sync_buffers=False)
            if config.numerics.grad_allreduce_dtype == "bf16":
                self.model.register_comm_hook(None, bf16_allreduce_hook)
        # What a CUDA graph leaves, its next replay overwrites: a gradient that grows over parts lies elsewhere.
        self._keeps_gradients = config.numerics.compile == "graphs" and config.optimizer.grad_accumulation_steps > 1
        for parameter in self.parameters if self._keeps_gradients else ():
            parameter.grad = torch.zeros_like(parameter)
        if (compiled := config.numerics.compile) != "no":
            self.model.compile(mode="reduce-overhead" if compiled == "graphs" else None)

    def epoch(self) -> Row:
        """Train one epoch, validate, remember the best; returns what to tell of it."""
        training, progress = self.training, self.training.progress
        progress.epochs += 1
        progress.stage_epochs += 1
        torch.manual_seed(hash((training.config.seed, progress.epochs, training.world.rank)) % 2**63)
        started = perf_counter()
        losses, waited, images = self._train_epoch()
        elapsed = perf_counter() - started
        row: Row = {
            "epoch": progress.epochs,
            "stage": self.stage.name,
            "updates": progress.updates,
            "workers": training.world.size,
            **{f"loss/{task}": value for task, value in losses.items()},
            **{f"weighted/{task}": value * progress.factors[task] for task, value in losses.items()},
            "learning_rate": self.rate,
            "images_per_s": images / elapsed,
            "data_wait_fraction": waited / elapsed,
            "memory_gib": peak_memory(training.device) / 2**30,
            "mfu": self._mfu(images / elapsed / training.world.size),
        }
        set_learning_rate(self.optimizer, self.rate)
        row |= self._validate(losses)
        self.rate = progress.learning_rate = self.optimizer.param_groups[0]["lr"]
        progress.plateau = self.plateau.state()
        progress.average_updates = self.average.updates
        row["seconds"] = perf_counter() - started
        progress.history.append(row)
        return row

    def autocast(self) -> AbstractContextManager[object]:
        """The arithmetic of the convolutions."""
        return torch.autocast(self.training.device.type, torch.bfloat16, enabled=self.precision == "bf16")

    def _mfu(self, windows_per_s: float) -> float:
        """This rank's FLOP/s as a share of the rate at which its device multiplies matrices."""
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
        rate = peak_matmul_flops(self.training.device, dtype, torch.get_num_threads())
        return self.operations * windows_per_s / rate

    def _train_epoch(self) -> tuple[dict[str, float], float, int]:
        """Mean unweighted losses over the epoch and all ranks, seconds spent waiting for data, and windows
        seen by all ranks."""
        training, progress = self.training, self.training.progress
        self.prepare()
        sums = torch.zeros(len(self.stage.tasks), device=training.device)
        waited, steps, windows = 0.0, 0, 0
        batches = training.loader.epoch(progress.epochs, depth=DEPTH in self.stage.tasks)
        while True:
            asked = perf_counter()
            batch = next(batches, None)
            waited += perf_counter() - asked
            if batch is None:
                break
            sums += self._step(batch)
            steps += 1
            windows += batch.total
        self._check_last()
        progress.updates += steps
        self._agree_on_statistics()
        means = (sums / steps).tolist()
        return dict(zip(self.stage.tasks, means, strict=True)), waited, windows

    def prepare(self) -> None:
        """Let what trains draw its random numbers and take in statistics; those of what is frozen stand still."""
        counter = self.training.counter
        for name, module in {ENCODER: counter.encoder, **counter.decoders}.items():
            module.train(name in self.stage.modules)

    def _moved(self, batch: Batch) -> Batch:
        """The batch on the device; a GPU copies it while it is at the update before."""
        copies = self.training.copies
        if copies is None:
            return batch.to(self.training.device)
        with torch.cuda.stream(copies):
            moved = batch.to(self.training.device)
        computing = torch.cuda.current_stream()
        computing.wait_stream(copies)
        moved.used_by(computing)
        return moved

    def _step(self, batch: Batch) -> Tensor:
        """One update; returns the unweighted losses (tasks,) of the whole batch, on the device."""
        training = self.training
        if not self.operations:
            frozen = not self.stage.trains_encoder
            self.operations = operations_per_window(
                training.counter, self.stage.tasks, batch.size, frozen_encoder=frozen, autocast=self.autocast()
            )
        self.optimizer.zero_grad(set_to_none=not self._keeps_gradients)
        try:
            batch = self._moved(batch)
            parts = batch.parts(training.config.optimizer.grad_accumulation_steps)
            losses = torch.stack([self._gradients(part, batch, part is parts[-1]) for part in parts]).sum(dim=0)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            error.__traceback__ = None  # its frames hold the tensors that did not fit
            self._too_large(batch, min(training.config.optimizer.grad_accumulation_steps, len(batch.rows)))
        losses = training.world.all_reduce_mean(losses)
        norm = nn.utils.clip_grad_norm_(self.parameters, training.config.optimizer.clip or float("inf"))
        self._check(torch.cat([losses, norm[None]]), batch.rows)
        ramp = min(1.0, (self.average.updates + 1) / max(1, training.config.optimizer.warmup))
        set_learning_rate(self.optimizer, self.rate * ramp)
        try:
            self.optimizer.step()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            raise InfeasibleConfigError(
                f"{self.stage.name} stage: what --optimizer.name {training.config.optimizer.name} keeps of "
                f"{sum(map(Tensor.numel, self.parameters)):,} parameters does not fit into the memory of "
                f"{training.device} beside them; give --optimizer.name sgd, or --model.count-decoder pooled"
            ) from error
        self.average.update()
        return losses

    def _check(self, values: Tensor, rows: Tensor) -> None:
        """Raise DivergedError where an update's losses (tasks,) and its gradient's norm behind them are not all finite.

        A CPU says it before the weights change. A GPU would stand still while it is asked, so it says it one update
        later, and of an epoch's last before the epoch is saved.
        """
        if values.device.type == "cpu":
            self._raise_if_diverged(values, rows)
            return
        self._check_last()
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]
        self._unchecked = _Seen(values.to("cpu", non_blocking=True), ready, rows)
        ready.record()

    def _check_last(self) -> None:
        """The same of an update that a GPU has been given."""
        if (seen := self._unchecked) is not None:
            self._unchecked = None
            seen.ready.synchronize()
            self._raise_if_diverged(seen.values, seen.rows)

    def _raise_if_diverged(self, values: Tensor, rows: Tensor) -> None:
        *losses, norm = values.tolist()
        if not np.isfinite(losses).all():
            raise DivergedError(self._diverged(dict(zip(self.stage.tasks, losses, strict=True)), rows))
        if not np.isfinite(norm):
            raise DivergedError(self._diverged({"gradient norm": norm}, rows))

    def _gradients(self, part: Batch, batch: Batch, last: bool) -> Tensor:
        """Add a part's share to the gradients, which the ranks average after the last part; returns its losses."""
        waits = isinstance(self.model, DistributedDataParallel) and not last
        with self.model.no_sync() if waits else nullcontext():  # type: ignore[operator]
            losses = self._losses(self.model, part, batch)
            (losses * self.factors).sum().backward()  # type: ignore[no-untyped-call]
        return losses.detach()

    def _losses(self, model: Callable[..., dict[str, Tensor]], part: Batch, batch: Batch) -> Tensor:
        """A part's share of the unweighted losses (tasks,): the mean over ranks of the sum over parts is the whole
        batch's."""
        training = self.training
        part = part.to(training.device)
        with full_products():
            targets = targets_of(part, training.config, training.counter.encoder.output_stride)
        with self.autocast():
            outputs = model(part.augmented(), self.stage.tasks, part.corners, not self.stage.trains_encoder)
        losses = task_losses(outputs, targets, training.scales)
        share = len(part.rows) * training.world.size / batch.total
        return torch.stack([losses[task] for task in self.stage.tasks]) * share

    def _too_large(self, batch: Batch, taken: int) -> NoReturn:
        """Find out how many windows of a batch, taken in so many parts, fit into memory; raise a SettingsError
        that says it."""
        training, here = self.training, len(batch.rows)
        height, width = batch.size
        self.optimizer.zero_grad(set_to_none=True)
        training.counter.eval()  # a synchronised BatchNorm would wait for the other ranks, and so would the wrapper
        fits = failed = -(-here // taken)
        while fits := fits // 2:
            if self._fit(batch.first(fits + fits // 4), batch):  # a quarter more: a real update keeps others beside
                break
        parts = -(-here // fits) if fits else 0
        mend = f"{fits} at a time do: give --optimizer.grad_accumulation_steps {parts}" if fits else "not even one does"
        raise InfeasibleConfigError(
            f"{self.stage.name} stage: {failed} windows of {height}x{width} pixels do not fit into the memory of "
            f"{training.device}, {mend}, or smaller ones: --sampling.crop {training.config.sampling.crop} and "
            f"--sampling.context {training.config.sampling.context} now"
        ) from None

    def _fit(self, part: Batch, batch: Batch) -> bool:
        """Whether the gradients of a part of a batch fit into memory, which is free again afterwards."""
        try:
            # Never the compiled one, which would be compiled for each size.
            losses = self._losses(self.training.counter.forward, part, batch)
            torch.autograd.grad(losses.sum(), self.parameters, allow_unused=True)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _validate(self, losses: dict[str, float]) -> Row:
        """Validate what ships, if this stage changes it, and feed the plateau rule."""
        training, progress = self.training, self.training.progress
        if not self.stage.trains_encoder:
            self.plateau.step(sum(losses.values()))
            return {}
        with self._averaged():
            training.counter.eval()
            metrics = training.validate(self.autocast)
            state = training.counter.state_dict()
            shipped = {name: value.clone() for name, value in state.items() if module_of(name) in (ENCODER, DENSITY)}
        self.plateau.step(metrics.mae)
        progress.epochs_since_best += 1
        best = progress.best.get(self.stage.name)
        if best is None or metrics.mae < best.mae:
            progress.best[self.stage.name] = Best(progress.epochs, metrics.mae, metrics.rmse)
            training.best[self.stage.name] = {name: value.cpu() for name, value in shipped.items()}
            progress.epochs_since_best = 0
        return {
            f"val/{name}": value for name, value in asdict(metrics).items() if name != "images" and np.isfinite(value)
        }

    def _agree_on_statistics(self) -> None:
        """Give all ranks the mean of their running statistics (BatchNorm), where each has kept its own."""
        parameters = {name for name, _ in self.training.counter.named_parameters()}
        for values in (self.training.counter.state_dict(), self.average.values):
            for name, value in values.items():
                if name not in parameters and value.is_floating_point():
                    value.copy_(self.training.world.all_reduce_mean(value))

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the counter's place."""
        live = _shipped_numbers(self.training.counter)
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
        own = torch.tensor([norms[task] for task in self.stage.tasks], device=training.device)
        means = training.world.all_reduce_mean(own).tolist()
        training.progress.norms = dict(zip(self.stage.tasks, means, strict=True))
        return calibrated_weights(training.config.loss, training.progress.norms)

    def _diverged(self, values: dict[str, float], rows: Tensor) -> str:
        listed = ", ".join(f"{name} {value}" for name, value in values.items())
        return (
            f"{self.stage.name} stage, epoch {self.training.progress.epochs}: {listed} on dataset rows "
            f"{rows.tolist()}; no checkpoint has it. Lower stages.{self.stage.name}.learning_rate "
            f"(now {self.rate:g}), or look at these rows"
        )


def _shipped_numbers(counter: Counter) -> dict[str, Tensor]:
    """Parameters and running statistics of what ships, as they change."""
    shipped = {name: value for name, value in counter.state_dict().items() if module_of(name) in (ENCODER, DENSITY)}
    return {name: value for name, value in shipped.items() if value.is_floating_point()}
