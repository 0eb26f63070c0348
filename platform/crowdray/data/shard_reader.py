"""The rows of one shard: mapped from a local file, or read from afar as they are asked for."""

import hashlib
import mmap
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal

import numpy as np
import pyarrow as pa
from fsspec.utils import merge_offset_ranges
from numpy.typing import NDArray

from crowdray import storage
from crowdray.data.sample import SCHEMA, SCHEMA_VERSION, Encoded, Sample
from crowdray.errors import DataError

Span = tuple[pa.Buffer | None, int, int]
"""Bytes of a buffer, from the first up to the end, which is not part of it."""

_LARGE = ("image", "roi", "depth", "points")
_SMALL = ("name", "split", "scene", "height", "width", "sha256")
_MAGIC = b"ARROW1"
_HEAD = 2**12
"""Bytes that are read of a message at first: more than what describes it needs."""
_NEAR = 2**14
"""Bytes between two parts of a file that are rather read than skipped."""


class Shard:
    """Rows of record batches in memory; nothing of a row is made before it is asked for."""

    def __init__(self, uri: str, batches: Sequence[pa.RecordBatch], schema: pa.Schema, rows: int) -> None:
        if not schema.equals(SCHEMA):
            raise DataError(f"{uri} does not have the columns of schema version {SCHEMA_VERSION}; convert again")
        if sum(map(len, batches)) != rows:
            raise DataError(f"{uri} does not hold the {rows} rows that its index names; convert the dataset again")
        self.uri = uri
        self._batches = batches
        self._ends = list(accumulate(map(len, batches)))

    def sample(self, row: int) -> Sample:
        """A row; what it holds are read-only views into the map, or bytes of its own."""
        number = bisect_right(self._ends, row)
        batch = self._batches[number]
        row -= self._ends[number - 1] if number else 0
        image, roi, depth, points = self._read([_span(batch.column(name), row) for name in _LARGE])
        assert image, "the schema has no null image"
        return Sample(
            image=image,
            roi=roi or None,
            depth=depth or None,
            points=np.frombuffer(points, np.float32).reshape(-1, 2),
            **{name: batch.column(name)[row].as_py() for name in _SMALL},
        )

    def texts(self, column: Literal["name", "scene"]) -> NDArray[np.object_]:
        """(rows,) names or scenes."""
        return np.concatenate([batch.column(column).to_numpy(zero_copy_only=False) for batch in self._batches])

    def sizes(self) -> NDArray[np.int64]:
        """(rows, 2) height and width of the images in pixels."""
        sides = [np.stack([b.column("height").to_numpy(), b.column("width").to_numpy()], axis=1) for b in self._batches]
        return np.concatenate(sides).astype(np.int64)

    def counts(self) -> NDArray[np.int64]:
        """(rows,) numbers of heads."""
        return np.concatenate([np.diff(_offsets(batch.column("points"))) // 2 for batch in self._batches])

    def _read(self, spans: Sequence[Span]) -> list[Encoded]:
        """The bytes of parts of buffers."""
        return [memoryview(buffer or b"").cast("B").toreadonly()[start:end] for buffer, start, end in spans]


class MappedShard(Shard):
    """A shard in a local file, mapped: its rows are views, and nothing is copied."""

    def __init__(self, uri: str, path: str, rows: int) -> None:
        try:
            reader = pa.ipc.open_file(pa.memory_map(path, "r"))
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except pa.ArrowException as error:
            raise DataError(f"{uri} is damaged ({error}); copy it again or convert again") from error
        super().__init__(uri, batches, reader.schema, rows)


class RemoteShard(Shard):
    """A shard that stays where it is: its small columns are read once, the rest of a row when it is asked for, in one
    round trip.

    The file's content lies at its own place in memory as large as the file, of which only what was read takes room;
    so the address of what was not read says where in the file it is. The hash of the file stays unchecked, those of
    its images do not.
    """

    def __init__(self, uri: str, size: int, rows: int) -> None:
        self.uri = uri
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._file = pa.py_buffer(self._memory)
        self._load([(0, min(_HEAD, size)), (max(0, size - len(_MAGIC)), size)])
        try:
            if self._memory[-len(_MAGIC) :] != _MAGIC:
                raise DataError(f"{uri} is truncated or was replaced: its index says {size} bytes; convert again")
            schema, *batches = self._messages(size)
        except (pa.ArrowException, EOFError) as error:
            raise DataError(f"{uri} is damaged ({error}); copy it again or convert again") from error
        super().__init__(uri, batches, schema, rows)

    def sample(self, row: int) -> Sample:
        """See Shard.sample; raises DataError when the image is not the one that was stored."""
        sample = super().sample(row)
        if hashlib.sha256(sample.image).hexdigest() != sample.sha256:
            raise DataError(f"{self.uri} is damaged: the image {sample.name} is not what it was; convert again")
        return sample

    def _messages(self, size: int) -> Iterator[pa.Schema | pa.RecordBatch]:
        """Schema and record batches, each a message of the Arrow IPC format: four bytes of ones, four of the length of
        what describes it, that, and its body. One of no length is the last."""
        place, known, schema = 8, _HEAD, None
        while place < size:
            if place + _HEAD // 2 > known:
                known = min(place + _HEAD, size)
                self._load([(place, known)])
            length = int.from_bytes(self._memory[place + 4 : place + 8], "little")
            if length == 0:
                return
            if place + 8 + length > known:
                self._load([(known, place + 8 + length)])
            message = pa.ipc.read_message(self._file.slice(place))
            place += 8 + length
            if schema is None:
                yield (schema := pa.ipc.read_schema(message))
                continue
            place += message.body.size
            yield (batch := pa.ipc.read_record_batch(message, schema))
            self._load(self._small(batch))

    def _small(self, batch: pa.RecordBatch) -> list[tuple[int, int]]:
        """Where in the file all lies that is kept, as few ranges."""
        buffers = [
            buffer
            for name, column in zip(batch.schema.names, batch.columns, strict=True)
            for buffer in (column.buffers()[:-1] if name in _LARGE else column.buffers())
            if buffer is not None
        ]
        starts = [buffer.address - self._file.address for buffer in buffers]
        ends = [start + buffer.size for start, buffer in zip(starts, buffers, strict=True)]
        _, starts, ends = merge_offset_ranges([self.uri] * len(starts), starts, ends, max_gap=_NEAR)
        return list(zip(starts, ends, strict=True))

    def _load(self, ranges: Sequence[tuple[int, int]]) -> None:
        for (start, end), content in zip(ranges, storage.read_ranges(self.uri, ranges), strict=True):
            self._memory[start:end] = content

    def _read(self, spans: Sequence[Span]) -> list[Encoded]:
        places = [0 if buffer is None else buffer.address - self._file.address for buffer, _, _ in spans]
        ranges = [(place + start, place + end) for place, (_, start, end) in zip(places, spans, strict=True)]
        return list(storage.read_ranges(self.uri, ranges))


def _offsets(column: pa.Array) -> NDArray[np.int64]:
    """(rows + 1,) where the rows of a column of variable length begin and end."""
    offsets = np.frombuffer(column.buffers()[1], np.int64)
    return offsets[column.offset : column.offset + len(column) + 1]


def _span(column: pa.Array, row: int) -> Span:
    """The buffer that holds a row's values, and the bytes of it that are the row's; a null has none."""
    start, end = _offsets(column)[row : row + 2].tolist()
    width = 4 if pa.types.is_large_list(column.type) else 1
    return column.buffers()[-1], start * width, end * width
