"""Find a batch size that fits into memory, by real training steps of the most expensive stage."""

import math
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter

import numpy as np
import torch

from crowdray.config import Config
from crowdray.data.batch import Batch, Crop, collate
from crowdray.data.image_cache import scaled_size
from crowdray.data.sampling import draw_window
from crowdray.data.shards import Dataset
from crowdray.data.splits import split_rows
from crowdray.errors import InfeasibleConfigError, UserError
from crowdray.training.distributed import World
from crowdray.training.errors import is_out_of_memory
from crowdray.training.flops import peak_memory, synchronize
from crowdray.training.inputs import build_loader, open_images
from crowdray.training.stage_trainer import StageTrainer
from crowdray.training.stages import build_stages
from crowdray.training.state import create_state

MEMORY_FRACTION = 0.9
"""Fraction of the memory available to training steps; the rest is a margin."""
MIN_SPEEDUP = 1.05
"""A doubled microbatch has to raise the windows per second by this factor."""
TIMED_STEPS = 3
"""Timed steps per size."""
WARMUP_STEPS = {"no": 1, "yes": 1, "graphs": 3}
"""Untimed steps before them, by numerics.compile: they allocate, compile, and record CUDA graphs."""


def measure_batch_size(
    config: Config, dataset: Dataset, *, device: torch.device, workers: int, memory_bytes: int | None = None
) -> int:
    """Find a global batch size with real training steps in this process, which stands for one worker.

    Args:
        memory_bytes: limit of a worker on a CPU, where the system kills a process that exceeds it; None if
            allocations beyond the limit fail, as on a GPU.

    Returns:
        Windows per step over all workers: a multiple of workers and gradient accumulation steps.

    Raises:
        UserError: not even one window fits.
    """
    timer = StepTimer(config, dataset, device, memory_bytes, distributed=workers > 1)
    microbatches = workers * config.optimizer.grad_accumulation_steps
    limit = timer.windows_per_epoch // microbatches
    if limit and not (size := search_microbatch_size(timer.windows_per_s, limit)):
        height, width = timer.largest_windows(1).image.shape[-2:]
        raise UserError(
            f"no window of {height}x{width} pixels fits into {MEMORY_FRACTION:.0%} of the memory of {device}; "
            f"lower --sampling.crop ({config.sampling.crop} now) or --sampling.context ({config.sampling.context} "
            "now), or set --numerics.activation_checkpointing True"
        )
    return microbatches * (size if limit else 1)


def search_microbatch_size(windows_per_s: Callable[[int], float | None], limit: int) -> int:
    """Find the smallest power of two beyond which doubling hardly speeds up training.

    If `limit` or the memory ends before that, the largest size that fits; 0 if none does.

    Args:
        windows_per_s: measures a size above all that fit so far; None if it does not fit.
    """
    fits, speed, candidate = 0, 0.0, 1
    while candidate <= limit and (measured := windows_per_s(candidate)) is not None:
        if measured < MIN_SPEEDUP * speed:
            return fits
        fits, speed, candidate = candidate, measured, 2 * candidate
    power, last = fits, speed
    too_large = min(candidate, limit + 1)
    while too_large - fits > 1:
        middle = (fits + too_large) // 2
        if (measured := windows_per_s(middle)) is None:
            too_large = middle
        else:
            fits, last = middle, measured
    return fits if last >= MIN_SPEEDUP * speed else power


