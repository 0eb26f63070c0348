"""Files and folders at URIs: read, listed, and published so that each is either whole or not there."""

import contextlib
import functools
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import fsspec

from crowdray.errors import DataError, UserError
from crowdray.storage.paths import PARTIAL, filesystem, is_local, join, resolve, retry, translated_errors

_PART = 2**26
"""Bytes of a file that are held in memory while it is copied."""
_exclusive: dict[str, bool] = {}
"""Whether the stores at these roots were seen to refuse a second creation."""


def exists(uri: str) -> bool:
    """Whether a file or a folder lies at the URI."""
    with translated_errors("look for", uri):
        fs, path = filesystem(uri)
        fs.invalidate_cache()
        return bool(retry(lambda: fs.exists(path)))


def read_bytes(uri: str) -> bytes:
    """The whole content of a file; a missing one is a UserError that names it."""
    with translated_errors("read", uri):
        if is_local(uri):  # a file system object costs more than a small file
            return Path(resolve(uri)).read_bytes()
        fs, path = filesystem(uri)
        content = retry(lambda: fs.cat_file(path))
        assert isinstance(content, bytes)
        return content


def read_bytes_or_none(uri: str) -> bytes | None:
    """The whole content of a file, None when there is no such file."""
    try:
        return read_bytes(uri)
    except UserError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return None
        raise


