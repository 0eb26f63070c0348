"""Counts of photos: kept in parts while a prediction runs, and combined into one table in CSV, JSONL or Parquet.

    .prediction/part-<command>-<photos>.json     counts of some photos, written when all of them are done
    counts.csv                                   every photo in input order, written last

The name of a part contains a digest of everything that decides it, so the counts of another command are never used. A
process that is killed loses at most its part.
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter

from crowdray import storage
from crowdray.documents import parse_document, to_document

TableFormat = Literal["csv", "jsonl", "parquet"]
FORMATS: tuple[TableFormat, ...] = get_args(TableFormat)

STATE = ".prediction"
"""Folder of the parts, below the output."""

_FORMULA = (*"=+-@", *"\uff1d\uff0b\uff0d\uff20", "\t", "\r", "\n")
"""First characters of a cell that spreadsheets may run as a formula, of half and full width."""
_ROW_GROUP = 10_000
"""Rows of a Parquet file that are in memory at a time."""
_PARTS_IN_MEMORY = 8


@dataclass(frozen=True, slots=True)
class PhotoCount:
    """Count of one photo, or the reason why it has none."""

    image: str
    """File name; bytes that are not UTF-8 are escaped."""
    model: str
    """The counter that counted it: models:/NAME/VERSION or the path of a package."""
    seconds: float = 0.0
    """Seconds that it took, without reading and decoding the photo."""
    count: float | None = None
    """Number of heads: the sum of the density."""
    count_low: float | None = None
    """Lower end of its interval; None if that is unknown, or the photo is unlike the training data."""
    count_high: float | None = None
    """Upper end."""
    width: int | None = None
    """Width in pixels, upright."""
    height: int | None = None
    """Height in pixels, upright."""
    warnings: tuple[str, ...] = ()
    """In what the photo lies far outside the training data."""
    error: str = ""
    """Why it could not be counted."""
    zones: dict[str, float | None] = field(default_factory=dict)
    """Values of each zone by the name of their column."""

    def row(self, zone_columns: Sequence[str]) -> dict[str, Any]:
        """Row of the table, by column."""
        return {
            "image": self.image,
            "count": self.count,
            "count_low": self.count_low,
            "count_high": self.count_high,
            "width": self.width,
            "height": self.height,
            "seconds": round(self.seconds, 4),
            "model": self.model,
            "warning": "; ".join(self.warnings),
            "error": self.error,
            **{name: self.zones.get(name) for name in zone_columns},
        }


_PART = TypeAdapter(dict[str, PhotoCount])


def printable(text: str) -> str:
    """Return text with escapes for bytes of file names that are not UTF-8."""
    return text.encode(errors="backslashreplace").decode()


def write_part(output: str, command: str, counts: Mapping[str, PhotoCount]) -> None:
    """Write the counts of some photos by key, atomically."""
    name = f"part-{command}-{hashlib.sha256(''.join(counts).encode()).hexdigest()[:16]}.json"
    content = to_document({key: asdict(count) for key, count in counts.items()})
    storage.write_bytes(storage.join(output, STATE, name), content.encode())


class Parts:
    """The parts of a command in its output folder."""

    def __init__(self, output: str, command: str) -> None:
        folder = storage.join(storage.resolve(output), STATE)
        names = sorted(file.name for file in storage.find_files(folder, depth=1))
        self._others = [storage.join(folder, name) for name in names if not name.startswith(f"part-{command}-")]
        self._read = lru_cache(_PARTS_IN_MEMORY)(_read_part)
        self._part: dict[str, str] = {}  # key of a photo -> URI of the part with its count
        self.done: set[str] = set()
        """Keys of the photos that are counted; a photo that failed is tried again."""
        for name in names:
            if (uri := storage.join(folder, name)) not in self._others:
                for key, count in self._read(uri).items():
                    if key not in self.done:
                        self._part[key] = uri
                        if not count.error:
                            self.done.add(key)

    def __getitem__(self, key: str) -> PhotoCount:
        return self._read(self._part[key])[key]

    def __contains__(self, key: str) -> bool:
        return key in self._part

    def remove_others(self) -> None:
        """Remove the parts of other commands."""
        for uri in self._others:
            storage.remove(uri)


def _read_part(uri: str) -> dict[str, PhotoCount]:
    """Return the counts of a part by key; none if it is damaged, so that they are counted again."""
    with suppress(ValueError):
        return _PART.validate_python(parse_document(storage.read_bytes(uri)))
    return {}


def write_table(
    counts: Iterable[PhotoCount], uri: str, table_format: TableFormat, zone_columns: Sequence[str] = ()
) -> None:
    """Write a table of counts to a URI, atomically and without holding all of them in memory."""
    rows = (count.row(zone_columns) for count in counts)
    columns = list(PhotoCount("", "").row(zone_columns))
    writers: dict[str, Callable[[Path, Iterator[dict[str, Any]], list[str]], None]] = {
        "csv": _write_csv,
        "jsonl": _write_jsonl,
        "parquet": _write_parquet,
    }
    with storage.staging_file(uri) as path:
        writers[table_format](path, rows, columns)
        storage.publish_file(path, uri)


def _write_csv(path: Path, rows: Iterator[dict[str, Any]], columns: list[str]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(_text_cell(column) for column in columns)
        writer.writerows([csv_cell(value) for value in row.values()] for row in rows)


def csv_cell(value: object) -> str:
    """Return a value as a cell: numbers with six decimals, None empty, and text as text."""
    if isinstance(value, float):
        return f"{value:.6f}"
    return _text_cell("" if value is None else str(value))


def _text_cell(text: str) -> str:
    """Return a cell that a spreadsheet shows as text: an apostrophe in front of what it would take for a formula."""
    return f"'{text}" if text.startswith(_FORMULA) else text


def _write_jsonl(path: Path, rows: Iterator[dict[str, Any]], columns: list[str]) -> None:
    with path.open("w", encoding="ascii") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)


def _write_parquet(path: Path, rows: Iterator[dict[str, Any]], columns: list[str]) -> None:
    texts, integers = ("image", "model", "warning", "error"), ("width", "height")
    types = {name: pa.string() for name in texts} | {name: pa.int32() for name in integers}
    schema = pa.schema([(name, types.get(name, pa.float64())) for name in columns])
    with pq.ParquetWriter(path, schema) as writer:
        while group := [row for row, _ in zip(rows, range(_ROW_GROUP), strict=False)]:
            writer.write_table(pa.Table.from_pylist(group, schema=schema))
        writer.write_table(schema.empty_table())
