"""What a conversion has finished, kept at its destination until the index is there: the next start goes on from it.

Below `.conversion/` lie the lease of the one who converts and a record of each finished slice, written after its
shard. The name of a record holds the digest of all that its slice was made from, so a record of another conversion
is never taken for one's own.
"""

import hashlib
import inspect
import json
import os
import pickle
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Self

from crowdray import storage
from crowdray.data.shards import ShardInfo, shard_from_json
from crowdray.datasets.quarantine import Quarantined
from crowdray.datasets.sources import Item, Source
from crowdray.errors import UserError
from crowdray.storage import lease as leases
from crowdray.storage.lease import Keeper, Lease

FOLDER = ".conversion"
"""Folder of the journal at the destination."""

_WRITER = "writer"
_RECORD = "slice-"
_SEAL = "index-"
_LIBRARIES = ("numpy", "pillow", "pyarrow", "scipy", "simplejpeg")
"""They decide on the bytes of a shard."""


@dataclass(slots=True)
class SliceResult:
    """What became of one slice: a shard and what is to be told of it; small, picklable, and the same as JSON."""

    number: int
    """Position of the slice, and the number of its shard."""
    shard: ShardInfo | None = None
    """None when no item can be used: then nothing was written."""
    quarantined: list[Quarantined] = field(default_factory=list)
    """The items that cannot be used."""
    outside: list[tuple[str, int]] = field(default_factory=list)
    """Images with heads outside their bounds, and how many."""
    hashes: list[tuple[str, str]] = field(default_factory=list)
    """Hash and name of each image, to find those that are there twice."""
    empty: int = 0
    """Images without a head."""
    missing: list[str] = field(default_factory=list)
    """Files that were not there for who converted the slice."""

    def to_json(self) -> str:
        """The content of a record."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """What to_json wrote, equal in every field; a ValueError, KeyError or TypeError for anything else."""
        content = json.loads(text)
        content["shard"] = content["shard"] and shard_from_json(content["shard"])
        content["quarantined"] = [Quarantined(**item) for item in content["quarantined"]]
        for name in ("outside", "hashes"):
            content[name] = [(first, second) for first, second in content[name]]
        return cls(**content)


@contextmanager
def claimed(dest: str, tell: Callable[[str], None]) -> Iterator[Lease]:
    """The right to be the only one who converts into `dest`, which ends within LEASE_S of its holder's death.

    A holder who renews the lease lives, and is named by a UserError; one who does not is waited for, which `tell`
    says.
    """
    folder = storage.join(dest, FOLDER)
    now = datetime.now(UTC).isoformat(" ", "seconds")
    owner, seen = f"process {os.getpid()} on {socket.gethostname()} since {now}", None
    while (lease := _lease(folder, owner, tell)) is None:
        there = leases.holder(folder, _WRITER)
        if seen and there and there != seen:
            raise UserError(f"{there[0]} is converting into {dest}; wait for its end, or choose another --dest")
        if seen is None and there:
            tell(f"{there[0]} holds {dest}; it is taken over if it is silent for {leases.LEASE_S:.0f} s")
        seen = seen or there
        time.sleep(leases.LEASE_S / leases.RENEWALS / 4)
    try:
        _remove(dest, storage.PARTIAL)  # the dead left them, and nobody else writes there now
        with Keeper() as keeper:
            keeper.add(lease)
            yield lease
    finally:
        if storage.is_local(folder):
            with suppress(OSError):  # it stays while it holds records
                Path(storage.resolve(folder)).rmdir()


def _lease(folder: str, owner: str, tell: Callable[[str], None]) -> Lease | None:
    try:
        return leases.take(folder, _WRITER, owner)
    except storage.ExclusiveCreateUnsupportedError as error:
        tell(f"{error}. Until then see to it that nobody else converts to the same place")
        return leases.share(folder, _WRITER, owner)


def slice_keys(source: Source, parts: Sequence[Sequence[Item]]) -> list[str]:
    """For each slice the digest of all that its result depends on.

    That is the code, the source as a worker gets it, the slice's items, and size and time of their files.
    """
    stamps = _stamps({uri for items in parts for item in items for uri in (item.image, item.annotation) if uri})
    made_by = [_code(), _module(source), hashlib.sha256(pickle.dumps(source)).hexdigest()]

    def key(number: int, items: Sequence[Item]) -> str:
        listed = [(repr(item), stamps.get(item.image or ""), stamps.get(item.annotation or "")) for item in items]
        return hashlib.sha256(json.dumps([made_by, number, listed]).encode()).hexdigest()

    return [key(number, items) for number, items in enumerate(parts)]


def record(dest: str, key: str, result: SliceResult) -> None:
    """Keep the result of a slice whose shard is written."""
    storage.write_bytes(storage.join(dest, _record_name(result.number, key)), result.to_json().encode())


def finished(dest: str, keys: Sequence[str]) -> dict[int, SliceResult]:
    """Results of the slices that have a record under their key, and their whole shard at `dest`."""
    sizes = {file.name: file.size for file in storage.find_files(dest, depth=2)}
    found = {}
    for number, key in enumerate(keys):
        if (name := _record_name(number, key)) in sizes:
            with suppress(ValueError, KeyError, TypeError):  # a damaged record is none
                result = SliceResult.from_json(storage.read_bytes(storage.join(dest, name)))
                if result.shard and sizes.get(result.shard.path) == result.shard.bytes:
                    found[number] = result
    return found


def seal(dest: str, keys: Sequence[str], digest: str) -> None:
    """Say, before the index is written, that the one with this digest ends the conversion of these slices."""
    storage.write_bytes(storage.join(dest, FOLDER, _seal_name(keys)), digest.encode())


def sealed(dest: str, keys: Sequence[str]) -> str:
    """Digest of the index that ended, or was about to end, the conversion of these slices; "" when there is none."""
    return (storage.read_bytes_or_none(storage.join(dest, FOLDER, _seal_name(keys))) or b"").decode()


def is_there(dest: str) -> bool:
    """Whether a conversion into `dest` is under way or was cut off."""
    return storage.exists(storage.join(dest, FOLDER))


def forget(dest: str) -> None:
    """Remove all records, of other conversions too, and what is half-written of them; the seal last."""
    _remove(dest, _RECORD)
    _remove(dest, _SEAL)


def _remove(dest: str, part: str) -> None:
    for file in storage.find_files(storage.join(dest, FOLDER)):
        if part in file.name:
            storage.remove(storage.join(dest, FOLDER, file.name))


def _record_name(number: int, key: str) -> str:
    return f"{FOLDER}/{_RECORD}{number:05d}-{key[:32]}.json"


def _seal_name(keys: Sequence[str]) -> str:
    return f"{_SEAL}{hashlib.sha256(json.dumps(keys).encode()).hexdigest()[:32]}.txt"


def _stamps(uris: set[str]) -> dict[str, tuple[int, float]]:
    """Size and time of files, from one listing of each of their folders; nothing of folders that cannot be listed."""
    stamps = {}
    for folder in sorted({uri.rpartition("/")[0] for uri in uris}):
        with suppress(UserError):
            for file in storage.find_files(folder, depth=1):
                if (uri := storage.join(folder, file.name)) in uris:
                    stamps[uri] = (file.size, file.modified)
    return stamps


def _code() -> list[str]:
    """What turns items into bytes: the modules of this floor, and libraries."""
    files = sorted(Path(__file__).parent.rglob("*.py"))
    return [*map(storage.hash_file, files), *(f"{name} {version(name)}" for name in _LIBRARIES)]


def _module(source: Source) -> str:
    """The code of a source that does not come from this floor."""
    with suppress(OSError, TypeError):  # written in a console
        return inspect.getsource(inspect.getmodule(type(source)) or type(source))
    return ""
