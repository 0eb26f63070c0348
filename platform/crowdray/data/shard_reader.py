"""Rows of one shard: from a memory-mapped local file, or read on demand from a remote file."""

import hashlib
import io
import mmap
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate
from typing import Literal

import numpy as np
import pyarrow as pa
from fsspec.utils import merge_offset_ranges
from numpy.typing import NDArray

from crowdray import storage
from crowdray.data.decoding import Encoded
from crowdray.data.sample import REWRITTEN_SCHEMA, SCHEMA, SCHEMA_VERSION, Sample
from crowdray.errors import DataError

ByteRange = tuple[int, int]
"""First and last + 1 byte."""

_LARGE = ("image", "roi", "depth", "points")
_EAGER_BYTES = 2**14
"""Bytes at the start of each read that are fetched at once; the metadata of a record batch takes about 1,000."""
_MAX_GAP = 2**14
"""Bytes between two ranges of a remote file that are fetched rather than skipped."""


class Shard:
    """Rows of Arrow record batches, converted to samples when they are accessed."""

    def __init__(self, uri: str, batches: Sequence[pa.RecordBatch], schema: pa.Schema, rows: int) -> None:
        if not any(map(schema.equals, (SCHEMA, REWRITTEN_SCHEMA))):
            raise DataError(f"{uri} does not have the columns of schema version {SCHEMA_VERSION}; convert again")
        if sum(map(len, batches)) != rows:
            raise DataError(f"{uri} does not have the {rows} rows of its index; convert the dataset again")
        try:
            for batch in batches:
                batch.validate(full=True)  # offsets that leave their buffer would read other memory
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{uri} is damaged ({error}); copy it again or convert again") from error
        if not all(map(_has_valid_values, batches)):
            raise DataError(f"{uri} has rows without an image, a size or whole points; convert the dataset again")
        self.uri = uri
        self._batches = batches
        self._ends = list(accumulate(map(len, batches)))

    def sample(self, row: int) -> Sample:
        """The sample of a row; its content is read-only, and a view into the file where that is mapped."""
        number = bisect_right(self._ends, row)
        batch = self._batches[number]
        row -= self._ends[number - 1] if number else 0
        image, roi, depth, points = self._read([(batch.column(name), row) for name in _LARGE])
        assert image, "the schema has no null image"
        return Sample(
            image=image,
            roi=roi or None,
            depth=depth or None,
            points=np.frombuffer(points, np.float32).reshape(-1, 2),
            **{name: batch.column(name)[row].as_py() for name in batch.schema.names if name not in _LARGE},
        )

    def strings(self, column: Literal["name", "scene", "split"]) -> NDArray[np.object_]:
        """(rows,) names, scenes or splits."""
        return np.concatenate([batch.column(column).to_numpy(zero_copy_only=False) for batch in self._batches])

    def sizes(self) -> NDArray[np.int64]:
        """(rows, 2) height and width of the images in pixels."""
        sides = [np.stack([b.column("height").to_numpy(), b.column("width").to_numpy()], axis=1) for b in self._batches]
        return np.concatenate(sides).astype(np.int64)

    def counts(self) -> NDArray[np.int64]:
        """(rows,) numbers of heads."""
        return np.concatenate([np.diff(_offsets(batch.column("points"))) // 2 for batch in self._batches])

    def _read(self, cells: Sequence[tuple[pa.Array, int]]) -> list[Encoded]:
        """Bytes of the values at rows of columns."""
        views: list[Encoded] = []
        for column, row in cells:
            start, end = _value_range(column, row)
            views.append(memoryview(column.buffers()[-1] or b"").cast("B").toreadonly()[start:end])
        return views


class MappedShard(Shard):
    """A shard in a local file, memory-mapped: samples are views, nothing is copied."""

    def __init__(self, uri: str, path: str, rows: int) -> None:
        try:
            reader = pa.ipc.open_file(pa.memory_map(path, "r"))
            batches = [reader.get_batch(number) for number in range(reader.num_record_batches)]
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{uri} is damaged ({error}); copy it again or convert again") from error
        super().__init__(uri, batches, reader.schema, rows)


class RemoteShard(Shard):
    """A shard in a remote file: small columns are read once, the rest of a row in one request when it is accessed.

    Images are verified by their hash, because the hash of the whole file cannot be.
    """

    def __init__(self, uri: str, size: int, rows: int) -> None:
        self._file = _LazyFile(uri, size)
        try:
            reader = pa.ipc.open_file(pa.PythonFile(self._file, "r"))
            batches = []
            for number in range(reader.num_record_batches):
                batches.append(batch := reader.get_batch(number))
                self._file.load(self._small_buffers(batch))
        except (pa.ArrowException, OSError, EOFError) as error:
            problem = f"damaged, or not the file of {size} bytes that its index names"
            raise DataError(f"{uri} is {problem} ({error}); copy it again or convert again") from error
        super().__init__(uri, batches, reader.schema, rows)

    def sample(self, row: int) -> Sample:
        """See Shard.sample; raises DataError if the image does not have its hash."""
        sample = super().sample(row)
        if hashlib.sha256(sample.image).hexdigest() != sample.sha256:
            raise DataError(f"{self.uri} is damaged: the hash of the image {sample.name} differs; convert again")
        return sample

    def _small_buffers(self, batch: pa.RecordBatch) -> list[ByteRange]:
        """Ranges of the file with all of a batch except the values of its large columns."""
        buffers = [
            buffer
            for name, column in zip(batch.schema.names, batch.columns, strict=True)
            for buffer in (column.buffers()[:-1] if name in _LARGE else column.buffers())
            if buffer is not None
        ]
        return [(start := self._file.offset(buffer), start + buffer.size) for buffer in buffers]

    def _read(self, cells: Sequence[tuple[pa.Array, int]]) -> list[Encoded]:
        ranges = []
        for column, row in cells:
            values = column.buffers()[-1]
            offset = 0 if values is None else self._file.offset(values)
            start, end = _value_range(column, row)
            ranges.append((offset + start, offset + end))
        return list(storage.read_ranges(self.uri, ranges))


class _LazyFile(io.RawIOBase):
    """A remote file for pyarrow that fetches the start of each read, and the rest only when `load` asks for it.

    pyarrow reads a record batch as one block that starts with its metadata. Reads return slices of anonymous memory as
    large as the file, of which only loaded pages take memory: so the address of a buffer is its position in the file.
    """

    def __init__(self, uri: str, size: int) -> None:
        self.uri = uri
        self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._content = pa.py_buffer(self._memory)
        self._position = 0

    def load(self, ranges: Sequence[ByteRange]) -> None:
        """Fetch ranges of the file, merged where they are close, in one request."""
        starts, ends = [start for start, _ in ranges], [end for _, end in ranges]
        _, starts, ends = merge_offset_ranges([self.uri] * len(starts), starts, ends, max_gap=_MAX_GAP)
        merged = list(zip(starts, ends, strict=True))
        for (start, end), content in zip(merged, storage.read_ranges(self.uri, merged), strict=True):
            self._memory[start:end] = content

    def offset(self, buffer: pa.Buffer) -> int:
        """Position in the file of a buffer that pyarrow read from it."""
        return int(buffer.address - self._content.address)

    def read_buffer(self, nbytes: int) -> pa.Buffer:
        """As pa.PythonFile calls it."""
        start, self._position = self._position, min(self._position + nbytes, self._content.size)
        self.load([(start, min(self._position, start + _EAGER_BYTES))])
        return self._content.slice(start, self._position - start)

    def readable(self) -> bool:
        """As in io.IOBase."""
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        """As in io.IOBase."""
        self._position = offset + (0, self._position, self._content.size)[whence]
        return self._position


def _has_valid_values(batch: pa.RecordBatch) -> bool:
    """Whether a batch has values where the schema requires them, sizes above 0, and two numbers for each point."""
    required = [batch.column(field.name) for field in SCHEMA if not field.nullable]
    if any(column.null_count for column in required):
        return False
    sizes = [batch.column(name).to_numpy() for name in ("height", "width")]
    images, points = (np.diff(_offsets(batch.column(name))) for name in ("image", "points"))
    return all((size > 0).all() for size in (*sizes, images)) and not (points % 2).any()


def _offsets(column: pa.Array) -> NDArray[np.int64]:
    """(rows + 1,) boundaries of the rows in the values of a column of variable length."""
    offsets = np.frombuffer(column.buffers()[1], np.int64)
    return offsets[column.offset : column.offset + len(column) + 1]


def _value_range(column: pa.Array, row: int) -> ByteRange:
    """The bytes of a row in the buffer of a column's values; empty for null."""
    start, end = _offsets(column)[row : row + 2].tolist()
    width = 4 if pa.types.is_large_list(column.type) else 1
    return start * width, end * width
