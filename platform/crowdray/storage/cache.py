"""This node's copies of remote files: each fetched once by however many processes, verified, bounded in size.

    <sha256[:2]>/<sha256>                     a copy; its access time is that of its last use
    <sha256[:2]>/.partial-<bytes>-<sha256>    one under way, whose room is taken already
    <sha256[:2]>/<sha256>.lock                held by the process that fetches it
    readers/<id>                              what a process reads, locked while that process lives
    lock                                      held for the moment in which room is made, or a copy is taken into use

All locks are the system's own, so those of a killed process are free, and the next one clears up after it. Deleting
a mapped file would harm no reader on Linux; copies in use stay so that nobody has to fetch them twice.
"""

import contextlib
import fcntl
import functools
import hashlib
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from crowdray.errors import DataError, UserError
from crowdray.storage.files import open_read
from crowdray.storage.paths import PARTIAL, filesystem, is_local, resolve, retry, translated_errors

_SHARE_OF_THE_DISK = 0.5
_BLOCK = 2**22
_POLL_S = 0.005
"""Wait between two looks at the lock that is held for a moment only."""

_UNDER_WAY = re.compile(re.escape(PARTIAL) + r"(\d+)-(\w+)")

_verified: set[tuple[str, int, int, int]] = set()
"""Hash, inode, size and time of files whose content this process has checked."""


class CacheFullError(UserError):
    """A copy that fits into the cache only beside nothing, or not at all; whoever can reads the file from afar."""


def cache_folder() -> Path:
    """The folder in which this node keeps what it fetched: $CROWDRAY_CACHE, else ~/.cache/crowdray."""
    return Path(os.environ.get("CROWDRAY_CACHE") or "~/.cache/crowdray").expanduser()


def fetch(uri: str, *, sha256: str, size: int, verify: bool = True) -> Path:
    """A local path to map: the file itself when it is local, else a copy in this node's cache, fetched once.

    `size` is in bytes and always checked. The hash is checked once per process: always for a remote file, and with
    `verify` for a local one. A copy stays while this process lives; others go, least recently used first, where the
    cache would outgrow $CROWDRAY_CACHE_GIB, by default half of what its disk has to give. Raises DataError when the
    content is not what the index says or there is none, and CacheFullError when there is no room for the copy.
    """
    if is_local(uri):
        path = Path(resolve(uri))
        if not path.is_file():
            raise DataError(f"{path} is missing though the index names it; copy it back or convert the dataset again")
        check_content(path, uri, sha256=sha256 if verify else None, size=size)
        return path
    cached = cache_folder() / sha256[:2] / sha256
    with translated_errors("cache", f"{uri} in {cached.parents[1]} (set CROWDRAY_CACHE to another folder if need be)"):
        cached.parent.mkdir(parents=True, exist_ok=True)
        if not _taken(cached, uri, size):
            # Its file stays behind: removing it would part those who wait for it from those who come later.
            with FileLock(f"{cached}.lock"):
                if not _taken(cached, uri, size):
                    _bring(uri, cached, size)
    return cached


def verify(uri: str, *, sha256: str, size: int) -> None:
    """Check a file against its size in bytes and its hash, wherever it lies; raises DataError."""
    try:
        fetch(uri, sha256=sha256, size=size)
    except CacheFullError:
        found, there = hashlib.sha256(), 0
        with open_read(uri) as file:
            while block := file.read(_BLOCK):
                found.update(block)
                there += len(block)
        _compare(uri, there, size, found.hexdigest(), sha256)


def check_content(path: Path, uri: str, *, sha256: str | None, size: int) -> None:
    """Check a local file against its expected size in bytes and, if given, its hash; raises DataError.

    A file that was found good is not hashed again by this process while its size and time stay the same.
    """
    status = path.stat()
    _compare(uri, status.st_size, size)
    if sha256 is None or (key := (sha256, status.st_ino, status.st_size, status.st_mtime_ns)) in _verified:
        return
    _compare(uri, size, size, hash_file(path), sha256)
    _verified.add(key)


def _compare(uri: str, found: int, size: int, found_hash: str = "", sha256: str = "") -> None:
    mend = "copy it again or convert the dataset again"
    if found != size:
        raise DataError(f"{uri} is truncated or was replaced: it has {found} bytes, its index says {size}; {mend}")
    if found_hash != sha256:
        raise DataError(f"{uri} is damaged: its sha256 is {found_hash}, its index says {sha256}; {mend}")


