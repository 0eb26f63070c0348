"""Work on the items of a source, slice by slice: by this process alone, or on all the CPUs of a cluster."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from crowdray.cluster.progress import counting
from crowdray.cluster.runtime import connect
from crowdray.data.sources import Item, Source
from crowdray.errors import UserError

WORTH_RAY_S = 20.0
"""Expected seconds of work from which on Ray is worth its own start."""

Result = TypeVar("Result")
Part = tuple[int, Sequence[Item]]
"""Number of a slice, and its items."""


def over_slices(
    work: Callable[[Source, Sequence[Item], int], Result], source: Source, parts: Sequence[Part]
) -> Iterator[tuple[int, Result]]:
    """Number and result of work(source, items, number) for each slice, in the order in which they end.

    Shows how many images are done. What `work` raises ends it all.
    """
    items = [item for _, slice_items in parts for item in slice_items]
    lengths = {number: len(slice_items) for number, slice_items in parts}
    # A GPU is Ray's to give: this process may stand where there is none.
    spread = source.gpu or (len(parts) > 1 and _seconds_of(source, items) > WORTH_RAY_S)
    with counting("images", len(items)) as advance:
        for number, result in (_on_cluster if spread else _here)(work, source, parts):
            yield number, result
            advance(lengths[number])


def _seconds_of(source: Source, items: Sequence[Item]) -> float:
    """What loading everything in this process would take, from one image in the middle."""
    sample = items[len(items) // 2]
    try:
        source.load(sample)  # the first one pays for imports and tables
        started = time.perf_counter()
        source.load(sample)
    except UserError:
        return 0.0  # the work itself will tell
    return (time.perf_counter() - started) * len(items)


def _here(
    work: Callable[[Source, Sequence[Item], int], Result], source: Source, parts: Sequence[Part]
) -> Iterator[tuple[int, Result]]:
    for number, items in parts:
        yield number, work(source, items, number)


def _on_cluster(
    work: Callable[[Source, Sequence[Item], int], Result], source: Source, parts: Sequence[Part]
) -> Iterator[tuple[int, Result]]:
    """Slices as Ray tasks; two per CPU are under way, so that none idles."""
    with connect() as resources:
        if source.gpu and not resources.gpus:
            raise UserError(f"--depth {source.depth_teacher} needs a GPU, and Ray has none here; leave cuda out")
        import ray

        task: Any = ray.remote(num_gpus=int(source.gpu))(work)
        shared = ray.put(source)
        waiting = list(parts)[::-1]
        running: dict[ray.ObjectRef[Result], int] = {}
        while waiting or running:
            while waiting and len(running) < 2 * max(1, resources.cpus):
                number, items = waiting.pop()
                running[task.remote(shared, items, number)] = number
            for done in ray.wait(list(running), num_returns=1)[0]:
                yield running.pop(done), ray.get(done)
