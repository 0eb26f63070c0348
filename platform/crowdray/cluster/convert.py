"""From a source to a dataset, slice by slice, by this process or by a cluster; what was stopped goes on."""

from collections.abc import Sequence

from crowdray import storage
from crowdray.cluster.parallel import Progress, map_slices, no_progress
from crowdray.data.shards import Index
from crowdray.datasets.conversion import Conversion, begun, convert_slice
from crowdray.datasets.resume import SliceResult
from crowdray.datasets.sources import Item, Source
from crowdray.errors import UserError


def convert(
    source: Source,
    dest: str,
    *,
    splits: Sequence[str] = (),
    overwrite: bool = False,
    strict: bool = False,
    progress: Progress = no_progress,
) -> Index:
    """Convert a source into a dataset at `dest` and publish it; returns its index.

    The bytes depend neither on who converts nor on how often it was started. Items that cannot be used are left out
    and listed; with `strict`, or when they are most of a split, a UserError lists them and nothing is published.
    Whatever ends it early, finished slices stay for the next start.
    """
    with begun(source, dest, splits=splits, overwrite=overwrite, tell=_say) as work:
        try:
            if work.waiting:
                _convert(work, progress)
            return work.publish(strict=strict)
        except BaseException:
            if work.finished:
                kept = f"{len(work.finished)} of {len(work.parts)} slices are finished and stay in {work.dest}"
                _say(f"{kept}: the same command goes on from there")
            raise


def _convert(work: Conversion, progress: Progress) -> None:
    """Bring all slices of a conversion to their end, and show how far it is."""
    resumed = len(work.parts) - len(work.waiting)
    if resumed:
        _say(f"going on after {resumed} of {len(work.parts)} slices")
    dest, keys = work.dest, {part.number: part.key for part in work.waiting}

    def convert_part(source: Source, items: Sequence[Item], number: int) -> SliceResult:
        return convert_slice(source, items, dest, number, keys[number])

    def note(_newest: SliceResult) -> str:
        bad = sum(len(result.quarantined) for result in work.finished.values())
        counts = {"quarantined": bad, "slices resumed": resumed}
        return ", ".join(f"{count} {what}" for what, count in counts.items() if count)

    parts = [(part.number, part.items) for part in work.waiting]
    done = sum(len(part.items) for part in work.parts if part.number not in keys)
    for _, result in map_slices(convert_part, work.source, parts, done=done, note=note, progress=progress):
        _check_reach(result)
        work.add(result)


def _check_reach(result: SliceResult) -> None:
    """A file that a worker misses and this process does not is no fault of the item."""
    if strange := next(filter(storage.exists, result.missing), None):
        raise UserError(
            f"a worker finds no {strange}, which this process does: with several nodes --source must be a place that "
            "all of them reach, a shared folder or a URI such as s3://bucket/folder"
        )


def _say(text: str) -> None:
    print(text, flush=True)
