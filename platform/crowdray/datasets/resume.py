"""State of an unfinished conversion, kept at its destination to resume it.

    .conversion/writer.*.json     lock of the process that converts
    .conversion/slice-*.json      result of a finished slice, written after its shard

The name of a result contains a digest of everything that decides it, so the result of another conversion is never used.
"""

import hashlib
import json
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from pydantic import TypeAdapter

from crowdray import storage
from crowdray.data.shards import ShardInfo
from crowdray.datasets import restart_markers
from crowdray.datasets.sources import Item, Source
from crowdray.datasets.statistics import DatasetStats
from crowdray.errors import UserError
from crowdray.storage.lock import Lock

FOLDER = ".conversion"
"""Folder of the state, below the destination."""

LIBRARIES = ("numpy", "pillow", "pyarrow", "scipy", "simplejpeg")
"""Libraries that decide the bytes of a shard."""

PACKAGE = Path(__file__).parents[1]
"""Folder of the package crowdray."""

SHARED_CODE = (
    "data/decoding.py",
    "data/jpeg_strips.py",
    "data/sample.py",
    "data/shards.py",
    "datasets/depth/analytic.py",
    "datasets/depth/inverse.py",
    "datasets/sources/layout.py",
    "datasets/sources/matlab*.py",
    "datasets/sources/region.py",
    "datasets/sources/annotations/annotation.py",
    "datasets/sources/annotations/images.py",
    "datasets/sources/annotations/json_reader.py",
    "datasets/restart_markers.py",
    "datasets/statistics.py",
    "scenes/*.py",
)
"""Modules that adapters and depth teachers call, and that encode samples and write shards."""

_LOCK = "writer"
_RESULT = "slice-"


@dataclass(slots=True)
class SliceResult:
    """Result of converting one slice; small and picklable."""

    number: int
    """Position of the slice, and number of its shard."""
    shard: ShardInfo | None = None
    """Its shard; None, and nothing written, if no item can be used."""
    stats: DatasetStats = field(default_factory=DatasetStats)
    rewritten: int = 0
    """Images to which restart markers were added."""


_JSON = TypeAdapter(SliceResult)


@contextmanager
def lock_destination(dest: str, log: Callable[[str], None]) -> Iterator[Lock]:
    """Hold the lock of a destination; UserError if another running process converts into it.

    `log` receives a message while it waits for a sign of an earlier process.
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


def slice_keys(source: Source, slices: Sequence[Sequence[Item]], *, rewrite: bool = False) -> list[str]:
    """For each slice, a digest of everything that decides its result.

    This is the code, the source as pickled for workers, the slice's items, the size and time of their files, and with
    `rewrite` the program that adds restart markers.
    """
    stamps = _stamps({uri for items in slices for item in items for uri in (item.image, item.annotation) if uri})
    common = [code_digest(source), hashlib.sha256(pickle.dumps(source)).hexdigest()]
    if rewrite:
        common.append(restart_markers.program_version())

    def key(number: int, items: Sequence[Item]) -> str:
        listed = [(repr(item), stamps.get(item.image), stamps.get(item.annotation)) for item in items]
        return hashlib.sha256(json.dumps([common, number, listed]).encode()).hexdigest()

    return [key(number, items) for number, items in enumerate(slices)]


def code_digest(source: Source) -> str:
    """Digest of the code and libraries that decide what a source is converted to.

    These are the modules of its adapter and depth teacher with their base classes, and SHARED_CODE. A new source or
    another plot must not discard the finished slices of an interrupted conversion.
    """
    modules = {sys.modules[part.__module__] for part in (*type(source).__mro__, *type(source.teacher).__mro__)}
    files = {Path(file) for module in modules if (file := getattr(module, "__file__", None))}
    files |= {file for pattern in SHARED_CODE for file in PACKAGE.glob(pattern)}
    hashes = [hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(files)]
    return hashlib.sha256(repr((hashes, [version(name) for name in LIBRARIES])).encode()).hexdigest()


def save_result(dest: str, key: str, result: SliceResult) -> None:
    """Save the result of a slice whose shard is written."""
    storage.write_bytes(storage.join(dest, _result_path(result.number, key)), _JSON.dump_json(result))


def load_results(dest: str, keys: Sequence[str]) -> dict[int, SliceResult]:
    """Saved results by slice number, of slices with the same key and a complete shard."""
    sizes = {file.name: file.size for file in storage.find_files(dest, depth=2)}
    results = {}
    for number, key in enumerate(keys):
        if (path := _result_path(number, key)) in sizes:
            with suppress(ValueError):  # a damaged result is converted again
                result = _JSON.validate_json(storage.read_bytes(storage.join(dest, path)))
                if result.shard and sizes.get(result.shard.path) == result.shard.bytes:
                    results[number] = result
    return results


def clear(dest: str) -> None:
    """Remove the results of all conversions."""
    _remove(dest, _RESULT)


def _remove(dest: str, pattern: str) -> None:
    for file in storage.find_files(storage.join(dest, FOLDER)):
        if pattern in file.name:
            storage.remove(storage.join(dest, FOLDER, file.name))


def _result_path(number: int, key: str) -> str:
    return f"{FOLDER}/{_RESULT}{number:05d}-{key[:32]}.json"


def _stamps(uris: set[str]) -> dict[str, tuple[int, float]]:
    """Size and modification time of files; one listing per folder, skipping folders without listing."""
    stamps = {}
    for folder in sorted({uri.rpartition("/")[0] for uri in uris}):
        with suppress(UserError):
            for file in storage.find_files(folder, depth=1):
                if (uri := storage.join(folder, file.name)) in uris:
                    stamps[uri] = (file.size, file.modified)
    return stamps
