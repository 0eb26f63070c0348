"""Datasets: shards of samples as uncompressed Arrow IPC files, and an index.json that is written last.

A dataset is a folder or a URI prefix. The names of its shards contain their number and hash.
"""

import hashlib
import json
import logging
import os
import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from itertools import accumulate, chain, groupby, pairwise
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from crowdray import storage
from crowdray.data.sample import REWRITTEN_SCHEMA, SCHEMA, SCHEMA_VERSION, Sample
from crowdray.data.shard_reader import MappedShard, RemoteShard, Shard
from crowdray.documents import parse_as, parse_json
from crowdray.errors import DataError, UserError

FORMAT = "crowdray"
INDEX = "index.json"
ROWS_PER_BATCH = 64
"""Maximum rows per record batch: bounds the memory of a writer."""
BYTES_PER_BATCH = 64 * 2**20
"""Bytes of encoded images, masks and depth after which a record batch ends before it has its rows."""
SHARD_NAME = re.compile(r"shard-\d{5}-[0-9a-f]{16}\.arrow")
"""Number and hash, so that a conversion that replaces a dataset never overwrites a shard that is being read."""

_FETCH_THREADS = 8
"""Shards fetched concurrently where all of them are needed."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """The index entry of one shard."""

    path: str
    """File name in the dataset."""
    rows: int
    """Number of samples."""
    bytes: int
    """File size."""
    sha256: str
    """SHA-256 of the file."""
    runs: tuple[tuple[str, int], ...]
    """Run-length encoded splits of its rows in order: (("train", 100), ("test", 28))."""
    heads: dict[str, int]
    """Annotated heads per split."""

    @property
    def splits(self) -> dict[str, int]:
        """Rows per split."""
        rows: Counter[str] = Counter()
        for split, length in self.runs:
            rows[split] += length
        return dict(rows)


@dataclass(frozen=True, slots=True)
class Index:
    """The parsed index.json of a dataset."""

    name: str
    """Name of its source, such as mall."""
    depth_teacher: str
    """Name and version of the source of its depth maps."""
    shards: tuple[ShardInfo, ...]
    """Shards in row order."""
    notes: tuple[str, ...]
    """Remarks of the conversion: missing splits, heads outside their image, repeated images."""

    @property
    def digest(self) -> str:
        """The dataset's identity: SHA-256 of the schema version and the hashes of all shards in order."""
        return hashlib.sha256(json.dumps([SCHEMA_VERSION, [s.sha256 for s in self.shards]]).encode()).hexdigest()

    @property
    def splits(self) -> dict[str, dict[str, int]]:
        """Rows and heads per split, in order of appearance."""
        totals: dict[str, dict[str, int]] = {}
        for shard in self.shards:
            for split, rows in shard.splits.items():
                total = totals.setdefault(split, {"rows": 0, "heads": 0})
                total["rows"] += rows
                total["heads"] += shard.heads[split]
        return totals

    def to_json(self) -> str:
        """The content of index.json."""
        content = {
            "format": FORMAT,
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "depth_teacher": self.depth_teacher,
            "digest": self.digest,
            "splits": self.splits,
            "notes": self.notes,
            "shards": [asdict(shard) for shard in self.shards],
        }
        return json.dumps(content, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str | bytes, uri: str) -> Self:
        """Parse index.json; `uri` identifies it in messages. Raises DataError if it is damaged or incompatible."""
        fix = "convert the dataset again"
        try:
            content = parse_json(text)
            if content["format"] != FORMAT:
                raise DataError(f"{uri} has the format {content['format']!r}, expected {FORMAT!r}; give a dataset")
            if content["schema_version"] != SCHEMA_VERSION:
                raise DataError(
                    f"{uri} has schema version {content['schema_version']}, expected {SCHEMA_VERSION}; {fix}"
                )
            index = parse_as(cls, {field.name: content[field.name] for field in fields(cls)})
            for shard in index.shards:
                _check_shard(shard)
            if len({shard.path for shard in index.shards}) != len(index.shards):
                raise ValueError("it lists a shard twice")
            if content["digest"] != index.digest:
                raise DataError(f"{uri} has digest {content['digest']}, but its shards have {index.digest}; {fix}")
            if content["splits"] != index.splits:
                raise ValueError(f"splits are {content['splits']}, but its shards have {index.splits}")
        except DataError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{uri} is damaged ({type(error).__name__}: {error}); {fix}") from error
        return index


