"""From a source to a dataset, slice by slice: by this process alone, or on all the CPUs of a cluster."""

from collections.abc import Sequence

from crowdray.cluster.spread import over_slices
from crowdray.data.conversion import SliceResult, check_destination, convert_slice, discard, publish, slices
from crowdray.data.shards import Index
from crowdray.data.sources import Item, Source


def convert(source: Source, dest: str, *, splits: Sequence[str] = (), overwrite: bool = False) -> Index:
    """Convert a source into a dataset at `dest` and publish it; returns its index.

    The bytes do not depend on who converts. Raises UserError with all problems together; then, as after an
    interrupt, nothing is published and nothing half-written stays.
    """
    check_destination(dest, overwrite=overwrite)

    def work(source: Source, items: Sequence[Item], number: int) -> SliceResult:
        return convert_slice(source, items, dest, number)

    parts = list(enumerate(slices(source.items(splits))))
    try:
        results = [result for _, result in over_slices(work, source, parts)]
        return publish(dest, source, results, splits=splits, overwrite=overwrite)
    except BaseException:
        discard(dest)
        raise