def read_ranges(uri: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Parts of a file, each from its first byte up to its end, which is not part of it.

    Raises DataError where the file has fewer bytes.
    """
    some = [(start, end) for start, end in ranges if start < end]
    starts, ends = [start for start, _ in some], [end for _, end in some]

    def read() -> list[bytes]:
        parts: list[bytes] = fs.cat_ranges([path] * len(some), starts, ends, on_error="raise")
        if [len(part) for part in parts] != [end - start for start, end in some]:
            raise DataError(
                f"{uri} is truncated or was replaced: it ends before byte {max(ends)}; copy it again or convert again"
            )
        return parts

    with translated_errors("read", uri):
        fs, path = filesystem(uri)
        parts = iter(retry(read) if some else [])
    return [next(parts) if start < end else b"" for start, end in ranges]


@contextlib.contextmanager
def open_read(uri: str) -> Iterator[IO[bytes]]:
    """A file opened for reading, where a part of it is enough; a missing one is a UserError that names it."""
    with translated_errors("read", uri):
        fs, path = filesystem(uri)
        fs.invalidate_cache(path)  # a size of earlier would cut the file off
        with fs.open(path, "rb") as file:
            yield file


def list_files(uri: str, suffixes: Sequence[str] = ()) -> list[str]:
    """URIs of the files directly in a folder, sorted by name, that end with one of the suffixes in any case.

    Without suffixes all files are listed; a folder that is not there is a UserError.
    """
    resolved = resolve(uri)
    with translated_errors("list", uri):
        fs, path = filesystem(uri)
        fs.invalidate_cache(path)
        entries = fs.ls(path, detail=True)
    endings = tuple(suffix.lower() for suffix in suffixes)
    names = [Path(entry["name"]).name for entry in entries if entry["type"] == "file"]
    return [join(resolved, name) for name in sorted(names) if not endings or name.lower().endswith(endings)]


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
    """All files below a folder, at most `depth` levels deep, in one listing; none when the folder is not there."""
    with translated_errors("list", uri):
        fs, path = filesystem(uri)
        fs.invalidate_cache()
        entries = retry(lambda: fs.find(path, maxdepth=depth, detail=True))
    found = [FileInfo(name.removeprefix(path).strip("/"), e["size"], _modified(e)) for name, e in entries.items()]
    return [file for file in found if file.name]


@contextlib.contextmanager
def local_copy(uri: str) -> Iterator[Path]:
    """The files directly in a folder, locally: the folder itself, or a copy for the length of the block, each file as
    long as the listing says. One that is not there is a UserError."""
    if is_local(uri):
        yield Path(resolve(uri))
        return
    found = find_files(uri, depth=1)
    if not found:
        raise UserError(f"cannot copy {uri}: it does not exist; check the path")
    with tempfile.TemporaryDirectory(prefix="crowdray-copy-") as folder:
        for file in found:
            with translated_errors("copy", join(uri, file.name)), (Path(folder) / file.name).open("wb") as copy:
                for start in range(0, file.size, _PART):
                    part = (start, min(start + _PART, file.size))
                    copy.writelines(read_ranges(join(uri, file.name), [part]))
        yield Path(folder)


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
            elif _creates_once(fs, path):
                retry(lambda: fs.pipe_file(path, data, mode="create"))
            else:
                raise ExclusiveCreateUnsupportedError(
                    f"cannot create {uri}: its store ignores `If-None-Match: *`, so two could both believe to be "
                    "first; use a store that keeps it, as AWS S3 does, or a folder that all nodes reach"
                )
        except OSError:
            # Object stores say "taken" in several ways, and a put that was sent twice is refused though it is ours.
            if (there := read_bytes_or_none(uri)) is None:
                raise
            return there == data
    return True


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file so that it is either whole or not there: a rename locally, one put remotely."""
    with translated_errors("write", uri):
        fs, path = filesystem(uri)
        if not is_local(uri):
            retry(lambda: fs.pipe_file(path, data))
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial_sibling(target)
        try:
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


def publish_file(local: Path, uri: str) -> None:
    """Move a finished local file to its URI, where it appears whole: by one rename or one put."""
    with translated_errors("write", uri):
        fs, path = filesystem(uri)
        if not is_local(uri):
            retry(lambda: fs.put_file(str(local), path))
            local.unlink()
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial_sibling(target)
        try:
            shutil.move(local, partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def staging_file(uri: str) -> Iterator[Path]:
    """A local file name to write before publish_file publishes it at the URI: beside a local target, else in temp.

    Whatever is left there at the end is removed, and a full disk becomes a UserError that names the URI.
    """
    with translated_errors("write", uri):
        target = Path(resolve(uri)) if is_local(uri) else Path(tempfile.gettempdir()) / Path(uri).name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = _partial_sibling(target)
        try:
            yield partial
        finally:
            partial.unlink(missing_ok=True)


def remove(uri: str) -> None:
    """Remove one file; one that is gone already is no error."""
    with translated_errors("remove", uri), contextlib.suppress(FileNotFoundError):
        fs, path = filesystem(uri)
        retry(lambda: fs.rm_file(path))


def publish_directory(local: Path, uri: str, last: str) -> None:
    """Publish every file of a local folder at a URI, the file named `last` last: it stands for the whole.

    Locally the folder is copied to a hidden sibling that is then renamed once. A place that is taken already
    is a UserError, and an attempt that fails takes back what it had uploaded.
    """
    files = sorted(path for path in local.rglob("*") if path.is_file())
    names = [path.relative_to(local).as_posix() for path in files]
    if last not in names:
        raise UserError(f"{local} holds no {last}, the file that is published last; found {names[:5]}")
    if exists(join(uri, last)):
        raise UserError(f"{uri} already holds {last}; choose another place, or remove that folder first")
    with translated_errors("publish", uri):
        if is_local(uri):
            _publish_locally(local, Path(resolve(uri)))
        else:
            _publish_remotely(local, uri, sorted(names, key=lambda name: name == last))


def unpublish_directory(uri: str, last: str) -> None:
    """Take back what publish_directory published: at once locally, elsewhere `last` first; if gone, no error."""
    with translated_errors("remove", uri):
        fs, path = filesystem(uri)
        if is_local(uri):
            partial = _partial_sibling(Path(path))
            with contextlib.suppress(FileNotFoundError):
                Path(path).replace(partial)
            shutil.rmtree(partial, ignore_errors=True)
            return
        fs.invalidate_cache()
        for name in sorted(fs.find(path), key=lambda name: name != join(path, last)):
            with contextlib.suppress(FileNotFoundError):
                fs.rm_file(name)


def _partial_sibling(target: Path) -> Path:
    return target.with_name(f"{PARTIAL}{uuid.uuid4().hex[:12]}-{target.name}")


def _create_locally(target: Path, data: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("xb") as file:  # LocalFileSystem.pipe_file looks first and then writes
        try:
            file.write(data)
            file.flush()  # a full disk shows here
        except OSError:
            target.unlink()
            raise


def _creates_once(fs: fsspec.AbstractFileSystem, path: str) -> bool:
    """Whether a store refuses to create what is there; tried once per bucket and process, on a file of its own."""
    root = f"{fs.protocol}{path.lstrip('/').split('/')[0]}"
    if root not in _exclusive:
        probe = f"{path.rpartition('/')[0]}/{PARTIAL}{uuid.uuid4().hex}"
        fs.pipe_file(probe, b"first", mode="create")
        try:
            fs.pipe_file(probe, b"second", mode="create")
            _exclusive[root] = False
        except OSError:
            _exclusive[root] = retry(lambda: fs.cat_file(probe)) == b"first"
        finally:
            fs.rm_file(probe)
    return _exclusive[root]


def _modified(entry: Mapping[str, Any]) -> float:
    """When a listed file was written: each file system has its own name and type for it."""
    times = (entry.get(name) for name in ("mtime", "LastModified", "last_modified", "updated", "created"))
    time = next((value for value in times if value is not None), 0.0)
    if isinstance(time, str):
        time = datetime.fromisoformat(time)
    return time.timestamp() if isinstance(time, datetime) else float(time)


def _publish_locally(local: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = _partial_sibling(target)
    try:
        shutil.copytree(local, partial)
        partial.replace(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _publish_remotely(local: Path, uri: str, names: Sequence[str]) -> None:
    fs, root = filesystem(uri)
    done: list[str] = []
    try:
        for name in names:
            done.append(join(root, name))
            retry(functools.partial(fs.put_file, str(local / name), done[-1]))
    except BaseException:
        for path in done:
            with contextlib.suppress(Exception):
                fs.rm_file(path)
        raise