class StepTimer:
    """Times training steps with learning rate 0 on the largest and most crowded windows of the dataset.

    Args:
        distributed: also allocate the gradient buckets of DDP, which a single process does not have.
    """

    def __init__(
        self, config: Config, dataset: Dataset, device: torch.device, memory_bytes: int | None, *, distributed: bool
    ) -> None:
        config = replace(config, sampling=replace(config.sampling, batch=config.optimizer.grad_accumulation_steps))
        rows, _ = split_rows(config, dataset, workers=1)
        self.windows_per_epoch = len(rows) * config.sampling.crops_per_image
        self.images = open_images(config, dataset)
        self.state = create_state(config, dataset, rows, world=World(), device=device)
        stage = max(build_stages(config), key=lambda stage: (stage.trains_encoder, len(stage.tasks)))
        loader = build_loader(self.state, self.images, rows)
        self.stage_trainer = StageTrainer(self.state, replace(stage, balanced=False), loader)
        self.stage_trainer.learning_rate = 0.0
        gradients = sum(map(torch.Tensor.numel, self.stage_trainer.parameters))
        self.gradient_buckets = torch.ones(gradients if distributed else 0, device=device)
        images = _image_cache_bytes(config, dataset)
        self._available = None if memory_bytes is None else MEMORY_FRACTION * memory_bytes - images
        self._peaks = {0: peak_memory(device)}

    def windows_per_s(self, size: int) -> float | None:
        """Time steps with microbatches of a size; returns windows per second, None if they do not fit."""
        state = self.state
        if self._available is not None and self._expected_memory(size) > self._available:
            return None
        batch = self.largest_windows(size * state.config.optimizer.grad_accumulation_steps)
        if state.device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(MEMORY_FRACTION, state.device)
        try:
            elapsed = self._time_steps(batch)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        finally:
            if state.device.type == "cuda":
                torch.cuda.set_per_process_memory_fraction(1.0, state.device)
        self._peaks[size] = peak_memory(state.device)
        return TIMED_STEPS * len(batch.rows) / elapsed

    def largest_windows(self, number: int) -> Batch:
        """Return windows of the tallest, widest and most crowded images, at the largest scale."""
        sampling, windows = self.state.config.sampling, self.stage_trainer.loader.windows
        dataset = self.images.dataset
        sizes = dataset.sizes("train") * (1 + sampling.scale) / sampling.downsample
        lengths = np.array([[windows.window_length(round(side)) for side in size] for size in sizes.tolist()])
        extremes = (*lengths.argmax(axis=0), dataset.counts("train").argmax())
        images = [self.images[row] for row in dataset.rows("train")[list(extremes)].tolist()]
        crops = []
        for repeat in range(number):
            image = images[repeat % len(images)]
            size = scaled_size(image, 1 + sampling.scale, windows.stride)
            window = draw_window(windows, size, seed=0, epoch=0, sample=image.row, repeat=repeat)
            crops.append(Crop(image, size, window))
        return collate(crops, replace(windows, reach=math.inf))  # no window has more heads than its whole image

    def _time_steps(self, batch: Batch) -> float:
        device = self.state.device
        for _ in range(WARMUP_STEPS[self.state.config.numerics.compile]):
            self.stage_trainer.train_step(batch)
        synchronize(device)
        started = perf_counter()
        for _ in range(TIMED_STEPS):
            self.stage_trainer.train_step(batch)
        synchronize(device)
        return perf_counter() - started

    def _expected_memory(self, size: int) -> float:
        """Extrapolate the process's bytes from the last two sizes.

        The first difference includes the optimizer's state, so the estimate errs on the safe side.
        """
        if len(self._peaks) == 1:
            return self._peaks[0]
        before, last = sorted(self._peaks)[-2:]
        slope = (self._peaks[last] - self._peaks[before]) / (last - before)
        return self._peaks[last] + slope * (size - last)


def explain_too_large(trainer: StageTrainer, batch: Batch) -> InfeasibleConfigError:
    """Return the error for a batch that does not fit, with the gradient accumulation steps that do.

    Halves the microbatch until its gradients fit.
    """
    state, local = trainer.state, len(batch.rows)
    height, width = batch.size
    trainer.optimizer.zero_grad(set_to_none=True)
    state.counter.eval()  # a synchronized BatchNorm in training mode would wait for the other ranks
    fits = failed = -(-local // min(state.config.optimizer.grad_accumulation_steps, local))
    while fits := fits // 2:
        # A quarter more, as a real step keeps other tensors too.
        if _gradients_fit(trainer, batch.take(fits + fits // 4), batch):
            break
    fix = "not even one does"
    if fits:
        fix = f"{fits} at a time do: set --optimizer.grad_accumulation_steps {-(-local // fits)}"
    sampling = state.config.sampling
    return InfeasibleConfigError(
        f"{trainer.stage.name} stage: {failed} windows of {height}x{width} pixels do not fit into the memory of "
        f"{state.device}, {fix}, or lower --sampling.crop ({sampling.crop} now) or --sampling.context "
        f"({sampling.context} now)"
    )


def _gradients_fit(trainer: StageTrainer, microbatch: Batch, batch: Batch) -> bool:
    """Whether the gradients of a microbatch fit into memory, which is free again afterwards."""
    try:
        # `forward` is never the compiled call, which would be compiled for each size.
        losses = trainer.microbatch_losses(trainer.state.counter.forward, microbatch, batch)
        torch.autograd.grad(losses.sum(), trainer.parameters, allow_unused=True)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return False
    return True


def _image_cache_bytes(config: Config, dataset: Dataset) -> float:
    """Expected bytes of a worker's decoded images: 3 of colour and 2 of depth per pixel."""
    pixels = float(dataset.sizes("train").prod(axis=1).sum()) / config.sampling.downsample**2
    return min(5 * pixels, config.sampling.cache_gib * 2**30)
