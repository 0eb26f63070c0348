"""From a source to a published dataset: slices become shards, the index comes last, and a broken conversion goes on.

A slice needs nothing but its items, so any worker can convert it; the same source gives the same bytes for
any number of workers, and for any number of starts.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import PurePosixPath

from crowdray import storage
from crowdray.data.sample import Sample, points_outside
from crowdray.data.shards import INDEX, SHARD_NAME, Index, ShardInfo, write_index, write_shard
from crowdray.datasets import resume
from crowdray.datasets.quarantine import (
    MOST_LISTED,
    QUARANTINE,
    Quarantined,
    check_quarantine,
    read_quarantine,
    write_quarantine,
)
from crowdray.datasets.resume import SliceResult
from crowdray.datasets.sources import Item, Source
from crowdray.errors import DataError, UserError
from crowdray.storage.lease import Lease

ROWS_PER_SHARD = 128
"""Items of one slice: few enough to spread over workers, enough to be worth a file."""


@dataclass(frozen=True, slots=True)
class Slice:
    """Items that become one shard."""

    number: int
    """Its position, and the number of its shard."""
    items: Sequence[Item]
    """What it is made from."""
    key: str
    """Digest of all that its result depends on."""


@dataclass(frozen=True)
class Conversion:
    """A source on its way into a dataset, by this process or by workers that it sends slices to."""

    source: Source
    dest: str
    splits: tuple[str, ...]
    lease: Lease
    """The right to be the only one who converts into `dest`."""
    parts: Sequence[Slice]
    """All slices."""
    finished: dict[int, SliceResult]
    """Results of slices by their number; an earlier start left those that are there at the beginning."""
    published: Index | None = None
    """The index of an earlier start that was stopped after it had written that."""

    @property
    def waiting(self) -> list[Slice]:
        """Slices that nobody has converted."""
        return [] if self.published else [part for part in self.parts if part.number not in self.finished]

    def convert(self, part: Slice) -> SliceResult:
        """Convert a slice in this process."""
        return convert_slice(self.source, part.items, self.dest, part.number, part.key)

    def add(self, result: SliceResult) -> None:
        """Take in the result of a slice; a UserError when another conversion has taken the destination over."""
        self.finished[result.number] = result
        if self.lease.ended:
            self._give_way()

    def publish(self, *, strict: bool = False) -> Index:
        """See `publish`, for the slices that are finished: all of them."""
        assert not self.waiting
        if not self.lease.renew():
            self._give_way()
        if self.published:
            _clean(self.dest, self.published)
            return self.published
        keys = [part.key for part in self.parts]
        return publish(self.dest, self.source, self.finished.values(), splits=self.splits, strict=strict, keys=keys)

    def _give_way(self) -> None:
        raise UserError(
            f"this process was silent for so long that another one took {self.dest} over and goes on; wait for its end"
        )


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


def convert_slice(source: Source, items: Sequence[Item], dest: str, number: int, key: str = "") -> SliceResult:
    """Load a slice of items, write its shard, and with a key its record; items that cannot be used are in the result.

    Raises UserError where storage is to blame and not an item: a full disk, a server that does not answer.
    """
    result = SliceResult(number)
    samples = _loaded(source, items, result)
    if (first := next(samples, None)) is not None:
        result.shard = write_shard(chain([first], samples), dest, number)
        # What was missing may be so for this worker alone, and a slice without a shard is soon tried again.
        if key and not result.missing:
            resume.record(dest, key, result)
    return result


def publish(
    dest: str,
    source: Source,
    results: Iterable[SliceResult],
    *,
    splits: Sequence[str] = (),
    strict: bool = False,
    keys: Sequence[str] = (),
) -> Index:
    """Write the index over the shards of all slices, then remove leftovers: from here on the dataset exists.

    Items that cannot be used are listed in quarantine.json. With `strict`, or when a split loses most of its
    items, nothing is published, and one DataError lists them. `keys` are those of all slices, where there are records.
    """
    done = sorted(results, key=lambda result: result.number)
    quarantined = [item for result in done for item in result.quarantined]
    shards = [result.shard for result in done if result.shard is not None]
    used: Counter[str] = Counter()
    for shard in shards:
        used.update(shard.splits)
    check_quarantine(source.name, quarantined, used, strict=strict)
    if not shards:
        raise DataError(f"{source.name}: there is nothing to convert; check --source and --split")
    _check_shards(dest, shards)
    notes = list(dict.fromkeys([*source.notes(splits), *_notes(done)]))
    digest = Index(source.name, source.depth_teacher, tuple(shards), tuple(notes)).digest
    if quarantined:
        write_quarantine(dest, quarantined, digest)
    if keys:
        resume.seal(dest, keys, digest)
    index = write_index(dest, shards, source=source.name, depth_teacher=source.depth_teacher, notes=notes)
    _clean(dest, index)
    return index


@contextmanager
def begun(
    source: Source,
    dest: str,
    *,
    splits: Sequence[str] = (),
    overwrite: bool = False,
    tell: Callable[[str], None] = lambda text: None,
) -> Iterator[Conversion]:
    """A conversion with what an earlier start of the same one has finished; nobody else converts into `dest`.

    Whatever ends the block early, finished slices stay for the next start. `tell` says what is waited for.
    Raises UserError for a place that must not be touched, and where another conversion is under way.
    """
    dest = storage.resolve(dest)
    check_destination(dest, overwrite=overwrite or resume.is_there(dest))
    listed = slices(source.items(splits), ROWS_PER_SHARD)
    with resume.claimed(dest, tell) as lease:
        keys = resume.slice_keys(source, listed)
        parts = [Slice(number, items, key) for number, (items, key) in enumerate(zip(listed, keys, strict=True))]
        published = _published(dest, resume.sealed(dest, keys))
        if published is None:
            check_destination(dest, overwrite=overwrite)
        work = Conversion(source, dest, tuple(splits), lease, parts, resume.finished(dest, keys), published)
        try:
            yield work
        except BaseException:
            if not lease.ended:
                _remove(dest, lambda name: name.startswith(storage.PARTIAL))
            raise


def convert(
    source: Source,
    dest: str,
    *,
    splits: Sequence[str] = (),
    overwrite: bool = False,
    strict: bool = False,
    on_slice: Callable[[SliceResult], None] = lambda result: None,
) -> Index:
    """Convert a whole source in this process; `on_slice` hears of each slice that it converts."""
    with begun(source, dest, splits=splits, overwrite=overwrite) as work:
        for part in work.waiting:
            work.add(result := work.convert(part))
            on_slice(result)
        return work.publish(strict=strict)


def _loaded(source: Source, items: Sequence[Item], result: SliceResult) -> Iterator[Sample]:
    """Samples of the items that can be used; what is to be told of them and of the others goes into the result."""
    for item in items:
        try:
            sample = source.load(item)
        except UserError as error:
            gone = [uri for uri in (item.image, item.annotation) if uri and not storage.exists(uri)]
            if not gone and not isinstance(error, DataError):
                raise
            result.missing += gone
            file = item.image or item.annotation or ""
            result.quarantined.append(Quarantined(item.split, item.name, file, str(error)))
            continue
        name = f"{sample.split}/{sample.name}"
        result.hashes.append((sample.sha256, name))
        result.empty += len(sample.points) == 0
        if outside := points_outside(sample.points, sample.height, sample.width):
            result.outside.append((name, outside))
        yield sample


def _published(dest: str, digest: str) -> Index | None:
    """The index at the destination if it has this digest."""
    place = storage.join(dest, INDEX)
    with suppress(DataError):  # --overwrite must be able to replace a damaged index
        if digest and storage.exists(place):
            index = Index.from_json(storage.read_bytes(place), place)
            return index if index.digest == digest else None
    return None


def _clean(dest: str, index: Index) -> None:
    """Remove what a published dataset does not need."""
    keep = {INDEX, *(shard.path for shard in index.shards)}
    if read_quarantine(dest, index.digest):
        keep.add(QUARANTINE)
    _remove(dest, lambda name: _ours(name) and name not in keep)
    resume.forget(dest)


def _check_shards(dest: str, shards: Sequence[ShardInfo]) -> None:
    """Nodes with a disk of their own each would leave shards that only they can see."""
    there = {file.name: file.size for file in storage.find_files(dest, depth=1)}
    if lost := [shard.path for shard in shards if there.get(shard.path) != shard.bytes]:
        raise UserError(
            f"{dest} lacks {len(lost)} shards that workers wrote there, such as {lost[0]}: with several nodes --dest "
            "must be a place that all of them reach, a shared folder or a URI such as s3://bucket/folder"
        )


def _ours(name: str) -> bool:
    return name in (INDEX, QUARANTINE) or bool(SHARD_NAME.fullmatch(name)) or name.startswith(storage.PARTIAL)


def _remove(dest: str, chosen: Callable[[str], bool]) -> None:
    for uri in storage.list_files(dest) if storage.exists(dest) else []:
        if chosen(PurePosixPath(uri).name):
            storage.remove(uri)


def _notes(results: Sequence[SliceResult]) -> list[str]:
    notes = []
    if quarantined := sum(len(result.quarantined) for result in results):
        notes.append(f"{quarantined} items cannot be used and were left out, see {QUARANTINE}")
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