def hash_file(path: Path) -> str:
    """The sha256 of a local file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _taken(cached: Path, uri: str, size: int) -> bool:
    """Whether a good copy is there; it is in use from now on."""
    with _moment(cached.parents[1]) as folder:
        if not cached.exists():
            return False
        _use(folder, cached.name)
        os.utime(cached, ns=(time.time_ns(), cached.stat().st_mtime_ns))
    try:
        check_content(cached, uri, sha256=cached.name, size=size)
    except DataError:
        return False
    return True


def _bring(uri: str, cached: Path, size: int) -> None:
    partial = cached.with_name(f"{PARTIAL}{size}-{cached.name}")
    fs, remote = filesystem(uri)

    def download() -> None:
        fs.get_file(remote, str(partial))
        check_content(partial, uri, sha256=cached.name, size=size)

    with _moment(cached.parents[1]) as folder:
        cached.unlink(missing_ok=True)  # a damaged one
        _make_room(folder, partial, uri, size)
        partial.touch()
        _use(folder, cached.name)
    try:
        retry(download)
        partial.replace(cached)
    except FileNotFoundError as error:
        raise DataError(f"{uri} is missing though the index names it; copy it back, or convert again") from error
    finally:
        partial.unlink(missing_ok=True)


def _make_room(folder: Path, partial: Path, uri: str, size: int) -> None:
    """Remove what killed processes left half-fetched, and copies that nobody uses, until `size` bytes are free."""
    copies: list[tuple[int, Path, int]] = []
    total = 0
    for path in folder.glob("[0-9a-f][0-9a-f]/*"):
        if path == partial or path.suffix == ".lock":
            continue
        if under_way := _UNDER_WAY.fullmatch(path.name):
            total += 0 if _left_behind(path, under_way[2]) else int(under_way[1])
        else:
            status = path.stat()
            copies.append((status.st_atime_ns, path, status.st_size))
            total += status.st_size
    limit = _limit_bytes(folder, total)
    used: set[str] | None = None
    for _, path, freed in sorted(copies):
        if total + size <= limit:
            break
        used = _in_use(folder) if used is None else used
        if path.name not in used:
            path.unlink()
            total -= freed
    if total + size > limit:
        raise CacheFullError(
            f"{uri} with its {size} bytes does not fit into the cache {folder}: it may have {limit} bytes, and {total} "
            "are in use; raise CROWDRAY_CACHE_GIB, or set CROWDRAY_CACHE to a folder on a larger disk"
        )


def _left_behind(partial: Path, name: str) -> bool:
    """Whether nobody fetches this one any more; then it is gone."""
    try:
        with FileLock(partial.with_name(f"{name}.lock"), blocking=False):
            partial.unlink(missing_ok=True)
    except Timeout:
        return False
    return True


def _limit_bytes(folder: Path, used: int) -> int:
    text = os.environ.get("CROWDRAY_CACHE_GIB")
    if not text:
        return int(_SHARE_OF_THE_DISK * (shutil.disk_usage(folder).free + used))
    try:
        gib = float(text)
    except ValueError:
        gib = math.nan
    if not gib >= 0:
        raise UserError(f"CROWDRAY_CACHE_GIB is {text!r}; give the size of the cache in GiB, such as 200")
    return int(min(gib, 2**30) * 2**30)


@contextlib.contextmanager
def _moment(folder: Path) -> Iterator[Path]:
    """The cache's folder, while no other process makes room in it or takes a copy into use."""
    with FileLock(folder / "lock", poll_interval=_POLL_S):
        yield folder


@functools.cache
def _own_mark(folder: Path) -> int:
    """A descriptor of the file that tells others what this process uses, while it lives or its forks do."""
    mark = folder / "readers" / uuid.uuid4().hex
    mark.parent.mkdir(exist_ok=True)
    descriptor = os.open(mark, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL, 0o644)
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def _use(folder: Path, name: str) -> None:
    os.write(_own_mark(folder), f"{name}\n".encode())


def _in_use(folder: Path) -> set[str]:
    """Names that living processes use; the marks of others are removed."""
    names: set[str] = set()
    for mark in (folder / "readers").iterdir():
        with mark.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                names.update(file.read().decode().split())
            else:
                mark.unlink()
    return names
