"""From a source to a dataset, slice by slice: by this process alone, or on all the CPUs of a cluster."""

import time
from collections.abc import Generator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

from crowdray import storage
from crowdray.cluster.progress import counting
from crowdray.cluster.runtime import connect
from crowdray.data.conversion import Conversion, Slice, begun, convert_slice
from crowdray.data.journal import SliceResult
from crowdray.data.shards import Index
from crowdray.data.sources import Item, Source
from crowdray.errors import UserError

if TYPE_CHECKING:
    import ray

WORTH_RAY_S = 20.0
"""Expected seconds of work from which on Ray is worth its own start."""

RETRIES = 3
"""Workers or nodes that a slice may lose before it is held to kill them itself."""


class ConversionStopped(RuntimeError):
    """Workers died over one slice time and again."""


def convert(
    source: Source, dest: str, *, splits: Sequence[str] = (), overwrite: bool = False, strict: bool = False
) -> Index:
    """Convert a source into a dataset at `dest` and publish it; returns its index.

    The bytes depend neither on who converts nor on how often it was started. Items that cannot be used are left out
    and listed; with `strict`, or when they are most of a split, a UserError lists them and nothing is published.
    Whatever ends it early, finished slices stay for the next start.
    """
    with begun(source, dest, splits=splits, overwrite=overwrite, tell=_say) as work:
        try:
            _convert(work)
            return work.publish(strict=strict)
        except BaseException:
            if work.finished:
                kept = f"{len(work.finished)} of {len(work.parts)} slices are finished and stay in {work.dest}"
                _say(f"{kept}: the same command goes on from there")
            raise


def _convert(work: Conversion) -> None:
    """Bring all slices of a conversion to their end, and show how far it is."""
    waiting = work.waiting
    resumed = len(work.parts) - len(waiting)
    if resumed:
        _say(f"going on after {resumed} of {len(work.parts)} slices")
    total, left = (sum(len(part.items) for part in parts) for parts in (work.parts, waiting))
    spread = len(waiting) > 1 and _seconds_of(work.source, [item for p in waiting for item in p.items]) > WORTH_RAY_S
    results = _on_cluster(work) if spread else (work.convert(part) for part in waiting)
    bad = sum(len(result.quarantined) for result in work.finished.values())
    with counting("images", total, done=total - left) as advance, closing(results):
        for result in results:
            work.add(result)
            bad += len(result.quarantined)
            notes = [f"{bad} quarantined" if bad else "", f"{resumed} slices resumed" if resumed else ""]
            advance(len(work.parts[result.number].items), ", ".join(filter(None, notes)))


def _say(text: str) -> None:
    print(text, flush=True)


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


def _on_cluster(work: Conversion) -> Generator[SliceResult, None, None]:
    """Slices as Ray tasks, in the order in which they end; two per CPU are under way, so that none idles."""
    with connect() as resources:
        import ray

        task: Any = ray.remote(max_retries=RETRIES)(convert_slice)
        shared = ray.put(work.source)
        waiting = work.waiting[::-1]
        running: dict[ray.ObjectRef[SliceResult], Slice] = {}
        while waiting or running:
            while waiting and len(running) < 2 * max(1, resources.cpus):
                part = waiting.pop()
                running[task.remote(shared, part.items, work.dest, part.number, part.key)] = part
            (ended, *_), _ = ray.wait(list(running), num_returns=1)
            yield _result(ended, running.pop(ended))


def _result(ended: "ray.ObjectRef[SliceResult]", part: Slice) -> SliceResult:
    """What a worker made of a slice; what Ray wrapped is raised as it was, or as what happened, in a sentence."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        result = ray.get(ended)
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, UserError) else error from None
    except RayError as error:
        first, last = part.items[0], part.items[-1]
        raise ConversionStopped(
            f"workers were lost {RETRIES + 1} times over {first.split}/{first.name} to {last.split}/{last.name} "
            f"({type(error).__name__}). If memory ran out, give Ray fewer CPUs; the same command goes on"
        ) from error
    _check_reach(result)
    return result


def _check_reach(result: SliceResult) -> None:
    """A file that a worker misses and this process does not is no fault of the item."""
    if strange := next(filter(storage.exists, result.missing), None):
        raise UserError(
            f"a worker finds no {strange}, which this process does: with several nodes --source must be a place that "
            "all of them reach, a shared folder or a URI such as s3://bucket/folder"
        )