def write_shard(samples: Iterable[Sample], dest: str, number: int) -> ShardInfo:
    """Write samples as shard `number` of the dataset at `dest`; equal samples result in equal bytes.

    The file gets its final name when it is complete. Raises DataError if there is no sample.
    """
    splits: list[str] = []
    heads: Counter[str] = Counter()
    batches = _batches(samples)
    if (first := next(batches, None)) is None:
        raise DataError(f"shard {number} of {dest} has no samples; give at least one")
    # Without such images, the bytes and so the digest are those of earlier versions.
    schema = SCHEMA if first[0].source_sha256 is None else REWRITTEN_SCHEMA
    with storage.staging_file(storage.join(storage.resolve(dest), f"shard-{number:05d}.arrow")) as scratch:
        with pa.OSFile(str(scratch), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for rows in chain([first], batches):
                writer.write_batch(_record_batch(rows, schema))
                for row in rows:
                    splits.append(row.split)
                    heads[row.split] += len(row.points)
        sha256 = storage.hash_file(scratch)
        name = f"shard-{number:05d}-{sha256[:16]}.arrow"
        size = scratch.stat().st_size
        if storage.is_local(dest):  # after a power failure the index must not name a shard that was lost
            with scratch.open("rb") as file:
                os.fsync(file.fileno())
        storage.publish_file(scratch, storage.join(dest, name))
    return ShardInfo(name, len(splits), size, sha256, _runs(splits), dict(heads))


def write_index(
    dest: str, shards: Sequence[ShardInfo], *, source: str, depth_teacher: str, notes: Sequence[str] = ()
) -> Index:
    """Write index.json for finished shards, which completes the dataset."""
    index = Index(source, depth_teacher, tuple(shards), tuple(notes))
    storage.write_bytes(storage.join(dest, INDEX), index.to_json().encode())
    return index


class Dataset:
    """The samples of all shards as one sequence of rows.

    Cheap to open and to pickle: each process fetches and maps a shard when its first row is accessed. Shards that do
    not fit into the cache are read remotely.
    """

    def __init__(self, uri: str, index: Index) -> None:
        self.uri = uri
        self.index = index
        self._ends = list(accumulate(shard.rows for shard in index.shards))
        self._open: dict[int, Shard] = {}
        self._warned = False

    @classmethod
    def open(cls, uri: str) -> Self:
        """Open the dataset at a path or URI, reading only its index; each shard is verified when it is first read.

        Raises DataError if the index is missing or damaged, or a local shard is missing or truncated.
        """
        root = storage.resolve(uri)
        index_uri = storage.join(root, INDEX)
        content = storage.read_bytes_or_none(index_uri)
        if content is None:
            raise DataError(
                f"{root} has no {INDEX}: it is not a dataset, or its conversion is unfinished; "
                f"run jobs/convert.py with --dest {root}"
            )
        dataset = cls(root, Index.from_json(content, index_uri))
        if storage.is_local(root):
            for shard in dataset.index.shards:
                storage.check_local_file(storage.join(root, shard.path), shard.bytes)
        return dataset

    @cached_property
    def digest(self) -> str:
        """See Index.digest."""
        return self.index.digest

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Dataset, (self.uri, self.index)

    def rows(self, split: str) -> NDArray[np.int64]:
        """Rows of a split in ascending order. Raises UserError, listing the splits, for an unknown one."""
        runs = list(chain.from_iterable(shard.runs for shard in self.index.shards))
        if split not in {name for name, _ in runs}:
            raise UserError(f"{self.uri} has no split {split!r}; it has {', '.join(self.index.splits)}")
        names = np.array([name == split for name, _ in runs])
        return np.flatnonzero(np.repeat(names, [length for _, length in runs])).astype(np.int64)

    def sample(self, row: int) -> Sample:
        """The sample of a row; its bytes and points are read-only views into a mapped shard."""
        if not 0 <= row < len(self):
            raise UserError(f"row {row} is outside the {len(self)} rows of {self.uri}")
        shard = bisect_right(self._ends, row)
        return self._shard(shard).sample(row - self._first_row(shard))

    def sizes(self, split: str) -> NDArray[np.int64]:
        """(n, 2) height and width in pixels of a split's images, in the order of rows(split)."""
        return self._gather(split, Shard.sizes)

    def counts(self, split: str) -> NDArray[np.int64]:
        """(n,) numbers of heads of a split's images, in the order of rows(split)."""
        return self._gather(split, Shard.counts)

    def strings(self, column: Literal["name", "scene"], split: str) -> list[str]:
        """Names or scenes of a split's images, in the order of rows(split)."""
        found: list[str] = self._gather(split, lambda shard: shard.strings(column)).tolist()
        return found

    def _first_row(self, shard: int) -> int:
        return self._ends[shard] - self.index.shards[shard].rows

    def _gather(self, split: str, column: Callable[[Shard], NDArray[Any]]) -> NDArray[Any]:
        """A column's values at a split's rows; remote shards are fetched concurrently."""
        rows = self.rows(split)
        bounds = np.searchsorted(rows, [0, *self._ends]).tolist()
        wanted = [number for number, (start, end) in enumerate(pairwise(bounds)) if start < end]
        with ThreadPoolExecutor(1 if storage.is_local(self.uri) else _FETCH_THREADS) as pool:
            parts = pool.map(lambda number: column(self._shard(number)), wanted)
            return np.concatenate(
                [
                    part[rows[bounds[number] : bounds[number + 1]] - self._first_row(number)]
                    for number, part in zip(wanted, parts, strict=True)
                ]
            )

    def _shard(self, number: int) -> Shard:
        if number not in self._open:
            info = self.index.shards[number]
            uri = storage.join(self.uri, info.path)
            try:
                path = storage.fetch(uri, sha256=info.sha256, size=info.bytes)
            except storage.CacheFullError as error:
                if not self._warned:
                    self._warned = True
                    _log.warning("%s. Until then, such shards are read remotely, row by row", error)
                shard: Shard = RemoteShard(uri, info.bytes, info.rows)
            else:
                shard = MappedShard(uri, str(path), info.rows)
            _check_splits(shard, info)
            self._open[number] = shard
        return self._open[number]


def _check_splits(shard: Shard, info: ShardInfo) -> None:
    """Raise DataError unless the index states the splits of a shard's rows and their heads."""
    splits = shard.strings("split").tolist()
    heads: Counter[str] = Counter()
    for split, count in zip(splits, shard.counts().tolist(), strict=True):
        heads[split] += count
    if _runs(splits) != info.runs or heads != Counter(info.heads):
        raise DataError(f"{shard.uri} has other splits or heads than its index says; convert the dataset again")


def _runs(splits: Iterable[str]) -> tuple[tuple[str, int], ...]:
    return tuple((split, len(list(run))) for split, run in groupby(splits))


def _batches(samples: Iterable[Sample]) -> Iterator[list[Sample]]:
    rows: list[Sample] = []
    size = 0
    for sample in samples:
        rows.append(sample)
        size += sum(len(content) for content in (sample.image, sample.roi, sample.depth) if content is not None)
        if len(rows) == ROWS_PER_BATCH or size >= BYTES_PER_BATCH:
            yield rows
            rows, size = [], 0
    if rows:
        yield rows


def _record_batch(rows: Sequence[Sample], schema: pa.Schema) -> pa.RecordBatch:
    def arrow_value(value: Any) -> Any:
        if isinstance(value, memoryview):
            return bytes(value)
        return value.reshape(-1) if isinstance(value, np.ndarray) else value

    columns = [[arrow_value(getattr(row, name)) for row in rows] for name in schema.names]
    return pa.RecordBatch.from_arrays(list(map(pa.array, columns, schema.types)), schema=schema)


def _check_shard(shard: ShardInfo) -> None:
    """Raise ValueError for an index entry that cannot be true."""
    # The name is joined to the dataset's URI: an index must not point elsewhere.
    if not SHARD_NAME.fullmatch(shard.path):
        raise ValueError(f"shard {shard.path!r}")
    rows = [rows for _, rows in shard.runs]
    if not 0 < shard.rows < shard.bytes < 2**44 or min(rows) < 1 or sum(rows) != shard.rows or shard.rows > 2**24:
        raise ValueError(f"shard {shard.path} of {shard.bytes} bytes has {shard.rows} rows in runs {shard.runs}")
    if set(shard.heads) != {split for split, _ in shard.runs} or min(shard.heads.values()) < 0:
        raise ValueError(f"shard {shard.path} has heads {shard.heads}")
