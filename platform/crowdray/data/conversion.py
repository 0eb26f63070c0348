"""From a source to a published dataset: slices become shards, the index comes last, problems come together.

A slice needs nothing but its items, so any worker can convert it; the same source gives the same bytes for
any number of workers.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from crowdray import storage
from crowdray.data.sample import Sample, points_outside
from crowdray.data.shards import INDEX, SHARD_NAME, Index, ShardInfo, write_index, write_shard
from crowdray.data.sources import Item, Source
from crowdray.errors import DataError, UserError

ROWS_PER_SHARD = 128
"""Items of one slice: few enough to spread over workers, enough to be worth a file."""

MOST_LISTED = 20
"""How many problems or names a message lists before it only counts."""


@dataclass(slots=True)
class SliceResult:
    """What became of one slice: a shard, or the problems that prevented it; small and picklable."""

    number: int
    """Position of the slice, and the number of its shard."""
    shard: ShardInfo | None = None
    """None when there was a problem: then nothing was written."""
    problems: list[str] = field(default_factory=list)
    """One message for each item that cannot be used."""
    outside: list[tuple[str, int]] = field(default_factory=list)
    """Images with heads outside their bounds, and how many."""
    hashes: list[tuple[str, str]] = field(default_factory=list)
    """Hash and name of each image, to find those that are there twice."""
    empty: int = 0
    """Images without a head."""


class _Unusable(Exception):
    """Raised inside a slice to give up its shard once an item has failed."""


def slices(items: Sequence[Item], rows: int = ROWS_PER_SHARD) -> list[Sequence[Item]]:
    """Cut items into slices of equal length, one for each shard, whoever converts them."""
    return [items[start : start + rows] for start in range(0, len(items), rows)]


def check_destination(dest: str, *, overwrite: bool = False) -> None:
    """Refuse a place that must not be touched: a finished dataset without `overwrite`, or foreign files.

    What a killed conversion left there is no obstacle: shards of the same content are written over, and
    publish removes the rest.
    """
    if not storage.exists(dest):
        return
    names = [PurePosixPath(uri).name for uri in storage.list_files(dest)]
    foreign = [name for name in names if not _ours(name) and not name.startswith(".")]
    if foreign:
        raise UserError(f"{dest} holds files that are no dataset of ours, such as {foreign[0]}; choose another --dest")
    if INDEX in names and not overwrite:
        raise UserError(f"{dest} already holds a dataset; choose another --dest, or replace it with --overwrite")


def convert_slice(source: Source, items: Sequence[Item], dest: str, number: int) -> SliceResult:
    """Load a slice of items and write its shard; every item is tried, and all problems are in the result."""
    result = SliceResult(number)
    try:
        result.shard = write_shard(_loaded(source, items, result), dest, number)
    except _Unusable:
        result.shard = None
    return result


def publish(
    dest: str,
    source: Source,
    results: Iterable[SliceResult],
    *,
    splits: Sequence[str] = (),
    overwrite: bool = False,
) -> Index:
    """Write the index over the shards of all slices, then remove leftovers: from here on the dataset exists.

    With any problem nothing is published, the new shards are removed again, and one DataError lists the
    problems.
    """
    done = sorted(results, key=lambda result: result.number)
    problems = [problem for result in done for problem in result.problems]
    shards = [result.shard for result in done if result.shard is not None]
    if problems or not shards:
        discard(dest)
        raise DataError(_problem_list(source, problems))
    check_destination(dest, overwrite=overwrite)
    notes = list(dict.fromkeys([*source.notes(splits), *_notes(done)]))
    index = write_index(dest, shards, source=source.name, depth_teacher=source.depth_teacher, notes=notes)
    _remove_leftovers(dest, keep={shard.path for shard in shards})
    return index


def discard(dest: str) -> None:
    """Remove what an unfinished conversion wrote, and nothing that a dataset published there needs."""
    _remove_leftovers(dest, keep=_published(dest))


def convert(
    source: Source,
    dest: str,
    *,
    splits: Sequence[str] = (),
    overwrite: bool = False,
    on_slice: Callable[[SliceResult], None] = lambda result: None,
) -> Index:
    """Convert a whole source in this process; `on_slice` hears of each finished slice."""
    check_destination(dest, overwrite=overwrite)
    results = []
    try:
        for number, items in enumerate(slices(source.items(splits))):
            results.append(convert_slice(source, items, dest, number))
            on_slice(results[-1])
        return publish(dest, source, results, splits=splits, overwrite=overwrite)
    except BaseException:
        discard(dest)
        raise


def _loaded(source: Source, items: Sequence[Item], result: SliceResult) -> Iterator[Sample]:
    """Samples up to the first problem; after it the rest is only checked, and _Unusable ends the writing."""
    for item in items:
        try:
            sample = source.load(item)
        except UserError as error:
            result.problems.append(f"{item.split}/{item.name}: {error}")
            continue
        name = f"{sample.split}/{sample.name}"
        result.hashes.append((sample.sha256, name))
        result.empty += len(sample.points) == 0
        if outside := points_outside(sample.points, sample.height, sample.width):
            result.outside.append((name, outside))
        if not result.problems:
            yield sample
    if result.problems:
        raise _Unusable


def _ours(name: str) -> bool:
    return name == INDEX or bool(SHARD_NAME.fullmatch(name)) or name.startswith(storage.PARTIAL)


def _published(dest: str) -> set[str]:
    """Names of the shards that a dataset already at the destination needs."""
    place = storage.join(dest, INDEX)
    if not storage.exists(place):
        return set()
    try:
        return {shard.path for shard in Index.from_json(storage.read_bytes(place), place).shards}
    except DataError:
        return set()  # a damaged index needs nothing, and --overwrite must be able to replace it


def _remove_leftovers(dest: str, keep: set[str]) -> None:
    if not storage.exists(dest):
        return
    for uri in storage.list_files(dest):
        name = PurePosixPath(uri).name
        if _ours(name) and name != INDEX and name not in keep:
            storage.remove(uri)


def _problem_list(source: Source, problems: Sequence[str]) -> str:
    if not problems:
        return f"{source.name}: there is nothing to convert; check --source and --split"
    more = [f"... and {len(problems) - MOST_LISTED} more"] if len(problems) > MOST_LISTED else []
    lines = [*problems[:MOST_LISTED], *more]
    return "\n  ".join([f"{source.name}: {len(problems)} items cannot be used, nothing was published:", *lines])


def _notes(results: Sequence[SliceResult]) -> list[str]:
    notes = []
    if outside := [pair for result in results for pair in result.outside]:
        total = sum(count for _, count in outside)
        listed = ", ".join(f"{name} ({count})" for name, count in outside[:MOST_LISTED])
        notes.append(f"{total} heads lie outside their image and are kept, in {len(outside)} images: {listed}")
    if empty := sum(result.empty for result in results):
        notes.append(f"{empty} images hold no head")
    names: dict[str, list[str]] = {}
    for sha256, name in (pair for result in results for pair in result.hashes):
        names.setdefault(sha256, []).append(name)
    repeated = [same for same in names.values() if len(same) > 1]
    if repeated:
        listed = "; ".join(" = ".join(same) for same in repeated[:MOST_LISTED])
        notes.append(f"{len(repeated)} images are there more than once: {listed}")
    return notes
