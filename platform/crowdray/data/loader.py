"""Batches of one rank, the same in every run of an epoch, optionally prepared by threads ahead of their use."""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from itertools import chain, groupby, islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from crowdray.data.batch import Batch, Crop, collate
from crowdray.data.gpu_cache import GpuImageCache
from crowdray.data.image_cache import AnnotatedImage, EncodedImage, ImageCache, scaled_size, source_rows
from crowdray.data.sampling import WindowConfig, draw_scale, draw_window, epoch_batches, rank_slice

_MIN_THREADS, _MAX_THREADS = 2, 8
"""Bounds of the number of decoding threads per rank, which is otherwise torch's number of threads."""


@dataclass(eq=False)
class Loader:
    """Batches of one rank. An epoch's batches depend only on its number, not on earlier epochs."""

    images: ImageCache | GpuImageCache
    rows: NDArray[np.int64]
    """Dataset rows to train on."""
    windows: WindowConfig
    _: KW_ONLY
    seed: int = 0
    """Random seed of order and windows."""
    rank: int = 0
    world: int = 1
    pin: bool = False
    """Put batches in page-locked memory."""
    ahead: int = 0
    """Number of batches that threads prepare ahead; 0 prepares each when it is needed."""

    def __post_init__(self) -> None:
        self._batch, self._repeats = self.windows.sampling.batch, self.windows.sampling.crops_per_image
        threads = max(_MIN_THREADS, min(_MAX_THREADS, torch.get_num_threads()))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="crowdray-loader")
        self._prefetched: tuple[int, bool, list[Future[Batch]]] = (0, False, [])
        """Epoch and depth of the batches that were started for the next epoch, and these."""

    def without_augmentation(self) -> "Loader":
        """A loader of windows that keep their size and colours, as evaluated images do; it prepares none ahead."""
        sampling = replace(self.windows.sampling, scale=0.0, brightness=0.0, contrast=0.0, colour=0.0)
        return replace(self, windows=replace(self.windows, sampling=sampling), ahead=0)

    def steps(self) -> int:
        """Updates per epoch."""
        return max(1, len(self.rows) * self._repeats // self._batch)

    def epoch(self, number: int, depth: bool = True) -> Generator[Batch, None, None]:
        """The batches of an epoch in order; towards its end, the first batches of the next epoch are prepared too.

        `depth` says whether it is needed. Closing the iterator cancels pending preparations. Batches from a
        `GpuImageCache` have pixels only after `Batch.to`.
        """
        jobs = self._jobs(number, depth)
        if not self.ahead:
            yield from (job() for job in jobs)
            return
        next_count = min(self.ahead, self.steps())
        pending = self._take_prefetched(number, depth)
        jobs = islice(chain(jobs, islice(self._jobs(number + 1, depth), next_count)), len(pending), None)
        try:
            for job in jobs:
                pending.append(self._pool.submit(job))
                if len(pending) > self.ahead:
                    yield pending.pop(0).result()
            while len(pending) > next_count:
                yield pending.pop(0).result()
            self._prefetched, pending = (number + 1, depth, pending), []
        finally:
            for future in pending:
                future.cancel()

    def _take_prefetched(self, number: int, depth: bool) -> list[Future[Batch]]:
        """The batches of this epoch that were already started; those of another epoch are cancelled."""
        *prefetched, futures = self._prefetched
        self._prefetched = 0, False, []
        if prefetched == [number, depth]:
            return futures
        for future in futures:
            future.cancel()
        return []

    def _jobs(self, number: int, depth: bool) -> Iterator[Callable[[], Batch]]:
        """A function for each batch of an epoch that prepares it."""
        batches = epoch_batches(len(self.rows), self._batch, seed=self.seed, epoch=number, repeats=self._repeats)
        for position, batch in enumerate(batches):
            draws = rank_slice(batch, self.rank, self.world)
            yield partial(self._collect, draws, number, position, len(batch), depth)

    def _collect(self, draws: NDArray[np.int64], epoch: int, number: int, global_size: int, depth: bool) -> Batch:
        join = self.images.collate if isinstance(self.images, GpuImageCache) else collate
        batch = join(self._crops(draws, epoch, number), self.windows, global_size, depth)
        return batch.pin() if self.pin else batch

    def _crops(self, draws: NDArray[np.int64], epoch: int, number: int) -> Iterator[Crop[Any]]:
        """Crops image by image, so that at most two decoded images are in memory."""
        scale = draw_scale(self.windows, seed=self.seed, epoch=epoch, batch=number)
        for position, group in groupby(draws.tolist(), lambda draw: draw // self._repeats):
            image: AnnotatedImage = self.images.open(int(self.rows[position]))
            size = scaled_size(image, scale, self.windows.stride)
            repeats = [draw % self._repeats for draw in group]
            windows = [
                draw_window(self.windows, size, seed=self.seed, epoch=epoch, sample=image.row, repeat=repeat)
                for repeat in repeats
            ]
            if isinstance(image, EncodedImage):
                bottom = max(min(window.top + window.height, size[0]) for window in windows)
                image = image.decode(*source_rows(image, size, slice(min(window.top for window in windows), bottom)))
            yield from (Crop(image, size, window) for window in windows)
