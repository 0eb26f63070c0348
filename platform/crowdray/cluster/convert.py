"""Conversion of a source into a dataset, in this process or on a cluster; an interrupted one resumes."""

from collections.abc import Sequence

from crowdray import storage
from crowdray.cluster.parallel import Progress, map_slices, no_progress
from crowdray.data.shards import Index
from crowdray.datasets.conversion import Conversion, convert_slice, open_conversion
from crowdray.datasets.resume import SliceResult
from crowdray.datasets.sources import Item, Source
from crowdray.errors import RESUME_HINT, UserError, escaped


def convert(
    source: Source,
    dest: str,
    *,
    splits: Sequence[str] = (),
    overwrite: bool = False,
    strict: bool = False,
    restart_markers: bool = False,
    progress: Progress = no_progress,
) -> Index:
    """Convert a source into a dataset at `dest` and publish it.

    The bytes depend neither on the number of workers nor on restarts; finished slices are kept on any failure.

    Empty `splits` means all; `strict` fails on any unusable item, otherwise only most of a split is an error;
    `restart_markers` adds them to JPEGs (see datasets.restart_markers).
    """
    options = {"overwrite": overwrite, "restart_markers": restart_markers}
    with open_conversion(source, dest, splits=splits, **options, log=_print) as conversion:
        try:
            if conversion.pending:
                _convert_pending(conversion, progress)
            return conversion.publish(strict=strict)
        except BaseException:
            if conversion.results:
                kept = f"{len(conversion.results)} of {len(conversion.slices)} slices are finished and kept"
                _print(f"{kept} in {conversion.dest}; {RESUME_HINT}")
            raise


def _convert_pending(conversion: Conversion, progress: Progress) -> None:
    slices = conversion.slices
    if resumed := len(conversion.results):
        _print(f"resuming after {resumed} of {len(slices)} slices")
    dest, keys, restart_markers = conversion.dest, conversion.keys, conversion.restart_markers

    def convert_part(source: Source, items: Sequence[Item], number: int) -> SliceResult:
        return convert_slice(source, items, dest, number, keys[number], restart_markers=restart_markers)

    done = sum(len(slices[number]) for number in conversion.results)
    parts = [(number, slices[number]) for number in conversion.pending]
    for _, result in map_slices(convert_part, conversion.source, parts, done=done, progress=progress):
        check_reachable(result)
        conversion.add(result)


def check_reachable(result: SliceResult) -> None:
    """Raise UserError if a file is missing for a worker but exists for this process."""
    if unreachable := next(filter(storage.exists, result.stats.missing), None):
        raise UserError(
            f"a worker cannot find {unreachable}, which exists for this process: with several nodes --source must be "
            "reachable by all of them, as a shared folder or a URI such as s3://bucket/folder"
        )


def _print(text: str) -> None:
    print(escaped(text), flush=True)
