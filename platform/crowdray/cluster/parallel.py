"""Work on the items of a source, slice by slice: by this process alone, or on all the CPUs of a cluster."""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any, TypeVar

from crowdray.cluster.runtime import connect
from crowdray.console.progress import counting
from crowdray.datasets.sources import Item, Source
from crowdray.errors import JobFailed, UserError

if TYPE_CHECKING:
    import ray

WORTH_RAY_S = 20.0
"""Expected seconds of work from which on Ray is worth its own start."""

RETRIES = 3
"""Workers or nodes that a slice may lose before it is held to kill them itself."""

Result = TypeVar("Result")
Part = tuple[int, Sequence[Item]]
"""Number of a slice, and its items."""
Work = Callable[[Source, Sequence[Item], int], Result]
"""Told the source, the items of a slice and its number."""


class WorkStopped(JobFailed):
    """Workers died over one slice time and again."""


def map_slices(
    work: Work[Result],
    source: Source,
    parts: Sequence[Part],
    *,
    done: int = 0,
    note: Callable[[Result], str] = lambda result: "",
) -> Generator[tuple[int, Result], None, None]:
    """Number and result of work(source, items, number) for each slice, in the order in which they end.

    Shows how many images are done, after `done` of an earlier start, and what `note` says of all so far, told the
    newest result. What `work` raises ends it all.
    """
    items = [item for _, slice_items in parts for item in slice_items]
    lengths = {number: len(slice_items) for number, slice_items in parts}
    # A GPU is Ray's to give: this process may stand where there is none.
    spread = source.gpu or (len(parts) > 1 and _seconds_of(source, items) > WORTH_RAY_S)
    results = (_on_cluster if spread else _here)(work, source, parts)
    with counting("images", done + len(items), done=done) as advance, closing(results):
        for number, result in results:
            yield number, result
            advance(lengths[number], note(result))


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


def _here(work: Work[Result], source: Source, parts: Sequence[Part]) -> Generator[tuple[int, Result], None, None]:
    for number, items in parts:
        yield number, work(source, items, number)


def _on_cluster(work: Work[Result], source: Source, parts: Sequence[Part]) -> Generator[tuple[int, Result], None, None]:
    """Slices as Ray tasks; two per CPU are under way, so that none idles."""
    with connect() as resources:
        if source.gpu and not resources.gpus:
            raise UserError(f"--depth {source.depth_teacher} needs a GPU, and Ray has none here; leave cuda out")
        import ray

        task: Any = ray.remote(num_gpus=int(source.gpu), max_retries=RETRIES)(work)
        shared = ray.put(source)
        waiting = list(parts)[::-1]
        running: dict[ray.ObjectRef[Result], Part] = {}
        while waiting or running:
            while waiting and len(running) < 2 * max(1, resources.cpus):
                number, items = waiting.pop()
                running[task.options(name=f"slice {number}").remote(shared, items, number)] = number, items
            (ended, *_), _ = ray.wait(list(running), num_returns=1)
            number, items = running.pop(ended)
            yield number, _result(ended, items)


def _result(ended: "ray.ObjectRef[Result]", items: Sequence[Item]) -> Result:
    """What a worker made of a slice; what Ray wrapped is raised as it was, or as what happened, in a sentence."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(ended)
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None
    except RayError as error:
        first, last = items[0], items[-1]
        raise WorkStopped(
            f"workers were lost {RETRIES + 1} times over {first.split}/{first.name} to {last.split}/{last.name} "
            f"({type(error).__name__}). If memory ran out, give Ray fewer CPUs; the same command goes on"
        ) from error
