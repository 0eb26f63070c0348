"""From a source to a dataset, slice by slice: by this process alone, or on all the CPUs of a cluster."""

import time
from collections.abc import Iterator, Sequence

from crowdray.cluster.progress import counting
from crowdray.cluster.runtime import connect
from crowdray.data.conversion import (
    SliceResult,
    check_destination,
    convert_slice,
    discard,
    publish,
    slices,
)
from crowdray.data.shards import Index
from crowdray.data.sources import Item, Source
from crowdray.errors import UserError

WORTH_RAY_S = 20.0
"""Expected seconds of work from which on Ray is worth its own start."""


def convert(source: Source, dest: str, *, splits: Sequence[str] = (), overwrite: bool = False) -> Index:
    """Convert a source into a dataset at `dest` and publish it; returns its index.

    The bytes do not depend on who converts. Raises UserError with all problems together; then, as after an
    interrupt, nothing is published and nothing half-written stays.
    """
    check_destination(dest, overwrite=overwrite)
    items = source.items(splits)
    parts = slices(items)
    # A GPU is Ray's to give: this process may stand where there is none.
    spread = source.gpu or (len(parts) > 1 and _seconds_of(source, items) > WORTH_RAY_S)
    results = []
    try:
        with counting("images", len(items)) as advance:
            for result in (_on_cluster if spread else _here)(source, parts, dest):
                results.append(result)
                advance(len(parts[result.number]))
        return publish(dest, source, results, splits=splits, overwrite=overwrite)
    except BaseException:
        discard(dest)
        raise


def _seconds_of(source: Source, items: Sequence[Item]) -> float:
    """What loading everything in this process would take, from one image in the middle."""
    sample = items[len(items) // 2]
    try:
        source.load(sample)  # the first one pays for imports and tables
        started = time.perf_counter()
        source.load(sample)
    except UserError:
        return 0.0  # the conversion itself will tell
    return (time.perf_counter() - started) * len(items)


def _here(source: Source, parts: Sequence[Sequence[Item]], dest: str) -> Iterator[SliceResult]:
    for number, items in enumerate(parts):
        yield convert_slice(source, items, dest, number)


def _on_cluster(source: Source, parts: Sequence[Sequence[Item]], dest: str) -> Iterator[SliceResult]:
    """Slices as Ray tasks, in the order in which they end; two per CPU are under way, so that none idles."""
    with connect() as resources:
        if source.gpu and not resources.gpus:
            raise UserError(f"--depth {source.depth_teacher} needs a GPU, and Ray has none here; leave cuda out")
        import ray

        task = ray.remote(num_gpus=int(source.gpu))(convert_slice)
        shared = ray.put(source)
        waiting = list(enumerate(parts))[::-1]
        running: list[ray.ObjectRef[SliceResult]] = []
        while waiting or running:
            while waiting and len(running) < 2 * max(1, resources.cpus):
                number, items = waiting.pop()
                running.append(task.remote(shared, items, dest, number))
            done, running = ray.wait(running, num_returns=1)
            yield from ray.get(done)
