"""Files and folders at URIs: reading, listing, and atomic publication, so that readers see whole files only."""

import contextlib
import functools
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import fsspec

from crowdray.errors import DataError, UserError
from crowdray.storage.paths import PARTIAL, filesystem, is_local, join, resolve, retry, translated_errors
from crowdray.storage.scratch import scratch_folder

_COMPANIONS = (
    *("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "$recycle.bin", "system volume information"),
    *("@eadir", "#recycle"),  # of Synology's file servers: thumbnails of photos, and removed ones
)
"""Files and folders that file managers and servers add to others, in lower case."""
_NAME_END = 32
"""Characters of a target's name at the end of its partial's name, which must not be too long for a file system."""

exclusive_create_support: dict[str, bool] = {}
"""Result of `_supports_exclusive_create` by bucket."""


def exists(uri: str) -> bool:
    """Whether a file or a folder exists at the URI."""
    with translated_errors("look for", uri):
        fs, path = filesystem(uri)
        fs.invalidate_cache()
        return bool(retry(lambda: fs.exists(path)))


def read_bytes(uri: str) -> bytes:
    """Read a whole file; raise UserError if it does not exist."""
    with translated_errors("read", uri):
        if is_local(uri):  # creating a file system object costs more than reading a small file
            return Path(resolve(uri)).read_bytes()
        fs, path = filesystem(uri)
        content = retry(lambda: fs.cat_file(path))
        assert isinstance(content, bytes)
        return content


def read_bytes_or_none(uri: str) -> bytes | None:
    """Read a whole file; None if it does not exist."""
    try:
        return read_bytes(uri)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def read_ranges(uri: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Read ranges (start, end) of a file, end exclusive; raise DataError if the file is shorter."""
    nonempty = [(start, end) for start, end in ranges if start < end]
    starts, ends = [start for start, _ in nonempty], [end for _, end in nonempty]

    def read() -> list[bytes]:
        parts: list[bytes] = fs.cat_ranges([path] * len(nonempty), starts, ends, on_error="raise")
        if [len(part) for part in parts] != [end - start for start, end in nonempty]:
            raise DataError(
                f"{uri} is truncated or was replaced: it ends before byte {max(ends)}; copy it again or convert again"
            )
        return parts

    with translated_errors("read", uri):
        fs, path = filesystem(uri)
        parts = iter(retry(read) if nonempty else [])
    return [next(parts) if start < end else b"" for start, end in ranges]


@contextlib.contextmanager
def open_read(uri: str) -> Iterator[IO[bytes]]:
    """Open a file for reading; raise UserError if it does not exist."""
    with translated_errors("read", uri):
        fs, path = filesystem(uri)
        fs.invalidate_cache(path)  # a cached size would truncate a file that has grown
        with fs.open(path, "rb") as file:
            yield file


def list_files(uri: str, suffixes: Sequence[str] = ()) -> list[str]:
    """List the URIs of the files directly in a folder, sorted by name; raise UserError if it does not exist.

    `suffixes` selects files that end with one of them, ignoring case, and are not hidden.
    """
    names = sorted(file.name for file in find_files(uri, depth=1))
    if not names and not exists(uri):
        raise UserError(f"cannot list {uri}: it does not exist; check the path")
    endings = tuple(suffix.lower() for suffix in suffixes)
    chosen = [name for name in names if not endings or (name.lower().endswith(endings) and not is_hidden(name))]
    return [join(resolve(uri), name) for name in chosen]


def is_hidden(path: str) -> bool:
    """Whether a part of a path is hidden or made by a file manager, as ._a.jpg, .DS_Store, __MACOSX and Thumbs.db."""
    return any(part.startswith(".") or part.lower() in _COMPANIONS for part in path.split("/"))


@dataclass(frozen=True)
class FileInfo:
    """A file below a listed folder."""

    name: str
    """Path relative to the folder, with slashes."""
    size: int
    """Size in bytes."""
    modified: float
    """Modification time, in seconds since 1970."""


def find_files(uri: str, depth: int | None = None) -> list[FileInfo]:
    """List all files below a folder, at most `depth` levels deep; empty if the folder does not exist.

    Without `depth`, links to local folders are followed, except to one that contains the link.
    """
    with translated_errors("list", uri):
        fs, path = filesystem(uri)
        fs.invalidate_cache()
        entries = retry(lambda: fs.find(path, maxdepth=depth, detail=True))
    found = []
    for full, entry in entries.items():
        name = full.removeprefix(path).strip("/")
        if depth is None and entry.get("islink") and os.path.isdir(full):
            if not Path(full).parent.resolve().is_relative_to(Path(full).resolve()):
                inner = find_files(full)
                found += [FileInfo(f"{name}/{file.name}", file.size, file.modified) for file in inner]
        elif name:
            found.append(FileInfo(name, entry["size"], _modified(entry)))
    return found


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """Yield a local folder with the files directly in a folder: the folder itself, or a temporary copy.

    Raises:
        UserError: The remote folder does not exist.
        DataError: A file is shorter than listed.
    """
    if is_local(uri):
        yield Path(resolve(uri))
        return

    def copy(file: FileInfo) -> None:
        fs.get_file(join(path, file.name), str(folder / file.name))
        if (folder / file.name).stat().st_size != file.size:
            raise DataError(f"{join(uri, file.name)} was cut off while it was copied; run the command again")

    with scratch_folder("copy") as folder:
        with translated_errors("copy", f"{uri} to {folder} (set TMPDIR to use another folder)"):
            fs, path = filesystem(uri)
            if not (found := find_files(uri, depth=1)):
                raise FileNotFoundError(uri)
            for file in found:
                retry(functools.partial(copy, file))
        yield folder


class ExclusiveCreateUnsupportedError(UserError):
    """The object store overwrites a file even when asked to create it exclusively."""


def create_bytes(uri: str, data: bytes) -> bool:
    """Create a file that does not exist yet; of several processes with different data, exactly one gets True.

    A reader may see a local file before its content.

    Raises:
        ExclusiveCreateUnsupportedError: The store ignores the condition, so plain reads and writes could not decide
            which process was first.
    """
    with translated_errors("create", uri):
        fs, path = filesystem(uri)
        try:
            if is_local(uri):
                _create_locally(Path(path), data)
            elif _supports_exclusive_create(fs, path):
                retry(lambda: fs.pipe_file(path, data, mode="create"))
            else:
                raise ExclusiveCreateUnsupportedError(
                    f"cannot create {uri} exclusively: its store ignores `If-None-Match: *`; use one that supports it, "
                    "such as AWS S3, or a folder that all nodes share"
                )
        except OSError:
            # Object stores refuse in several ways, and a request that was retried is refused because of itself.
            if (existing := read_bytes_or_none(uri)) is None:
                raise
            return existing == data
    return True


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file atomically: by a rename locally, by one request remotely."""
    with translated_errors("write", uri):
        fs, path = filesystem(uri)
        if not is_local(uri):
            retry(lambda: fs.pipe_file(path, data))
            return
        with _partial_sibling(Path(path)) as partial:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(path)


def publish_file(local: Path, uri: str) -> None:
    """Move a local file to its URI atomically: by a rename locally, by one request remotely."""
    with translated_errors("write", uri):
        fs, path = filesystem(uri)
        if not is_local(uri):
            retry(lambda: fs.put_file(str(local), path))
            local.unlink()
            return
        with _partial_sibling(Path(path)) as partial:
            shutil.move(local, partial)
            partial.replace(path)


@contextlib.contextmanager
def staging_file(uri: str) -> Iterator[Path]:
    """Yield a local path to write before `publish_file`: next to a local target, else in the temporary folder.

    A file that is still there at the end is removed; a full disk is a UserError that names the URI.
    """
    with translated_errors("write", uri):
        if is_local(uri):
            with _partial_sibling(Path(resolve(uri))) as partial:
                yield partial
        else:
            with scratch_folder("upload") as folder:
                yield folder / Path(uri).name


def remove(uri: str) -> None:
    """Remove a file if it exists."""
    with translated_errors("remove", uri), contextlib.suppress(FileNotFoundError):
        fs, path = filesystem(uri)
        retry(lambda: fs.rm_file(path))


def publish_directory(local: Path, uri: str, last: str) -> None:
    """Copy a local folder to a URI so that readers who look for the file `last` see all of it or nothing.

    A local target appears by one rename; on an object store `last` is uploaded last.

    Raises:
        UserError: `last` is missing locally or exists at the URI, or the copy failed; nothing is left behind.
    """
    files = sorted(path for path in local.rglob("*") if path.is_file())
    names = [path.relative_to(local).as_posix() for path in files]
    if last not in names:
        raise UserError(f"{local} does not contain {last}, the file to publish last; found {names[:5]}")
    if exists(join(uri, last)):
        raise UserError(f"{uri} already contains {last}; choose another path, or remove that folder first")
    with translated_errors("publish", uri):
        if is_local(uri):
            with _partial_sibling(Path(resolve(uri))) as partial:
                shutil.copytree(local, partial)
                partial.replace(resolve(uri))
        else:
            _upload(local, uri, sorted(names, key=lambda name: name == last))


def unpublish_directory(uri: str, last: str) -> None:
    """Remove a folder of `publish_directory` if it exists: by one rename locally, `last` first remotely."""
    with translated_errors("remove", uri):
        fs, path = filesystem(uri)
        if is_local(uri):
            with _partial_sibling(Path(path)) as partial, contextlib.suppress(FileNotFoundError):
                Path(path).replace(partial)
            return
        fs.invalidate_cache()
        for name in sorted(fs.find(path), key=lambda name: name != join(path, last)):
            with contextlib.suppress(FileNotFoundError):
                fs.rm_file(name)


@contextlib.contextmanager
def _partial_sibling(target: Path) -> Iterator[Path]:
    """Yield a path next to `target` for an unfinished file or folder, which is removed unless it was renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{PARTIAL}{uuid.uuid4().hex[:12]}-{target.name[-_NAME_END:]}")
    try:
        yield partial
    finally:
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


def _create_locally(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:  # LocalFileSystem.pipe_file checks and writes in two steps
        try:
            file.write(data)
            file.flush()  # raises if the disk is full
        except OSError:
            target.unlink()
            raise


def _supports_exclusive_create(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    """Whether a store refuses to create an existing file; tested once per bucket, with a probe file."""
    bucket = f"{fs.protocol}{path.lstrip('/').split('/')[0]}"
    if bucket not in exclusive_create_support:
        probe = f"{path.rpartition('/')[0]}/{PARTIAL}{uuid.uuid4().hex}"
        fs.pipe_file(probe, b"first", mode="create")
        try:
            fs.pipe_file(probe, b"second", mode="create")
            exclusive_create_support[bucket] = False
        except OSError:
            exclusive_create_support[bucket] = retry(lambda: fs.cat_file(probe)) == b"first"
        finally:
            fs.rm_file(probe)
    return exclusive_create_support[bucket]


def _modified(entry: Mapping[str, Any]) -> float:
    """The modification time of a listed file, whose name and type differ between file systems."""
    times = (entry.get(name) for name in ("mtime", "LastModified", "last_modified", "updated", "created"))
    time = next((value for value in times if value is not None), 0.0)
    if isinstance(time, str):
        time = datetime.fromisoformat(time)
    return time.timestamp() if isinstance(time, datetime) else float(time)


def _upload(local: Path, uri: str, names: Sequence[str]) -> None:
    fs, root = filesystem(uri)
    uploaded: list[str] = []
    try:
        for name in names:
            uploaded.append(join(root, name))
            retry(functools.partial(fs.put_file, str(local / name), uploaded[-1]))
    except BaseException:
        for path in uploaded:
            with contextlib.suppress(Exception):
                fs.rm_file(path)
        raise
