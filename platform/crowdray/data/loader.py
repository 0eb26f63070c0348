"""Batches of windows for one rank: decoded once, cut anew in each epoch; while an accelerator trains, in threads."""

from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import chain, groupby, islice

import numpy as np
import torch
from numpy.typing import NDArray

from crowdray.data.batch import Batch, P, View, collate
from crowdray.data.gpu_cache import GpuImageCache
from crowdray.data.image_cache import ImageCache, scaled_size
from crowdray.data.sampling import WindowRule, draw_scale, draw_window, epoch_batches, rank_share

_FEWEST_DECODERS, _MOST_DECODERS = 2, 8
"""Decoding threads of a rank: as many as it may use for anything else, within these bounds."""


class Loader:
    """Batches of one rank. An epoch's batches depend on its number alone, not on what came before."""

    def __init__(
        self,
        store: ImageCache | GpuImageCache,
        rows: NDArray[np.int64],
        rule: WindowRule,
        *,
        batch: int,
        repeats: int = 1,
        seed: int = 0,
        rank: int = 0,
        world: int = 1,
        pin: bool = False,
        ahead: int = 0,
    ) -> None:
        self.store = store
        self.rows = rows
        self.rule = rule
        self.batch = batch
        self.repeats = repeats
        self.seed = seed
        self.rank = rank
        self.world = world
        self.pin = pin
        self.ahead = ahead
        threads = max(_FEWEST_DECODERS, min(_MOST_DECODERS, torch.get_num_threads()))
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="crowdray-loader")
        self._begun: tuple[int, bool, list[Future[Batch]]] = (0, False, [])
        """Epoch and depth of the batches that are under way for it, and these."""

    def steps(self) -> int:
        """Updates of one epoch."""
        return max(1, len(self.rows) * self.repeats // self.batch)

    def epoch(self, number: int, depth: bool = True) -> Generator[Batch, None, None]:
        """The batches of an epoch in order, prepared ahead of their use, and behind them the first of the next epoch;
        without depth where nothing is learned from it. Of pictures on a device they have their pixels once they are
        there. Closing the iterator ends the preparations."""
        jobs = self._jobs(number, depth)
        if not self.ahead:
            yield from (job() for job in jobs)
            return
        begun_next = min(self.ahead, self.steps())
        pending = self._take_begun(number, depth)
        jobs = islice(chain(jobs, islice(self._jobs(number + 1, depth), begun_next)), len(pending), None)
        try:
            for job in jobs:
                pending.append(self._pool.submit(job))
                if len(pending) > self.ahead:
                    yield pending.pop(0).result()
            while len(pending) > begun_next:
                yield pending.pop(0).result()
            self._begun, pending = (number + 1, depth, pending), []
        finally:
            for future in pending:
                future.cancel()

    def _take_begun(self, number: int, depth: bool) -> list[Future[Batch]]:
        """The batches of this epoch that are under way already; those of another one are given up."""
        *begun, futures = self._begun
        self._begun = 0, False, []
        if begun == [number, depth]:
            return futures
        for future in futures:
            future.cancel()
        return []

    def _jobs(self, number: int, depth: bool) -> Iterator[Callable[[], Batch]]:
        """What prepares each batch of an epoch."""
        batches = epoch_batches(len(self.rows), self.batch, seed=self.seed, epoch=number, repeats=self.repeats)
        for position, batch in enumerate(batches):
            share = rank_share(batch, self.rank, self.world)
            yield partial(self._collect, share, number, position, len(batch), depth)

    def _collect(self, share: NDArray[np.int64], epoch: int, number: int, total: int, depth: bool) -> Batch:
        if isinstance(self.store, GpuImageCache):
            resident = self._views(self.store.__getitem__, share, epoch, number)
            batch = self.store.collate(resident, self.rule, total, depth)
        else:
            batch = collate(self._views(self.store.__getitem__, share, epoch, number), self.rule, total, depth)
        return batch.pin() if self.pin else batch

    def _views(
        self, picture_of: Callable[[int], P], share: NDArray[np.int64], epoch: int, number: int
    ) -> Iterator[View[P]]:
        """One picture after the other, so that no more than two are decoded at a time."""
        scale = draw_scale(self.rule, seed=self.seed, epoch=epoch, batch=number)
        for position, draws in groupby(share.tolist(), lambda draw: draw // self.repeats):
            picture = picture_of(int(self.rows[position]))
            size = scaled_size(picture, scale, self.rule.stride)
            for draw in draws:
                repeat = draw % self.repeats
                window = draw_window(self.rule, size, seed=self.seed, epoch=epoch, sample=picture.row, repeat=repeat)
                yield View(picture, size, window)
