"""State of an unfinished conversion, kept at its destination to resume it.

    .conversion/writer.*.json     lock of the process that converts
    .conversion/slice-*.json      result of a finished slice, written after its shard
    .conversion/index-*.txt       digest of the index, written before it

The name of a result contains a digest of everything that decides it, so the result of another conversion is never used.
"""

import hashlib
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from crowdray import storage
from crowdray.data.shards import ShardInfo, shard_from_json
from crowdray.datasets.code_digest import code_digest
from crowdray.datasets.sources import Item, Source
from crowdray.datasets.statistics import DatasetStats
from crowdray.errors import UserError
from crowdray.storage.lock import Lock

FOLDER = ".conversion"
"""Folder of the state, below the destination."""

_LOCK = "writer"
_RESULT = "slice-"
_FINISHED = "index-"


@dataclass(slots=True)
class SliceResult:
    """Result of converting one slice; small and picklable, and equal after a round trip through JSON."""

    number: int
    """Position of the slice, and number of its shard."""
    shard: ShardInfo | None = None
    """Its shard; None, and nothing written, if no item can be used."""
    stats: DatasetStats = field(default_factory=DatasetStats)
    """Statistics of its items."""

    def to_json(self) -> str:
        """JSON text that from_json reads back."""
        shard = asdict(self.shard) if self.shard else None
        return json.dumps({"number": self.number, "shard": shard, "stats": self.stats.as_dict()})

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Inverse of to_json; ValueError, KeyError or TypeError for anything else."""
        content = json.loads(text)
        shard = content["shard"] and shard_from_json(content["shard"])
        return cls(content["number"], shard, DatasetStats.from_dict(content["stats"]))


@contextmanager
def lock_destination(dest: str, log: Callable[[str], None]) -> Iterator[Lock]:
    """Hold the lock of a destination; UserError if another running process converts into it.

    Args:
        dest: Path or URI of the dataset.
        log: Receives a message while the lock of a dead process expires.
    """
    folder = storage.join(dest, FOLDER)
    fix = "wait until it finishes, or choose another --dest"
    try:
        with Lock(storage.join(folder, _LOCK), dest, fix, log) as lock:
            _remove(dest, storage.PARTIAL)  # left by dead processes: no other process writes here now
            yield lock
    finally:
        if storage.is_local(folder):
            with suppress(OSError):  # it is not empty while it contains results
                Path(storage.resolve(folder)).rmdir()


def slice_keys(source: Source, slices: Sequence[Sequence[Item]]) -> list[str]:
    """For each slice, a digest of everything that decides its result.

    This is the code, the source as pickled for workers, the slice's items, and the size and time of their files.
    """
    stamps = _stamps({uri for items in slices for item in items for uri in (item.image, item.annotation) if uri})
    common = [code_digest(source), hashlib.sha256(pickle.dumps(source)).hexdigest()]

    def key(number: int, items: Sequence[Item]) -> str:
        listed = [(repr(item), stamps.get(item.image or ""), stamps.get(item.annotation or "")) for item in items]
        return hashlib.sha256(json.dumps([common, number, listed]).encode()).hexdigest()

    return [key(number, items) for number, items in enumerate(slices)]


def save_result(dest: str, key: str, result: SliceResult) -> None:
    """Save the result of a slice whose shard is written."""
    storage.write_bytes(storage.join(dest, _result_path(result.number, key)), result.to_json().encode())


def load_results(dest: str, keys: Sequence[str]) -> dict[int, SliceResult]:
    """Saved results by slice number, of slices with the same key and a complete shard."""
    sizes = {file.name: file.size for file in storage.find_files(dest, depth=2)}
    results = {}
    for number, key in enumerate(keys):
        if (path := _result_path(number, key)) in sizes:
            with suppress(ValueError, KeyError, TypeError):  # a damaged result is converted again
                result = SliceResult.from_json(storage.read_bytes(storage.join(dest, path)))
                if result.shard and sizes.get(result.shard.path) == result.shard.bytes:
                    results[number] = result
    return results


def mark_finished(dest: str, keys: Sequence[str], digest: str) -> None:
    """Save the digest of the index that completes the conversion; call this before writing the index."""
    storage.write_bytes(storage.join(dest, FOLDER, _finished_name(keys)), digest.encode())


def finished_digest(dest: str, keys: Sequence[str]) -> str:
    """Digest given to mark_finished for the conversion of these slices; "" if there is none."""
    return (storage.read_bytes_or_none(storage.join(dest, FOLDER, _finished_name(keys))) or b"").decode()


def is_unfinished(dest: str) -> bool:
    """Whether a conversion into `dest` is running or was interrupted."""
    return storage.exists(storage.join(dest, FOLDER))


def clear(dest: str) -> None:
    """Remove the results of all conversions and, last, the marks of finished ones."""
    _remove(dest, _RESULT)
    _remove(dest, _FINISHED)


def _remove(dest: str, pattern: str) -> None:
    for file in storage.find_files(storage.join(dest, FOLDER)):
        if pattern in file.name:
            storage.remove(storage.join(dest, FOLDER, file.name))


def _result_path(number: int, key: str) -> str:
    return f"{FOLDER}/{_RESULT}{number:05d}-{key[:32]}.json"


def _finished_name(keys: Sequence[str]) -> str:
    return f"{_FINISHED}{hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:32]}.txt"


def _stamps(uris: set[str]) -> dict[str, tuple[int, float]]:
    """Size and modification time of files; one listing per folder, skipping folders without listing."""
    stamps = {}
    for folder in sorted({uri.rpartition("/")[0] for uri in uris}):
        with suppress(UserError):
            for file in storage.find_files(folder, depth=1):
                if (uri := storage.join(folder, file.name)) in uris:
                    stamps[uri] = (file.size, file.modified)
    return stamps
