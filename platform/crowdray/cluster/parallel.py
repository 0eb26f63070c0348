"""Map a function over slices of a source's items, in this process or as Ray tasks."""

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from crowdray.cluster.runtime import MAX_RETRIES, connect, wait_for_workers
from crowdray.datasets.sources import Item, Source
from crowdray.errors import RESUME_HINT, JobFailed, UserError

if TYPE_CHECKING:
    import ray

MIN_RAY_S = 20.0
"""Expected seconds of work above which starting Ray pays off."""

Result = TypeVar("Result")
Slice = tuple[int, Sequence[Item]]
"""Number of a slice, and its items."""
Work = Callable[[Source, Sequence[Item], int], Result]
"""Called with the source, the items of a slice and its number."""


Progress = Callable[[int, int], AbstractContextManager[Callable[[int], None]]]
"""Called with the number of all images and of those done earlier; the block receives a function that counts more."""


class WorkStopped(JobFailed):
    """Workers were lost repeatedly on the same slice."""


@contextmanager
def no_progress(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """Show nothing."""
    yield lambda number: None


def map_slices(
    work: Work[Result],
    source: Source,
    slices: Sequence[Slice],
    *,
    done: int = 0,
    progress: Progress = no_progress,
) -> Generator[tuple[int, Result], None, None]:
    """Yield the number and result of each slice, in order of completion; the first exception of `work` ends it.

    Args:
        done: Images finished by an earlier run, for the progress.
    """
    items = [item for _, slice_items in slices for item in slice_items]
    lengths = {number: len(slice_items) for number, slice_items in slices}
    # A GPU is allocated by Ray: this process may run on a node without one.
    use_ray = source.teacher.gpu or (len(slices) > 1 and _seconds_to_load(source, items) > MIN_RAY_S)
    local = ((number, work(source, slice_items, number)) for number, slice_items in slices)
    results = _map_on_cluster(work, source, slices) if use_ray else local
    with progress(done + len(items), done) as advance, closing(results):
        for number, result in results:
            yield number, result
            advance(lengths[number])


def _seconds_to_load(source: Source, items: Sequence[Item]) -> float:
    """Estimate the seconds to load all items in this process from one in the middle."""
    sample = items[len(items) // 2]
    try:
        source.load(sample)  # warm-up: imports and tables
        started = time.perf_counter()
        source.load(sample)
    except UserError:
        return 0.0  # the work itself reports it
    return (time.perf_counter() - started) * len(items)


def _map_on_cluster(
    work: Work[Result], source: Source, slices: Sequence[Slice]
) -> Generator[tuple[int, Result], None, None]:
    """Run slices as Ray tasks, two in flight per CPU so that none idles."""
    with connect() as resources:
        if source.teacher.gpu and not resources.gpus:
            raise UserError(f"--depth {source.teacher.name} needs a GPU, and Ray has none; remove the option cuda")
        import ray

        wait_for_workers(resources, 1, {"CPU": 1, "GPU": int(source.teacher.gpu)}, partial(print, flush=True))
        task: Any = ray.remote(num_gpus=int(source.teacher.gpu), max_retries=MAX_RETRIES)(work)
        shared = ray.put(source)
        waiting = list(slices)[::-1]
        running: dict[ray.ObjectRef[Result], Slice] = {}
        while waiting or running:
            while waiting and len(running) < 2 * max(1, resources.cpus):
                number, items = waiting.pop()
                running[task.options(name=f"slice {number}").remote(shared, items, number)] = number, items
            (finished, *_), _ = ray.wait(list(running), num_returns=1)
            number, items = running.pop(finished)
            yield number, _result(finished, items)


def _result(finished: "ray.ObjectRef[Result]", items: Sequence[Item]) -> Result:
    """Fetch the result of a slice; a UserError is unwrapped, lost workers become WorkStopped."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(finished)
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None
    except RayError as error:
        first, last = items[0], items[-1]
        raise WorkStopped(
            f"workers were lost {MAX_RETRIES + 1} times on {first.split}/{first.name} to {last.split}/{last.name} "
            f"({type(error).__name__}). If memory ran out, give Ray fewer CPUs; {RESUME_HINT}"
        ) from error
