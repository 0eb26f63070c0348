"""Conversion of a source into a dataset of shards, resumable at any point.

Each slice of items becomes a shard; the index is written last. A slice needs only its items, so any worker can convert
it. Equal sources result in equal bytes for any number of workers and any number of restarts.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import PurePosixPath

from crowdray import storage
from crowdray.data.sample import Sample
from crowdray.data.shards import INDEX, SHARD_NAME, Index, ShardInfo, write_index, write_shard
from crowdray.datasets import resume
from crowdray.datasets.restart_markers import with_restart_markers
from crowdray.datasets.resume import SliceResult
from crowdray.datasets.sources import Item, Source
from crowdray.datasets.statistics import DatasetStats, load_usable
from crowdray.datasets.validation import (
    QUARANTINE,
    ValidationReport,
    read_quarantine,
    shared_problems,
    validate,
    write_quarantine,
)
from crowdray.errors import DataError, UserError
from crowdray.storage.lock import Lock

ROWS_PER_SHARD = 128
"""Items per slice: few enough to distribute over workers, enough to fill a file."""


@dataclass(frozen=True)
class Conversion:
    """A running conversion; slices are converted by this process or by workers."""

    source: Source
    dest: str
    splits: tuple[str, ...]
    restart_markers: bool
    """Whether to add restart markers to JPEGs."""
    lock: Lock
    """Exclusive right to convert into `dest`."""
    slices: Sequence[Sequence[Item]]
    """Items of each shard."""
    keys: Sequence[str]
    """For each slice, a digest of everything that decides its result."""
    results: dict[int, SliceResult]
    """Results of finished slices by number, including those of an interrupted run."""

    @property
    def pending(self) -> list[int]:
        """Numbers of the slices that are not converted yet."""
        return [number for number in range(len(self.slices)) if number not in self.results]

    def convert(self, number: int) -> SliceResult:
        """Convert a slice in this process."""
        items, key = self.slices[number], self.keys[number]
        return convert_slice(self.source, items, self.dest, number, key, restart_markers=self.restart_markers)

    def add(self, result: SliceResult) -> None:
        """Add the result of a slice; UserError if another process has taken over the destination."""
        self.results[result.number] = result
        if not self.lock.held:
            self._fail_lock_lost()

    def publish(self, *, strict: bool = False) -> Index:
        """Write the index over the shards of all slices, which creates the dataset, and remove leftovers.

        Unusable items are listed in quarantine.json; with `strict` they are errors.

        Raises:
            DataError: Nothing was published because of unusable items: any if `strict`, else most of a split.
            UserError: Shards are missing at the destination, or another process has taken it over.
        """
        assert not self.pending
        if not self.lock.renew():
            self._fail_lock_lost()
        source, ordered = self.source, [self.results[number] for number in range(len(self.slices))]
        shards = [result.shard for result in ordered if result.shard is not None]
        stats = sum((result.stats for result in ordered), DatasetStats())
        report = validate(source.name, source.teacher.name, stats, source.notes(self.splits))
        report.raise_for_unusable(strict=strict)
        if not shards:
            raise DataError(f"{source.name}: there is nothing to convert; check --source and --split")
        _check_shards(self.dest, shards)
        notes = _index_notes(report)
        if self.restart_markers:
            rewritten, images = sum(result.rewritten for result in ordered), sum(shard.rows for shard in shards)
            notes.append(f"restart markers added to {rewritten:,} of {images:,} images")
        digest = Index(source.name, source.teacher.name, tuple(shards), tuple(notes)).digest
        if report.unusable:
            write_quarantine(self.dest, report.unusable, digest)
        index = write_index(self.dest, shards, source=source.name, depth_teacher=source.teacher.name, notes=notes)
        _clean(self.dest, index)
        return index

    def _fail_lock_lost(self) -> None:
        raise UserError(
            f"this process was unresponsive, so another one took over {self.dest} and continues; wait until it finishes"
        )


def split_into_slices(items: Sequence[Item], rows: int = ROWS_PER_SHARD) -> list[Sequence[Item]]:
    """Cut items into slices of equal length, one per shard."""
    return [items[start : start + rows] for start in range(0, len(items), rows)]


def check_destination(dest: str, *, overwrite: bool = False) -> None:
    """Raise UserError if `dest` contains other files, or a finished dataset without `overwrite`.

    Shards of an interrupted conversion are allowed: equal ones are overwritten, and publish removes the rest.
    """
    if not storage.exists(dest):
        return
    names = [PurePosixPath(uri).name for uri in storage.list_files(dest)]
    foreign = [name for name in names if not _is_dataset_file(name) and not storage.is_hidden(name)]
    if foreign:
        raise UserError(f"{dest} contains other files, such as {foreign[0]}; choose another --dest")
    if INDEX in names and not overwrite:
        raise UserError(f"{dest} already contains a dataset; choose another --dest, or replace it with --overwrite")


def convert_slice(
    source: Source, items: Sequence[Item], dest: str, number: int, key: str = "", *, restart_markers: bool = False
) -> SliceResult:
    """Load the items of a slice, write its shard and, with a key, save its result; UserError if storage fails."""
    result = SliceResult(number)
    samples = load_usable(source, items, result.stats)
    if restart_markers:
        samples = _with_restart_markers(samples, result)
    if (first := next(samples, None)) is not None:
        result.shard = write_shard(chain([first], samples), dest, number)
        # Missing files may be missing on this worker only, and a slice without a shard is quickly converted again.
        if key and not result.stats.missing:
            resume.save_result(dest, key, result)
    return result


@contextmanager
def open_conversion(
    source: Source,
    dest: str,
    *,
    splits: Sequence[str] = (),
    overwrite: bool = False,
    restart_markers: bool = False,
    log: Callable[[str], None] = lambda text: None,
) -> Iterator[Conversion]:
    """Lock `dest` and yield its conversion, with the results of an interrupted run of the same conversion.

    Finished slices are kept if the block fails. `log` receives a message while it waits for another process.
    UserError if `dest` contains other files or a dataset, another process converts into it, or the program that adds
    restart markers is missing.
    """
    dest = storage.resolve(dest)
    check_destination(dest, overwrite=overwrite)
    slices = split_into_slices(source.items(splits), ROWS_PER_SHARD)
    with resume.lock_destination(dest, log) as lock:
        check_destination(dest, overwrite=overwrite)  # another process may have finished since
        keys = resume.slice_keys(source, slices, rewrite=restart_markers)
        results = resume.load_results(dest, keys)
        yield Conversion(source, dest, tuple(splits), restart_markers, lock, slices, keys, results)


def convert(
    source: Source,
    dest: str,
    *,
    splits: Sequence[str] = (),
    overwrite: bool = False,
    strict: bool = False,
    restart_markers: bool = False,
    on_slice: Callable[[SliceResult], None] = lambda result: None,
) -> Index:
    """Convert a source in this process; `on_slice` receives the result of each converted slice."""
    with open_conversion(
        source, dest, splits=splits, overwrite=overwrite, restart_markers=restart_markers
    ) as conversion:
        for number in conversion.pending:
            conversion.add(result := conversion.convert(number))
            on_slice(result)
        return conversion.publish(strict=strict)


def _with_restart_markers(samples: Iterator[Sample], result: SliceResult) -> Iterator[Sample]:
    """Samples with restart markers in their images; `result` counts those that changed."""
    for sample in samples:
        rewritten = with_restart_markers(sample)
        result.rewritten += rewritten.sha256 != sample.sha256
        yield rewritten


def _index_notes(report: ValidationReport) -> list[str]:
    """Notes for the index, one line each; reasons for unusable items are in the quarantine file."""
    shared = (problem.splitlines() for problem in shared_problems(report.duplicates))
    notes = [f"{head} {'; '.join(map(str.strip, lines))}" for head, *lines in shared]
    if count := len(report.unusable):
        notes.insert(0, f"{count} item{'s' * (count != 1)} left out as unusable, see {QUARANTINE}")
    return [*notes, *report.notes]


def _clean(dest: str, index: Index) -> None:
    """Remove everything that the published dataset does not need."""
    keep = {INDEX, *(shard.path for shard in index.shards)}
    if read_quarantine(dest, index.digest):
        keep.add(QUARANTINE)
    for uri in storage.list_files(dest):
        name = PurePosixPath(uri).name
        if _is_dataset_file(name) and name not in keep:
            storage.remove(uri)
    resume.clear(dest)


def _check_shards(dest: str, shards: Sequence[ShardInfo]) -> None:
    """Raise UserError if shards are missing: nodes may have written them to disks of their own."""
    sizes = {file.name: file.size for file in storage.find_files(dest, depth=1)}
    if missing := [shard.path for shard in shards if sizes.get(shard.path) != shard.bytes]:
        raise UserError(
            f"{dest} lacks {len(missing)} shards that workers wrote, such as {missing[0]}: with several nodes --dest "
            "must be reachable by all of them, as a shared folder or a URI such as s3://bucket/folder"
        )


def _is_dataset_file(name: str) -> bool:
    return name in (INDEX, QUARANTINE) or bool(SHARD_NAME.fullmatch(name)) or name.startswith(storage.PARTIAL)
