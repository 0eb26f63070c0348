"""The node's cache of remote files: each fetched once by all processes, verified, with a limited total size.

    <sha256[:2]>/<sha256>                     a copy, locked by its readers; its access time is that of its last use
    <sha256[:2]>/.partial-<size>-<sha256>     a download, locked by its process, whose size is reserved
    <sha256[:2]>/<sha256>.lock                held by the process that downloads
    lock                                      held while space is freed or a copy is put into use

All locks are the operating system's, so those of a killed process are released and the next process cleans up. Deleting
a mapped file would not disturb its readers on Linux; copies in use stay so that they are not fetched twice.
"""

import fcntl
import hashlib
import os
import re
import shutil
import time
from pathlib import Path

from filelock import FileLock

from crowdray.errors import DataError, UserError
from crowdray.storage.paths import PARTIAL, filesystem, is_local, resolve, retry, translated_errors

_DISK_FRACTION = 0.5
_FIX = "copy it again or convert the dataset again"
_BLOCK = 2**22
_POLL_S = 0.005
"""Interval between attempts to take the cache's lock, which is held for moments only."""

_PARTIAL_NAME = re.compile(re.escape(PARTIAL) + r"(\d+)-\w+")

_verified: set[tuple[str, int, int, int]] = set()
"""Hash, inode, size and modification time of files that this process has verified."""

_in_use: dict[Path, int] = {}
"""Descriptors of the copies that this process uses; their locks last while it or a fork of it runs."""


class CacheFullError(UserError):
    """A file does not fit into the cache next to the copies in use; read it remotely instead."""


def cache_folder() -> Path:
    """The folder of this node's cache: $CROWDRAY_CACHE, by default ~/.cache/crowdray."""
    return Path(os.environ.get("CROWDRAY_CACHE") or "~/.cache/crowdray").expanduser()


def fetch(uri: str, *, sha256: str, size: int) -> Path:
    """Return a local path to map: the file itself if it is local, else a copy in this node's cache.

    A copy stays while this process runs. Other copies are evicted, least recently used first, when the cache would
    outgrow $CROWDRAY_CACHE_GIB, by default half of the disk space that it can use.

    Args:
        uri: The file.
        sha256: Expected hash; checked once per process.
        size: Expected size in bytes.

    Raises:
        DataError: The file is missing, or is not as expected.
        CacheFullError: The copy does not fit.
    """
    if is_local(uri):
        path = check_local_file(uri, size)
        _verify_file(path, uri, sha256=sha256, size=size)
        return path
    cached = cache_folder() / sha256[:2] / sha256
    with translated_errors("cache", f"{uri} in {cached.parents[1]} (set CROWDRAY_CACHE to use another folder)"):
        cached.parent.mkdir(parents=True, exist_ok=True)
        if not _use_existing(cached, uri, size):
            # The lock file is never removed: processes that wait for it and later ones must share it.
            with FileLock(f"{cached}.lock"):
                if not _use_existing(cached, uri, size):
                    _download(uri, cached, size)
    return cached


def hash_file(path: Path) -> str:
    """The sha256 of a local file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_local_file(uri: str, size: int) -> Path:
    """Return the path of a local file, if it exists and has this size in bytes; otherwise raise DataError."""
    path = Path(resolve(uri))
    if not path.is_file():
        raise DataError(f"{path} is missing but listed in the index; copy it back or convert the dataset again")
    _check_size(path, uri, size)
    return path


def _check_size(path: Path, uri: str, size: int) -> None:
    if (found := path.stat().st_size) != size:
        raise DataError(f"{uri} is truncated or was replaced: it has {found} bytes, its index says {size}; {_FIX}")


def _verify_file(path: Path, uri: str, *, sha256: str, size: int) -> None:
    """Check a file; it is hashed once per process unless its size or modification time changes."""
    _check_size(path, uri, size)
    status = path.stat()
    if (key := (sha256, status.st_ino, status.st_size, status.st_mtime_ns)) in _verified:
        return
    if (found := hash_file(path)) != sha256:
        raise DataError(f"{uri} is damaged: its sha256 is {found}, its index says {sha256}; {_FIX}")
    _verified.add(key)


def _use_existing(cached: Path, uri: str, size: int) -> bool:
    """Put an existing valid copy into use; False if there is none."""
    with _cache_lock(cached.parents[1]):
        if not cached.exists():
            return False
        _keep(cached, cached)
        os.utime(cached, ns=(time.time_ns(), cached.stat().st_mtime_ns))
    try:
        _verify_file(cached, uri, sha256=cached.name, size=size)
    except DataError:
        return False
    return True


def _download(uri: str, cached: Path, size: int) -> None:
    partial = cached.with_name(f"{PARTIAL}{size}-{cached.name}")
    fs, remote = filesystem(uri)

    def attempt() -> None:
        fs.get_file(remote, str(partial))
        _verify_file(partial, uri, sha256=cached.name, size=size)

    folder = cached.parents[1]
    with _cache_lock(folder):
        cached.unlink(missing_ok=True)  # a damaged copy
        _free_space(folder, uri, size)
        partial.touch()
        _keep(cached, partial)
    try:
        retry(attempt)
        with _cache_lock(folder):
            partial.replace(cached)
    except FileNotFoundError as error:
        raise DataError(f"{uri} is missing but listed in the index; copy it back or convert again") from error
    finally:
        with _cache_lock(folder):
            partial.unlink(missing_ok=True)


def _free_space(folder: Path, uri: str, size: int) -> None:
    """Remove downloads of killed processes, then unused copies, until `size` bytes are free."""
    copies: list[tuple[int, Path, int]] = []
    total = 0
    for path in folder.glob("[0-9a-f][0-9a-f]/*"):
        if path.suffix == ".lock":
            continue
        if match := _PARTIAL_NAME.fullmatch(path.name):
            total += 0 if _remove_unused(path) else int(match[1])
        else:
            status = path.stat()
            copies.append((status.st_atime_ns, path, status.st_size))
            total += status.st_size
    limit = _limit_bytes(folder, total)
    for _, path, freed in sorted(copies):
        if total + size > limit and _remove_unused(path):
            total -= freed
    if total + size > limit:
        raise CacheFullError(
            f"{uri} ({size} bytes) does not fit into the cache {folder}: its limit is {limit} bytes, and {total} are "
            "in use; raise CROWDRAY_CACHE_GIB, or set CROWDRAY_CACHE to a folder on a larger disk"
        )


def _limit_bytes(folder: Path, used: int) -> int:
    text = os.environ.get("CROWDRAY_CACHE_GIB")
    if not text:
        return int(_DISK_FRACTION * (shutil.disk_usage(folder).free + used))
    if not re.fullmatch(r"\d+(\.\d*)?", text):
        raise UserError(f"CROWDRAY_CACHE_GIB is {text!r}; give the size of the cache in GiB, such as 200")
    return int(float(text) * 2**30)


def _cache_lock(folder: Path) -> FileLock:
    """Exclude other processes from freeing space and from putting copies into use."""
    return FileLock(folder / "lock", poll_interval=_POLL_S)


def _keep(cached: Path, file: Path) -> None:
    """Lock the file that is, or becomes, a copy, which protects it from `_remove_unused`."""
    descriptor = os.open(file, os.O_RDONLY)
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    if cached in _in_use:
        os.close(_in_use[cached])
    _in_use[cached] = descriptor


def _remove_unused(path: Path) -> bool:
    """Remove a file that no process has locked; returns whether it was removed."""
    with path.open("r+b") as file:  # on NFS, an exclusive lock needs write access
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        path.unlink()
        return True
