"""How large a batch should be, measured before a run begins: by updates of the stage that takes most memory."""

import math
from collections.abc import Callable
from dataclasses import replace
from time import perf_counter
from typing import NoReturn

import numpy as np
import torch

from crowdray.config import Config
from crowdray.data.batch import Batch, View, collate
from crowdray.data.image_cache import scaled_size
from crowdray.data.sampling import draw_window
from crowdray.data.shards import Dataset
from crowdray.errors import UserError
from crowdray.training.distributed import World
from crowdray.training.errors import is_out_of_memory
from crowdray.training.flops import peak_memory, wait
from crowdray.training.stage_trainer import StageTrainer
from crowdray.training.trainer import Trainer

SHARE = 0.9
"""Part of the memory that is given away; the rest is for what a training has beside its updates."""
RISE = 1.05
"""Twice the windows have to be this much faster each."""
TIMED = 3
"""Updates of each size that are timed."""
WARM = {"no": 1, "yes": 1, "graphs": 3}
"""Updates before them, by numerics.compile: they make room, compile, and record graphs in the second."""


def largest_batch(
    config: Config, dataset: Dataset, *, device: torch.device, workers: int, room: int | None = None
) -> int:
    """Windows of one update over all workers together, a multiple of the workers and of the parts of an update: as
    many as `fastest` finds for one part of one worker, which is this process.

    room: bytes that a worker may take on a CPU, where asking for more would have it killed; None for a bound that the
    system sets by refusing. Raises UserError where not one window fits.
    """
    updates = _Updates(config, dataset, device, room, grouped=workers > 1)
    parts = workers * config.optimizer.grad_accumulation_steps
    most = len(updates.training.train_rows) * config.sampling.crops_per_image // parts
    if most and not (found := fastest(updates.windows_per_s, most)):
        height, width = updates.batch(1).image.shape[-2:]
        raise UserError(
            f"not even one window of {height}x{width} pixels fits into {SHARE:.0%} of the memory of {device}: give "
            f"smaller ones, --sampling.crop {config.sampling.crop} and --sampling.context {config.sampling.context} "
            "now, or --numerics.activation_checkpointing True"
        )
    return parts * (found if most else 1)


def fastest(windows_per_s: Callable[[int], float | None], most: int) -> int:
    """The smallest power of two beyond which windows are hardly taken faster; where memory, or `most`, ends before
    that, the largest number that fits. 0 where not one does.

    windows_per_s: told a number of windows, larger than all that fitted before; None where they do not fit.
    """
    fits, pace, ahead = 0, 0.0, 1
    while ahead <= most and (found := windows_per_s(ahead)) is not None:
        if found < RISE * pace:
            return fits
        fits, pace, ahead = ahead, found, 2 * ahead
    power, last = fits, pace
    too_many = min(ahead, most + 1)
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if (found := windows_per_s(middle)) is None:
            too_many = middle
        else:
            fits, last = middle, found
    return fits if last >= RISE * pace else power


class _Measured(StageTrainer):
    """A stage that leaves it to others what to do about a batch that does not fit."""

    def _too_large(self, batch: Batch, taken: int) -> NoReturn:
        raise torch.OutOfMemoryError(f"{len(batch.rows)} windows in {taken} parts")


class _Updates:
    """Real updates that change nothing, of windows as large and as full of heads as the data has them."""

    def __init__(self, config: Config, dataset: Dataset, device: torch.device, room: int | None, grouped: bool) -> None:
        smallest = replace(config.sampling, batch=config.optimizer.grad_accumulation_steps)
        self.training = Trainer(replace(config, sampling=smallest), dataset, world=World(), device=device)
        dearest = max(self.training.stages, key=lambda stage: (stage.trains_encoder, len(stage.tasks)))
        self.running = _Measured(self.training, replace(dearest, calibrated=False), None)
        self.running.rate = 0.0
        self.running.prepare()
        # The buckets in which a group's gradients are exchanged stay where this process has none between updates.
        exchanged = sum(map(torch.Tensor.numel, self.running.parameters)) if grouped else 0
        self.buckets = torch.ones(exchanged, device=device)
        self.room = None if room is None else SHARE * room - _pictures(config, dataset)
        self.peaks = {0: peak_memory(device)}

    def windows_per_s(self, size: int) -> float | None:
        """Windows per second in parts of this size; None where they do not fit."""
        training, device = self.training, self.training.device
        if self.room is not None and self._expected(size) > self.room:
            return None
        batch = self.batch(size * training.config.optimizer.grad_accumulation_steps)
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(SHARE, device)
        try:
            for _ in range(WARM[training.config.numerics.compile]):
                self.running._step(batch)
            wait(device)
            started = perf_counter()
            for _ in range(TIMED):
                self.running._step(batch)
            wait(device)
            elapsed = perf_counter() - started
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return None
        finally:
            if device.type == "cuda":
                torch.cuda.set_per_process_memory_fraction(1.0, device)
        self.peaks[size] = peak_memory(device)
        return TIMED * len(batch.rows) / elapsed

    def batch(self, size: int) -> Batch:
        """So many windows, at the largest size that images are shown at."""
        training, rule = self.training, self.training.loader.rule
        dataset, sampling = training.store.dataset, training.config.sampling
        sizes = dataset.sizes("train") * (1 + sampling.scale) / sampling.downsample
        windows = np.array([[rule.window(round(side)) for side in image] for image in sizes.tolist()])
        extremes = (*windows.argmax(axis=0), dataset.counts("train").argmax())
        rows = dataset.rows("train")[list(extremes)].tolist()
        pictures = [training.store[row] for row in rows]
        views = []
        for number in range(size):
            picture = pictures[number % len(pictures)]
            shown = scaled_size(picture, 1 + sampling.scale, rule.stride)
            window = draw_window(rule, shown, seed=0, epoch=0, sample=picture.row, repeat=number)
            views.append(View(picture, shown, window))
        return collate(views, replace(rule, reach=math.inf))  # no window has more heads than its whole image

    def _expected(self, size: int) -> float:
        """Bytes of the process with parts of this size, on the line through the last two that were measured; the first
        growth has the optimizer's state in it, and so errs on the safe side."""
        if len(self.peaks) == 1:
            return self.peaks[0]
        before, last = sorted(self.peaks)[-2:]
        slope = (self.peaks[last] - self.peaks[before]) / (last - before)
        return self.peaks[last] + slope * (size - last)


def _pictures(config: Config, dataset: Dataset) -> float:
    """Bytes that a worker's decoded images will take: three of colour and two of depth for each pixel."""
    pixels = float(dataset.sizes("train").prod(axis=1).sum()) / config.sampling.downsample**2
    return min(5 * pixels, config.sampling.cache_gib * 2**30)
